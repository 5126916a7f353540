"""What a circle decides from what it sees: each budget, each refusal, each stop, and the drift law."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bon_algos.contracts import Circle, CircleSpec, Interval, PolicyRecord, Trial, Turn
from bon_algos.order import kl_bound
from service.circle_rules import (
    DAY_SECONDS,
    Begin,
    CancelJob,
    End,
    Facts,
    FreshGroups,
    JobFacts,
    Promote,
    Prove,
    Stop,
    Submit,
    TrialFacts,
    Try,
    Wait,
    decide,
    foreseen_kl,
    needs_groups,
    through_gate,
)
from tests.service.records import BASE, STUDENT, policy, route
from tests.service.test_reports import a_report

OTHER = "pol-" + "7" * 16
NOW = 1_000_000.0
JOB = "job_" + "1" * 32
FIT = policy(STUDENT)
UNFIT = FIT.model_copy(update={"tainted": True}), policy(STUDENT, state="failed")


def interval(mean: float, reach: float = 0.1) -> Interval:
    return Interval(mean=mean, low=mean - reach, high=mean + reach)


def spec(**changes: object) -> CircleSpec:
    return CircleSpec.model_validate({"n": 4, "min_groups": 100, **changes})


def circle(**changes: object) -> Circle:
    return Circle.model_validate({"route": "default", "since": 0.0, "spec": spec(), **changes})


def turn(**changes: object) -> Turn:
    return Turn.model_validate({"number": 1, "began_at": NOW - 60, "parent": BASE, **changes})


def over(seconds: float = 100.0, ago: float = 3600.0, **changes: object) -> Turn:
    return turn(phase="over", began_at=NOW - ago, seconds=seconds, outcome="promoted", **changes)


READY = Facts(now=NOW, route=route(), counted=150, fresh=FreshGroups(100, interval(1.0)))


def report(gain: float = 1.0, judge: float | None = 0.5, kl: float = 1.0, **changes: object):
    found = a_report()
    rewards = found.reward
    second = None if judge is None else rewards.model_copy(update={"gain": interval(judge)})
    return found.model_copy(
        update={
            "reward": rewards.model_copy(update={"gain": interval(gain), "reference": interval(2.0)}),
            "judge": second,
            "judge_note": "nobody was asked",
            "kl_policy_reference": interval(kl),
            **changes,
        }
    )


# --- whether a turn begins -------------------------------------------------------------------------------


def test_a_turn_begins_with_enough_fresh_groups_that_promise_a_gain():
    assert decide(circle(), READY) == Begin()


@pytest.mark.parametrize(
    ("changes", "facts", "said"),
    [
        ({"counted": 60}, READY, "90 of 100 fresh groups"),
        ({}, replace(READY, fresh=None), "of 100 fresh groups"),
        ({}, replace(READY, fresh=FreshGroups(99, interval(1.0))), "99 of 100 fresh groups that a curve"),
        ({}, replace(READY, fresh=FreshGroups(100, interval(0.05))), "gains 0.05"),
        ({"spec": spec(min_gain=0.9)}, READY, "no more than 0.9"),
        ({"spec": spec(budgets={"jobs_per_day": 1}), "turns": (over(),)}, READY, "1 jobs in 24 hours"),
        ({"spec": spec(budgets={"gpu_seconds_per_day": 150}), "turns": (over(),)}, READY, "about 100"),
    ],
)
def test_a_turn_waits(changes, facts, said):
    decision = decide(circle(**changes), facts)
    assert isinstance(decision, Wait)
    assert said in decision.reason


@pytest.mark.parametrize(
    ("changes", "is_needed"),
    [
        ({}, True),
        ({"counted": 60}, False),
        ({"status": "stopped"}, False),
        ({"turn": turn()}, False),
        ({"live_policy": OTHER}, False),
        ({"spec": spec(max_turns=2), "num_turns": 2}, False),
        ({"spec": spec(budgets={"max_kl": 0.6})}, False),
        ({"spec": spec(budgets={"jobs_per_day": 1}), "turns": (over(),)}, False),
        ({"spec": spec(budgets={"gpu_seconds_per_day": 150}), "turns": (over(),)}, False),
    ],
)
def test_groups_are_looked_at_where_nothing_else_forbids_a_turn(changes, is_needed):
    assert needs_groups(circle(**changes), replace(READY, fresh=None)) == is_needed


def test_yesterdays_jobs_are_in_no_budget():
    before = over(ago=DAY_SECONDS + 1)
    limits = {"jobs_per_day": 1, "gpu_seconds_per_day": 100}
    assert decide(circle(spec=spec(budgets=limits), turns=(before,)), READY) == Begin()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spec": spec(max_turns=2), "num_turns": 2}, "all 2 turns"),
        ({"refusals": 3}, "3 turns in a row"),
        ({"spec": spec(budgets={"max_kl": 0.6})}, "0.81 nats"),
        ({"live_policy": OTHER}, "somebody else"),
    ],
)
def test_a_circle_stops_by_itself(changes, said):
    decision = decide(circle(**changes), READY)
    assert isinstance(decision, Stop)
    assert said in decision.reason


@pytest.mark.parametrize("unfit", UNFIT)
def test_a_circle_whose_live_policy_cannot_be_served_stops(unfit):
    """No group of it will ever come."""
    facts = replace(READY, route=route(STUDENT), live=unfit, counted=0)
    decision = decide(circle(live_policy=STUDENT), facts)
    assert isinstance(decision, Stop)
    assert "tainted or failed" in decision.reason
    served = replace(facts, live=FIT, counted=READY.counted)
    assert decide(circle(live_policy=STUDENT), served) == Begin()


@pytest.mark.parametrize("m", [1, 2, 4, 16, 4096])
def test_by_the_drift_law_best_of_4_of_best_of_m_is_best_of_4m(m):
    """log n − (n − 1)/n nats (`order.kl_bound`); m is known by the KL that was measured."""
    aims_at_4 = spec(method={"type": "bon_sft"})
    assert foreseen_kl(circle(spec=aims_at_4, kl_base=kl_bound(m))) == pytest.approx(kl_bound(4 * m), abs=1e-6)


def test_a_turn_is_foreseen_by_what_its_method_aims_at():
    further = spec(method={"type": "offline_bond", "offline_bond": {"backward_n": 20}})
    assert foreseen_kl(circle(spec=further)) == pytest.approx(kl_bound(20), abs=1e-6)
    aims_at_none = spec(method={"type": "rloo"})
    assert foreseen_kl(circle(spec=aims_at_none)) == pytest.approx(kl_bound(4), abs=1e-6)


# --- its job ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "decision"),
    [
        (JobFacts("running", 10, None, ""), Wait("the job is running")),
        (JobFacts("paused", 10, None, ""), Wait("the job is paused")),
        (JobFacts("succeeded", 10, STUDENT, ""), Prove(STUDENT)),
        (JobFacts("failed", 10, None, "empty_window: nothing"), End("failed", "empty_window: nothing")),
        (JobFacts("cancelled", 10, None, ""), End("failed", "the job was cancelled")),
        (None, End("failed", "the job is gone")),
    ],
)
def test_what_becomes_of_a_job_becomes_of_its_turn(job, decision):
    assert decide(circle(turn=turn(job_id=JOB)), replace(READY, job=job)) == decision


def test_a_turn_without_a_job_submits_one():
    assert decide(circle(turn=turn()), READY) == Submit()


def test_a_job_over_the_days_gpu_seconds_is_cancelled():
    limited = {"spec": spec(budgets={"gpu_seconds_per_day": 150}), "turns": (over(),)}
    facts = replace(READY, job=JobFacts("running", 51, None, ""))
    assert isinstance(decide(circle(**limited, turn=turn(job_id=JOB)), facts), CancelJob)


# --- the gate --------------------------------------------------------------------------------------------


def proving(**facts: object):
    found = Facts(**{**vars(READY), "policy": policy(STUDENT), "report": report(), "is_served": True, **facts})
    return decide(circle(turn=turn(phase="proving", policy=STUDENT)), found)


def test_through_the_gate_and_proved_it_becomes_shadow():
    assert proving() == Try("shadow")
    assert proving(is_served=False) == Wait("engines have not proved the policy yet")
    assert proving(policy=policy(STUDENT, fingerprint=None)) == Wait("engines have not proved the policy yet")


@pytest.mark.parametrize(
    "facts",
    [{"policy": None}, {"policy": policy(STUDENT, state="failed")}, {"report": None}],
)
def test_what_is_broken_goes_no_further(facts):
    assert isinstance(proving(**facts), End)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gain": 0.05}, "no more than 0 for sure"),
        ({"gain": -1.0}, "no more than 0 for sure"),
        ({"judge": 0.05}, "it may fall by 0"),
        ({"judge": None}, "no second reward model looked: nobody was asked"),
        ({"kl": 10.5}, "10.50 nats"),
        ({"kl_policy_base": interval(11.0)}, "11.00 nats"),
        ({"held_out": a_report().held_out.model_copy(update={"seen_in_training": 2})}, "2 held-out prompts"),
    ],
)
def test_the_gate_refuses(changes, said):
    refused = through_gate(spec(), report(**changes))
    assert isinstance(refused, End)
    assert (refused.outcome, refused.stops) == ("refused", False)
    assert said in refused.reason


def test_a_margin_lets_the_second_reward_fall_by_as_much():
    assert through_gate(spec(gate={"judge_margin": 0.2}), report(judge=-0.05)) is None
    assert through_gate(spec(gate={"judge_margin": 0.1}), report(judge=-0.05)) is not None


def test_without_a_second_reward_only_where_the_operator_says_so():
    assert through_gate(spec(gate={"needs_judge": False}), report(judge=None)) is None


def test_second_reward_that_surely_falls_while_reward_rises_stops_the_circle():
    """With whatever margin: the first is being exploited, and every further turn would exploit it more."""
    refused = through_gate(spec(gate={"judge_margin": 100.0}), report(judge=-0.5))
    assert isinstance(refused, End)
    assert refused.stops


# --- shadow and canary -----------------------------------------------------------------------------------


def trying(
    stage: str = "shadow",
    *,
    on: str | None = None,
    trial: TrialFacts | None = None,
    tried: PolicyRecord | None = FIT,
    **changes: object,
):
    held = Trial(id="trial_1", policy=STUDENT, share=0.1, salt="s", since=NOW - 100)
    on_trial = route().model_copy(update={on or stage: held})
    shown = trial or TrialFacts(60, 60, NOW - 100, interval(2.5))
    facts = replace(READY, route=on_trial, policy=tried, report=report(), trial=shown)
    rules = {"shadow": {"share": 0.1, "answers": 50}, "canary": {"share": 0.1, "answers": 50, "seconds": 50}}
    return decide(circle(spec=spec(**rules), turn=turn(phase=stage, policy=STUDENT), **changes), facts)


def test_shadow_then_canary_then_live():
    assert trying() == Try("canary")
    assert trying("canary") == Promote()
    assert trying(trial=TrialFacts(40, 40, NOW, interval(2.5))) == Wait("40 of 50 answers as shadow")
    assert trying("canary", trial=TrialFacts(60, 60, NOW - 10, interval(2.5))) == Wait("40 s more as canary")


@pytest.mark.parametrize(
    ("trial", "said"),
    [
        (TrialFacts(10, 7, NOW - 100, None), "3 of 10 requests had no answer"),
        (TrialFacts(60, 60, NOW - 100, interval(1.5)), "its reward is 1.5"),
    ],
)
def test_a_trial_that_goes_wrong_is_withdrawn(trial, said):
    decision = trying("canary", trial=trial)
    assert isinstance(decision, End)
    assert (decision.outcome, decision.stops) == ("withdrawn", False)
    assert said in decision.reason


@pytest.mark.parametrize("stage", ["shadow", "canary"])
@pytest.mark.parametrize("unfit", [None, *UNFIT])
def test_a_policy_on_trial_that_cannot_be_served_any_more_has_failed(stage, unfit):
    """It will never have its answers."""
    decision = trying(stage, tried=unfit, trial=TrialFacts(0, 0, NOW, None))
    assert isinstance(decision, End)
    assert (decision.outcome, decision.stops) == ("failed", False)


def test_nine_requests_without_an_answer_say_nothing_yet():
    assert trying(trial=TrialFacts(9, 0, NOW, None)) == Wait("0 of 50 answers as shadow")


def test_who_takes_the_trial_away_stops_the_circle():
    facts = replace(READY, policy=FIT, report=report())
    decision = decide(circle(turn=turn(phase="canary", policy=STUDENT)), facts)
    assert isinstance(decision, End)
    assert decision.stops


def test_a_promotion_that_was_done_and_not_written_down_is_written_down():
    facts = replace(READY, route=route(STUDENT))
    assert decide(circle(turn=turn(phase="canary", policy=STUDENT)), facts) == Promote()


def test_a_circle_that_is_stopped_ends_its_turn_and_then_waits():
    stopped = circle(status="stopped", reason="stopped by key_1")
    assert decide(stopped, READY) == Wait("stopped by key_1")
    under_way = stopped.model_copy(update={"turn": turn(job_id=JOB)})
    assert decide(under_way, READY) == End("stopped", "stopped by key_1")
