"""A report's rewards: what the reward model that chooses and trains says, and what a second one says of the same draws.

Owns both sections of the record. Does not own the asking (`judge`) nor the frontier (`report_frontier`).

Dimension key:  B prompts · M draws of the reference
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bon_algos.contracts import EvaluationReport, Rewards
from bon_algos.frontier import ratio_of_means
from bon_algos.order import best_of_n_weights, mean_interval
from worker.evaluate import Judged
from worker.judge import NoOpinion, Opinion, Row


def first_rewards(
    judged: Sequence[Judged], summary: EvaluationReport, reward_model_id: str, n: int, seed: int
) -> Rewards:
    """By the reward model that chooses and trains: the summary's numbers, and the share with an interval."""
    reference_B = np.array([row.reward_reference.mean() for row in judged])
    best_B = np.array([best_of_n_weights(row.order_reference, n) @ row.reward_reference for row in judged])
    policy_B = np.array([row.reward_policy.mean() for row in judged])
    return Rewards(
        reward_model_id=reward_model_id,
        policy=summary.reward_policy,
        reference=summary.reward_reference,
        best_of_n=summary.reward_best_of_n,
        gain=summary.reward_gain,
        gain_share=ratio_of_means(policy_B - reference_B, best_B - reference_B, seed),
    )


def second_rewards(
    judged: Sequence[Judged], opinion: Opinion | NoOpinion, n: int, seed: int
) -> tuple[Rewards | None, str]:
    """What the second reward model says, and in words what it does not.

    A prompt counts where it scored something of both sides and of what best-of-n may serve.
    """
    if isinstance(opinion, NoOpinion):
        return None, opinion.why
    policy_B = np.array([_mean_of(row) for row in opinion.policy])
    reference_B = np.array([_mean_of(row) for row in opinion.reference])
    best_B = np.array([second_of_chosen(row, said, n) for row, said in zip(judged, opinion.reference, strict=True)])
    whole_B = np.isfinite(policy_B) & np.isfinite(reference_B) & np.isfinite(best_B)
    if whole_B.sum() < 2:
        return None, f"The second reward model {opinion.reward_model_id} scored {whole_B.sum()} prompts: too few."
    left_out = int((~whole_B).sum())
    policy_B, reference_B, best_B = policy_B[whole_B], reference_B[whole_B], best_B[whole_B]
    rewards = Rewards(
        reward_model_id=opinion.reward_model_id,
        policy=mean_interval(policy_B),
        reference=mean_interval(reference_B),
        best_of_n=mean_interval(best_B),
        gain=mean_interval(policy_B - reference_B),
        gain_share=ratio_of_means(policy_B - reference_B, best_B - reference_B, seed),
    )
    return rewards, f"{left_out} prompts are left out: it could not score them." if left_out else ""


def _mean_of(rewards: Row) -> float:
    known = [reward for reward in rewards if reward is not None]
    return float(np.mean(known)) if known else math.nan


def second_of_chosen(row: Judged, said: Row, k: int) -> float:
    """What the second reward model says of the fresh draw that best-of-k serves; draws it could not score left out."""
    weight_M = best_of_n_weights(row.order_fresh, k)
    known_M = np.array([reward is not None for reward in said])
    total = float(weight_M[known_M].sum())
    values = np.array([reward for reward in said if reward is not None])
    return float(weight_M[known_M] @ values) / total if total > 0 else math.nan
