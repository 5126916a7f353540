"""Log-probs of completions against plain transformers: all logits, one row at a time, no padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bon_algos.logprobs import SHARING_FAMILIES, TokenGroup, sequence_logprobs, sharing_pays, token_logprobs

VOCABULARY = 53
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
GROUPS = [
    TokenGroup([1, 7, 3], [[4, 5, 2], [6, 7, 8, 9, 10, 2], [2]]),
    TokenGroup([11], [[12, 13], [14, 2]]),
    TokenGroup([20, 21, 22, 23, 24, 25, 26, 27], [[30, 31, 2]]),
]


def random_model(model_class: Any, config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return model_class(config).eval()


def llama() -> Any:
    return random_model(LlamaForCausalLM, LlamaConfig(**SIZES, initializer_range=0.3), seed=0)


def qwen3() -> Any:
    config = Qwen3Config(**SIZES, initializer_range=0.3, tie_word_embeddings=True)
    return random_model(Qwen3ForCausalLM, config, seed=1)


def qwen2() -> Any:
    return random_model(Qwen2ForCausalLM, Qwen2Config(**SIZES, initializer_range=0.3), seed=2)


def mistral(window: int | None = None) -> Any:
    config = MistralConfig(**SIZES, initializer_range=0.3, sliding_window=window)
    return random_model(MistralForCausalLM, config, seed=3)


def gemma3(window: int = 32) -> Any:
    config = Gemma3TextConfig(**SIZES, initializer_range=0.3, sliding_window=window, query_pre_attn_scalar=10)
    return random_model(Gemma3ForCausalLM, config, seed=4)


FAMILIES = (llama, qwen3, qwen2, mistral, gemma3)
MODELS = pytest.mark.parametrize("build", FAMILIES)


BY_THEMSELVES = [TokenGroup(prompt, [completion]) for prompt, completions in GROUPS for completion in completions]
"""The same completions, sharing nothing: they stand in rows of their own."""


def by_transformers(model, groups) -> list[list[torch.Tensor]]:
    """The oracle: for each completion (L,), from the full logits of its row alone."""
    found = []
    for prompt_ids, completions in groups:
        rows = []
        for completion in completions:
            token_1L = torch.tensor([[*prompt_ids, *completion]])
            logprob_LV = model(input_ids=token_1L).logits[0].log_softmax(-1)
            predicted = logprob_LV[len(prompt_ids) - 1 : -1]
            rows.append(predicted.gather(-1, torch.tensor(completion)[:, None])[:, 0])
        found.append(rows)
    return found


@MODELS
@torch.no_grad()
def test_log_probs_are_those_of_plain_transformers(build):
    model = build()
    expected = by_transformers(model, GROUPS)
    assert sharing_pays(model.config, GROUPS)
    for group, expected_group in zip(token_logprobs(model, GROUPS), expected, strict=True):
        for actual_L, expected_L in zip(group, expected_group, strict=True):
            torch.testing.assert_close(actual_L, expected_L, atol=1e-5, rtol=0)
    for actual_N, expected_group in zip(sequence_logprobs(model, GROUPS), expected, strict=True):
        expected_N = torch.stack([row.sum() for row in expected_group])
        assert actual_N.dtype == torch.float32
        torch.testing.assert_close(actual_N, expected_N, atol=1e-5, rtol=0)


def gradients_of(model, logprob_by_group) -> dict[str, torch.Tensor]:
    """Each completion has a coefficient of its own, as a loss gives it."""
    model.zero_grad()
    torch.autograd.backward(torch.cat(logprob_by_group) @ torch.linspace(-1, 2, 6, dtype=torch.float64))
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@MODELS
@pytest.mark.parametrize("batch_chunk_size", [1, 5, 256])
def test_gradients_are_those_of_plain_transformers(build, batch_chunk_size):
    """In float64; but normalisation layers round to float32, each row's gradients by themselves."""
    model = build().double()
    rows = [torch.stack([row.sum() for row in group]) for group in by_transformers(model, GROUPS)]
    expected = gradients_of(model, rows)
    assert sharing_pays(model.config, GROUPS)
    shared = gradients_of(model, sequence_logprobs(model, GROUPS, batch_chunk_size=batch_chunk_size))
    for name, gradient in expected.items():
        torch.testing.assert_close(shared[name], gradient, atol=1e-5, rtol=1e-5, msg=name)
    assert not any(sharing_pays(model.config, [group]) for group in BY_THEMSELVES)
    rows = [sequence_logprobs(model, [group], batch_chunk_size=batch_chunk_size)[0] for group in BY_THEMSELVES]
    alone = gradients_of(model, rows)
    for name, gradient in expected.items():
        # Gemma's normalisation of queries and keys rounds sums over a row's padding, too.
        atol = 1e-6 if build is gemma3 else 1e-12
        torch.testing.assert_close(alone[name], gradient, atol=atol, rtol=1e-10, msg=name)


