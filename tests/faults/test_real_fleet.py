"""Two real engines behind one gateway, which is not the only gateway of the first: F9 with kill -9. The second was
given an exported policy at its start, as `vllm serve --lora-modules` is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from click.testing import CliRunner

from bon_algos.contracts import POLICIES_INDEX, Fingerprint, Manifest, policy_key
from bon_algos.logprobs import TokenGroup
from bonsai import guard
from bonsai.cli import main
from service.settings import GatewaySettings
from service.tokenizer_files import read_tokenizer
from tests.fixtures.gateway import Client, Reply, running_gateway
from tests.fixtures.real_stack import RealStack, wait_until
from tests.service.records import manifest
from worker.models import open_policy
from worker.publish import publish

pytestmark = pytest.mark.stack
PROMPTS = [f"{i} reviews of a film" for i in range(12)]
"""Some prefer each engine."""


class SecondEngine:
    """Started as the stack's own policy engine is, on another socket, and with nobody who starts it again."""

    def __init__(self, stack: RealStack, directory: Path, exported: Path) -> None:
        spec = stack.stack.process("policy").spec
        self.socket, self._log = directory / "second.sock", directory / "second.log"
        own_socket = [str(self.socket) if part == str(spec.socket) else part for part in spec.argv]
        self._argv = [*own_socket, "--lora-modules", f"exported={exported}"]
        # Each engine binds itself to the first core it may use, unless it is told another.
        self._environment = {**spec.environment, "VLLM_CPU_OMP_THREADS_BIND": str(max(os.sched_getaffinity(0)))}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        # Held open by the tests: should they die, the guard sees it close and kills the engine.
        lifeline, self._held = os.pipe()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, str(lifeline), "0", *self._argv],
                env=self._environment,
                cwd=self._log.parent,
                stdout=log,
                stderr=log,
                pass_fds=(lifeline,),
                start_new_session=True,
            )
        os.close(lifeline)

    def logprobs(self) -> dict[str, list[float]]:
        """Of one prompt's tokens, by the name of each model that the engine has."""
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)), base_url="http://engine") as engine:
            names = [row["id"] for row in engine.get("/v1/models").json()["data"]]
            asked = {"prompt": list(range(1, 9)), "max_tokens": 1, "prompt_logprobs": 0}
            told = {name: engine.post("/v1/completions", json={"model": name, **asked}).json() for name in names}
        return {
            name: [one["logprob"] for at in reply["choices"][0]["prompt_logprobs"][1:] for one in at.values()]
            for name, reply in told.items()
        }

    def kill(self) -> None:
        """kill -9 of the server, of what it started and of its guard."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            os.close(self._held)
            self._process = None


@contextmanager
def second_engine(stack: RealStack, directory: Path, exported: Path) -> Iterator[SecondEngine]:
    engine = SecondEngine(stack, directory, exported)
    engine.start()
    try:
        yield engine
    finally:
        engine.kill()


def settings(stack: RealStack, directory: Path, engines: Mapping[str, str]) -> GatewaySettings:
    """Those of the stack's own gateway, with one engine more."""
    (directory / "engines.json").write_text(json.dumps(engines))
    told: dict[str, Any] = {name.removeprefix("BONSAI_").lower(): it for name, it in stack.stack.environment.items()}
    own = {
        "policy_engine_urls": json.loads(told["policy_engine_urls"]),
        "policy_engines_file": directory / "engines.json",
        "admin_key_file": stack.stack.state.admin_key,
        "key_pepper_file": stack.stack.state.key_pepper,
        "spool": directory / "spool",
        "port": 0,
    }
    return GatewaySettings(**{**told, **own})


