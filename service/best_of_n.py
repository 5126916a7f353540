"""The hot path: sample, score, choose.

Owns: what becomes of n candidates under one deadline, and the words for it (status, failures). Does not own: who
answers (experiments.py), how many are drawn where that depends on rewards (strategies.py), the engines (vllm.py,
reward.py), the definition of best (CandidateGroup.best), logging.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic, time
from typing import Any, NamedTuple, Protocol, cast

from bon_algos.contracts import (
    Candidate,
    CandidateFailure,
    CandidateGroup,
    Message,
    Outcome,
    Sampling,
    SelectionStatus,
    Strategy,
)
from bon_algos.order import soft_best_of_n_weights, systematic_sample
from bon_algos.scoring import Completion, Score
from bon_algos.vllm_protocol import Listener
from service.errors import DeadlineExceeded, EngineBroken, GatewayError, InvalidField, RewardModelUnavailable
from service.vllm import DrawingWindow


class Policy(Protocol):
    async def sample(
        self,
        policy: str,
        prompt_token_ids: Sequence[int],
        n: int,
        sampling: Sampling,
        window: DrawingWindow,
        hear: Listener | None,
    ) -> list[Candidate]: ...


class Scorer(Protocol):
    async def score(
        self, prompt: str, messages: Sequence[Message] | None, completions: Sequence[str]
    ) -> list[Score]: ...


@dataclass(frozen=True)
class Budget:
    """One deadline for the whole request; times of the monotonic clock, which is the event loop's."""

    started: float
    deadline: float
    scoring_starts: float
    """From here on `quorum` candidates are enough, so that there is time left to score them."""
    quorum: int

    @property
    def seconds(self) -> float:
        return self.deadline - self.started

    @property
    def window(self) -> DrawingWindow:
        return DrawingWindow(soft=self.scoring_starts, hard=self.deadline, quorum=self.quorum)


class Answer(NamedTuple):
    group: CandidateGroup
    """`selected` is None when nothing can be served."""
    failure: GatewayError | None
    """Why nothing is served; the group is logged all the same."""
    waited: float
    """Seconds spent waiting for engines."""


async def best_of_n(
    group: CandidateGroup,
    budget: Budget,
    policy: Policy,
    reward_model: Scorer,
    *,
    wait_for_reward: bool,
    hear: Listener | None = None,
) -> Answer:
    """Fill a group that has no candidates yet. A single sample is scored here only when that is waited for. `hear` is
    told what the engine says, as it says it.

    Raises what the policy engine raises; then there are no candidates to log.
    """
    asked = monotonic()
    drawn = await policy.sample(
        group.policy_id, group.prompt_token_ids, group.requested, group.sampling, budget.window, hear
    )
    group = group.model_copy(update={"candidates": tuple(drawn), "engine_seconds": monotonic() - asked})
    failure: GatewayError | None = None
    if finished_count(group) < budget.quorum:
        failure = too_late(group, f"and {budget.quorum} are needed")
    elif group.requested > 1 or wait_for_reward:
        group, failure = await measure_in_time(group, budget.deadline, reward_model)
    answered = monotonic()
    group = group.model_copy(update={"total_seconds": answered - budget.started})
    return choose(group, budget.quorum, failure)._replace(waited=answered - asked)


def choose(group: CandidateGroup, quorum: int, failure: GatewayError | None = None) -> Answer:
    """Which candidate is served, and the status that says how it came to that. failure: what went wrong so far.

    A single sample is served whatever becomes of its score. When the deadline cut the drawing short, `quorum`
    candidates must have a reward; otherwise one is enough, and the status tells that others are missing.
    """
    late = any(candidate.failure in ("deadline", "not_scored") for candidate in group.candidates)
    if group.requested == 1 and finished_count(group) == 1:
        return _served(group, 0, "single" if failure is None else "reward_failed")
    if failure is None and len(group.scored) < (quorum if late else 1):
        failure = _too_few_rewards(group)
    if failure is not None:
        return _served(group, None, "deadline" if isinstance(failure, DeadlineExceeded) else "reward_failed", failure)
    if late:
        return _served(group, _choice(group), "deadline")
    return _served(group, _choice(group), "ok" if len(group.scored) == group.requested else "partial")


def _choice(group: CandidateGroup) -> int | None:
    """The best, or one drawn by soft best-of-n: by the group's id, so that its record gives the same again."""
    if group.softness is None or not (places := group.eligible):
        return group.best
    weights = soft_best_of_n_weights([cast(float, group.candidates[i].reward) for i in places], group.softness)
    drawn = systematic_sample(weights, 1, random.Random(group.id).random())
    return places[int(drawn.argmax())]


async def measure(group: CandidateGroup, reward_model: Scorer) -> CandidateGroup:
    """The group with its rewards. A candidate without an answer has none, unless all are so. Raises what the reward
    model raises."""
    finished = [i for i, candidate in enumerate(group.candidates) if candidate.finish_reason is not None]
    asked = [Completion(group.prompt, group.messages, candidate.text) for candidate in group.candidates]
    speaking = [i for i in finished if asked[i].answer.strip()]
    places = speaking or finished
    texts = [group.candidates[i].text for i in places]
    scores = await reward_model.score(group.prompt, group.messages, texts)
    candidates = list(group.candidates)
    for i in set(finished) - set(speaking):
        candidates[i] = candidates[i].model_copy(update={"failure": "empty"})
    for i, score in zip(places, scores, strict=True):
        found = {
            "reward": score.reward,
            "disagreement": score.disagreement,
            "failure": score.failure or candidates[i].failure,
        }
        candidates[i] = candidates[i].model_copy(update=found)
    return group.model_copy(update={"candidates": tuple(candidates)})


