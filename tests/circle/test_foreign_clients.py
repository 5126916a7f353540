"""Clients that people already have, unmodified, each in an environment of its own, against a real stack.

OpenAI's own client is in test_openai_clients.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bonsai.demo.prompts import held_out_prompts
from tests.fixtures.clients import client_python
from tests.fixtures.real_stack import RealStack

pytestmark = pytest.mark.stack

CLIENTS = Path(__file__).parent / "clients"
LOAD_GENERATOR = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
    "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)


def output_of(stack: RealStack, python: Path | str, *arguments: str) -> str:
    own = {"OPENAI_BASE_URL": f"{stack.stack.url}/v1", "OPENAI_API_KEY": stack.stack.api_key, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(python), *arguments], capture_output=True, text=True, env={**os.environ, **own})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_langchain_chats_calls_tools_and_reads_prescribed_answers(foreign):
    seen = json.loads(output_of(foreign, client_python("langchain"), str(CLIENTS / "chat_of_langchain.py")))
    assert seen["policy"] == foreign.base_policy
    assert 1 <= seen["tokens"] <= 100
    assert seen["call"][0] == "weather"
    assert isinstance(seen["call"][1]["rain"], bool)
    assert seen["after_the_call"] in ("stop", "length")
    assert seen["forecast"] == "bool"
    assert seen["streamed"][0] >= 1
    assert seen["batch"] == 3


@pytest.mark.parametrize(
    "tokenizer", ["tokenizer_backend=huggingface,tokenizer={model}", "tokenizer_backend=None,tokenized_requests=False"]
)
def test_lm_eval_runs_a_generating_task(stack, tmp_path, tokenizer):
    """With its own tokenizer it sends token ids, without one text."""
    rows = [{"question": f"Review number {i}. The food", "answer": "was"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "reviews",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 16, "do_sample": True, "temperature": 1.0},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "reviews.yaml").write_text(json.dumps(task))  # JSON is YAML
    model = f"model=default,base_url={stack.stack.url}/v1/completions,max_length=128,"
    output_of(
        stack, client_python("lm_eval"), "-m", "lm_eval", "--model", "local-completions",
        "--model_args", model + tokenizer.format(model=stack.stack.plan.policy.path), "--include_path", str(tmp_path),
        "--tasks", "reviews", "--log_samples", "--output_path", str(tmp_path / "out"),
    )  # fmt: skip
    [samples] = (tmp_path / "out").rglob("samples_*.jsonl")
    said = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    assert len(said) == len(rows)
    texts = {candidate.text for group in stack.groups() for candidate in group.candidates}
    assert set(said) <= texts


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_vllms_load_generator_fails_no_request(stack, tmp_path, endpoint):
    """Its reader of streams loses what follows a comment: the body says that it wants none."""
    rows = [{"prompt": prompt, "output_tokens": 16} for prompt in held_out_prompts()[:20]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    body = {"best_of": 4, "stream_options": {"include_usage": True, "bonsai_comments": False}}
    output_of(
        stack, sys.executable, "-W", "ignore", "-c", LOAD_GENERATOR,
        "--backend", "openai-chat" if "chat" in endpoint else "openai", "--endpoint", endpoint,
        "--base-url", stack.stack.url, "--model", "default", "--tokenizer", str(stack.stack.plan.policy.path),
        "--dataset-name", "custom", "--dataset-path", str(tmp_path / "rows.jsonl"), "--skip-chat-template",
        "--custom-output-len", "16", "--num-prompts", str(len(rows)), "--extra-body", json.dumps(body),
        "--save-result", "--result-dir", str(tmp_path), "--result-filename", "load.json",
    )  # fmt: skip
    result = json.loads((tmp_path / "load.json").read_text())
    assert (result["completed"], result["failed"]) == (20, 0)
    assert result["total_output_tokens"] > 0