def publish_random_policy(stack: RealStack, directory: Path) -> str:
    """Registered as a worker does it, but nothing was trained: random factors, and what the trainer sees of them."""
    told = stack.stack.environment
    base, rank = told["BONSAI_BASE_POLICY_ID"], 8
    model = Path(told["BONSAI_POLICY_DIRECTORY"])
    policy = open_policy(model, base, rank=rank, alpha=16.0, train_factor_a=True, seed=0, device=torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    policy.load_factors({name: 0.1 * torch.randn(t.shape, generator=draw) for name, t in policy.factors.items()})
    policy.save_adapter(directory / "adapter")
    ids = torch.randint(0, read_tokenizer(model).vocabulary_size, (16, 24), generator=draw).tolist()
    groups = [TokenGroup(row[:8], [row[8:]]) for row in ids]
    own, reference = (policy.token_logprobs(groups, of=whose) for whose in ("policy", "base"))
    fingerprint = Fingerprint(
        prompt_token_ids=tuple(tuple(row[:8]) for row in ids),
        completion_token_ids=tuple(tuple(row[8:]) for row in ids),
        policy_logprobs=tuple(tuple(rows[0]) for rows in own),
        base_logprobs=tuple(tuple(rows[0]) for rows in reference),
    )

    def described(digest: str, files: dict[str, str]) -> Manifest:
        plain = manifest(f"pol-{digest[:16]}", files, digest)
        return plain.model_copy(update={"base_policy_id": base, "parent_policy_id": base, "lora_rank": rank})

    record = publish(Path(told["BONSAI_ARTEFACTS"]), directory / "adapter", fingerprint, described, lambda: None)
    stack.redis.hset(policy_key(record.id), mapping={"record": record.model_dump_json(), "version": 1})
    stack.redis.zadd(POLICIES_INDEX, {record.id: time.time()})
    return record.id


def rows(gateway: Client, policy: str) -> dict[str, dict[str, Any]]:
    """Of each engine what it says of the policy."""
    listed = gateway.get("/engines").json["data"]
    return {row["id"]: one for row in listed for one in row["adapters"] if one["policy"] == policy}


def ask(gateway: Client, policy: str, prompt: str) -> Reply:
    body = {"prompt": prompt, "max_tokens": 4}
    return gateway.post("/generate", body, {"x-bonsai-arm": f"{policy}:1"})


def test_an_engine_that_was_killed_is_loaded_and_proved_again_before_it_gets_requests(stack: RealStack, tmp_path: Path):
    policy, both = publish_random_policy(stack, tmp_path), {"policy-0", "second"}
    exported = tmp_path / "exported"
    done = CliRunner().invoke(main, ["policies", "export", policy, str(exported), "--dir", str(stack.stack.state.root)])
    assert done.exit_code == 0, done.output
    with (
        second_engine(stack, tmp_path, exported) as second,
        running_gateway(settings(stack, tmp_path, {"second": f"unix://{second.socket}"})) as gateway,
    ):

        def serving() -> set[str]:
            return {name for name, row in rows(gateway, policy).items() if row["served"]}

        def all_answered() -> bool:
            replies = [ask(gateway, policy, prompt) for prompt in PROMPTS]
            return all(reply.status == 200 and reply.json["policy"] == policy for reply in replies)

        wait_until(lambda: serving() == both, "both have proved the policy", seconds=120)
        assert all_answered()
        by_engine = second.logprobs()
        assert by_engine["exported"] == pytest.approx(by_engine[policy], abs=1e-4)
        assert by_engine["exported"] != pytest.approx(by_engine[stack.stack.environment["BONSAI_BASE_POLICY_ID"]])
        wait_until(lambda: rows(gateway, policy)["second"]["used_at"], "the second engine has had requests", seconds=5)

        second.kill()
        assert all_answered()
        killed_at = time.time()
        second.start()
        prompts = cycle(PROMPTS)
        while not (row := rows(gateway, policy)["second"])["served"] or row["proven_at"] < killed_at:
            assert row["used_at"] < killed_at, "it gave tokens of a policy that it had not proved in this life"
            assert ask(gateway, policy, next(prompts)).json["policy"] == policy
            assert time.time() < killed_at + 180
        assert serving() == both
        assert row["used_at"] < killed_at or row["used_at"] >= row["proven_at"]
        assert all_answered()
        assert rows(gateway, policy)["second"]["used_at"] > row["proven_at"]
