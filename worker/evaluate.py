"""The report: the finished policy against its reference on prompts it has not learned from.

Owns what is drawn and how draws become the report's numbers. Does not own the estimators (`bon_algos.order`)
nor whether the numbers are good enough: that is decided where traffic is moved.

A prompt is one observation. Every sample is drawn from the engine, the policy's under its own name. The reference's
draws that the ledger holds of a held-out prompt count beside its fresh ones where they are of its law: same reward
model, never learned from. Chosen by what was said of them, or drawn in whatever way, they are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bon_algos.acceptance import MIN_FINGERPRINT_TOKENS
from bon_algos.contracts import EvaluationReport, Fingerprint, Interval
from bon_algos.frontier import Array, win_rate_against_best_of_n
from bon_algos.logprobs import TokenGroup
from bon_algos.order import best_of_n_weights, mean_interval
from bon_algos.serving_order import serving_ranks_of
from bon_algos.steps import SequenceLogprobs
from worker.dataset import LoggedCandidate, PromptPool
from worker.errors import JobFailed
from worker.models import TrainedPolicy, Whose
from worker.rollouts import Rollout

MAX_PROMPTS = 96
"""Beyond this the intervals are narrow enough, and the engine has users."""
MIN_SAMPLES = 16
MAX_LOST_SHARE = 0.02
"""Of completions that the reward model could not read: more, and what is left is another policy's."""
MAX_LOGPROB_DIFFERENCE = {"cpu": 1e-3, "cuda": 2e-2}
"""Nats per token, mean, engine against trainer, by the precision the device computes in."""
CHECKED_PROMPTS = 16
FINGERPRINT_TOKENS = 384


class Judged(NamedTuple):
    """A held-out prompt with fresh samples of the policy and as many of the reference."""

    pool: PromptPool
    policy: Sequence[Rollout]
    reference: Sequence[Rollout]
    logged: Sequence[LoggedCandidate]
    """What the window has of the reference's law beside them."""

    @property
    def order_policy(self) -> Array:
        """(N,); what serving compares, of the policy's draws: ranks among those of both sides."""
        return self._order[0]

    @property
    def order_reference(self) -> Array:
        """(M,); the same of all the reference's draws: the fresh ones, then the ledger's."""
        return self._order[1]

    @property
    def order_fresh(self) -> Array:
        """Of the reference's fresh draws."""
        return self.order_reference[: len(self.reference)]

    @property
    def _order(self) -> Sequence[Array]:
        return serving_ranks_of(self.policy, self._drawn_by_reference)

    @property
    def reward_policy(self) -> Array:
        """(N,); rewards of the policy's draws, one that was cut off with its own. One without ranks last, and is worth
        the worst of the prompt, whichever side has it: what is lost on both sides alike favours neither."""
        return self._rewards(self.policy)

    @property
    def reward_reference(self) -> Array:
        """(M,); the same of the reference's."""
        return self._rewards(self._drawn_by_reference)

    def _rewards(self, draws: Sequence[Rollout | LoggedCandidate]) -> Array:
        known = (one.reward for one in (*self.policy, *self._drawn_by_reference) if one.reward is not None)
        worst = min(known)
        return np.array([worst if one.reward is None else one.reward for one in draws])

    @property
    def _drawn_by_reference(self) -> Sequence[Rollout | LoggedCandidate]:
        return [*self.reference, *self.logged]


def samples_needed(n: int) -> int:
    """Per prompt: best-of-n is estimated without bias from n draws or more."""
    return max(MIN_SAMPLES, n)


def report_of(
    judged: Sequence[Judged], kl_policy_reference: Interval, n: int, kl_policy_base: Interval | None = None
) -> EvaluationReport:
    """The report from the draws. kl_policy_base: where the reference is not the base. Raises JobFailed when too many
    draws have no reward."""
    _require_rewards(judged)
    policy_B = np.array([row.reward_policy.mean() for row in judged])
    reference_B = np.array([row.reward_reference.mean() for row in judged])
    best_B = np.array([best_of_n_weights(row.order_reference, n) @ row.reward_reference for row in judged])
    attainable = float((best_B - reference_B).mean())
    return EvaluationReport(
        prompts=len(judged),
        samples_per_prompt=len(judged[0].policy),
        reward_policy=mean_interval(policy_B),
        reward_reference=mean_interval(reference_B),
        reward_best_of_n=mean_interval(best_B),
        reward_gain=mean_interval(policy_B - reference_B),
        n=n,
        gain_share=float((policy_B - reference_B).mean()) / attainable if attainable > 0 else 0.0,
        win_rate=share_interval(
            [win_rate_against_best_of_n(row.order_policy, row.order_reference, 1) for row in judged]
        ),
        kl_policy_reference=kl_policy_reference,
        kl_policy_base=kl_policy_base,
        mean_tokens_policy=_mean_tokens([row.policy for row in judged]),
        mean_tokens_reference=_mean_tokens([row.reference for row in judged]),
    )


