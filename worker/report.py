"""The whole report of a policy: from draws on held-out prompts to the record that is published beside it.

Owns which number is made of which draws. Does not own the draws and the summary (`evaluate`), the estimators
(`bon_algos.order`, `frontier`, `quantiles`), nor how the record is shown (`model_card`, `report_figure`).

A prompt is one observation throughout. Rewards, win rates and the frontier use all draws of the reference; what needs
texts or the second reward model uses the fresh ones.

Dimension key:  B prompts · N draws of the policy · M draws of the reference · K sizes of best-of-k
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from typing import NamedTuple

import numpy as np
import torch

from bon_algos.contracts import (
    Cost,
    EvaluationReport,
    FrontierPoint,
    HeldOut,
    Interval,
    Lengths,
    MaybeSides,
    PolicyReport,
    Refusals,
    Rewards,
    Sides,
    Standing,
)
from bon_algos.diversity import distinct_n
from bon_algos.frontier import (
    RESAMPLES,
    Array,
    bootstrap_interval,
    kl_at_win_rate,
    ratio_of_means,
    shown_sizes,
    win_rate_against_best_of_n,
    win_rate_of_best_of_k,
)
from bon_algos.order import best_of_n_weights, kl_best_of_n_estimate, kl_bound, mean_interval
from bon_algos.quantiles import log_quantile_harmonic_mid, standing_against, standing_among_others
from bon_algos.refusals import is_refusal
from worker.evaluate import Judged, share_interval
from worker.judge import NoOpinion, Opinion, Row
from worker.rollouts import Rollout

MOST_K = 256
"""The frontier's last point at most."""
INTERVALS = (
    "95 %; a prompt is one observation. Means: Student's t over prompts. Ratios (gain share, KL ratio): percentile "
    f"bootstrap over prompts, {RESAMPLES} resamples with a fixed seed."
)


