"""The control plane over HTTP: a policy's way to traffic and back, a job's way to a worker, and bad requests."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import redis as blocking_redis

from bon_algos.contracts import POLICIES_INDEX, Fingerprint, policy_key
from bon_algos.contracts.methods import METHOD_NAMES
from service.dispatch import waiting_list
from tests.fixtures.gateway import Reply, World, gateway_settings, running_gateway
from tests.fixtures.redis import RedisServer
from tests.fixtures.waiting import wait_until
from tests.service.bad_admin_input import ARMS, BAD, NO_JOB
from tests.service.published import write_policy
from tests.service.records import BASE, policy
from tests.stubs.engine import StubEngine
from tests.stubs.reward import StubReward
from tests.stubs.server import running

JOB = {"method": {"type": "bon_forward_kl", "bon_forward_kl": {"n": 4}}, "n": 4}


def send(world: World, method: str, path: str, body: object = None, **headers: str) -> Reply:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return world.client.request(method, path, content, {"Content-Type": "application/json", **headers})


def proven_candidate(world: World, root: Path, number: int = 1) -> str:
    """A policy as a worker registers it, whose trainer saw what the stub will answer: −0.5 nats everywhere. number:
    of another one, the higher the newer."""
    rows = ((number,) * 64,) * 5
    fingerprint = Fingerprint(
        prompt_token_ids=((1, 2),) * 5,
        completion_token_ids=rows,
        policy_logprobs=((world.engine.script.logprob,) * 64,) * 5,
        base_logprobs=((-1.5,) * 64,) * 5,
    )
    written = write_policy(root / "artefacts", {"fingerprint.json": fingerprint.model_dump_json().encode()})
    record = policy(written.policy_id, fingerprint=None, created_at=float(number), written=written, n_equivalent=16)
    with blocking_redis.Redis.from_url(world.redis_url) as client:
        client.hset(policy_key(record.id), mapping={"record": record.model_dump_json(), "version": 1})
        client.zadd(POLICIES_INDEX, {record.id: 1.0})
    wait_until(lambda: bool(world.client.get(f"/policies/{record.id}").json.get("served")))
    wait_until(lambda: bool(world.client.get(f"/policies/{record.id}").json["fingerprint"]))
    return record.id


def fill_ledger(world: World, count: int = 4) -> None:
    for i in range(count):
        assert world.client.post("/generate", {"prompt": f"p{i}", "n": 2}).status == 200
    world.groups(count)


@pytest.mark.slow
def test_a_policy_goes_live_answers_and_is_rolled_back(world: World, tmp_path: Path):
    assert world.client.post("/generate", {"prompt": "p", "n": 4}).json["arm"] == f"{BASE}:4"
    student = proven_candidate(world, tmp_path)
    refused = send(world, "POST", f"/policies/{student}/promote", {"route": "default"})
    assert (refused.status, refused.json["error"]["code"]) == (409, "override_reason_required")
    promoted = send(world, "POST", f"/policies/{student}/promote", {"override_reason": "by hand"})
    assert (promoted.status, promoted.json["live_policy"]) == (200, student)
    answer = world.client.post("/generate", {"prompt": "p", "n": 4}).json
    assert (answer["arm"], answer["arm_reason"]) == (f"{student}:1", "live")
    assert world.client.get(f"/policies/{student}").json["live_on"] == ["default"]
    again = send(world, "POST", f"/policies/{student}/promote", {"override_reason": "by hand"})
    assert (again.status, again.json["error"]["code"]) == (409, "already_live")
    back = send(world, "POST", "/routes/default/rollback")
    assert (back.status, back.json["live_policy"]) == (200, None)
    assert world.client.post("/generate", {"prompt": "p", "n": 4}).json["arm"] == f"{BASE}:4"
    assert send(world, "POST", "/routes/default/rollback").status == 409


@pytest.mark.slow
def test_an_engine_that_forgot_the_live_policy_is_answered_for_by_best_of_n(world: World, tmp_path: Path):
    """It restarts while the policy's files are out of reach, which fails nobody: they come back, and so does it."""
    student = proven_candidate(world, tmp_path)
    send(world, "POST", f"/policies/{student}/promote", {"override_reason": "by hand"})
    (tmp_path / "artefacts" / "policies").rename(tmp_path / "lost")
    world.engine.script.models.remove(student)
    wait_until(lambda: world.client.get(f"/policies/{student}").json["served"] is False)
    answer = world.client.post("/generate", {"prompt": "p", "n": 4}).json
    assert (answer["arm"], answer["arm_reason"]) == (f"{BASE}:4", "default")
    assert answer["warnings"]
    (tmp_path / "lost").rename(tmp_path / "artefacts" / "policies")
    wait_until(lambda: world.client.get(f"/policies/{student}").json["served"] is True, seconds=20)


