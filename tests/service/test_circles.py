"""A circle with real Redis: it goes round by itself, once, whoever dies in it; and it can be stopped.

The worker's part is played through its own lease, as a worker would. The rules are in test_circle_rules.py; the whole
with real engines is tests/circle/test_turning.py and `benchmarks.turns`.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any

import pytest
import redis as blocking_redis
from redis.asyncio import Redis

from archive.reading import Archive
from bon_algos.contracts import (
    TURNS_KEPT,
    Arm,
    Circle,
    CircleSpec,
    Interval,
    PolicyRecord,
    PolicyReport,
    Turn,
    circle_key,
    experiment_stats_key,
    job_key,
    policy_key,
    report_digest,
)
from service.access import GATEWAY
from service.audit import Audit
from service.catalogue import Catalogue
from service.circle_driver import CircleDriver, Means
from service.circle_rules import DAY_SECONDS
from service.circles import Circles, circle_object
from service.curve import Curves
from service.dispatch import Dispatcher
from service.errors import Conflict
from service.jobs import Jobs
from service.policies import Policies
from service.routing import Routes
from service.store import open_redis
from service.trials import Trials
from tests.service.records import BASE, PASSED, REWARD_MODEL, group, job_spec, manifest, numbered, policy, route
from tests.service.records import report as summary_report
from tests.service.test_redis_model import deliver
from tests.service.test_reports import a_report
from worker.compaction import Compaction, Limits
from worker.lease import Lease, claim

pytestmark = pytest.mark.anyio
FIRST, SECOND = numbered(11), numbered(12)
SPEC = CircleSpec.model_validate(
    {
        "n": 4, "min_groups": 8, "shadow": {"share": 0.5, "answers": 5}, "canary": {"share": 0.5, "answers": 5},
    }
)  # fmt: skip
NOTHING_HOT = Limits(entries=100, bytes=2**20, seconds=0.0, hot_groups=0, hot_seconds=0.0)


@dataclass
class Turning:
    """A gateway's part of a circle, and a worker's."""

    redis: Redis
    store: blocking_redis.Redis
    circles: Circles
    driver: CircleDriver
    means: Means
    directory: Path

    async def circle(self) -> Circle:
        return await self.circles.get("default", "default")

    async def look(self, times: int = 1) -> Circle:
        """Each look is taken twice: the second time by a gateway that finds the circle as it was before the first, for
        whoever did the first died before it wrote down what it had done."""
        for _ in range(times):
            before = await self.circle()
            await self.driver.step(before)
            after = await self.circle()
            if after.version > before.version:
                await self.redis.set(circle_key("default"), before.model_dump_json())
                await self.driver.step(before)
        return await self.circle()

    async def groups(self, drawn_by: str, count: int = 8) -> None:
        arm = Arm(policy=drawn_by, n=4)
        rows = [group([(float(i % 3), 2), (4.0, 2), (0.0, 2), (float(i % 2), 2)], arm) for i in range(count)]
        before = await self.redis.xlen("bonsai:ledger")
        later = {"created_at": 4e9}
        numbered_rows = [
            row.model_copy(update={"id": f"resp_{before + i}", "prompt_token_ids": (i,), **later})
            for i, row in enumerate(rows)
        ]
        await deliver(self.redis, self.directory, numbered_rows)

    async def work(self, policy_id: str, **report: float) -> None:
        """What a worker does with the job of the turn under way."""
        turn = (await self.circle()).turn
        assert turn is not None
        assert turn.job_id is not None
        epoch = claim(self.store, turn.job_id, lease_seconds=60, worker="here:1")
        assert isinstance(epoch, int)
        lease = Lease(self.store, turn.job_id, epoch, lease_seconds=60, heartbeat_seconds=60)
        lease.finish_succeeded(self.made(policy_id, turn, **report), "")

    def made(self, policy_id: str, turn: Turn, **report: float) -> PolicyRecord:
        content = as_reported(policy_id, turn.parent, **report)
        files = {name: hashlib.sha256(content).hexdigest() for name in ("README.md", "report.json", "report.png")}
        place = self.directory / "reports" / report_digest(files)
        place.mkdir(parents=True)
        for name in files:
            (place / name).write_bytes(content)
        start = "base" if turn.parent == BASE else turn.parent
        asked = {"type": "offline_bond", "offline_bond": {}}
        spec = job_spec(training={"start_from": start, "reference": "start"}, method=asked)
        drift = PolicyReport.model_validate_json(content).kl_policy_base
        told = {
            "report": summary_report().model_copy(update={"kl_policy_base": drift}),
            "report_files": files,
            "parent_policy_id": turn.parent,
            "job_id": turn.job_id,
            "spec": spec,
            "lora_rank": spec.method.algorithm.lora_rank,
        }
        plain = manifest(policy_id, digest=hashlib.sha256(policy_id.encode()).hexdigest())
        return policy(policy_id, written=plain.model_copy(update=told))

    async def prove(self, policy_id: str) -> None:
        """An engine serves it."""
        row = await self.redis.hget(policy_key(policy_id), "record")
        assert row is not None
        proven = PolicyRecord.model_validate_json(row).model_copy(update={"fingerprint": PASSED})
        await self.redis.hset(policy_key(policy_id), "record", proven.model_dump_json())
        self.means.catalogue.set_served(frozenset({BASE, FIRST, policy_id}))

    async def answers(self, policy_id: str, count: int = 5) -> None:
        """Of the trial that the policy is in."""
        found = (await self.means.catalogue.refresh()).route("default")
        trial = found.canary or found.shadow
        assert trial is not None
        sums = {
            "exposures": count,
            "answers": count,
            "scored": count,
            "reward_sum": 4.0 * count,
            "reward_sq": 16.0 * count,
        }
        await self.redis.hset(
            experiment_stats_key(trial.id), mapping={f"{policy_id}:1|{k}": v for k, v in sums.items()}
        )

    async def jobs(self) -> int:
        return len((await self.means.jobs.list(20))[0])

    async def promotions(self) -> int:
        return sum(entry["event"] == "promote" for entry in await self.audit())

    async def audit(self) -> Sequence[dict[str, Any]]:
        return (await Audit(self.redis).page("default", 100, None))[0]


def as_reported(policy_id: str, parent: str, gain: float = 1.0, judge: float | None = 0.5, kl: float = 0.6) -> bytes:
    found, reach = a_report(), 0.1
    rewards = found.reward.model_copy(update={"gain": Interval(mean=gain, low=gain - reach, high=gain + reach)})
    second = None if judge is None else Interval(mean=judge, low=judge - reach, high=judge + reach)
    return found.model_copy(
        update={
            "policy_id": policy_id,
            "parent_policy_id": parent,
            "reward": rewards,
            "judge": None if second is None else found.reward.model_copy(update={"gain": second}),
            "kl_policy_base": Interval(mean=kl, low=kl, high=kl),
        }
    ).model_dump_json().encode()  # fmt: skip


@pytest.fixture
async def turning(redis_url: str, tmp_path: Path) -> AsyncIterator[Turning]:
    async with open_redis(redis_url) as redis, open_redis(redis_url, in_bytes=True) as of_bytes:
        catalogue = Catalogue(redis, policy(BASE), route())
        await catalogue.refresh()
        jobs = Jobs(redis, n_cap=64, max_lora_rank=64)
        woken = Dispatcher(redis, lambda *sent: None, seconds=5)
        curves = Curves(of_bytes, Archive.at(str(tmp_path / "archive")))
        means = Means(catalogue, jobs, woken, Policies(redis), Trials(redis), curves, tmp_path)
        driver = CircleDriver(redis, means, seconds=5)
        with blocking_redis.Redis.from_url(redis_url) as store:
            world = Turning(redis, store, driver.circles, driver, means, tmp_path)
            yield world


async def turned(world: Turning, policy_id: str, **report: float) -> Circle:
    """From enough groups to the end of the turn, as far as it comes."""
    await world.groups((await world.circle()).live_policy or BASE)
    await world.look(2)
    await world.work(policy_id, **report)
    await world.prove(policy_id)
    await world.look(2)
    for _ in range(2):
        if (await world.circle()).turn is None:
            break
        await world.answers(policy_id)
        await world.look(1)
    return await world.circle()


async def test_it_goes_round_twice_by_itself_and_everything_is_done_once(turning: Turning):
    await turning.circles.put("default", SPEC, GATEWAY)
    first = await turned(turning, FIRST)
    assert (first.status, first.live_policy, first.turn) == ("running", FIRST, None)
    snapshot = await turning.means.catalogue.refresh()
    assert snapshot.route("default").live_policy == FIRST
    assert snapshot.route("default").best_of_n_policy == FIRST
    second = await turned(turning, SECOND, kl=1.1)
    assert (second.live_policy, second.kl_base) == (SECOND, 1.1)
    assert [(turn.parent, turn.policy, turn.outcome) for turn in second.turns] == [
        (BASE, FIRST, "promoted"),
        (FIRST, SECOND, "promoted"),
    ]
    assert (await turning.jobs(), await turning.promotions()) == (2, 2)
    rows, _ = await turning.means.jobs.list(20)
    newest = rows[0]["bonsai"]["spec"]["training"]
    assert (newest["start_from"], newest["reference"]) == (FIRST, "start")


async def test_groups_that_the_stream_has_no_more_are_fresh_all_the_same(turning: Turning):
    await turning.circles.put("default", SPEC, GATEWAY)
    await turning.groups(BASE)
    compaction = Compaction(turning.store, Archive.at(str(turning.directory / "archive")), NOTHING_HOT)
    compaction.open()
    while compaction.step(wait_seconds=0.01) is not None:
        pass
    assert await turning.redis.xlen("bonsai:ledger") == 0
    assert (await turning.look()).turn is not None


async def test_what_the_base_drew_is_nothing_fresh_when_another_is_live(turning: Turning):
    await turning.circles.put("default", SPEC, GATEWAY)
    await turned(turning, FIRST)
    await turning.groups(BASE)
    after = await turning.look(2)
    assert after.turn is None
    assert "fresh groups" in after.reason


async def test_three_refused_turns_stop_it_and_nothing_was_tried(turning: Turning):
    spec = SPEC.model_copy(update={"max_refusals": 2})
    await turning.circles.put("default", spec, GATEWAY)
    for number in (21, 22):
        await turned(turning, numbered(number), gain=0.05)
    await turning.groups(BASE)
    ended = await turning.look(2)
    assert (ended.status, [turn.outcome for turn in ended.turns]) == ("stopped", ["refused"] * 2)
    found = (await turning.means.catalogue.refresh()).route("default")
    assert (found.live_policy, found.shadow, found.canary) == (None, None, None)


async def test_more_turns_than_are_kept_count_as_long_as_they_are_of_today(turning: Turning):
    spec = CircleSpec.model_validate({**SPEC.model_dump(), "budgets": {"jobs_per_day": 61}})
    circle, _ = await turning.circles.put("default", spec, GATEWAY)
    over = Turn(number=1, began_at=time(), parent=BASE, phase="over", seconds=2.0, outcome="promoted")
    earlier = circle.model_copy(update={"turns": (over,) * (TURNS_KEPT + 10)})
    await turning.redis.set(circle_key("default"), earlier.model_dump_json())
    await turned(turning, FIRST, gain=0.05)
    await turning.groups(BASE)
    after = await turning.look()
    assert (after.turn, len(after.turns), after.reason) == (None, 61, "61 jobs in 24 hours: the budget")
    assert circle_object(after, time())["spent"]["gpu_seconds"] == pytest.approx(120.0, abs=1.0)


async def test_turns_of_days_ago_make_room(turning: Turning):
    circle, _ = await turning.circles.put("default", SPEC, GATEWAY)
    over = Turn(number=1, began_at=time() - 2 * DAY_SECONDS, parent=BASE, phase="over", outcome="promoted")
    earlier = circle.model_copy(update={"turns": (over,) * (TURNS_KEPT + 10)})
    await turning.redis.set(circle_key("default"), earlier.model_dump_json())
    assert len((await turned(turning, FIRST)).turns) == TURNS_KEPT


async def test_a_job_that_several_processes_train_spends_as_many_gpus(turning: Turning):
    await turning.circles.put("default", SPEC, GATEWAY)
    await turning.groups(BASE)
    job_id = (await turning.look(2)).turn.job_id  # type: ignore[union-attr]
    await turning.redis.hset(job_key(str(job_id)), mapping={"spent_ms": 5_000, "gpu_ms": 20_000})
    assert (await turning.look()).turn.seconds == 20.0  # type: ignore[union-attr]
    # A worker of an older version tells time alone.
    await turning.redis.hset(job_key(str(job_id)), "spent_ms", 30_000)
    assert (await turning.look()).turn.seconds == 30.0  # type: ignore[union-attr]


async def test_second_reward_that_falls_stops_it_at_once(turning: Turning):
    await turning.circles.put("default", SPEC, GATEWAY)
    ended = await turned(turning, FIRST, judge=-0.5)
    assert (ended.status, ended.live_policy, ended.turns[0].outcome) == ("stopped", None, "refused")
    assert "exploited" in ended.reason


async def test_stopping_cancels_its_job(turning: Turning):
    await turning.circles.put("default", SPEC, GATEWAY)
    await turning.groups(BASE)
    under_way = await turning.look(2)
    assert under_way.turn is not None
    await turning.circles.stop("default", "enough", GATEWAY)
    ended = await turning.look()
    assert (ended.turn, ended.turns[0].outcome) == (None, "stopped")
    assert under_way.turn.job_id is not None
    assert (await turning.means.jobs.get(under_way.turn.job_id))["status"] == "cancelled"
    again = await turning.circles.start("default", GATEWAY)
    assert (again.status, again.refusals) == ("running", 0)
    with pytest.raises(Conflict):
        await turning.circles.start("default", GATEWAY)


async def test_stopping_takes_its_canary_away_and_leaves_what_is_live(turning: Turning):
    await turning.circles.put("default", SPEC, GATEWAY)
    await turned(turning, FIRST)
    await turning.groups(FIRST)
    await turning.look(2)
    await turning.work(SECOND)
    await turning.prove(SECOND)
    await turning.look(2)
    assert (await turning.means.catalogue.refresh()).route("default").shadow is not None
    await turning.circles.stop("default", "enough", GATEWAY)
    await turning.look()
    found = (await turning.means.catalogue.refresh()).route("default")
    assert (found.live_policy, found.shadow) == (FIRST, None)


async def test_stopped_while_its_job_is_being_submitted_no_job_is_left(turning: Turning):
    """The gateway that drives had looked before; it finds that it came too late, and takes the job back."""
    await turning.circles.put("default", SPEC, GATEWAY)
    await turning.groups(BASE)
    looked_at = await turning.look()
    await turning.circles.stop("default", "enough", GATEWAY)
    await turning.look()
    await turning.driver.step(looked_at)
    [job], _ = await turning.means.jobs.list(20)
    ended = await turning.circle()
    assert (job["status"], ended.status, ended.turn) == ("cancelled", "stopped", None)


async def submitted_and_died(turning: Turning) -> Circle:
    """A gateway has asked for the turn's job and died before it wrote that down."""
    await turning.circles.put("default", SPEC, GATEWAY)
    await turning.groups(BASE)
    looked_at = await turning.look()
    await turning.driver.step(looked_at)
    await turning.redis.set(circle_key("default"), looked_at.model_dump_json())
    return looked_at


