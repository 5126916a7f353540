"""How many candidates to draw and when to stop: fixed, adaptive, distilled first.

Owns: which strategy answers a request, and when those that look at rewards have enough. Does not own: drawing
(waves.py, best_of_n.py), what strategies have learned (learned.py), its mathematics (`bon_algos.stopping`,
`bon_algos.escalation`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Final, Literal, cast

from bon_algos.contracts import Arm, CandidateGroup, Route, StopReason
from bon_algos.escalation import EscalationRule
from bon_algos.stopping import StoppingRule
from service.best_of_n import (
    Answer,
    best_of_n,
)
from service.experiments import Assignment
from service.learned import Learned
from service.waves import Means, in_waves


@dataclass(frozen=True)
class Fixed:
    """All n at once."""

    stop_reason: Literal["fixed", "holdout"] = "fixed"

    def stops(self, n: int) -> tuple[int, ...]:
        return (n,)


@dataclass(frozen=True)
class Adaptive:
    """In waves, until the next one is not worth its tokens."""

    rule: StoppingRule

    def stops(self, n: int) -> tuple[int, ...]:
        return self.rule.stops

    def policy(self, group: CandidateGroup) -> str:
        return group.policy_id

    def reason_to_stop(self, group: CandidateGroup) -> StopReason | None:
        if not group.scored:
            return "wave_failed"
        drawn = len(group.candidates)
        tokens = sum(len(candidate.token_ids) for candidate in group.candidates)
        if not self.rule.is_enough(_rewards(group), tokens / drawn, drawn):
            return None
        return "cap" if drawn == self.rule.stops[-1] else "gain_below_price"

    def gain_missed(self, group: CandidateGroup) -> float | None:
        missing, rewards = group.arm.n - len(group.candidates), _rewards(group)
        if not rewards:
            return None
        return self.rule.gain(rewards, missing) if missing > 0 else 0.0


@dataclass(frozen=True)
class DistilledFirst:
    """One sample of the live policy, then n of the base policy where that is not good enough."""

    student: str
    rule: EscalationRule | None
    """None: this request is a probe, which tells what escalating is worth, and always escalates."""

    def stops(self, n: int) -> tuple[int, ...]:
        return (1, 1 + n)

    def policy(self, group: CandidateGroup) -> str:
        return group.policy_id if group.candidates else self.student

    def reason_to_stop(self, group: CandidateGroup) -> StopReason | None:
        if len(group.candidates) > 1:
            return "probe" if self.rule is None else "below_threshold"
        sample = group.candidates[0]
        if self.rule is None or sample.reward is None or not sample.is_complete:
            return None
        return None if sample.reward < self.rule.threshold else "above_threshold"

    def gain_missed(self, group: CandidateGroup) -> float | None:
        if len(group.candidates) > 1:
            return 0.0
        reward = group.candidates[0].reward
        return None if self.rule is None or reward is None else self.rule.gain_missed(reward)


Plan = Fixed | Adaptive | DistilledFirst


def _rewards(group: CandidateGroup) -> list[float]:
    return [cast(float, group.candidates[i].reward) for i in group.eligible]


# --- which strategy answers ------------------------------------------------------------------------------


def share_of(group_id: str) -> float:
    """Where a group falls in [0, 1), by its id: nobody can choose it."""
    return int.from_bytes(blake2b(group_id.encode(), digest_size=8).digest()) / 2**64


def planned(
    route: Route,
    assignment: Assignment,
    n: int | None,
    learned: Learned,
    *,
    served: frozenset[str],
    is_policy_law: bool,
    position: float,
    holdout_share: float,
) -> tuple[Assignment, Plan]:
    """The strategy that answers, and the arm it aims at. Pure.

    n: what the request names. served: see Snapshot. is_policy_law: whether it is sampled as what was learned from.
    position: `share_of` its group. What would not have all n of the policy that best-of-n draws from always has them in
    the first share, see `_held_out_share`; of distilled_first the next share is probes. What is forced or in an
    experiment is fixed.
    """
    is_free = assignment.experiment_id is None and assignment.reason in ("default", "live", "n_above_equivalent")
    sampled = route.best_of_n_policy if route.best_of_n_policy in served else route.base_policy
    teacher = Arm(policy=sampled, n=route.default_n if n is None else n)
    looks_at_rewards = route.strategy in ("adaptive", "distilled_first")
    share = _held_out_share(route, assignment, holdout_share)
    may_be_held_out = (is_free or assignment.reason == "canary") and teacher.n > 1
    if may_be_held_out and (looks_at_rewards or assignment.arm != teacher) and position < share:
        return replace(assignment, arm=teacher, reason="default", experiment_id=None), Fixed("holdout")
    if not looks_at_rewards or not is_free:
        return assignment, Fixed()
    if route.strategy == "adaptive":
        return _adaptive(assignment, learned, is_policy_law=is_policy_law)
    if assignment.reason != "live":
        return _fixed(assignment, "no live policy stands in for this n: best-of-n answered")
    if not is_policy_law:
        return _fixed(replace(assignment, arm=teacher, reason="default"), f"{_UNKNOWN_LAW}: best-of-n answered")
    rule = None if position < share + holdout_share else learned.escalation
    return replace(assignment, arm=teacher), DistilledFirst(assignment.arm.policy, rule)


def _held_out_share(route: Route, assignment: Assignment, holdout_share: float) -> float:
    """Of what the live policy answers a circle sets its own. Not of what its canary answers: a circle that collects
    from every request would never see its canary answer one."""
    return holdout_share if route.collect_share is None or assignment.reason != "live" else route.collect_share


_UNKNOWN_LAW: Final = "the route's strategy knows rewards at temperature 1 with nothing cut off or penalised"


def _adaptive(assignment: Assignment, learned: Learned, *, is_policy_law: bool) -> tuple[Assignment, Plan]:
    n = assignment.arm.n
    if n == 1:
        return assignment, Fixed()
    if not is_policy_law:
        return _fixed(assignment, f"{_UNKNOWN_LAW}: fixed n answered")
    if learned.why_no_rules is not None:
        return _fixed(assignment, f"{learned.why_no_rules}: fixed n answered")
    rule = learned.rules.get(n)
    if rule is None:
        return _fixed(assignment, "stopping early saves nothing at this n: fixed n answered")
    return assignment, Adaptive(rule)


def _fixed(assignment: Assignment, warning: str) -> tuple[Assignment, Plan]:
    return replace(assignment, warnings=(*assignment.warnings, warning)), Fixed()


# --- what it does ---------------------------------------------------------------------------------------


async def answered(plan: Plan, group: CandidateGroup, means: Means, *, wait_for_reward: bool) -> Answer:
    """Fill a group that has no candidates yet. Raises what the policy engine raises while there is none to log."""
    if isinstance(plan, Fixed):
        return await best_of_n(
            group,
            means.budget,
            means.policy,
            means.reward_model,
            wait_for_reward=wait_for_reward,
            hear=means.hear,
        )
    return await in_waves(plan, group, means)