class Subject(NamedTuple):
    """Whose report it is."""

    policy_id: str
    base_policy_id: str
    parent_policy_id: str
    job_id: str
    route: str
    method: str
    created_at: float
    seed: int
    n: int
    reward_model_id: str
    reward_members: int
    """Models that score a candidate before one is chosen."""


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
    curve = _Curve.of(judged, n)
    policy, reference = [row.policy for row in judged], [row.reference for row in judged]
    judge, judge_note = _judge(evidence, n, about.seed)
    against_best_B = [win_rate_against_best_of_n(row.order_policy, row.order_reference, n) for row in judged]
    return PolicyReport(
        policy_id=about.policy_id,
        base_policy_id=about.base_policy_id,
        parent_policy_id=about.parent_policy_id,
        job_id=about.job_id,
        route=about.route,
        method=about.method,
        created_at=about.created_at,
        seed=about.seed,
        n=n,
        intervals=INTERVALS,
        held_out=seen,
        reward=_reward(about, evidence),
        judge=judge,
        judge_note=judge_note,
        win_rate_reference=summary.win_rate,
        win_rate_best_of_n=share_interval(against_best_B),
        kl_policy_reference=summary.kl_policy_reference,
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


def held_out(judged: Sequence[Judged], trained: Set[tuple[int, ...]], ancestors: Sequence[str]) -> HeldOut:
    """Which prompts these are. trained: all that the policy and its ancestors learned from, as tokens."""
    draws = [row.order_reference.size for row in judged]
    prompts = {row.pool.prompt_ids for row in judged}
    return HeldOut(
        prompts=len(prompts),
        samples_per_prompt=len(judged[0].policy),
        reference_draws=(min(draws), max(draws)),
        trained_prompts=len(trained),
        ancestors=tuple(ancestors),
        seen_in_training=len(prompts & trained),
    )


# --- rewards ---------------------------------------------------------------------------------------------


def _reward(about: Subject, evidence: Evidence) -> Rewards:
    summary = evidence.summary
    reference_B = np.array([row.reward_reference.mean() for row in evidence.judged])
    best_B = np.array(
        [best_of_n_weights(row.order_reference, about.n) @ row.reward_reference for row in evidence.judged]
    )
    policy_B = np.array([_mean_of([one.reward for one in row.policy]) for row in evidence.judged])
    return Rewards(
        reward_model_id=about.reward_model_id,
        policy=summary.reward_policy,
        reference=summary.reward_reference,
        best_of_n=summary.reward_best_of_n,
        gain=summary.reward_gain,
        gain_share=ratio_of_means(policy_B - reference_B, best_B - reference_B, about.seed),
    )


def _judge(evidence: Evidence, n: int, seed: int) -> tuple[Rewards | None, str]:
    """What the second reward model says, and in words what it does not.

    A prompt counts where it scored something of both sides and of what best-of-n may serve.
    """
    opinion, judged = evidence.opinion, evidence.judged
    if isinstance(opinion, NoOpinion):
        return None, opinion.why
    policy_B = np.array([_mean_of(row) for row in opinion.policy])
    reference_B = np.array([_mean_of(row) for row in opinion.reference])
    best_B = np.array([_chosen(row, said, n) for row, said in zip(judged, opinion.reference, strict=True)])
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


def _chosen(row: Judged, said: Row, k: int) -> float:
    """What the second reward model says of the fresh draw that best-of-k serves; draws it could not score left out."""
    weight_M = best_of_n_weights([one.ranking_reward for one in row.reference], k)
    known_M = np.array([reward is not None for reward in said])
    total = float(weight_M[known_M].sum())
    values = np.array([reward for reward in said if reward is not None])
    return float(weight_M[known_M] @ values) / total if total > 0 else math.nan


# --- the frontier ----------------------------------------------------------------------------------------


class _Curve(NamedTuple):
    """Best-of-k of the reference, prompt by prompt."""

    sizes: tuple[int, ...]
    reward: Array
    win: Array
    kl: Array
    """(B, K) each."""

    @classmethod
    def of(cls, judged: Sequence[Judged], n: int) -> _Curve:
        """For every k that leaves each prompt another draw to win against."""
        sizes = shown_sizes(min(min(row.order_reference.size for row in judged) - 1, MOST_K), n)
        of_prompts: list[list[Array]] = [[], [], []]
        for row in judged:
            order_M, reward_M = row.order_reference, row.reward_reference
            of_prompts[0].append(np.array([best_of_n_weights(order_M, k) @ reward_M for k in sizes]))
            of_prompts[1].append(np.array([win_rate_of_best_of_k(order_M, k) for k in sizes]))
            of_prompts[2].append(np.array([kl_best_of_n_estimate(order_M, k) for k in sizes]))
        return cls(sizes, *(np.stack(rows) for rows in of_prompts))

    def points(self, opinion: Opinion | NoOpinion, judged: Sequence[Judged]) -> tuple[FrontierPoint, ...]:
        return tuple(
            FrontierPoint(
                k=k,
                reward=mean_interval(self.reward[:, place]),
                win_rate=share_interval(self.win[:, place].tolist()),
                kl=float(self.kl[:, place].mean()),
                kl_bound=kl_bound(k),
                judge=_judge_at(k, opinion, judged),
            )
            for place, k in enumerate(self.sizes)
        )

    def standing(self, judged: Sequence[Judged], kl_B: Array, seed: int) -> Standing:
        """Of the policy: all three means of the same prompts, resampled together."""
        win_B = np.array([win_rate_against_best_of_n(row.order_policy, row.order_reference, 1) for row in judged])
        num_sizes = len(self.sizes)

        def frontier_kl(mean: Array) -> float:
            return kl_at_win_rate(mean[2 : 2 + num_sizes], mean[2 + num_sizes :], float(mean[0]))

        together = np.column_stack((win_B, kl_B, self.win, self.kl))
        at_equal_win = bootstrap_interval(frontier_kl, together, seed)
        ratio = bootstrap_interval(lambda mean: float(mean[1]) / frontier_kl(mean), together, seed)
        note = "" if at_equal_win and ratio else self._why_not(float(win_B.mean()))
        return Standing(frontier_kl=at_equal_win, kl_ratio=ratio, note=note)

    def _why_not(self, win: float) -> str:
        last = float(self.win[:, -1].mean())
        if win > last:
            return (
                f"The policy wins {win:.1%}, more than best-of-{self.sizes[-1]} ({last:.1%}): the frontier ends there."
            )
        if win <= self.win[:, 0].mean() or not self.kl.mean(axis=0)[-1] > 0:
            return f"The policy wins {win:.1%}: what costs no KL on the frontier, there is no ratio to."
        return "The win rate of too many resamples lies beyond the frontier's ends: there are too few prompts."


def _judge_at(k: int, opinion: Opinion | NoOpinion, judged: Sequence[Judged]) -> Interval | None:
    if isinstance(opinion, NoOpinion) or k > min(len(row.reference) for row in judged):
        return None
    said = [_chosen(row, rewards, k) for row, rewards in zip(judged, opinion.reference, strict=True)]
    return _interval(value for value in said if math.isfinite(value))


# --- order, length, words --------------------------------------------------------------------------------


def _log_quantile(judged: Sequence[Judged]) -> Sides:
    def of(row: Judged, side: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        return float(side(torch.from_numpy(row.order_policy)[None], torch.from_numpy(row.order_reference)[None]).mean())

    policy_B = [of(row, lambda own, others: log_quantile_harmonic_mid(standing_against(own, others))) for row in judged]
    reference_B = [of(row, lambda _, own: log_quantile_harmonic_mid(standing_among_others(own))) for row in judged]
    return Sides(policy=mean_interval(policy_B), reference=mean_interval(reference_B))


def _lengths(judged: Sequence[Judged], n: int) -> Lengths:
    policy, reference = ([_tokens(getattr(row, side)) for row in judged] for side in ("policy", "reference"))
    best_B = [
        best_of_n_weights([one.ranking_reward for one in row.reference], n) @ tokens
        for row, tokens in zip(judged, reference, strict=True)
    ]
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
