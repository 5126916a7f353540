"""A policy all of whose weights train: its reference stays, and its files are a model of transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bon_algos.logprobs import sequence_logprobs
from tests.worker.test_models import GROUPS, moved, same
from worker.durable import sha256_file
from worker.full_weights import open_full_policy


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
