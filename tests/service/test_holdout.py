"""The traffic that keeps the ledger honest: a share of what would be answered with less always has all n."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from bon_algos.contracts import Arm, CandidateGroup, Route
from bon_algos.escalation import Pair, learned_escalation
from service.experiments import Assignment
from service.learned import Learned
from service.strategies import DistilledFirst, Fixed, Plan, planned, share_of
from tests.fixtures.gateway import World
from tests.fixtures.waiting import wait_until
from tests.service.records import BASE, STUDENT, route
from tests.service.strategy_world import (
    FIRST,
    HI,
    ROUTE,
    N,
    gateway,
    known,
    log_history,
)
from tests.service.test_admin_routes import proven_candidate, send

__all__ = ["gateway"]


def test_the_holdout_is_a_share_of_requests_by_the_replys_id(gateway):
    """Nothing that a caller sends moves a request in or out: a name that every request has is no dice."""
    world = gateway(holdout_share=0.5)
    log_history(world, np.random.default_rng(0).normal(size=(150, N)))
    send(world, "PUT", "/routes/default", ROUTE)
    wait_until(lambda: known(world)["adaptive"] is not None, seconds=60)
    world.engine.script.completions = ["6.0", "0.0"]
    bodies = [world.client.post("/generate", HI, {"X-Request-Id": "always-the-same"}).json for _ in range(12)]
    # Twelve that all fall on one side: one in two thousand.
    assert {body["selection"]["stop_reason"] for body in bodies} == {"holdout", "gain_below_price"}
    for body in bodies:
        expected = ("holdout", N) if share_of(body["id"]) < 0.5 else ("gain_below_price", FIRST)
        assert (body["selection"]["stop_reason"], body["candidates"]["requested"]) == expected
    wait_until(lambda: len(world.records()) == 162)
    groups = [record for record in world.records()[150:] if isinstance(record, CandidateGroup)]
    assert [one.is_unbiased for one in groups] == [one.stop_reason == "holdout" for one in groups]


def planned_for(
    on: Route, assignment: Assignment, position: float, n: int | None = None, served: Sequence[str] = (STUDENT,)
) -> tuple[Assignment, Plan]:
    """With a holdout of a tenth."""
    return planned(
        on,
        assignment,
        n,
        Learned(),
        served=frozenset(served),
        is_policy_law=True,
        position=position,
        holdout_share=0.1,
    )


def with_strategy(strategy: str, **changes: object) -> Route:
    return route(STUDENT).model_copy(update={"strategy": strategy, "default_n": N, **changes})


LIVE = Assignment(Arm(policy=STUDENT, n=1), "live", warnings=("w",))
CANARY = Assignment(Arm(policy=STUDENT, n=1), "canary", "trial_1", warnings=("w",))
HELD_OUT = (Assignment(Arm(policy=BASE, n=N), "default", warnings=("w",)), Fixed("holdout"))


@pytest.mark.parametrize("strategy", ["fixed", "soft", "adaptive", "distilled_first"])
@pytest.mark.parametrize("answers", [LIVE, CANARY])
def test_whatever_answers_with_one_sample_is_held_out_under_every_strategy(strategy, answers):
    on = with_strategy(strategy)
    assert planned_for(on, answers, 0.09) == HELD_OUT
    after, plan = planned_for(on, answers, 0.2)
    assert not isinstance(plan, Fixed) or (after, plan) == (answers, Fixed())


@pytest.mark.parametrize("strategy", ["fixed", "soft"])
@pytest.mark.parametrize("reason", ["default", "n_above_equivalent"])
def test_what_has_all_n_anyway_is_not_called_held_out(strategy, reason):
    assignment = Assignment(Arm(policy=BASE, n=N), reason)
    assert planned_for(with_strategy(strategy), assignment, 0.0) == (assignment, Fixed())


def test_one_candidate_that_was_asked_for_stays_one_of_the_live_policy():
    assert planned_for(with_strategy("fixed"), LIVE, 0.0, n=1) == (LIVE, Fixed())


def test_a_circle_sets_its_own_share_of_what_its_live_policy_answers():
    """And draws from that policy. Of its canary's requests the gateway's share counts: with a circle that collects
    from every request the canary would never answer."""
    of_live = (replace(HELD_OUT[0], arm=Arm(policy=STUDENT, n=N)), Fixed("holdout"))
    for share in (0.02, 0.5):
        on = with_strategy("fixed", collect_share=share)
        assert planned_for(on, LIVE, share - 0.01) == of_live
        assert planned_for(on, LIVE, share + 0.01) == (LIVE, Fixed())
    everything = with_strategy("fixed", collect_share=1.0)
    assert planned_for(everything, CANARY, 0.09) == of_live
    assert planned_for(everything, CANARY, 0.11) == (CANARY, Fixed())
    assert planned_for(everything, CANARY, 0.09, served=()) == HELD_OUT


def test_the_share_after_the_one_that_is_held_out_is_probes():
    """A tenth, however much a circle collects."""
    learned = Learned(escalation=learned_escalation([Pair(0.0, 1.0)], 0.5))
    for collected, first in ((None, 0.1), (0.5, 0.5)):
        on = with_strategy("distilled_first", collect_share=collected)
        rules = [
            cast(
                DistilledFirst,
                planned(
                    on, LIVE, None, learned, served=frozenset({STUDENT}), is_policy_law=True, position=first + after,
                    holdout_share=0.1,
                )[1],
            ).rule
            for after in (0.05, 0.15)
        ]  # fmt: skip
        assert rules == [None, learned.escalation]


@pytest.mark.parametrize("strategy", ["fixed", "soft", "adaptive", "distilled_first"])
@pytest.mark.parametrize(("reason", "experiment"), [("forced", None), ("experiment", "exp_1"), ("n_below_arm", None)])
def test_what_is_forced_or_in_an_experiment_is_fixed(strategy, reason, experiment):
    """Even where it falls into the holdout: an arm is what it is called."""
    assignment = Assignment(Arm(policy=STUDENT, n=2), reason, experiment)
    for position in (0.0, 0.9):
        assert planned_for(with_strategy(strategy), assignment, position) == (assignment, Fixed())


def live_student(world: World, root: Path) -> str:
    student = proven_candidate(world, root)
    assert send(world, "POST", f"/policies/{student}/promote", {"override_reason": "by hand"}).status == 200
    return student


def test_beside_a_live_policy_the_ledger_goes_on_to_tell_of_best_of_n(gateway, tmp_path):
    world = gateway(holdout_share=0.5)
    student = live_student(world, tmp_path)
    world.engine.script.completions = ["1.0"]
    bodies = [world.client.post("/generate", {**HI, "n": 4}).json for _ in range(12)]
    held_out = {body["id"] for body in bodies if share_of(body["id"]) < 0.5}
    assert 0 < len(held_out) < 12  # else: one in two thousand
    for body in bodies:
        said = (body["arm"], body["arm_reason"], body["selection"]["stop_reason"])
        expected = (f"{BASE}:4", "default", "holdout") if body["id"] in held_out else (f"{student}:1", "live", "fixed")
        assert said == expected
    assert {one.id for one in world.groups(12) if one.is_unbiased and one.requested == 4} == held_out


def test_a_prompt_that_the_reward_model_has_no_room_for_is_not_refused_by_chance(gateway, tmp_path):
    """250 bytes and a template of 8 in a window of 256: one sample answers, and would have been held out or not."""
    world = gateway(holdout_share=0.5)
    live_student(world, tmp_path)
    replies = [world.client.post("/generate", {"prompt": "x" * 250}) for _ in range(8)]
    assert [(reply.status, reply.json["arm_reason"]) for reply in replies] == [(200, "live")] * 8
    assert any(share_of(reply.json["id"]) < 0.5 for reply in replies)  # else: one in 256


def test_shares_are_uniform():
    shares = np.array([share_of(f"request-{i}") for i in range(2000)])
    # Of 2,000 draws the empirical cdf is off by .043 with probability 1e-3 (Kolmogorov).
    assert np.abs(np.sort(shares) - np.arange(2000) / 2000).max() < 0.043
