"""`bonsai rebuild`: Redis is lost, and the same policies answer again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis as blocking_redis
from click.testing import CliRunner, Result

from bon_algos.contracts import (
    AUDIT_STREAM,
    LEDGER_COUNTS,
    OPEN_JOBS,
    POLICIES_DELETED,
    POLICIES_INDEX,
    REGISTRY,
    TAGS,
    UNRECORDED_JOBS,
    PolicyRecord,
    job_key,
    jobs_index,
    policy_key,
    route_key,
)
from bon_algos.crash_points import CRASH_AT
from bonsai.cli import main
from bonsai.registry.auditing import verified_audit
from bonsai.registry.rebuild import RegistryInUse, missing_from, read_artefacts, restore
from service.artefacts import MANIFEST_FILE
from service.journal import FILE, read_journal
from tests.fixtures.gateway import World, engine, reward, world
from tests.fixtures.waiting import wait_until
from tests.service.published import write_full_policy, write_policy
from tests.service.records import BASE, job_spec, policy
from tests.service.test_registry_routes import is_proven, proven, send
from worker import attempts
from worker.job_record import keep
from worker.lease import claim

__all__ = ["engine", "reward", "world"]
ROOT = Path(__file__).parents[2]
DONE, RUNNING = "job_" + "d" * 32, "job_" + "e" * 32


@pytest.fixture
def store(world: World):
    with blocking_redis.Redis.from_url(world.redis_url, decode_responses=True) as client:
        yield client


def rebuild(world: World, root: Path, *more: str) -> Result:
    """The stack's directory is `root`, as the gateway's artefacts lie below it."""
    return CliRunner().invoke(main, ["rebuild", "--dir", str(root), "--redis-url", world.redis_url, *more])


def seen(world: World) -> dict[str, object]:
    """What people would miss."""
    rows = world.client.get("/policies").json["data"]
    route = world.client.get("/routes/default").json
    told = ("id", "state", "live_on", "canary_on", "tags", "version", "description")
    return {
        "policies": [{name: row[name] for name in told} for row in rows],
        "route": {name: route.get(name) for name in ("live_policy", "previous_policies", "canary", "strategy")},
        "tags": [row["policy"] for row in world.client.get("/tags").json["data"]],
        "jobs": [(row["id"], row["status"]) for row in world.client.get("/distill").json["data"]],
    }


def journalled(world: World, root: Path) -> None:
    """The journal is as the registry is."""

    def is_written() -> bool:
        journal = read_journal(root / "artefacts")
        versions = {row["id"]: row["version"] for row in world.client.get("/policies").json["data"]}
        if journal is None or not journal.tags:
            return False
        return {one.id: one.version for one in journal.policies} == versions

    wait_until(is_written)


def add_job(world: World, root: Path, job_id: str, state: str, created_at: float) -> None:
    fields = {"spec": job_spec().model_dump_json(), "tenant": "default", "created_at": str(created_at)}
    with blocking_redis.Redis.from_url(world.redis_url) as client:
        client.hset(job_key(job_id), mapping={**fields, "state": state, "epoch": "3", "lease_until": "99"})
        client.zadd(jobs_index(), {job_id: created_at})
        keep(client, root / "artefacts", job_id)


def a_life(world: World, root: Path) -> tuple[str, str]:
    """One policy live under a tag, one canary, one deleted; one job done, one at work."""
    first, second, third = (proven(world, root, number) for number in (1.0, 2.0, 3.0))
    assert send(world.client, "POST", f"/policies/{first}/promote", {"override_reason": "r"}).status == 200
    assert send(world.client, "POST", f"/policies/{second}/promote", {"stage": "canary", "share": 0.1}).status == 200
    assert send(world.client, "PUT", "/tags/prod", {"policy": first}).status == 201
    assert send(world.client, "PATCH", f"/policies/{second}", {"description": "mild"}).status == 200
    assert send(world.client, "DELETE", f"/policies/{third}").status == 204
    add_job(world, root, DONE, "succeeded", 1.0)
    add_job(world, root, RUNNING, "running", 2.0)
    journalled(world, root)
    return first, third


def test_registry_and_jobs_come_back_and_the_same_policy_answers(world: World, tmp_path: Path, store):
    live, deleted = a_life(world, tmp_path)
    before, name = seen(world), store.get(REGISTRY)
    store.flushall()
    wait_until(lambda: [row["id"] for row in world.client.get("/policies").json["data"]] == [BASE])
    assert world.client.post("/generate", {"prompt": "p", "n": 2}).json["arm"] == f"{BASE}:2"
    assert store.get(REGISTRY) not in (None, name)

    promised = rebuild(world, tmp_path, "--dry-run")
    assert (promised.exit_code, store.zcard(POLICIES_INDEX)) == (0, 1)
    assert "would restore 2 policies, 1 routes, 1 tags, 1 tombstones, 2 jobs" in promised.output
    done = rebuild(world, tmp_path)
    assert done.exit_code == 0, done.output

    wait_until(lambda: world.client.get(f"/policies/{live}").status == 200)
    wait_until(lambda: is_proven(world.client, live))
    after = seen(world)
    expected = {**before, "jobs": [(RUNNING, "queued"), (DONE, "succeeded")]}
    assert after == expected
    assert store.smembers(OPEN_JOBS) == {RUNNING}
    assert store.hget(job_key(RUNNING), "epoch") == "3"
    assert (store.get(REGISTRY), store.zrange(POLICIES_DELETED, 0, -1)) == (name, [deleted])
    answers = [world.client.post("/generate", {"prompt": "p", "unit": f"u{i}"}).json for i in range(8)]
    assert f"{live}:1" in {one["arm"] for one in answers}
    assert verified_audit(store).entries == 1

    again = rebuild(world, tmp_path)
    assert (again.exit_code, again.output) == (0, "nothing is missing\n")
    send(world.client, "PUT", "/tags/next", {"policy": live})
    journalled(world, tmp_path)
    wait_until(lambda: "next" in read_journal(tmp_path / "artefacts").tags)  # type: ignore[union-attr]


@pytest.mark.parametrize(("point", "is_there"), [("rebuild.asked", False), ("rebuild.written", True)])
def test_a_rebuild_that_is_killed_is_there_whole_or_not_at_all_and_may_be_made_again(
    point: str, is_there: bool, world: World, tmp_path: Path, store
):
    live, _ = a_life(world, tmp_path)
    store.flushall()
    command = [sys.executable, "-m", "bonsai", "rebuild", "--dir", str(tmp_path), "--redis-url", world.redis_url]
    assert subprocess.run(command, env={**os.environ, CRASH_AT: point}, cwd=ROOT).returncode == -9
    assert bool(store.exists(policy_key(live))) == is_there
    again = rebuild(world, tmp_path)
    assert again.exit_code == 0, again.output
    wait_until(lambda: world.client.get("/routes/default").json.get("live_policy") == live)


def test_a_registry_that_lives_is_not_overwritten(world: World, tmp_path: Path, store):
    a_life(world, tmp_path)
    journal = (tmp_path / "artefacts" / FILE).read_text()
    store.set(REGISTRY, "reg_of_another")
    refused = rebuild(world, tmp_path)
    assert refused.exit_code == 1
    assert "another registry, in use on default" in refused.output
    assert (store.get(REGISTRY), list(store.hgetall(TAGS))) == ("reg_of_another", ["prod"])
    send(world.client, "PUT", "/tags/next", {"policy": BASE})
    wait_until(lambda: "next" in store.hgetall(TAGS))
    assert (tmp_path / "artefacts" / FILE).read_text() == journal


def test_without_a_journal_policies_are_candidates_and_the_command_says_what_is_not_known(
    world: World, tmp_path: Path, store
):
    live, _ = a_life(world, tmp_path)
    shutil.copytree(tmp_path / "artefacts", tmp_path / "kept" / "artefacts")
    (tmp_path / "kept" / "artefacts" / FILE).unlink()
    store.flushall()
    done = rebuild(world, tmp_path / "kept")
    assert done.exit_code == 0, done.output
    assert "there is no journal" in done.output
    wait_until(lambda: world.client.get(f"/policies/{live}").json.get("state") == "candidate")


def test_a_policy_whose_files_are_gone_is_named_and_its_route_goes_on_without_it(world: World, tmp_path: Path, store):
    live, _ = a_life(world, tmp_path)
    store.flushall()
    for directory in (tmp_path / "artefacts" / "policies").iterdir():
        if directory.name.startswith(live[4:]):
            (directory / MANIFEST_FILE).write_text("{}")
    (tmp_path / "artefacts" / "jobs" / DONE / "job.json").write_text("{")
    done = rebuild(world, tmp_path)
    assert done.exit_code == 0, done.output
    assert f"{live} was in the registry and has no files that are whole" in done.output
    assert f"route default goes on without {live}" in done.output
    assert f"jobs/{DONE}/job.json is unreadable" in done.output
    route = json.loads(store.get(route_key("default")))
    assert (route["live_policy"], route["previous_policies"]) == (None, [None])
    assert store.hgetall(TAGS) == {}


def test_a_circle_is_not_restored_and_its_route_may_begin_one(world: World, tmp_path: Path, store):
    a_life(world, tmp_path)
    assert send(world.client, "PUT", "/routes/default/circle", {"collect_share": 0.25}).status == 201
    wait_until(lambda: '"collect_share": 0.25' in (tmp_path / "artefacts" / FILE).read_text())
    store.flushall()
    assert "the circle of route default is not restored" in rebuild(world, tmp_path).output
    assert json.loads(store.get(route_key("default")))["collect_share"] is None
    wait_until(lambda: send(world.client, "PUT", "/routes/default/circle", {}).status == 201)


def test_full_weights_come_back_and_what_was_refused_outlives_the_sweep(redis_url: str, tmp_path: Path):
    """The one that is refused could not be read for a while: the next rebuild has it."""
    artefacts = tmp_path / "artefacts"
    full, refused = write_full_policy(artefacts), write_policy(artefacts)
    home = artefacts / "policies" / refused.digest
    with blocking_redis.Redis.from_url(redis_url, decode_responses=True) as client:
        ended = {"state": "succeeded", "policy_id": refused.policy_id, "created_at": "1"}
        job_id = "job_" + "f" * 32
        home.joinpath(MANIFEST_FILE).write_text(refused.model_copy(update={"job_id": job_id}).model_dump_json())
        client.hset(job_key(job_id), mapping=ended)
        with blocking_redis.Redis.from_url(redis_url) as of_worker:
            keep(of_worker, artefacts, job_id)
        client.flushall()
        home.joinpath("fingerprint.json").rename(tmp_path / "away")

        missing = restore(client, read_artefacts(artefacts))
        restored = PolicyRecord.model_validate_json(client.hget(policy_key(full.policy_id), "record"))
        assert (restored.kind, restored.manifest) == ("full", full)
        assert [remark for remark in missing.remarks if refused.digest[:16] in remark]

        a_day_ago = time.time() - attempts.ORPHAN_SECONDS - 1
        os.utime(home, (a_day_ago, a_day_ago))
        attempts.sweep(client, artefacts)
        (tmp_path / "away").rename(home / "fingerprint.json")
        assert set(missing_from(client, read_artefacts(artefacts)).policies) == {refused.policy_id}


def test_a_rebuild_looks_again_where_a_gateway_writes_in_the_meantime(redis_url: str, tmp_path: Path, monkeypatch):
    """As one does that meets an empty Redis; what it wrote is seen, and the audit has one entry."""
    policy_id = write_full_policy(tmp_path).policy_id
    with blocking_redis.Redis.from_url(redis_url, decode_responses=True) as client:

        def meanwhile(point: str) -> None:
            if point == "rebuild.asked" and not client.exists(REGISTRY):
                client.set(REGISTRY, "reg_of_a_gateway")

        monkeypatch.setattr("bonsai.registry.rebuild.crash_point", meanwhile)
        written = restore(client, read_artefacts(tmp_path))
        assert set(written.policies) == {policy_id}
        assert client.zrange(POLICIES_INDEX, 0, -1) == [policy_id]
        assert (client.get(REGISTRY), client.xlen(AUDIT_STREAM)) == ("reg_of_a_gateway", 1)


def test_a_registry_of_full_weights_that_these_files_lack_is_another_one(redis_url: str, tmp_path: Path):
    with blocking_redis.Redis.from_url(redis_url, decode_responses=True) as client:
        record = policy("pol-" + "9" * 16).model_copy(update={"kind": "full"})
        client.hset(policy_key(record.id), "record", record.model_dump_json())
        client.zadd(POLICIES_INDEX, {record.id: 1.0})
        with pytest.raises(RegistryInUse, match="1 policies that these files lack"):
            missing_from(client, read_artefacts(tmp_path))


def submit(world: World, store) -> str:
    store.hset(LEDGER_COUNTS, "default", "100")
    reply = send(world.client, "POST", "/distill", {"method": {"type": "bon_forward_kl"}})
    assert reply.status == 202
    return str(reply.json["id"])


def test_a_job_that_no_worker_had_begun_is_there_again_once_its_caller_was_told_of_it(
    world: World, tmp_path: Path, store
):
    job_id = submit(world, store)
    paused = submit(world, store)
    assert send(world.client, "POST", f"/distill/{paused}/pause", None).status == 200
    store.flushall()
    assert "restored 2 jobs" in rebuild(world, tmp_path).output
    told = [(row["id"], row["status"]) for row in world.client.get("/distill").json["data"]]
    assert told == [(paused, "paused"), (job_id, "queued")]
    assert job_id in store.smembers(OPEN_JOBS)


def test_a_job_that_was_cancelled_after_its_worker_was_killed_stays_so(world: World, tmp_path: Path, store, redis_url):
    """Its worker's record says for ever that it runs."""
    job_id = submit(world, store)
    with blocking_redis.Redis.from_url(redis_url) as of_worker:
        own = claim(of_worker, job_id, lease_seconds=60, worker="here:1")
        assert not isinstance(own, str)
        assert own.epoch == 1
        keep(of_worker, tmp_path / "artefacts", job_id)
    assert send(world.client, "POST", f"/distill/{job_id}/cancel", None).status == 200
    store.hset(job_key(job_id), "lease_until", "0")
    wait_until(lambda: store.hget(job_key(job_id), "state") == "cancelled")
    wait_until(lambda: not store.sismember(UNRECORDED_JOBS, job_id))
    store.flushall()
    assert rebuild(world, tmp_path).exit_code == 0
    assert world.client.get(f"/distill/{job_id}").json["status"] == "cancelled"
    assert store.smembers(OPEN_JOBS) == set()
