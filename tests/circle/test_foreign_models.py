"""Any model serves: another architecture, another tokenizer, random weights, nothing of the demo's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bon_algos.contracts import Candidate
from tests.circle.random_models import write_policy, write_reward_model
from tests.fixtures.real_stack import RealStack, real_stack

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def foreign() -> Iterator[RealStack]:
    """A stack of its own, since engines hold one model: Qwen3 with a byte-level tokenizer and ChatML."""
    with tempfile.TemporaryDirectory(prefix="bonsai-foreign-") as name:
        directory = Path(name)
        write_policy(directory / "policy")
        write_reward_model(directory / "reward")
        with real_stack(
            directory,
            policy=str(directory / "policy"),
            reward=str(directory / "reward"),
            environment={**os.environ, "BONSAI_RECONCILE_SECONDS": "1"},
        ) as running:
            yield running


def test_best_of_n_answers_prompts_and_conversations_in_any_script(foreign):
    for text in ("plain words", "Ünïcödé 中文 🎬"):
        reply = foreign.generate(text, n=4, max_tokens=12, return_candidates=True)
        assert reply["candidates"]["scored"] >= 1
        assert len(reply["choices"]) == 4
        raw = foreign.http.post("/generate?n=4", json={"prompt": text, "max_tokens": 12})
        assert raw.status_code == 200, raw.text


def test_a_distillation_goes_round_with_it(foreign):
    foreign.fill_ledger([f"word number {i}" for i in range(12)], 4)
    usable = [group for group in foreign.groups() if group.is_unbiased]
    assert isinstance(usable[0].candidates[0], Candidate)
    method = {"type": "bon_forward_kl", "bon_forward_kl": {"n": 4, "steps": 4, "prompts_per_step": 4, "lora_rank": 8}}
    job = foreign.finished(foreign.start_job(method, n=4, held_out_fraction=0.3))
    assert job["status"] == "succeeded", job["error"]
    assert foreign.served(job["policy"])["fingerprint"]["passed"]
