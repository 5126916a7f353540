"""Adapters of other programs on real engines: one comes in and is proven, one goes out and is loaded unchanged."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bon_algos.logprobs import TokenGroup, token_logprobs
from bon_algos.vllm_protocol import forced_token_request, parse_forced_token
from bonsai.cli import main
from bonsai.stack_plan import SHIPPED_MODELS
from tests.fixtures.real_stack import RealStack
from worker.models import open_policy, unwarned_of_tied_embeddings

pytestmark = pytest.mark.stack
BASE = SHIPPED_MODELS / "policy"
PROMPT, COMPLETION = [3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5]


def bonsai(*arguments: str) -> str:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def imported(stack: RealStack, tmp_path_factory) -> str:
    """An adapter that somebody else made, imported and proven by the engine."""
    policy = open_policy(BASE, "elsewhere", rank=4, alpha=8, train_factor_a=True, seed=1, device=torch.device("cpu"))
    draw = torch.Generator().manual_seed(1)
    moved = {name: one + 0.02 * torch.randn(one.shape, generator=draw) for name, one in policy.factors.items()}
    policy.load_factors(moved)
    directory = tmp_path_factory.mktemp("elsewhere") / "adapter"
    policy.save_adapter(directory)
    told = bonsai("policies", "import", str(directory), "--n", "16", "--dir", str(stack.stack.state.root))
    return told.split()[0]


def test_somebody_elses_adapter_is_proven_and_answers(stack: RealStack, imported: str):
    found = stack.served(imported)
    assert found["fingerprint"]["passed"]
    assert (found["job"], found["report"], found["manifest"]["imported"]["n"]) == (None, None, 16)
    reply = stack.generate("hi", n=1, max_tokens=8, headers={"x-bonsai-arm": f"{imported}:1"})
    assert reply["policy"] == imported


def test_an_exported_policy_says_the_same_in_peft_and_in_vllm(stack: RealStack, imported: str, tmp_path: Path):
    out, merged = tmp_path / "out", tmp_path / "merged"
    bonsai("policies", "export", imported, str(out), "--dir", str(stack.stack.state.root))
    bonsai("policies", "export", imported, str(merged), "--merged", "--dir", str(stack.stack.state.root))
    with unwarned_of_tied_embeddings():
        worn = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), out)
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    by_peft, by_one_model, by_vllm = said(worn.eval()), said(whole.eval()), said_by_engine(stack, out)
    torch.testing.assert_close(by_one_model, by_peft, atol=1e-4, rtol=0)
    torch.testing.assert_close(by_vllm, by_peft, atol=1e-3, rtol=0)


def said(model) -> torch.Tensor:
    with torch.no_grad():
        [[logprob_L]] = token_logprobs(model, [TokenGroup(PROMPT, [COMPLETION])])
    return logprob_L


def said_by_engine(stack: RealStack, directory: Path) -> torch.Tensor:
    """The directory as the engine loads it, by the very call that `--lora-modules` makes at its start; an engine
    that was started with it is in tests/faults/test_real_fleet.py."""
    socket = stack.stack.process("policy").spec.socket
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://engine", timeout=60) as engine:
        loading = {"lora_name": "exported", "lora_path": str(directory)}
        assert engine.post("/v1/load_lora_adapter", json=loading).status_code == 200
        try:
            tokens = [*PROMPT, *COMPLETION]
            asked = [forced_token_request("exported", tokens[:i], tokens[i]) for i in range(len(PROMPT), len(tokens))]
            replies = [engine.post("/v1/completions", json=body).content for body in asked]
        finally:
            engine.post("/v1/unload_lora_adapter", json={"lora_name": "exported"})
    return torch.tensor([parse_forced_token(reply, token) for reply, token in zip(replies, COMPLETION, strict=True)])