async def measure_in_time(
    group: CandidateGroup, deadline: float, reward_model: Scorer
) -> tuple[CandidateGroup, GatewayError | None]:
    """The group with its rewards, or with the reason why each has none, and what went wrong."""
    try:
        async with asyncio.timeout_at(deadline):
            return await measure(group, reward_model), None
    except TimeoutError:
        group = _unscored(group, "not_scored")
        return group, too_late(group, "and the reward model had not scored them")
    except (RewardModelUnavailable, EngineBroken) as error:
        return _unscored(group, "reward_error"), error


def _unscored(group: CandidateGroup, failure: CandidateFailure) -> CandidateGroup:
    candidates = tuple(
        candidate if candidate.failure is not None else candidate.model_copy(update={"failure": failure})
        for candidate in group.candidates
    )
    return group.model_copy(update={"candidates": candidates})


def _served(
    group: CandidateGroup, selected: int | None, status: SelectionStatus, failure: GatewayError | None = None
) -> Answer:
    return Answer(group.model_copy(update={"selected": selected, "status": status}), failure, waited=0.0)


def too_late(group: CandidateGroup, rest: str) -> DeadlineExceeded:
    facts = candidate_counts(group)
    return DeadlineExceeded(
        f"when the deadline passed {facts['finished']} of {facts['requested']} candidates had finished {rest}",
        facts={"candidates": facts},
    )


def _too_few_rewards(group: CandidateGroup) -> GatewayError:
    facts = candidate_counts(group)
    if any(candidate.failure == "too_long" for candidate in group.candidates):
        return InvalidField(
            "the candidates came out longer than the reward model's window: lower max_tokens",
            param="max_tokens",
            code="too_long_for_reward_model",
            facts={"candidates": facts},
        )
    return EngineBroken(
        f"the reward model gave {facts['scored']} of {facts['finished']} finished candidates a finite reward",
        code="reward_model_broken",
        facts={"candidates": facts},
    )


def finished_count(group: CandidateGroup) -> int:
    return sum(candidate.finish_reason is not None for candidate in group.candidates)


def candidate_counts(group: CandidateGroup) -> dict[str, Any]:
    """How many were requested, finished, scored and failed, the failed ones by reason."""
    failures = [candidate.failure for candidate in group.candidates if candidate.failure is not None]
    return {
        "requested": group.requested,
        "finished": finished_count(group),
        "scored": len(group.scored),
        "failed": {reason: failures.count(reason) for reason in dict.fromkeys(failures)},
    }


def outcome_of(group: CandidateGroup) -> Outcome:
    """The record of rewards that were measured after the reply."""
    return Outcome(
        id=f"outcome_{group.id}",
        tenant=group.tenant,
        created_at=time(),
        group_id=group.id,
        route=group.route,
        experiment=group.experiment,
        arm=group.arm,
        arm_reason=group.arm_reason,
        reward_model_id=group.reward_model_id,
        rewards=tuple(candidate.reward for candidate in group.candidates),
    )


def margin_of(group: CandidateGroup) -> float | None:
    """By how much the winner's reward exceeds the best of the others; None with fewer than two rewards."""
    reward = group.candidates[cast(int, group.selected)].reward
    others = [c.reward for i, c in enumerate(group.candidates) if i != group.selected and c.reward is not None]
    return None if reward is None or not others else reward - max(others)


def selection_of(group: CandidateGroup) -> dict[str, Any]:
    """How the served candidate was chosen, in the words of a reply."""
    served = group.candidates[cast(int, group.selected)]
    chosen, best = served.reward, group.selected if group.softness is None else group.best
    highest = None if best is None else group.candidates[best].reward
    return {
        "status": group.status,
        "strategy": _strategy_of(group),
        "stop_reason": group.stop_reason,
        "reward_model": group.reward_model_id,
        "reward": chosen,
        "disagreement": served.disagreement,
        "margin": margin_of(group),
        "given_up": None if chosen is None or highest is None else highest - chosen + (group.gain_missed or 0.0),
        "tokens_saved": tokens_saved(group),
    }


def _strategy_of(group: CandidateGroup) -> Strategy:
    """What chose; where the route's strategy had to stand back, what stood in for it."""
    if group.stop_reason in ("fixed", "holdout"):
        return "fixed" if group.softness is None else "soft"
    return "adaptive" if group.candidates[0].policy_id is None else "distilled_first"


def tokens_saved(group: CandidateGroup) -> int:
    """Against all n of the arm, at the mean length of those that were drawn; less than 0 where more were drawn."""
    lengths = [len(candidate.token_ids) for candidate in group.candidates if candidate.finish_reason is not None]
    return round((group.arm.n - len(group.candidates)) * sum(lengths) / len(lengths))


def warnings_of(group: CandidateGroup) -> list[str]:
    """What the caller should know of the winner."""
    chosen = group.candidates[cast(int, group.selected)]
    found = []
    if chosen.finish_reason == "length":
        found.append("the completion was cut at max_tokens")
    if not chosen.text.strip():
        found.append("the completion is empty")
    if group.status == "reward_failed":
        found.append("the reward model did not answer: the completion has no reward")
    return found
