"""`bonsai distill` against a real gateway: what is asked for happens, and what is refused is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
import redis as blocking_redis
from click.testing import CliRunner, Result

from bon_algos.contracts import job_key
from bonsai.cli import main
from tests.fixtures.gateway import World, engine, reward, store, world
from tests.service.records import STUDENT, policy, report
from worker.lease import Lease, claim

__all__ = ["engine", "reward", "store", "world"]
SPEC = json.dumps({"n": 2, "method": {"type": "bon_sft", "bon_sft": {"n": 2, "steps": 3}}})
Ask = Callable[..., Result]


@pytest.fixture
def ask(world: World, store: blocking_redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Ask:
    host, port = world.client.address
    monkeypatch.setenv("BONSAI_API_KEY", str(world.client.key))
    return lambda *said, **more: CliRunner().invoke(main, ["distill", "--url", f"http://{host}:{port}", *said], **more)


@pytest.fixture
def job_id(ask: Ask) -> str:
    return ask("submit", "-", input=SPEC).output.split()[0]


def test_a_job_is_submitted_listed_paused_resumed_and_cancelled(ask: Ask, job_id: str):
    other = ask("submit", "-", input=SPEC).output.split()[0]
    assert [line.split()[0] for line in ask("list").output.splitlines()] == [other, job_id]
    assert ask("list", "--after", other).output.split()[:2] == [job_id, "queued"]
    for wish, state in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        assert ask(wish, job_id).output.split()[:2] == [job_id, state]
    assert json.loads(ask("show", job_id).output)["status"] == "cancelled"


def test_what_a_running_job_was_asked_for_is_shown(ask: Ask, store: blocking_redis.Redis, job_id: str):
    store.hset(job_key(job_id), mapping={"state": "running", "step": 1})
    assert "to pause" in ask("pause", job_id).output


def test_events_are_followed_to_the_end(ask: Ask, store: blocking_redis.Redis, job_id: str):
    def work() -> None:
        own = claim(store, job_id, lease_seconds=60, worker="here:1")
        assert not isinstance(own, str)
        lease = Lease(store, job_id, own, lease_seconds=60, heartbeat_seconds=60)
        lease.progress("training", 3, 3, {"loss": 0.5}, None)
        lease.finish_succeeded(policy(STUDENT), report().model_dump_json())

    worker = Thread(target=work)
    worker.start()
    followed = ask("events", job_id)
    worker.join()
    said = [line.split("  ", 2)[2].strip() for line in followed.output.splitlines()]
    assert said == ["The job is queued.", "Attempt 1 has begun.", "Step 3 is done.", "The job has succeeded."]
    assert ask("events", job_id).output == followed.output


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (("show", "job_" + "0" * 32), "no such job (404 job_not_found)"),
        (("resume", "JOB"), "only a paused job is resumed (409 not_paused)"),
        (("--url", "http://127.0.0.1:9", "list"), "failed GET /distill"),
    ],
)
def test_a_refusal_is_said_with_status_1(ask: Ask, job_id: str, said: tuple[str, ...], reason: str):
    result = ask(*(job_id if word == "JOB" else word for word in said))
    assert result.exit_code == 1
    assert reason in result.output


def test_a_spec_that_is_none_is_not_sent(ask: Ask):
    result = ask("submit", "-", input='{"method": {"type": "ppo"}}')
    assert result.exit_code == 2
    assert "method.type" in result.output


def test_without_a_key_it_says_where_it_looked_for_one(tmp_path: Path) -> None:
    shown = CliRunner().invoke(main, ["distill", "--dir", str(tmp_path), "list"], env={"BONSAI_API_KEY": ""})
    assert shown.exit_code == 1
    assert "admin.key" in shown.output