async def test_stopped_after_a_gateway_died_with_a_job_unwritten_no_job_is_left(turning: Turning):
    await submitted_and_died(turning)
    await turning.circles.stop("default", "enough", GATEWAY)
    with pytest.raises(Conflict, match="being ended"):
        await turning.circles.delete("default", GATEWAY)
    ended = await turning.look()
    [job], _ = await turning.means.jobs.list(20)
    assert (job["status"], ended.turn) == ("cancelled", None)
    await turning.circles.delete("default", GATEWAY)


async def test_rules_changed_after_a_gateway_died_with_a_job_unwritten_it_is_the_turns_job(turning: Turning):
    await submitted_and_died(turning)
    await turning.circles.put("default", CircleSpec.model_validate({**SPEC.model_dump(), "n": 8}), GATEWAY)
    going_on = await turning.look()
    assert (await turning.jobs(), going_on.turns) == (1, ())
    [job], _ = await turning.means.jobs.list(20)
    assert going_on.turn is not None
    assert going_on.turn.job_id == job["id"]


async def test_deleted_while_its_job_is_being_submitted_no_job_is_left(turning: Turning):
    await turning.circles.put("default", SPEC, GATEWAY)
    await turning.groups(BASE)
    looked_at = await turning.look()
    await turning.circles.stop("default", "enough", GATEWAY)
    await turning.look()
    await turning.circles.delete("default", GATEWAY)
    await turning.driver.step(looked_at)
    [job], _ = await turning.means.jobs.list(20)
    assert job["status"] == "cancelled"