def test_every_family_that_shares_prompts_is_seen_here():
    assert sorted(build().config.model_type for build in FAMILIES) == sorted(SHARING_FAMILIES)


@pytest.mark.parametrize("build", [mistral, gemma3])
@pytest.mark.parametrize("window", [1, 2, 4, 9])
def test_attention_windows_are_kept(build, window):
    """Shorter than a completion, than a prompt, and than neither; each with its gradients."""
    model = build(window=window).double()
    rows = [torch.stack([row.sum() for row in group]) for group in by_transformers(model, GROUPS)]
    expected = gradients_of(model, rows)
    assert sharing_pays(model.config, GROUPS)
    shared_rows = sequence_logprobs(model, GROUPS)
    torch.testing.assert_close(torch.cat(shared_rows), torch.cat(rows), atol=1e-5, rtol=0)
    shared = gradients_of(model, shared_rows)
    for name, gradient in expected.items():
        torch.testing.assert_close(shared[name], gradient, atol=1e-5, rtol=1e-5, msg=name)
    wide = torch.cat(sequence_logprobs(build(window=32).double(), GROUPS))
    assert (torch.cat(rows) - wide).abs().max() > 1e-3


@MODELS
@torch.no_grad()
def test_a_model_that_has_shared_prompts_answers_anything_else_as_before(build):
    """Its attention stays installed: padding on the left, a cache and packed sequences must still mean the same."""
    model, other = build(), build()
    sequence_logprobs(model, GROUPS)
    token_RL = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    mask_RL = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for context in (
        {"attention_mask": mask_RL},
        {"position_ids": torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])},
        {},
    ):
        assert torch.equal(model(input_ids=token_RL, **context).logits, other(input_ids=token_RL, **context).logits)
    sampled = [
        one.generate(token_RL, attention_mask=mask_RL, max_new_tokens=4, do_sample=False, pad_token_id=0)
        for one in (model, other)
    ]
    assert torch.equal(*sampled)


@MODELS
def test_checkpointing_changes_nothing(build):
    """Whatever recomputes a layer finds the same attention."""
    model = build().double()
    expected = gradients_of(model, sequence_logprobs(model, GROUPS))
    model.gradient_checkpointing_enable()
    model.train()
    recomputed = gradients_of(model, sequence_logprobs(model, GROUPS))
    for name, gradient in expected.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


@pytest.mark.parametrize(
    ("group", "pays"),
    [
        (TokenGroup([1] * 64, [[2] * 16] * 4), True),  # the prompt is most of a row
        (TokenGroup([1] * 16, [[2] * 64]), False),  # nothing is shared
        (TokenGroup([1], [[2] * 400] * 16), False),  # hardly anything is
        (TokenGroup([1], [[2] * 400, [2] * 4]), True),  # half of the rows would be padding
    ],
)
def test_prompts_are_shared_where_that_is_cheaper(group, pays):
    assert sharing_pays(llama().config, [group]) is pays


@torch.no_grad()
def test_a_family_that_is_not_known_to_share_stands_in_rows():
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = random_model(GPTNeoXForCausalLM, config, seed=0)
    assert not sharing_pays(model.config, GROUPS)
    expected = torch.cat([torch.stack([row.sum() for row in rows]) for rows in by_transformers(model, GROUPS)])
    torch.testing.assert_close(torch.cat(sequence_logprobs(model, GROUPS)), expected, atol=1e-5, rtol=0)


token_ids = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9)
groups = st.lists(st.builds(TokenGroup, token_ids, st.lists(token_ids, min_size=1, max_size=3)), min_size=1, max_size=3)


@given(groups)
@settings(deadline=None, max_examples=15)
@torch.no_grad()
def test_padding_and_neighbours_never_matter(batch):
    model = QWEN3_DOUBLE
    together = sequence_logprobs(model, batch)
    for group, together_N in zip(batch, together, strict=True):
        alone = [sequence_logprobs(model, [TokenGroup(group.prompt_ids, [c])])[0] for c in group.completion_ids]
        torch.testing.assert_close(together_N, torch.cat(alone), atol=1e-6, rtol=0)