def share_interval(share_B: Sequence[float]) -> Interval:
    """Mean of shares with its interval, cut to [0, 1]."""
    interval = mean_interval(share_B)
    return Interval(mean=interval.mean, low=max(interval.low, 0.0), high=min(interval.high, 1.0))


def kl_by_prompt(judged: Sequence[Judged], logprobs_of_other: SequenceLogprobs) -> list[float]:
    """KL(policy ‖ other) per completion of each prompt: the engine's log-probs of the policy's own samples against
    the trainer's of the other, the reference or the base; nats."""
    other = logprobs_of_other([_token_group(row) for row in judged])
    return [
        float(np.mean([one.logprob for one in row.policy])) - float(logprob_N.mean())
        for row, logprob_N in zip(judged, other, strict=True)
    ]


def logprob_difference(
    policy: TrainedPolicy, groups: Sequence[TokenGroup], seen: Sequence[Sequence[Sequence[float]]], *, of: Whose
) -> float:
    """Mean absolute difference per token between log-probs as the engine saw them and the trainer's; nats."""
    trainer = policy.token_logprobs(groups, of=of)
    pairs = [
        (ours, theirs)
        for own_group, seen_group in zip(trainer, seen, strict=True)
        for own_L, seen_L in zip(own_group, seen_group, strict=True)
        for ours, theirs in zip(own_L, seen_L, strict=True)
    ]
    return sum(abs(ours - theirs) for ours, theirs in pairs) / len(pairs)


def require_same_policy(policy: TrainedPolicy, judged: Sequence[Judged], limit: float) -> float:
    """The log-prob difference between the engine that drew the policy's samples and the trainer.

    Raises JobFailed above the limit: the samples would be another policy's, most often because the engine did
    not apply the adapter.
    """
    rows = judged[:CHECKED_PROMPTS]
    seen = [[one.candidate.logprobs for one in row.policy] for row in rows]
    difference = logprob_difference(policy, [_token_group(row) for row in rows], seen, of="policy")
    if difference > limit:
        message = f"engine and trainer differ by {difference:.2e} nats per token"
        raise JobFailed("served_policy_differs", f"{message}; rounding explains {limit:.0e}")
    return difference


def fingerprint(policy: TrainedPolicy, held_out: Sequence[PromptPool]) -> Fingerprint:
    """Log-probs of logged completions under the policy and the base model, `FINGERPRINT_TOKENS` or more.

    Logged ones, not fresh ones: the same weights from the same window have the same fingerprint, so the same name.
    Raises JobFailed when the window holds too few tokens.
    """
    groups: list[TokenGroup] = []
    tokens = 0
    for completions in range(1, 1 + max(len(pool.candidates) for pool in held_out)):
        for pool in held_out:
            if len(pool.candidates) >= completions and tokens < FINGERPRINT_TOKENS:
                candidate = pool.candidates[completions - 1]
                groups.append(TokenGroup(pool.prompt_ids, [candidate.token_ids]))
                tokens += len(candidate.token_ids)
    if tokens < MIN_FINGERPRINT_TOKENS:
        raise JobFailed("window_too_small", f"{tokens} held-out tokens; a fingerprint needs {MIN_FINGERPRINT_TOKENS}")
    own, base = policy.token_logprobs(groups, of="policy"), policy.token_logprobs(groups, of="base")
    return Fingerprint(
        prompt_token_ids=tuple(tuple(group.prompt_ids) for group in groups),
        completion_token_ids=tuple(tuple(group.completion_ids[0]) for group in groups),
        policy_logprobs=tuple(tuple(rows[0]) for rows in own),
        base_logprobs=tuple(tuple(rows[0]) for rows in base),
    )


def _token_group(row: Judged) -> TokenGroup:
    return TokenGroup(row.pool.prompt_ids, [one.candidate.token_ids for one in row.policy])


def _require_rewards(judged: Sequence[Judged]) -> None:
    draws = [one for row in judged for one in (*row.policy, *row.reference)]
    lost = sum(one.reward is None for one in draws)
    starved = sum(all(one.reward is None for one in side) for row in judged for side in (row.policy, row.reference))
    if lost > MAX_LOST_SHARE * len(draws) or starved:
        raise JobFailed("rewards_missing", f"{lost} of {len(draws)} held-out completions have no reward")


def _mean_tokens(rows: Sequence[Sequence[Rollout]]) -> float:
    return float(np.mean([len(one.candidate.token_ids) for row in rows for one in row]))
