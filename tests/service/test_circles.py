"""A circle with real Redis: it goes round by itself, once, whoever dies in it; and it can be stopped.

The worker's part is played through its own lease, as a worker would. The rules are in test_circle_rules.py; the whole
with real engines is tests/circle/test_turning.py and `benchmarks.turns`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from time import time

import pytest

from archive.reading import Archive
from bon_algos.contracts import (
    CIRCLES_INDEX,
    TURNS_KEPT,
    CircleSpec,
    Turn,
    circle_key,
    job_key,
)
from service.access import GATEWAY
from service.circle_driver import CircleDriver
from service.circle_rules import DAY_SECONDS
from service.circles import circle_object
from service.curve import Curves
from service.errors import Conflict, Unavailable
from service.routing import Routes
from service.store import open_redis
from tests.service.records import BASE, REWARD_MODEL, numbered
from tests.service.turning import FIRST, SECOND, SPEC, Turning, turned, turning
from worker.compaction import Compaction, Limits

__all__ = ["turning"]

pytestmark = pytest.mark.anyio
NOTHING_HOT = Limits(entries=100, bytes=2**20, seconds=0.0, hot_groups=0, hot_seconds=0.0)


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


async def test_while_it_waits_its_curve_is_drawn_anew_after_a_tenth_more_groups(turning: Turning):
    """Of 20 groups that is 22."""
    spec = SPEC.model_copy(update={"min_groups": 20, "min_gain": 100.0})
    await turning.circles.put("default", spec, GATEWAY)
    await turning.groups(BASE, 20)
    waits = (await turning.look()).reason
    assert waits.startswith("best-of-n gains")
    await turning.groups(BASE, 1, best=400.0)
    assert (await turning.look()).reason == waits
    await turning.groups(BASE, 1, best=400.0)
    assert (await turning.look()).reason != waits


async def test_other_rules_are_held_against_the_groups_at_once(turning: Turning):
    spec = SPEC.model_copy(update={"min_groups": 10, "min_gain": 100.0})
    await turning.circles.put("default", spec, GATEWAY)
    await turning.groups(BASE, 20)
    await turning.look()
    await turning.circles.put("default", spec.model_copy(update={"min_groups": 20, "min_gain": 0.0}), GATEWAY)
    assert (await turning.look()).turn is not None


async def test_over_its_budget_it_does_not_look_at_groups(turning: Turning, unused_port: int):
    """Where it did it would say that the ledger cannot be read."""
    spec = CircleSpec.model_validate({**SPEC.model_dump(), "budgets": {"max_kl": 0.1}})
    circle, _ = await turning.circles.put("default", spec, GATEWAY)
    await turning.groups(BASE)
    async with open_redis(f"redis://127.0.0.1:{unused_port}", in_bytes=True) as nobody:
        blind = replace(turning.means, curves=Curves(nobody, Archive.at(str(turning.directory / "archive"))))
        await CircleDriver(turning.redis, blind, seconds=5).step(circle)
    assert "nats from the first reference" in (await turning.circle()).reason


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


async def test_F44_a_circle_of_another_version_holds_up_no_other(turning: Turning):
    circle, _ = await turning.circles.put("default", SPEC, GATEWAY)
    newer = {**circle.model_dump(mode="json"), "route": "newer", "colour": "green"}
    await turning.redis.set(circle_key("newer"), json.dumps(newer))
    await turning.redis.sadd(CIRCLES_INDEX, "newer")
    assert [one.route for one in await turning.circles.list()] == ["default"]
    with pytest.raises(Unavailable) as refused:
        await turning.circles.get("newer", "default")
    assert refused.value.code == "circle_of_other_version"
    with pytest.raises(Unavailable):
        await turning.circles.stop("newer", "enough", GATEWAY)


async def test_F44_a_report_of_another_version_counts_as_none(turning: Turning):
    await turning.circles.put("default", SPEC, GATEWAY)
    ended = await turned(turning, FIRST, colour="green")
    assert (ended.turn, ended.live_policy, ended.turns[0].outcome) == (None, None, "refused")
    assert "no report" in ended.turns[0].reason


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