QWEN3_DOUBLE = qwen3().double()


@torch.no_grad()
def test_all_completions_of_a_length_are_a_law():
    """The probabilities of all 53² two-token completions sum to one: temperature 1, nothing masked."""
    pairs = [[first, second] for first in range(VOCABULARY) for second in range(VOCABULARY)]
    (logprob_N,) = sequence_logprobs(llama(), [TokenGroup([5, 6], pairs)])
    assert logprob_N.double().exp().sum().item() == pytest.approx(1, abs=1e-5)


class LargestVocabularyTensor(TorchDispatchMode):
    """Remembers how many rows the largest tensor over the vocabulary had."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return result


def test_the_vocabulary_is_met_a_chunk_at_a_time_and_never_by_the_prompt():
    """40 prompt tokens, 3 × 10 completion tokens, 4 at once: never more rows than the head itself has (24)."""
    model, group = llama(), TokenGroup(list(range(40)), [list(range(k, k + 10)) for k in (0, 10, 20)])
    with LargestVocabularyTensor() as plain:
        model(input_ids=torch.tensor([[*group.prompt_ids, *group.completion_ids[0]]]))
    assert plain.rows == 50  # the watch sees full logits where there are any
    with LargestVocabularyTensor() as seen:
        torch.autograd.backward(sequence_logprobs(model, [group], batch_chunk_size=4)[0].sum())
    assert seen.rows <= SIZES["hidden_size"]


@pytest.mark.parametrize("layers", ["all-linear", ["q_proj", "lm_head"]])
@torch.no_grad()
def test_the_reference_is_the_policy_with_its_adapter_off(layers):
    model = llama()
    expected = sequence_logprobs(model, GROUPS)
    policy = get_peft_model(model, LoraConfig(r=4, target_modules=layers))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.3)
    adapted = sequence_logprobs(policy, GROUPS)
    for actual_N, expected_rows in zip(adapted, by_transformers(policy, GROUPS), strict=True):
        torch.testing.assert_close(actual_N, torch.stack([row.sum() for row in expected_rows]), atol=2e-5, rtol=0)
    with policy.disable_adapter():
        reference = sequence_logprobs(policy, GROUPS)
    for actual_N, expected_N, adapted_N in zip(reference, expected, adapted, strict=True):
        assert torch.equal(actual_N, expected_N)
        assert not torch.equal(actual_N, adapted_N)


def test_gradients_of_the_heads_adapter_are_those_of_all_logits():
    policy = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    ours = torch.stack([logprob_N.sum() for logprob_N in sequence_logprobs(policy, GROUPS, batch_chunk_size=2)]).sum()
    theirs = torch.stack([row.sum() for rows in by_transformers(policy, GROUPS) for row in rows]).sum()
    pairs = zip(torch.autograd.grad(ours, trained), torch.autograd.grad(theirs, trained), strict=True)
    for own, other in pairs:
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)


def test_half_precision_weights_are_summed_in_float32():
    (logprob_N,) = sequence_logprobs(llama().bfloat16(), GROUPS[:1])
    assert logprob_N.dtype == torch.float32


@torch.no_grad()
def test_an_empty_completion_is_certain():
    (logprob_N,) = sequence_logprobs(llama(), [TokenGroup([1, 2], [[], [3]])])
    assert logprob_N[0].item() == 0


@pytest.mark.parametrize("group", [TokenGroup([], [[1]]), TokenGroup([1], [])])
def test_a_group_without_prompt_or_completion_is_refused(group):
    with pytest.raises(ValueError, match="at least one"):
        sequence_logprobs(llama(), [group])


def test_a_head_that_is_more_than_a_linear_map_is_refused():
    dropped = get_peft_model(llama(), LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.1))
    weighted = get_peft_model(llama(), LoraConfig(r=2, target_modules=["lm_head"], use_dora=True))
    for policy in (dropped, weighted):
        with pytest.raises(ValueError, match="one plain LoRA"):
            sequence_logprobs(policy, GROUPS)
    capped = random_model(Gemma2ForCausalLM, Gemma2Config(**SIZES, final_logit_softcapping=30.0), seed=0)
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        sequence_logprobs(capped, GROUPS)
