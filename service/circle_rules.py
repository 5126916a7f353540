"""What a circle does next: pure, no I/O, no clock.

Owns: when a turn may begin, the gate that its policy goes through, when it goes on from shadow to canary to live, and
when the circle stops by itself. Does not own: finding the facts and doing what is decided (circle_driver.py).

    collecting ─▶ training ─▶ proving ─▶ shadow ─▶ canary ─▶ live, and again
        │             │           │          │         │
     budgets       failed     refused    withdrawn  withdrawn

The gate is the paired report on held-out prompts. What is decided is written into the turn, which goes one way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from bon_algos.contracts import (
    FINAL_JOB_STATES,
    TURNS_KEPT,
    Circle,
    CircleSpec,
    Interval,
    JobState,
    PolicyRecord,
    PolicyReport,
    Route,
    TrialRule,
    Turn,
    TurnOutcome,
)

DAY_SECONDS: Final = 86_400.0
JUDGED_FROM: Final = 10
"""Requests that a trial must have had before its losses say anything."""


@dataclass(frozen=True)
class JobFacts:
    state: JobState
    seconds: float
    """GPU-seconds."""
    policy: str | None
    error: str


@dataclass(frozen=True)
class FreshGroups:
    """What the n-curve says of the groups that came since the last turn."""

    groups: int
    gain: Interval
    """Best-of-n over one sample."""


@dataclass(frozen=True)
class TrialFacts:
    exposures: int
    answers: int
    since: float
    reward: Interval | None


@dataclass(frozen=True)
class Facts:
    """All that a decision may depend on, beside the circle. None: not known, or not there."""

    now: float
    route: Route
    counted: int
    """Groups that the route's count tells now."""
    fresh: FreshGroups | None = None
    job: JobFacts | None = None
    live: PolicyRecord | None = None
    policy: PolicyRecord | None = None
    """Of the turn under way."""
    report: PolicyReport | None = None
    is_served: bool = False
    trial: TrialFacts | None = None


@dataclass(frozen=True)
class Wait:
    reason: str


@dataclass(frozen=True)
class Begin:
    """A turn, from the live policy."""


@dataclass(frozen=True)
class Submit:
    """The turn's job."""


@dataclass(frozen=True)
class CancelJob:
    reason: str


@dataclass(frozen=True)
class Prove:
    """The job has made a policy: look at it."""

    policy: str


@dataclass(frozen=True)
class Try:
    stage: Literal["shadow", "canary"]


@dataclass(frozen=True)
class Promote:
    pass


@dataclass(frozen=True)
class End:
    """The turn is over."""

    outcome: TurnOutcome
    reason: str
    stops: bool = False
    """The circle with it."""


@dataclass(frozen=True)
class Stop:
    """The circle, until somebody starts it again."""

    reason: str


Decision = Wait | Begin | Submit | CancelJob | Prove | Try | Promote | End | Stop


def decide(circle: Circle, facts: Facts) -> Decision:
    """The next thing to do."""
    turn = circle.turn
    is_moved = facts.route.live_policy != circle.live_policy
    if is_moved and turn is not None and turn.policy is not None and turn.policy == facts.route.live_policy:
        return Promote()  # done before a crash or a stop; what remains is to write it down
    if circle.status == "stopped":
        return Wait(circle.reason) if turn is None else End("stopped", circle.reason)
    if is_moved:
        reason = "somebody else moved the live policy: look, and start the circle again"
        return Stop(reason) if turn is None else End("stopped", reason, stops=True)
    if turn is None:
        return _collecting(circle, facts)
    match turn.phase:
        case "training":
            return _training(circle, turn, facts)
        case "proving":
            return _proving(circle, turn, facts)
        case "shadow" | "canary":
            return _trying(circle, turn, turn.phase, facts)
        case "over":
            raise AssertionError("a turn that is over is no turn under way")


# --- whether a turn may begin ----------------------------------------------------------------------------


def needs_groups(circle: Circle, facts: Facts) -> bool:
    """Whether what comes next depends on `Facts.fresh`, which costs much to find out."""
    is_collecting = circle.turn is None and circle.status == "running"
    return is_collecting and facts.route.live_policy == circle.live_policy and _held_back(circle, facts) is None


