"""The second reward model's opinion of the held-out completions: one that neither chose nor trained anything.

Owns asking it, and the words of a report where there is none. Does not own what is made of its rewards (`report`).
A policy is published without it: the report says in words that it did not answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bon_algos.scoring import Completion
from worker.engine import Engines
from worker.errors import EngineUnavailable, JobFailed
from worker.evaluate import MAX_LOST_SHARE, Judged
from worker.patience import patiently

log = logging.getLogger(__name__)

NOT_CONFIGURED = (
    "No second reward model is configured (BONSAI_JUDGE_REWARD_MODEL): all rewards here are those of the model that "
    "chose and trained, and cannot show whether it was exploited."
)

Row = Sequence[float | None]


class Opinion(NamedTuple):
    """Rewards of every draw, in the order of the rows; None where it could not score."""

    reward_model_id: str
    policy: Sequence[Row]
    reference: Sequence[Row]


class NoOpinion(NamedTuple):
    why: str
    """For the report."""


def second_opinion(
    judge: Engines | None, judged: Sequence[Judged], wait: Callable[[float], None], patience: float
) -> Opinion | NoOpinion:
    """Of all fresh draws. Raises what `wait` raises: the end of the lease, a cancellation."""
    if judge is None:
        return NoOpinion(NOT_CONFIGURED)
    completions = [
        Completion(row.pool.prompt, row.pool.messages, one.candidate.text)
        for side in ("policy", "reference")
        for row in judged
        for one in getattr(row, side)
    ]
    try:
        scores = patiently(lambda: judge.score(completions), wait, patience)
    except (EngineUnavailable, JobFailed) as failure:
        log.error("the second reward model %s did not answer: %s", judge.reward_model_id, failure)
        return NoOpinion(f"The second reward model {judge.reward_model_id} did not answer: {failure}.")
    rewards = [score.reward for score in scores]
    lost = sum(reward is None for reward in rewards)
    if lost > MAX_LOST_SHARE * len(rewards):
        return NoOpinion(
            f"The second reward model {judge.reward_model_id} could not score {lost} of {len(rewards)} completions: "
            "what is left would be another policy's."
        )
    left = iter(rewards)
    policy = [[next(left) for _ in row.policy] for row in judged]
    return Opinion(judge.reward_model_id, policy, [[next(left) for _ in row.reference] for row in judged])
