"""A circle that is stopped, deleted, or given other rules, at whatever moment: no job and no trial of it is left."""

from __future__ import annotations

import pytest

from bon_algos.contracts import (
    ROUTES_INDEX,
    Circle,
    CircleSpec,
    PolicyRecord,
    Turn,
    circle_key,
    job_key,
    policy_key,
    route_key,
)
from service.access import GATEWAY
from service.errors import CircleNotFound, Conflict
from tests.service.records import BASE, route
from tests.service.turning import FIRST, SECOND, SPEC, Turning, turned, turning

__all__ = ["turning"]

pytestmark = pytest.mark.anyio


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


async def about_to_submit(turning: Turning) -> Circle:
    """A circle whose next step submits the turn's job."""
    await turning.circles.put("default", SPEC, GATEWAY)
    await turning.groups(BASE)
    return await turning.look()


async def test_stopped_while_its_job_is_being_submitted_no_job_is_left(turning: Turning):
    """The gateway that drives had looked before; it finds that it came too late, and takes the job back."""
    looked_at = await about_to_submit(turning)
    await turning.circles.stop("default", "enough", GATEWAY)
    await turning.look()
    await turning.driver.step(looked_at)
    [job], _ = await turning.means.jobs.list(20)
    ended = await turning.circle()
    assert (job["status"], ended.status, ended.turn) == ("cancelled", "stopped", None)


async def submitted_and_died(turning: Turning) -> Circle:
    """A gateway has asked for the turn's job and died before it wrote that down."""
    looked_at = await about_to_submit(turning)
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
    looked_at = await about_to_submit(turning)
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


async def as_canary(turning: Turning) -> Circle:
    """A circle whose next look promotes."""
    await turning.circles.put("default", SPEC, GATEWAY)
    await turning.groups(BASE)
    await turning.look(2)
    await turning.work(FIRST)
    await turning.prove(FIRST)
    await turning.look(2)
    await turning.answers(FIRST)
    await turning.look()
    await turning.answers(FIRST)
    return await turning.circle()


async def test_stopped_after_it_was_decided_to_promote_nothing_is_promoted(turning: Turning):
    """The gateway that drives saw the circle before it was stopped."""
    looked_at = await as_canary(turning)
    await turning.circles.stop("default", "enough", GATEWAY)
    await turning.driver.step(looked_at)
    assert (await turning.means.catalogue.refresh()).route("default").live_policy is None
    ended = await turning.look()
    found = (await turning.means.catalogue.refresh()).route("default")
    assert (found.live_policy, found.canary, ended.turns[0].outcome) == (None, None, "stopped")
    assert await turning.promotions() == 0


async def test_stopped_after_it_has_promoted_the_turn_says_so(turning: Turning):
    """The gateway that drives died before it wrote the end of the turn."""
    looked_at = await as_canary(turning)
    await turning.driver.step(looked_at)
    await turning.redis.set(circle_key("default"), looked_at.model_dump_json())
    await turning.circles.stop("default", "enough", GATEWAY)
    ended = await turning.look()
    assert (ended.status, ended.live_policy, ended.turns[0].outcome) == ("stopped", FIRST, "promoted")


@pytest.mark.parametrize(("key_of", "member", "value"), [(policy_key, "record", "{}"), (job_key, "step", "no number")])
async def test_all_are_stopped_whatever_fails_with_one(turning: Turning, key_of, member: str, value: str):
    """The turn of one cannot be ended: its policy's record is of another version, or its job's is damaged, which is no
    failure that anybody foresaw."""
    broken = await as_canary(turning)
    assert broken.turn is not None
    assert broken.turn.job_id is not None
    spare_route = route().model_copy(update={"name": "spare"})
    await turning.redis.set(route_key("spare"), spare_route.model_dump_json())
    await turning.redis.sadd(ROUTES_INDEX, "spare")
    begun = Turn(number=1, began_at=0.0, parent=BASE)
    spare = broken.model_copy(update={"route": "spare", "turn": begun})
    await turning.redis.set(circle_key("spare"), spare.model_dump_json())
    await turning.redis.hset(key_of(FIRST if key_of is policy_key else broken.turn.job_id), member, value)
    failures = await turning.driver.stop(["default", "nowhere", "spare"], "enough", GATEWAY)
    assert [(name, type(failure)) for name, failure in failures.items()] == [("nowhere", CircleNotFound)]
    left, ended = await turning.circle(), await turning.circles.get("spare", "default")
    assert (left.status, ended.status, ended.turn) == ("stopped", "stopped", None)
    assert (left.turn is None, ended.turns[0].outcome) == (False, "stopped")


async def taint(turning: Turning, policy_id: str) -> None:
    """As an erasure leaves a policy that learned from what was erased."""
    row = await turning.redis.hget(policy_key(policy_id), "record")
    assert row is not None
    tainted = PolicyRecord.model_validate_json(row).model_copy(update={"tainted": True})
    await turning.redis.hset(policy_key(policy_id), "record", tainted.model_dump_json())


async def test_tainted_as_canary_its_turn_is_over(turning: Turning):
    await as_canary(turning)
    await taint(turning, FIRST)
    after = await turning.look()
    found = (await turning.means.catalogue.refresh()).route("default")
    assert (after.status, after.turn, after.turns[0].outcome) == ("running", None, "failed")
    assert (found.live_policy, found.canary) == (None, None)


async def test_its_live_policy_tainted_it_stops_until_there_is_another(turning: Turning):
    await turning.circles.put("default", SPEC, GATEWAY)
    await turned(turning, FIRST)
    await taint(turning, FIRST)
    ended = await turning.look()
    assert (ended.status, "tainted" in ended.reason) == ("stopped", True)
    await turning.means.policies.roll_back("default")
    again = await turning.circles.start("default", GATEWAY)
    assert (again.status, again.live_policy) == ("running", None)


async def test_a_roll_back_by_hand_stops_it(turning: Turning):
    await turning.circles.put("default", SPEC, GATEWAY)
    await turned(turning, FIRST)
    await turning.means.policies.roll_back("default")
    ended = await turning.look()
    assert ended.status == "stopped"
    assert "somebody else" in ended.reason
    again = await turning.circles.start("default", GATEWAY)
    assert again.live_policy is None


async def test_a_damaged_record_of_one_keeps_the_others_going(turning: Turning):
    stuck = await as_canary(turning)
    assert stuck.turn is not None
    assert stuck.turn.job_id is not None
    await turning.redis.hset(job_key(stuck.turn.job_id), "step", "no number")

    left = await turning.look()

    assert (left.status, left.turn) == (stuck.status, stuck.turn)
    assert left.reason == "tried, and tries again: a record of it is damaged"