def _collecting(circle: Circle, facts: Facts) -> Decision:
    if (held_back := _held_back(circle, facts)) is not None:
        return held_back
    return _too_few(circle, facts) if facts.fresh is None else _whether_to_gain(circle.spec, facts.fresh)


def _held_back(circle: Circle, facts: Facts) -> Decision | None:
    """Why no turn begins, whatever the groups would say."""
    spec, budgets = circle.spec, circle.spec.budgets
    if facts.live is not None and _is_unfit(facts.live):
        return Stop("the live policy is tainted or failed: roll back, or promote another, and start the circle again")
    if spec.max_turns is not None and circle.num_turns >= spec.max_turns:
        return Stop(f"all {spec.max_turns} turns are done")
    if circle.refusals >= spec.max_refusals:
        return Stop(f"{circle.refusals} turns in a row promoted nothing")
    if (foreseen := foreseen_kl(circle)) > budgets.max_kl:
        return Stop(f"another turn would be {foreseen:.2f} nats from the first reference; at most {budgets.max_kl:g}")
    today = of_last_day(circle.turns, facts.now)
    if len(today) >= budgets.jobs_per_day:
        return Wait(f"{len(today)} jobs in 24 hours: the budget")
    spent, next_one = sum(turn.seconds for turn in today), max((turn.seconds for turn in circle.turns), default=0.0)
    if spent + next_one > budgets.gpu_seconds_per_day:
        return Wait(f"{spent:.0f} GPU-seconds in 24 hours, and the next job needs about {next_one:.0f}: the budget")
    return _too_few(circle, facts) if facts.counted - circle.counted < spec.min_groups else None


def _too_few(circle: Circle, facts: Facts) -> Wait:
    return Wait(f"{max(0, facts.counted - circle.counted)} of {circle.spec.min_groups} fresh groups")


def of_last_day(turns: Sequence[Turn], now: float) -> list[Turn]:
    """Those that budgets count."""
    return [turn for turn in turns if now - turn.began_at < DAY_SECONDS]


def turns_kept(turns: Sequence[Turn], now: float) -> tuple[Turn, ...]:
    """The newest, and however many budgets count."""
    return tuple(turns[-max(TURNS_KEPT, len(of_last_day(turns, now))) :])


def _whether_to_gain(spec: CircleSpec, fresh: FreshGroups) -> Decision:
    if fresh.groups < spec.min_groups:
        return Wait(f"{fresh.groups} of {spec.min_groups} fresh groups that a curve can be drawn from")
    if fresh.gain.low <= spec.min_gain:
        low = fresh.gain.low
        return Wait(f"best-of-n gains {fresh.gain.mean:.3g} (from {low:.3g}): no more than {spec.min_gain:g} for sure")
    return Begin()


def foreseen_kl(circle: Circle) -> float:
    """KL to the first reference after one more turn, nats. The drift law: best-of-m has x − 1 + e^−x, where x = log m,
    and best-of-n of it x + log n in the place of x. What was measured of the live policy says at which x it stands, and
    n is what the method aims at, which may be more than a request draws."""
    x = _log_size(circle.kl_base) + circle.spec.log_aim
    return x - 1 + math.exp(-x)


def _log_size(kl: float) -> float:
    """The x ≥ 0 with x − 1 + e^−x = kl, which rises with x; by halving, to 1e-9."""
    low, high = 0.0, max(0.0, kl) + 1
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if middle - 1 + math.exp(-middle) < kl else (low, middle)
    return low


# --- its job ---------------------------------------------------------------------------------------------


def _training(circle: Circle, turn: Turn, facts: Facts) -> Decision:
    job = facts.job
    if turn.job_id is None:
        return Submit()
    if job is None:
        return End("failed", "the job is gone")
    if job.state == "succeeded" and job.policy is not None:
        return Prove(job.policy)
    if job.state in FINAL_JOB_STATES:
        return End("failed", job.error or f"the job was {job.state}")
    if job.state == "paused":
        return Wait("the job is paused")
    earlier = sum(one.seconds for one in of_last_day(circle.turns, facts.now))
    if earlier + job.seconds > circle.spec.budgets.gpu_seconds_per_day:
        return CancelJob("the job is over the budget of GPU-seconds")
    return Wait(f"the job is {job.state}")


