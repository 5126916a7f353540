"""A policy all of whose weights train: its reference stays, and its files are a model of transformers."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bon_algos.logprobs import sequence_logprobs
from tests.worker import drawn, world
from tests.worker.stub_engine import save_tokenizer
from tests.worker.test_models import GROUPS, moved, same
from worker.durable import sha256_file
from worker.full_weights import open_full_policy
from worker.job_process import read_tokenizer
from worker.own_draws import own_draws


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base_directory(request, tmp_path):
    """With a head of its own, or with the embeddings as its head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=request.param, **sizes)).save_pretrained(
        tmp_path / "base"
    )
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    return tmp_path / "base"


def opened(directory):
    cpu = torch.device("cpu")
    return open_full_policy(directory, device=cpu, precision=None, gradient_checkpointing=False)


def test_the_exported_model_says_what_the_trainer_says(base_directory, tmp_path):
    policy = moved(opened(base_directory))
    policy.save(tmp_path / "model", base_directory)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        own, theirs = policy.logprobs(GROUPS), sequence_logprobs(exported, GROUPS)
    for own_N, theirs_N in zip(own, theirs, strict=True):
        torch.testing.assert_close(own_N, theirs_N, rtol=0, atol=1e-5)
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"


def test_the_reference_stays_the_base_bit_for_bit(base_directory):
    policy = moved(opened(base_directory))
    with torch.no_grad():
        base = sequence_logprobs(LlamaForCausalLM.from_pretrained(base_directory).eval(), GROUPS)
        assert same(policy.reference_logprobs(GROUPS), base)
        assert not same(policy.logprobs(GROUPS), base)
        policy.interpolate(0.0)
        assert same(policy.logprobs(GROUPS), base)


def test_the_same_weights_are_the_same_bytes(base_directory, tmp_path):
    for name in ("one", "two"):
        moved(opened(base_directory)).save(tmp_path / name, base_directory)
    digests = [{path.name: sha256_file(path) for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert digests[0] == digests[1]


# --- its own draws ---------------------------------------------------------------------------------------

DRAWS = 2000


def prompt(ids, max_tokens=1, stop=()):
    return drawn.pool(0).model_copy(update={"prompt_ids": ids, "max_tokens": max_tokens, "stop": stop})


def draws_of(policy, pools, directory, n=DRAWS):
    save_tokenizer(directory)
    return own_draws(policy, pools, n, read_tokenizer(directory), seed=0, check=lambda: None)


def test_it_draws_from_its_own_law_whatever_stands_beside_a_prompt(base_directory, tmp_path):
    """Prompts of different lengths, the shorter one padded; the first token's law is known. The base's generation
    settings, which would cut the law, do not count."""
    policy = moved(opened(base_directory))
    policy.model.generation_config.update(top_k=2, temperature=0.1)
    pools = [prompt((0, 5)), prompt((0, 7, 3, 9, 4))]
    for pool, own in zip(pools, draws_of(policy, pools, tmp_path / "t"), strict=True):
        with torch.no_grad():
            law = policy.model(torch.tensor([pool.prompt_ids])).logits[0, -1].double().softmax(-1).numpy()
        seen = np.bincount([one.token_ids[0] for one in own], minlength=len(law))
        assert chisquare(seen, law / law.sum() * DRAWS).pvalue > 1e-3
        assert own[0].logprobs == pytest.approx([np.log(law[own[0].token_ids[0]])], abs=1e-4)


def test_a_draw_ends_at_the_end_of_the_sequence_at_a_stop_string_or_at_its_length(base_directory, tmp_path):
    policy = opened(base_directory)
    policy.model.config.eos_token_id = world.END
    (own,) = draws_of(policy, [prompt((0, 5), max_tokens=6, stop=("w7", "w9"))], tmp_path / "t", n=200)
    for one in own:
        is_stopped = one.token_ids[-1] in (7, 9, world.END)
        assert {7, 9, world.END}.isdisjoint(one.token_ids[:-1])
        assert one.finish_reason == ("stop" if is_stopped else "length")
        assert len(one.token_ids) == 6 or is_stopped
        assert len(one.text.split()) == len(one.token_ids) - is_stopped
    assert {one.token_ids[-1] for one in own} >= {7, 9, world.END}
