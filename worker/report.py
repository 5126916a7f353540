"""The whole report of a policy: from draws on held-out prompts to the record that is published beside it.

Owns which number is made of which draws. Does not own the draws and the summary (`evaluate`), the estimators
(`bon_algos.order`, `quantiles`), the rewards and the frontier (`report_rewards`, `report_frontier`), nor how the record
is shown (`model_card`, `report_figure`).

A prompt is one observation throughout. Rewards, win rates and the frontier use all draws of the reference; what needs
texts or the second reward model uses the fresh ones.

Dimension key:  B prompts
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from bon_algos.contracts import (
    Cost,
    EvaluationReport,
    HeldOut,
    Interval,
    Lengths,
    MaybeSides,
    PolicyReport,
    Refusals,
    Sides,
)
from bon_algos.diversity import distinct_n
from bon_algos.frontier import RESAMPLES, Array, win_rate_against_best_of_n
from bon_algos.order import best_of_n_weights, mean_interval
from bon_algos.quantiles import log_quantile_harmonic_mid, standing_against, standing_among_others
from bon_algos.refusals import is_refusal
from worker.evaluate import Judged, share_interval
from worker.judge import NoOpinion, Opinion
from worker.report_frontier import Curve
from worker.report_rewards import first_rewards, second_rewards
from worker.rollouts import Rollout

INTERVALS = (
    "95 %; a prompt is one observation. Means: Student's t over prompts. Ratios (gain share, KL ratio): percentile "
    f"bootstrap over prompts, {RESAMPLES} resamples with a fixed seed."
)


class Subject(NamedTuple):
    """Whose report it is."""

    policy_id: str
    kind: Literal["lora", "full"]
    base_policy_id: str
    parent_policy_id: str
    reference_policy_id: str
    job_id: str
    route: str
    method: str
    created_at: float
    seed: int
    n: int
    reward_model_id: str
    reward_members: int
    """Models that score a candidate before one is chosen."""

    @property
    def shown(self) -> dict[str, Any]:
        """The members of a report that say whose it is."""
        return {name: value for name, value in self._asdict().items() if name in PolicyReport.model_fields}


class Evidence(NamedTuple):
    """What was drawn for it, and what that says at once."""

    judged: Sequence[Judged]
    kl: Sequence[float]
    """(B,); KL(policy ‖ reference) of each prompt; nats."""
    summary: EvaluationReport
    opinion: Opinion | NoOpinion


def policy_report(about: Subject, seen: HeldOut, evidence: Evidence) -> PolicyReport:
    """The record. ValueError with fewer than two prompts."""
    judged, summary, n = evidence.judged, evidence.summary, about.n
    curve = Curve.of(judged, n)
    policy, reference = [row.policy for row in judged], [row.reference for row in judged]
    judge, judge_note = second_rewards(judged, evidence.opinion, n, about.seed)
    against_best_B = [win_rate_against_best_of_n(row.order_policy, row.order_reference, n) for row in judged]
    return PolicyReport(
        **about.shown,
        intervals=INTERVALS,
        held_out=seen,
        reward=first_rewards(judged, summary, about.reward_model_id, n, about.seed),
        judge=judge,
        judge_note=judge_note,
        win_rate_reference=summary.win_rate,
        win_rate_best_of_n=share_interval(against_best_B),
        kl_policy_reference=summary.kl_policy_reference,
        kl_policy_base=summary.kl_policy_base,
        log_quantile=_log_quantile(judged),
        lengths=_lengths(judged, n),
        distinct=tuple(MaybeSides(policy=_distinct(policy, k), reference=_distinct(reference, k)) for k in (1, 2, 3)),
        finish_reasons_policy=_finish_reasons(policy),
        finish_reasons_reference=_finish_reasons(reference),
        refusals_policy=_refusals(policy),
        refusals_reference=_refusals(reference),
        cost=_cost(judged, n, about.reward_members),
        frontier=curve.points(evidence.opinion, judged),
        standing=curve.standing(judged, np.array(evidence.kl), about.seed),
    )


def held_out(
    judged: Sequence[Judged], trained: Set[tuple[int, ...]], ancestors: Sequence[str], unknown: Sequence[str] = ()
) -> HeldOut:
    """Which prompts these are. trained: all that the policy and its ancestors learned from, as tokens. unknown: the
    ancestors whose training nobody knows."""
    draws = [row.order_reference.size for row in judged]
    prompts = {row.pool.prompt_ids for row in judged}
    return HeldOut(
        prompts=len(prompts),
        samples_per_prompt=len(judged[0].policy),
        reference_draws=(min(draws), max(draws)),
        trained_prompts=len(trained),
        ancestors=tuple(ancestors),
        unknown_ancestors=tuple(unknown),
        seen_in_training=len(prompts & trained),
    )


# --- order, length, words --------------------------------------------------------------------------------


def _log_quantile(judged: Sequence[Judged]) -> Sides:
    def of(row: Judged, side: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        return float(side(torch.from_numpy(row.order_policy)[None], torch.from_numpy(row.order_reference)[None]).mean())

    policy_B = [of(row, lambda own, others: log_quantile_harmonic_mid(standing_against(own, others))) for row in judged]
    reference_B = [of(row, lambda _, own: log_quantile_harmonic_mid(standing_among_others(own))) for row in judged]
    return Sides(policy=mean_interval(policy_B), reference=mean_interval(reference_B))


def _lengths(judged: Sequence[Judged], n: int) -> Lengths:
    policy, reference = ([_tokens(getattr(row, side)) for row in judged] for side in ("policy", "reference"))
    best_B = [best_of_n_weights(row.order_fresh, n) @ tokens for row, tokens in zip(judged, reference, strict=True)]
    policy_B, reference_B = (np.array([tokens.mean() for tokens in rows]) for rows in (policy, reference))
    return Lengths(
        policy=mean_interval(policy_B),
        reference=mean_interval(reference_B),
        best_of_n=mean_interval(best_B),
        difference=mean_interval(policy_B - reference_B),
        p90_policy=float(np.percentile(np.concatenate(policy), 90)),
        p90_reference=float(np.percentile(np.concatenate(reference), 90)),
    )


def _tokens(draws: Sequence[Rollout]) -> Array:
    return np.array([len(one.candidate.token_ids) for one in draws], dtype=np.float64)


def _cost(judged: Sequence[Judged], n: int, members: int) -> Cost:
    policy, reference = (
        float(np.mean([_tokens(getattr(row, side)).mean() for row in judged])) for side in ("policy", "reference")
    )
    prompt = float(np.mean([len(row.pool.prompt_ids) for row in judged]))
    return Cost(
        generated_policy=policy,
        generated_best_of_n=n * reference,
        scored_best_of_n=n * members * (prompt + reference),
        cheaper=n * reference / policy if policy > 0 else None,
    )


def _distinct(side: Sequence[Sequence[Rollout]], n: int) -> Interval | None:
    shares = (distinct_n([one.candidate.token_ids for one in draws], n) for draws in side)
    return _interval(share for share in shares if share is not None)


def _finish_reasons(side: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    counts = Counter(str(one.candidate.finish_reason) for draws in side for one in draws)
    return {reason: count / counts.total() for reason, count in sorted(counts.items())}


def _refusals(side: Sequence[Sequence[Rollout]]) -> Refusals:
    verdicts = [[is_refusal(one.candidate.text) for one in draws] for draws in side]
    known = [[verdict for verdict in row if verdict is not None] for row in verdicts]
    judged = sum(map(len, known))
    shares = [float(np.mean(row)) for row in known if row]
    return Refusals(
        share=share_interval(shares) if len(shares) > 1 else None,
        judged=judged,
        unjudged=sum(map(len, verdicts)) - judged,
    )


def _interval(values: Iterable[float]) -> Interval | None:
    """None with fewer than two."""
    found = list(values)
    return mean_interval(found) if len(found) > 1 else None
