"""Shadow and canary: who may try itself where, who is among its share, and what states follow from routes."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bon_algos.contracts import (
    POLICY_TRANSITIONS,
    Arm,
    PolicyRecord,
    PolicyState,
    Route,
    Trial,
    experiment_stats_key,
)
from service.errors import Conflict, GatewayError, InvalidField, PolicyNotFound, PreconditionFailed
from service.experiment_store import Experiments
from service.experiments import assign
from service.policies import Policies, Replaces
from service.preconditions import Precondition
from service.routing import RouteRequest, Routes, route_object
from service.trials import SILENT_AFTER, Trials, trial_object
from tests.service.records import BASE, PASSED, REWARD_MODEL, policy, route
from tests.service.test_experiment_store import arms
from tests.service.test_policies import SERVED, A, B, C, policies, redis, register, snapshot_of, states

__all__ = ["policies", "redis"]
anyio = pytest.mark.anyio


def trial(policy_id: str = A, share: float = 0.25, trial_id: str = "trial_1") -> Trial:
    return Trial(id=trial_id, policy=policy_id, share=share, salt="salt", since=0.0)


# --- who answers -----------------------------------------------------------------------------------------


def answered(unit: str, n: int | None = None, served: frozenset[str] = SERVED, share: float = 0.25):
    tried = route().model_copy(update={"canary": trial(share=share)})
    return assign(tried, experiment=None, live=None, canary=policy(A), served=served, unit=unit, n=n)


def test_a_canary_answers_its_share_and_the_same_units_each_time():
    units = [f"unit {i}" for i in range(2000)]
    met = [answered(unit) for unit in units]
    share = sum(one.reason == "canary" for one in met) / len(met)
    assert share == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 2000) ** 0.5)
    assert [answered(unit) for unit in units] == met
    [first, *_] = [one for one in met if one.reason == "canary"]
    assert (first.arm, first.experiment_id) == (Arm(policy=A, n=1), "trial_1")


def test_who_was_among_a_canarys_share_stays_when_it_grows():
    units = [f"unit {i}" for i in range(500)]
    before = {unit for unit in units if answered(unit, share=0.1).reason == "canary"}
    after = {unit for unit in units if answered(unit, share=0.5).reason == "canary"}
    assert before < after


def test_a_canary_stands_in_only_for_what_it_was_distilled_for():
    assert {answered(f"unit {i}", n=17).reason for i in range(100)} == {"default"}


def test_a_canary_that_is_not_served_is_passed_over_and_the_reply_says_so():
    met = [answered(f"unit {i}", served=frozenset({BASE})) for i in range(100)]
    assert {one.arm.policy for one in met} == {BASE}
    assert any("canary is not served" in one.warnings[0] for one in met if one.warnings)


def test_a_shadow_that_answers_nothing_is_silent():
    def shown(exposures: int, answers: int) -> bool:
        sums = {f"{A}:1|exposures": str(exposures), f"{A}:1|answers": str(answers)}
        return bool(trial_object(trial(), sums)["is_silent"])

    assert [shown(SILENT_AFTER, 0), shown(SILENT_AFTER, 1), shown(SILENT_AFTER - 1, 0)] == [True, False, False]


# --- starting and ending ---------------------------------------------------------------------------------


@anyio
async def test_a_policy_goes_from_shadow_to_canary_to_live_and_back(policies: Policies, redis):
    trials = Trials(redis)
    shadowed = await trials.start(A, "default", "shadow", 0.5, SERVED)
    assert shadowed.shadow is not None
    assert await states(redis) == ["shadow", "candidate", "candidate"]
    tried = await trials.start(A, "default", "canary", 0.1, SERVED)
    assert (tried.shadow, tried.canary is not None) == (None, True)
    assert await redis.ttl(experiment_stats_key(shadowed.shadow.id)) != -1
    assert await states(redis) == ["canary", "candidate", "candidate"]
    promoted = await policies.promote(A, "default", "it held", SERVED)
    assert (promoted.live_policy, promoted.canary) == (A, None)
    await policies.promote(B, "default", "better", SERVED)
    assert await states(redis) == ["retired", "live", "candidate"]
    assert (await policies.roll_back("default")).live_policy == A
    assert await states(redis) == ["live", "retired", "candidate"]


@anyio
async def test_a_trial_that_ends_leaves_a_candidate_and_another_share_is_the_same_trial(policies, redis):
    trials = Trials(redis)
    first = (await trials.start(A, "default", "canary", 0.1, SERVED)).canary
    wider = (await trials.start(A, "default", "canary", 0.2, SERVED)).canary
    assert first is not None
    assert wider is not None
    assert (wider.id, wider.salt, wider.share) == (first.id, first.salt, 0.2)
    assert (await trials.stop(A, "default")).canary is None
    assert await states(redis) == ["candidate"] * 3
    with pytest.raises(Conflict) as refused:
        await trials.stop(A, "default")
    assert refused.value.code == "no_trial"


@anyio
async def test_a_route_holds_one_of_each_stage(policies, redis):
    trials = Trials(redis)
    await trials.start(A, "default", "canary", 0.1, SERVED)
    await trials.start(B, "default", "shadow", 1.0, SERVED)
    for stage in ("canary", "shadow"):
        with pytest.raises(Conflict) as refused:
            await trials.start(C, "default", stage, 0.1, SERVED)
        assert refused.value.code == "stage_taken"
    snapshot = await snapshot_of(redis)
    told = route_object(snapshot.route("default"), snapshot)
    assert (told["canary"]["policy"], told["shadow"]["policy"]) == (A, B)
    assert "salt" not in told["canary"]


@anyio
@pytest.mark.parametrize(
    ("record", "served", "code"),
    [
        (policy(A, fingerprint=None), SERVED, "fingerprint_missing"),
        (policy(A), frozenset({BASE}), "policy_not_served"),  # P21
        (policy(A, state="failed"), SERVED, "policy_unusable"),
        (policy(A, state="retired"), SERVED, "policy_retired"),
        (policy(BASE), SERVED, "policy_is_base"),
    ],
)
async def test_P7_P21_what_may_not_be_tried_says_why(redis, record: PolicyRecord, served, code):
    await register(redis, record)
    with pytest.raises(Conflict) as refused:
        await Trials(redis).start(record.id, "default", "canary", 0.1, served)
    assert refused.value.code == code
    if record.kind != "base":
        with pytest.raises(Conflict) as refused:
            await Policies(redis).promote(record.id, "default", "r", served)
        assert refused.value.code == code


@anyio
async def test_P20_a_canary_is_at_most_half_of_a_route(policies, redis):
    with pytest.raises(InvalidField):
        await Trials(redis).start(A, "default", "canary", 0.51, SERVED)
    with pytest.raises(PolicyNotFound):
        await Trials(redis).start("pol-" + "9" * 16, "default", "canary", 0.1, SERVED)


@anyio
async def test_a_canary_and_an_experiment_do_not_share_a_route(policies, redis):
    experiments, trials = Experiments(redis), Trials(redis)
    await experiments.put("default", arms(("base", 16, 9000), (A, 1, 1000)), await snapshot_of(redis))
    with pytest.raises(Conflict) as refused:
        await trials.start(B, "default", "canary", 0.1, SERVED)
    assert refused.value.code == "route_in_use"
    assert (await trials.start(B, "default", "shadow", 0.1, SERVED)).shadow is not None
    await experiments.stop("default")
    await trials.start(A, "default", "canary", 0.1, SERVED)
    with pytest.raises(Conflict):
        await experiments.put("default", arms(("base", 16, 9000), (A, 1, 1000)), await snapshot_of(redis))
    with pytest.raises(Conflict):
        await Routes(redis, reward_model=REWARD_MODEL, n_cap=64, max_tokens=8).delete("default")


# --- compare and set -------------------------------------------------------------------------------------


@anyio
async def test_P4_of_two_who_saw_the_same_version_one_wins(policies, redis):
    seen = (await snapshot_of(redis)).policy(A).version

    async def promoted(route_name: str) -> str:
        precondition = Precondition(frozenset({f'"{seen}"'}))
        try:
            await Policies(redis).promote(A, route_name, "r", SERVED, precondition=precondition)
        except (PreconditionFailed, Conflict) as error:
            return error.code
        return "won"

    met = await asyncio.gather(*(promoted("default") for _ in range(4)))
    assert sorted(met) == ["precondition_failed"] * 3 + ["won"]


@anyio
async def test_P3_of_two_who_would_replace_the_same_policy_one_wins(policies, redis):
    async def promoted(policy_id: str) -> str:
        try:
            await Policies(redis).promote(policy_id, "default", "r", SERVED, replaces=Replaces(policy=None))
        except Conflict as error:
            return error.code
        return "won"

    met = await asyncio.gather(*(promoted(policy_id) for policy_id in (A, B, C)))
    assert sorted(met) == ["route_moved", "route_moved", "won"]
    assert sorted(await states(redis)) == ["candidate", "candidate", "live"]


# --- states ----------------------------------------------------------------------------------------------


def test_every_state_has_its_successors_and_nothing_follows_a_failure():
    assert POLICY_TRANSITIONS["failed"] == frozenset()
    assert all(after <= POLICY_TRANSITIONS.keys() for after in POLICY_TRANSITIONS.values())
    assert not any("candidate" in POLICY_TRANSITIONS[before] for before in ("live", "retired", "failed"))
    with pytest.raises(ValueError, match="retired cannot become shadow"):
        policy(A, state="retired").become("shadow")


def used(stages: dict[str, str]) -> list[Route]:
    """Routes by name, each with what A is to it."""
    held: dict[str, dict[str, object]] = {"live": {"live_policy": A}, "canary": {"canary": trial()}}
    held["shadow"] = {"shadow": trial()}
    return [route(name=name).model_copy(update=held.get(stage)) for name, stage in stages.items()]


@given(st.lists(st.sampled_from(["live", "canary", "shadow", "none"]), max_size=3), st.booleans())
def test_a_state_is_the_highest_stage_that_any_route_gives(stages, has_been_live):
    record = policy(A).model_copy(update={"has_been_live": has_been_live})
    ranked = [stage for stage in ("live", "canary", "shadow") if stage in stages]
    expected = ranked[0] if ranked else "retired" if has_been_live else "candidate"
    assert record.state_on(used({f"r{i}": stage for i, stage in enumerate(stages)})) == expected


MOVES = st.lists(
    st.tuples(
        st.sampled_from(["shadow", "canary", "live", "stop", "roll_back", "retire", "fail"]),
        st.sampled_from([A, B]),
        st.sampled_from(["default", "other"]),
    ),
    min_size=4,
    max_size=14,
)


@settings(max_examples=25, deadline=None)
@given(MOVES)
def test_no_sequence_of_changes_leaves_the_table_of_transitions(shared_redis, moves):
    asyncio.run(lived_through(shared_redis.url, moves))


async def lived_through(url: str, moves) -> None:
    from service.catalogue import Catalogue
    from service.store import open_redis

    async with open_redis(url) as client:
        await client.flushall()
        await Catalogue(client, policy(BASE), route()).refresh()
        await Routes(client, reward_model=REWARD_MODEL, n_cap=64, max_tokens=8).put("other", RouteRequest(), BASE)
        await register(client, policy(A), policy(B, created_at=1.0))
        before = dict.fromkeys((A, B), "candidate")
        for what, policy_id, on in moves:
            try:
                await move(client, what, policy_id, on)
            except GatewayError:
                continue
            snapshot = await snapshot_of(client)
            for one in (A, B):
                now: PolicyState = snapshot.policy(one).state
                assert now == before[one] or now in POLICY_TRANSITIONS[before[one]]  # type: ignore[index]
                assert not (before[one] == "retired" and now == "live") or what == "roll_back"
                assert now == snapshot.policy(one).state_on(snapshot.routes.values())
                before[one] = now


async def move(client, what: str, policy_id: str, on: str) -> None:
    trials, registry = Trials(client), Policies(client)
    if what in ("shadow", "canary"):
        await trials.start(policy_id, on, "shadow" if what == "shadow" else "canary", 0.2, SERVED)
    elif what == "live":
        await registry.promote(policy_id, on, "r", SERVED)
    elif what == "stop":
        await trials.stop(policy_id, on)
    elif what == "roll_back":
        await registry.roll_back(on)
    elif what == "retire":
        await registry.retire(policy_id)
    else:
        await registry.record_fingerprint(policy_id, PASSED.model_copy(update={"passed": False, "reason": "r"}))
