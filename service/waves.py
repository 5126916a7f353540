"""Candidates in waves, scored before the next is drawn.

Owns: the rounds of engine and reward model under one deadline, and what becomes of one that fails. Does not own: when
there is enough (strategies.py), scoring and choosing (best_of_n.py).

Each wave is one streamed engine call. When a later one cannot be had or cannot be scored, the best of what was scored
is served, and the group says so.
"""

from __future__ import annotations

from time import monotonic
from typing import Final, NamedTuple, Protocol

from bon_algos.contracts import Candidate, CandidateGroup, Sampling, StopReason
from bon_algos.vllm_protocol import Listener, Piece
from service.best_of_n import Answer, Budget, Policy, Scorer, choose, finished_count, measure_in_time, too_late
from service.errors import EngineBroken, EngineUnavailable, GatewayError, PolicyNotServed
from service.vllm import DrawingWindow

SEEDS: Final = 2**63


class Means(NamedTuple):
    """What a strategy draws and scores with."""

    policy: Policy
    reward_model: Scorer
    budget: Budget
    hear: Listener | None


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
