"""The policy in training on one copy of its base model: what it is at first, what its reference is, its files."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bon_algos.logprobs import TokenGroup, sequence_logprobs
from tests.worker import world
from worker.durable import sha256_file
from worker.models import adapted_layers, open_policy, parts_by_tokens, unwarned_of_tied_embeddings

GROUPS = [TokenGroup([0, 5, 7], [[3, 4, 1], [9, 1]]), TokenGroup([0, 6], [[8, 8, 8, 1]])]


def opened(directory, *, train_factor_a=True, seed=0):
    return open_policy(
        directory,
        world.BASE,
        rank=8,
        alpha=16.0,
        train_factor_a=train_factor_a,
        seed=seed,
        device=torch.device("cpu"),
    )


def moved(policy, seed=1):
    """Somewhere else than its reference, in every factor that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return policy


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_it_begins_as_its_reference_and_the_reference_is_the_base_bit_for_bit(tiny_policy):
    policy = opened(tiny_policy)
    with torch.no_grad():
        base = sequence_logprobs(LlamaForCausalLM.from_pretrained(tiny_policy).eval(), GROUPS)
    assert same(policy.logprobs(GROUPS), base)
    moved(policy)
    assert same(policy.reference_logprobs(GROUPS), base)
    assert not same(policy.logprobs(GROUPS), base)


def test_asking_the_reference_between_forward_and_backward_changes_no_gradient(tiny_policy):
    def gradient(ask_between):
        policy = moved(opened(tiny_policy))
        loss = torch.stack([logprob_N.sum() for logprob_N in policy.logprobs(GROUPS)]).sum()
        if ask_between:
            policy.reference_logprobs(GROUPS)
        loss.backward()
        return [parameter.grad for parameter in policy.trained.values()]

    assert same(gradient(True), gradient(False))


def test_with_factor_a_frozen_only_b_trains(tiny_policy):
    names = opened(tiny_policy, train_factor_a=False).trained
    assert names
    assert all(".lora_B." in name for name in names)
    assert len(opened(tiny_policy).trained) == 2 * len(names)


def small(model_class, config_class, **changes):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = config_class(**{"vocab_size": 32, "num_key_value_heads": 1, **sizes, **changes})
    with torch.device("meta"):
        return model_class(config)


LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_every_linear_layer_has_an_adapter_and_the_head_where_the_engine_serves_one():
    assert set(adapted_layers(small(LlamaForCausalLM, LlamaConfig))) == {*LINEAR, "lm_head"}
    assert set(adapted_layers(small(Qwen3ForCausalLM, Qwen3Config, head_dim=8))) == {*LINEAR, "lm_head"}
    assert set(adapted_layers(small(MistralForCausalLM, MistralConfig))) == LINEAR
    assert set(adapted_layers(small(LlamaForCausalLM, LlamaConfig, vocab_size=258_049))) == LINEAR


def test_on_tied_embeddings_the_heads_adapter_leaves_the_input_side_alone(tiny_policy):
    policy = opened(tiny_policy)
    before = policy.model.get_input_embeddings().weight.clone()
    moved(policy)
    assert any("lm_head" in name for name in policy.trained)
    assert torch.equal(policy.model.get_input_embeddings().weight, before)


def test_peft_reads_the_saved_adapter_as_the_same_policy(tiny_policy, tmp_path):
    policy = moved(opened(tiny_policy))
    policy.save_adapter(tmp_path / "adapter")
    base = LlamaForCausalLM.from_pretrained(tiny_policy)
    with unwarned_of_tied_embeddings():
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert same(sequence_logprobs(loaded, GROUPS), policy.logprobs(GROUPS))


def test_an_adapter_from_before_the_head_had_one_is_the_same_policy(tiny_policy, tmp_path):
    policy = moved(opened(tiny_policy))
    old = {name: torch.zeros_like(p) if "lm_head" in name else p for name, p in policy.factors.items()}
    policy.load_factors(old)
    policy.save_adapter(tmp_path / "old")
    file = tmp_path / "old" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "lm_head" not in name}, file)
    taken_up = moved(opened(tiny_policy, seed=1), seed=2)
    taken_up.load_adapter(tmp_path / "old")
    with torch.no_grad():
        assert same(taken_up.logprobs(GROUPS), policy.logprobs(GROUPS))
    save_file({**load_file(file), "of.no.layer": torch.zeros(1)}, file)
    with pytest.raises(KeyError, match=r"of\.no\.layer"):
        taken_up.load_adapter(tmp_path / "old")


def test_the_same_factors_are_the_same_bytes(tiny_policy, tmp_path):
    """Two models, two directories: no path, order or time in the files, so their digest can be their name."""
    for name in ("one", "two"):
        moved(opened(tiny_policy)).save_adapter(tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert sha256_file(tmp_path / "one" / file) == sha256_file(tmp_path / "two" / file)
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["base_model_name_or_path"] == world.BASE


def test_the_anchors_factors_replace_the_policys_in_its_file(tiny_policy, tmp_path):
    policy = moved(opened(tiny_policy, train_factor_a=False))
    zeros = {name: torch.zeros_like(parameter) for name, parameter in policy.trained.items()}
    policy.save_adapter(tmp_path / "anchor", zeros)
    saved = load_file(tmp_path / "anchor" / "adapter_model.safetensors")
    assert all(not tensor.any() for name, tensor in saved.items() if "lora_B" in name)
    assert all(parameter.any() for parameter in policy.trained.values())


def test_parts_hold_every_group_once_within_their_tokens():
    groups = [TokenGroup([0] * 5, [[1] * length] * 3) for length in (1, 9, 2, 40, 3, 3)]
    parts = list(parts_by_tokens(groups, max_tokens=60))
    assert [group for part in parts for group in groups[part]] == groups
    for part in parts:
        longest = max(5 + len(group.completion_ids[0]) for group in groups[part])
        assert longest * 3 * len(groups[part]) <= 60 or len(groups[part]) == 1