# --- the gate --------------------------------------------------------------------------------------------


def _proving(circle: Circle, turn: Turn, facts: Facts) -> Decision:
    policy = facts.policy
    if policy is None or _is_unfit(policy):
        return _failed(policy)
    if facts.report is None:
        return End("refused", "the policy has no report that could be read")
    if (refused := through_gate(circle.spec, facts.report)) is not None:
        return refused
    if policy.fingerprint is None or not facts.is_served:
        return Wait("engines have not proved the policy yet")
    return Try("shadow")


def _is_unfit(policy: PolicyRecord) -> bool:
    """Whether no engine may serve it any more: it stays so."""
    return policy.tainted or policy.state == "failed"


def _failed(policy: PolicyRecord | None) -> End:
    """Of a turn whose policy is gone or unfit."""
    reason = "" if policy is None or policy.fingerprint is None else policy.fingerprint.reason
    return End("failed", reason or "the policy is gone, tainted or refused by an engine")


def through_gate(spec: CircleSpec, report: PolicyReport) -> End | None:
    """Why the report keeps a policy back; None: it may go on."""
    gain, judge, gate = report.reward.gain, report.judge, spec.gate
    if report.held_out.seen_in_training:
        return End("refused", f"{report.held_out.seen_in_training} held-out prompts were trained on")
    if judge is not None and judge.gain.high < 0 < gain.low:
        return End("refused", "the second reward fell while reward rose: the first is being exploited", stops=True)
    if gain.low <= gate.least_gain:
        return End("refused", f"reward rose by {_text(gain)}: no more than {gate.least_gain:g} for sure")
    if (kl := kl_base_of(report)) > spec.budgets.max_kl:
        return End("refused", f"{kl:.2f} nats from the first reference; at most {spec.budgets.max_kl:g}")
    if judge is None:
        return End("refused", f"no second reward model looked: {report.judge_note}") if gate.needs_judge else None
    if judge.gain.low < -gate.judge_margin:
        return End("refused", f"the second reward rose by {_text(judge.gain)}: it may fall by {gate.judge_margin:g}")
    return None


def kl_base_of(report: PolicyReport) -> float:
    """Nats per completion, to the base."""
    return (report.kl_policy_base or report.kl_policy_reference).mean


def _text(interval: Interval) -> str:
    return f"{interval.mean:.3g} [{interval.low:.3g}, {interval.high:.3g}]"


# --- shadow and canary -----------------------------------------------------------------------------------


def _trying(circle: Circle, turn: Turn, stage: Literal["shadow", "canary"], facts: Facts) -> Decision:
    assert turn.policy is not None
    if facts.policy is None or _is_unfit(facts.policy):
        return _failed(facts.policy)
    held = facts.route.stage_of(turn.policy)
    if held is None or facts.trial is None:
        return End("withdrawn", f"the policy is the route's {stage} no more", stops=True)
    if (stage, held) == ("shadow", "canary"):
        return Try("canary")  # done before a crash; what remains is to write it down
    rule = circle.spec.shadow if stage == "shadow" else circle.spec.canary
    if (trouble := _trouble(rule, facts.trial, facts.report)) is not None:
        return End("withdrawn", f"as {stage}: {trouble}")
    missing = rule.answers - facts.trial.answers
    if missing > 0:
        return Wait(f"{facts.trial.answers} of {rule.answers} answers as {stage}")
    if (left := rule.seconds - (facts.now - facts.trial.since)) > 0:
        return Wait(f"{left:.0f} s more as {stage}")
    return Try("canary") if stage == "shadow" else Promote()


def _trouble(rule: TrialRule, trial: TrialFacts, report: PolicyReport | None) -> str | None:
    """What is wrong with a trial. The online comparison is an experiment's; here only a fall is seen that needs none:
    worse in traffic than the parent was on held-out prompts."""
    lost = trial.exposures - trial.answers
    if trial.exposures >= JUDGED_FROM and lost > rule.most_lost * trial.exposures:
        return f"{lost} of {trial.exposures} requests had no answer"
    if report is not None and trial.reward is not None and trial.answers >= JUDGED_FROM:
        parent = report.reward.reference
        if trial.reward.high < parent.low:
            return f"its reward is {_text(trial.reward)}, the parent's was {_text(parent)}"
    return None