@pytest.mark.slow
def test_an_experiment_counts_its_arms(world: World, tmp_path: Path):
    student = proven_candidate(world, tmp_path)
    arms = [{"policy": "base", "n": 4, "weight": 5000}, {"policy": student, "n": 1, "weight": 5000}]
    started = send(world, "PUT", "/experiments/default", {"arms": arms})
    assert started.status == 200
    assert [arm["arm"] for arm in started.json["arms"]] == [f"{BASE}:4", f"{student}:1"]
    units = [f"unit-{i}" for i in range(12)]
    met = [world.client.post("/generate", {"prompt": "p", "unit": unit, "n": 4}).json["arm"] for unit in units]
    world.client.post("/generate", {"prompt": "p"}, {"x-bonsai-arm": f"{student}:1"})

    def shown() -> list[dict[str, Any]]:
        arms_now: list[dict[str, Any]] = world.client.get("/experiments/default").json["arms"]
        return arms_now

    # The forced one was spooled last: with it all have arrived.
    wait_until(lambda: [sum(arm[what] for arm in shown()) for what in ("scored", "forced")] == [12, 1])
    assert [arm["exposures"] for arm in shown()] == [met.count(f"{BASE}:4"), met.count(f"{student}:1")]
    assert [arm["forced"] for arm in shown()] == [0, 1]
    assert [arm["answers"] for arm in shown()] == [arm["exposures"] for arm in shown()]
    stopped = world.client.request("DELETE", "/experiments/default")
    assert (stopped.status, stopped.json["status"]) == (200, "stopped")
    assert world.client.request("DELETE", "/experiments/default").status == 409


def test_a_job_is_recorded_dispatched_and_cancelled(world: World):
    empty = send(world, "POST", "/distill", JOB)
    assert (empty.status, empty.json["error"]["code"], empty.json["groups_found"]) == (422, "empty_ledger", 0)
    fill_ledger(world)
    accepted = send(world, "POST", "/distill", JOB, **{"Idempotency-Key": "once"})
    assert accepted.status == 202
    job_id = accepted.json["id"]
    assert accepted.headers["location"] == f"/v1/fine_tuning/jobs/{job_id}"
    with blocking_redis.Redis.from_url(world.redis_url) as client:
        queue = waiting_list("normal")
        wait_until(lambda: client.llen(queue) == 1)
        message = json.loads(client.lindex(queue, 0) or b"")
    assert json.loads(base64.b64decode(message["body"]))[0] == [job_id]
    replayed = send(world, "POST", "/distill", JOB, **{"Idempotency-Key": "once"})
    assert (replayed.status, replayed.headers["idempotent-replayed"], replayed.json["id"]) == (202, "true", job_id)
    other = send(world, "POST", "/distill", {**JOB, "seed": 1}, **{"Idempotency-Key": "once"})
    assert (other.status, other.json["error"]["code"]) == (422, "idempotency_conflict")
    assert [job["id"] for job in world.client.get("/distill?limit=5").json["data"]] == [job_id]
    assert send(world, "POST", f"/distill/{job_id}/cancel").json["status"] == "cancelled"
    assert send(world, "POST", f"/distill/{job_id}/cancel").json["error"]["code"] == "job_finished"
    events = world.client.get(f"/distill/{job_id}/events").json["data"]
    assert [event["data"]["status"] for event in events] == ["queued", "cancelled"]


def test_a_route_over_http(world: World):
    assert send(world, "PUT", "/routes/chat", {"default_n": 2}).status == 201
    assert send(world, "PUT", "/routes/chat", {"default_n": 3}).status == 200
    assert world.client.get("/routes/chat").json["default_n"] == 3
    assert [row["name"] for row in world.client.get("/routes").json["data"]] == ["chat", "default"]
    assert world.client.post("/generate", {"prompt": "p", "route": "chat"}).json["arm"] == f"{BASE}:3"
    assert world.client.request("DELETE", "/routes/chat").status == 204
    assert world.client.get("/routes/chat").status == 404


