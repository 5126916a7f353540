"""How many candidates to draw and when to stop: fixed, adaptive, distilled first.

Owns: which strategy answers a request, and the waves of those that look at rewards before they go on. Does not own:
what they have learned (learned.py), its mathematics (`bon_algos.stopping`, `bon_algos.escalation`), scoring and
choosing (best_of_n.py).

Each wave is one streamed engine call, scored before the next: all share one deadline. When a later wave cannot be had
or cannot be scored, the best of what was scored is served, and the group says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import blake2b
from time import monotonic
from typing import Final, Literal, NamedTuple, Protocol, cast

from bon_algos.contracts import Arm, Candidate, CandidateGroup, Route, Sampling, StopReason
from bon_algos.escalation import EscalationRule
from bon_algos.stopping import StoppingRule
from bon_algos.vllm_protocol import Piece
from service.best_of_n import (
    Answer,
    Budget,
    Policy,
    Scorer,
    best_of_n,
    choose,
    finished_count,
    measure_in_time,
    too_late,
)
from service.errors import EngineBroken, EngineUnavailable, GatewayError, PolicyNotServed
from service.experiments import Assignment
from service.learned import Learned
from service.vllm import DrawingWindow, Listener

SEEDS: Final = 2**63


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


class Waves(Protocol):
    """A strategy that looks at rewards before it goes on."""

    def stops(self, n: int) -> tuple[int, ...]:
        """After how many candidates it looks, where the arm has n; ascending."""

    def policy(self, group: CandidateGroup) -> str:
        """Who draws the next wave."""

    def reason_to_stop(self, group: CandidateGroup) -> StopReason | None:
        """None: go on. Never None after the last stop."""

    def gain_missed(self, group: CandidateGroup) -> float | None:
        """What is expected of the draws that were spared up to the arm's n; units of the reward."""


def _rewards(group: CandidateGroup) -> list[float]:
    return [cast(float, group.candidates[i].reward) for i in group.eligible]


# --- which strategy answers ------------------------------------------------------------------------------


def share_of(request_id: str) -> float:
    """Where a request falls in [0, 1): the same on every gateway."""
    return int.from_bytes(blake2b(request_id.encode(), digest_size=8).digest()) / 2**64


def planned(
    route: Route,
    assignment: Assignment,
    n: int | None,
    learned: Learned,
    *,
    is_policy_law: bool,
    position: float,
    holdout_share: float,
) -> tuple[Assignment, Plan]:
    """The strategy that answers, and the arm it aims at. Pure.

    n: what the request names. is_policy_law: whether it is sampled as what was learned from. position: `share_of` the
    request. The first `holdout_share` always has all n of the base policy; of distilled_first the next share is probes.
    What is forced or in an experiment is fixed.
    """
    is_free = assignment.experiment_id is None and assignment.reason in ("default", "live", "n_above_equivalent")
    if route.strategy not in ("adaptive", "distilled_first") or not is_free:
        return assignment, Fixed()
    teacher = Arm(policy=route.base_policy, n=route.default_n if n is None else n)
    if position < holdout_share:
        return replace(assignment, arm=teacher, reason="default"), Fixed("holdout")
    if route.strategy == "adaptive":
        return _adaptive(assignment, learned, is_policy_law=is_policy_law)
    if assignment.reason != "live":
        return _fixed(assignment, "no live policy stands in for this n: best-of-n answered")
    if not is_policy_law:
        return _fixed(replace(assignment, arm=teacher, reason="default"), f"{_UNKNOWN_LAW}: best-of-n answered")
    rule = None if position < 2 * holdout_share else learned.escalation
    return replace(assignment, arm=teacher), DistilledFirst(assignment.arm.policy, rule)


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


# --- waves -----------------------------------------------------------------------------------------------


class Means(NamedTuple):
    """What a strategy draws and scores with."""

    policy: Policy
    reward_model: Scorer
    budget: Budget
    hear: Listener | None


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