async def test_stopped_while_its_policy_becomes_shadow_it_is_on_no_trial(turning: Turning):
    await turning.circles.put("default", SPEC, GATEWAY)
    await turning.groups(BASE)
    await turning.look(2)
    await turning.work(FIRST)
    await turning.prove(FIRST)
    looked_at = await turning.look()
    await turning.circles.stop("default", "enough", GATEWAY)
    await turning.look()
    await turning.driver.step(looked_at)
    found = (await turning.means.catalogue.refresh()).route("default")
    assert (found.shadow, (await turning.circle()).status) == (None, "stopped")


async def test_a_roll_back_by_hand_stops_it(turning: Turning):
    await turning.circles.put("default", SPEC, GATEWAY)
    await turned(turning, FIRST)
    await turning.means.policies.roll_back("default")
    ended = await turning.look()
    assert ended.status == "stopped"
    assert "somebody else" in ended.reason
    again = await turning.circles.start("default", GATEWAY)
    assert again.live_policy is None


async def test_a_job_that_cannot_be_asked_for_is_a_failed_turn(turning: Turning):
    asked = {"type": "offline_bond", "offline_bond": {"lora_rank": 128}}
    spec = CircleSpec.model_validate({**SPEC.model_dump(), "method": asked})
    await turning.circles.put("default", spec, GATEWAY)
    await turning.groups(BASE)
    ended = await turning.look(2)
    assert ended.turns[0].outcome == "failed"
    assert "lora_rank" in ended.turns[0].reason