def test_bad_requests_name_what_is_wrong_and_change_nothing(world: World):
    with blocking_redis.Redis.from_url(world.redis_url) as client:
        wait_until(lambda: bool(client.exists("bonsai:route:default")))
        before = sorted(client.keys("*"))
        wrong = []
        for name, verb, path, body, status in BAD:
            content = b"" if body is None else body
            reply = send(world, verb, path.encode().decode("ascii", "replace").replace("�", "%EF"), content)
            if reply.status != status:
                wrong.append((name, verb, path[:80], status, reply.status, reply.body[:200]))
            elif status >= 400:
                assert reply.headers["content-type"] == "application/problem+json", name
                assert len(reply.body) <= 4096, name
                assert set(reply.json["error"]) == {"message", "type", "param", "code"}
                # All names in these bodies can be printed: another one would be the parser's, not the caller's.
                assert "unprintable" not in reply.json["error"]["message"], name
        assert wrong == []
        # The gateway's, which come when they come.
        own = ("reconciler", "circles:lease", "keys:used", "spools", "files:since")
        known = {*before, *(f"bonsai:{name}".encode() for name in own)}
        assert [key for key in sorted(client.keys("*")) if key not in known] == []


def test_an_unknown_method_is_named_by_its_field_and_told_every_method_there_is(world: World):
    reply = send(world, "POST", "/distill", {"method": {"type": "ppo"}})
    assert (reply.status, reply.json["error"]["param"]) == (422, "method.type")
    assert all(f"'{name}'" in reply.json["error"]["message"] for name in (*METHOD_NAMES, "interpolation"))


@pytest.mark.parametrize(
    ("method", "parameters", "told"),
    [
        ("bond", {"quantiles": "learned_law"}, "'harmonic_mid', 'harmonic', 'monte_carlo', 'mid_rank' or 'add_one'"),
        ("bon_regression", {"quantiles": "median"}, "'add_one', 'learned_law' or 'learned_head'"),
        ("vbon", {"quantiles": "learned_head"}, "'mid_rank' or 'add_one'"),
        ("vbon", {"quantiles": "mid_rank", "likelihood": "exact"}, "must be add_one for the exact likelihood"),
    ],
)
def test_an_estimator_that_a_method_cannot_take_is_refused_by_its_field(
    world: World, method: str, parameters: dict[str, str], told: str
):
    reply = send(world, "POST", "/distill", {"method": {"type": method, method: parameters}})
    assert (reply.status, reply.json["error"]["param"]) == (422, f"method.{method}.quantiles")
    assert told in reply.json["error"]["message"]


@pytest.mark.parametrize("header", ["", "x" * 256, "a b"])
def test_an_idempotency_key_that_is_none_is_400(world: World, header: str):
    assert send(world, "POST", "/distill", JOB, **{"Idempotency-Key": header}).status == 400


def test_without_redis_the_gateway_serves_and_refuses_changes(
    tmp_path: Path, engine: StubEngine, reward: StubReward, own_redis: RedisServer
):
    with running(engine.app()) as engine_url, running(reward.app()) as reward_url:
        settings = gateway_settings(tmp_path, engine_url, reward_url, own_redis.url)
        with running_gateway(settings) as client:
            world = World(client, engine, reward, own_redis.url)
            wait_until(lambda: client.get("/ready").status == 200)
            own_redis.kill()
            assert client.post("/generate", {"prompt": "p", "n": 2}).status == 200
            for verb, path, body in [
                ("POST", "/distill", JOB),
                ("PUT", "/routes/x", {}),
                ("PUT", "/experiments/default", {"arms": ARMS}),
                ("POST", f"/policies/{BASE}/promote", {"override_reason": "r"}),
                ("GET", f"/distill/{NO_JOB}", None),
            ]:
                refused = send(world, verb, path, body)
                assert (refused.status, refused.json["error"]["code"]) == (503, "store_unavailable")
                assert int(refused.headers["retry-after"]) >= 1
            assert client.get("/routes/default").status == 200
            assert client.get("/policies").status == 200