async def in_waves(plan: Waves, group: CandidateGroup, means: Means) -> Answer:
    """Draw and score wave by wave until the strategy has enough or time is up."""
    asked, slowest = monotonic(), 0.0
    failure: GatewayError | None = None
    reason: StopReason | None = None
    stops = plan.stops(group.arm.n)
    quorum = min(means.budget.quorum, stops[0])
    for stop in stops:
        began = monotonic()
        group, failure = await _with_wave(group, plan.policy(group), stop, quorum, means)
        slowest = max(slowest, monotonic() - began)
        reason = _interruption(group, failure) or plan.reason_to_stop(group)
        if reason is None and monotonic() + slowest > means.budget.scoring_starts:
            reason = "no_time"
        if reason is not None:
            break
    answered_at = monotonic()
    update = {"stop_reason": reason, "total_seconds": answered_at - means.budget.started}
    group = group.model_copy(update={**update, "gain_missed": plan.gain_missed(group)})
    is_servable = bool(group.scored) and len(group.candidates) > stops[0]
    return choose(group, quorum, None if is_servable else failure)._replace(waited=answered_at - asked)


def _interruption(group: CandidateGroup, failure: GatewayError | None) -> StopReason | None:
    """Why no further wave is drawn, whatever the rewards are."""
    if any(candidate.failure in ("deadline", "not_scored") for candidate in group.candidates):
        return "no_time"
    return None if failure is None else "wave_failed"


async def _with_wave(
    group: CandidateGroup, policy_id: str, stop: int, quorum: int, means: Means
) -> tuple[CandidateGroup, GatewayError | None]:
    """The group with candidates up to `stop`, scored; and what went wrong. Raises what the engine raises in the first
    wave."""
    already, asked = len(group.candidates), monotonic()
    try:
        drawn = await means.policy.sample(
            policy_id,
            group.prompt_token_ids,
            stop - already,
            _further(group.sampling, already),
            _window(means.budget, quorum - finished_count(group)),
            _numbered_from(already, means.hear),
        )
        failure: GatewayError | None = None
    except (EngineUnavailable, EngineBroken, PolicyNotServed) as error:
        if already == 0:
            raise
        drawn, failure = [_NEVER_DRAWN] * (stop - already), error
    if policy_id != group.policy_id:
        drawn = [candidate.model_copy(update={"policy_id": policy_id}) for candidate in drawn]
    seconds = group.engine_seconds + monotonic() - asked
    wave = group.model_copy(update={"candidates": tuple(drawn), "requested": len(drawn)})
    if already == 0 and finished_count(wave) < quorum:
        failure = too_late(wave, f"and {quorum} are needed")
    elif finished_count(wave):
        wave, failure = await measure_in_time(wave, means.budget.deadline, means.reward_model)
    update = {"candidates": group.candidates + wave.candidates, "requested": stop, "engine_seconds": seconds}
    return group.model_copy(update=update), failure


_NEVER_DRAWN: Final = Candidate(text="", token_ids=(), logprobs=(), failure="engine_error")


def _further(sampling: Sampling, already: int) -> Sampling:
    """A seeded request draws what it would draw at once: the engine adds a candidate's place to the seed."""
    if sampling.seed is None or already == 0:
        return sampling
    return sampling.model_copy(update={"seed": (sampling.seed + already) % SEEDS})


def _window(budget: Budget, quorum: int) -> DrawingWindow:
    """quorum: of this wave; 0 where earlier ones suffice."""
    return budget.window._replace(quorum=max(0, quorum))


def _numbered_from(already: int, hear: Listener | None) -> Listener | None:
    """Candidates of a later wave continue the numbering."""
    if hear is None or already == 0:
        return hear
    told = hear

    def continued(piece: Piece) -> None:
        told(piece._replace(candidate=already + piece.candidate))

    return continued