async def test_a_route_with_a_circle_is_not_deleted_and_a_circle_that_runs_neither(turning: Turning):
    await turning.circles.put("default", SPEC, GATEWAY)
    routes = Routes(turning.redis, reward_model=REWARD_MODEL, n_cap=64, max_tokens=8)
    with pytest.raises(Conflict, match="circle"):
        await routes.delete("default")
    with pytest.raises(Conflict, match="stop it first"):
        await turning.circles.delete("default", GATEWAY)
    await turning.circles.stop("default", "enough", GATEWAY)
    await turning.circles.delete("default", GATEWAY)
    assert (await turning.means.catalogue.refresh()).route("default").collect_share is None


async def test_a_circle_that_begins_with_a_live_policy_knows_how_far_it_has_drifted(turning: Turning):
    await turning.circles.put("default", SPEC, GATEWAY)
    await turned(turning, FIRST, kl=0.7)
    await turning.circles.stop("default", "enough", GATEWAY)
    await turning.circles.delete("default", GATEWAY)
    again, is_new = await turning.circles.put("default", SPEC, GATEWAY)
    assert (is_new, again.live_policy, again.kl_base) == (True, FIRST, 0.7)


async def test_the_audit_tells_each_step(turning: Turning):
    await turning.circles.put("default", SPEC, GATEWAY)
    await turned(turning, FIRST)
    entries = await turning.audit()
    own = [entry["event"] for entry in entries if entry["event"].startswith("circle")]
    steps = [
        "circle_put",
        "circle_turn",
        "circle_job",
        "circle_proving",
        "circle_shadow",
        "circle_canary",
        "circle_turn_over",
    ]
    assert list(dict.fromkeys(own)) == steps
    [moved] = [entry for entry in entries if entry["event"] == "promote"]
    assert moved["by"] == "circle:default"
    assert moved["data"]["reason"].startswith("turn 1 of the circle")
