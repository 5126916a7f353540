"""What is in the data a job would learn from: rewards, ties, what there is to gain, what leaks. Without torch, no I/O.

Owns: the numbers of a dry run, from the very choice that the worker would make (`acceptance`). Does not own: the
estimators (`order`), finding near-duplicates (`near_duplicates`), reading.

Dimension key:  B prompts · M candidates of each
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import Final

import numpy as np

from bon_algos.acceptance import (
    MIN_FINGERPRINT_TOKENS,
    Choice,
    Pool,
    Prompt,
    Requirements,
    Unusable,
    pool,
    split_sides,
    usable_pools,
)
from bon_algos.ancestors import NO_ANCESTORS, Lineage
from bon_algos.contracts import CandidateGroup, DataReport, GainPoint, Leakage, RewardDistribution, Spread, Trouble
from bon_algos.near_duplicates import near_duplicates
from bon_algos.order import kl_best_of_n_estimate, kl_bound, mean_interval, n_curve

QUANTILES: Final = (0, 5, 25, 50, 75, 95, 100)
HISTOGRAM_BINS: Final = 20
LARGEST: Final = 1e100
"""Beyond it a reward counts as this: sums and squares are to be numbers."""


def data_report(
    choice: Choice,
    wanted: Requirements,
    tokens: Mapping[str, int],
    *,
    n: int,
    held_out_fraction: float,
    groups_read: int,
    is_whole: bool,
    lineage: Lineage | Unusable = NO_ANCESTORS,
) -> DataReport:
    """tokens: of all completions of a chosen group, by its id. n: the best-of-n that the policy is to stand in for.
    lineage: of the policy, or why nobody knows it."""
    accepted = len(choice.chosen)
    trained_before = frozenset[Prompt]() if isinstance(lineage, Unusable) else lineage.trained
    pools, troubles = _pools(choice, wanted, held_out_fraction, trained_before)
    if isinstance(lineage, Unusable):
        troubles = [Trouble(code=lineage.code, message=lineage.message)]
    if not troubles and (trouble := _too_few_tokens(pools, tokens)):
        troubles.append(trouble)
    rows = [pool.ranks for pool in pools if len(pool.scored) > 1]
    curve = _curve(pools, n)
    return DataReport(
        groups_read=groups_read,
        is_whole=is_whole,
        accepted=accepted - choice.rejected.get("too_few_candidates", 0),
        rejected=dict(choice.rejected),
        policies=dict(Counter(group.policy_id for group in choice.chosen for _ in group.candidates)),
        train_prompts=_prompts(pools, "train"),
        held_out_prompts=_prompts(pools, "held_out"),
        groups_per_prompt=_spread([len(pool.groups) for pool in pools]),
        candidates_per_prompt=_spread([pool.num_candidates for pool in pools]),
        rewards=_distribution(choice.chosen),
        tied_pairs=_tied_pairs(rows),
        prompts_all_tied=sum(len(set(row)) == 1 for row in rows) / len(rows) if rows else None,
        effective_n=_effective_n(rows, n),
        curve=curve,
        is_there_gain=curve[-1].gain_low > 0 if curve else None,
        leakage=_leakage(pools) if pools else None,
        would_fail=tuple(troubles),
    )


def _pools(
    choice: Choice, wanted: Requirements, held_out_fraction: float, trained_before: Set[Prompt]
) -> tuple[list[Pool], list[Trouble]]:
    """As the worker would have them; where it would have none, those that there are, and why."""
    try:
        return usable_pools(choice, wanted, held_out_fraction, trained_before), []
    except Unusable as reason:
        trouble = Trouble(code=reason.code, message=reason.message)
    try:
        sides = split_sides(choice.chosen, held_out_fraction, trained_before)
    except ValueError:
        sides = {group.prompt_token_ids: "train" for group in choice.chosen}
    return pool(choice.chosen, sides), [trouble]


def _too_few_tokens(pools: Sequence[Pool], tokens: Mapping[str, int]) -> Trouble | None:
    held_out = sum(tokens[group.id] for entry in pools if entry.side == "held_out" for group in entry.groups)
    if held_out >= MIN_FINGERPRINT_TOKENS:
        return None
    message = f"{held_out} held-out tokens; a fingerprint needs {MIN_FINGERPRINT_TOKENS}"
    return Trouble(code="window_too_small", message=message)


def _prompts(pools: Sequence[Pool], side: str) -> int:
    return len({entry.prompt for entry in pools if entry.side == side})


def _spread(numbers: Sequence[float]) -> Spread | None:
    if not numbers:
        return None
    values = np.asarray(numbers, dtype=np.float64)
    return Spread(
        count=len(values),
        least=float(values.min()),
        median=float(np.median(values)),
        mean=float(values.mean()),
        most=float(values.max()),
    )


def _distribution(groups: Sequence[CandidateGroup]) -> RewardDistribution | None:
    """Of rewards as they were given: what was cut off counts with its own."""
    given = [one.reward for group in groups for one in group.candidates if one.reward is not None]
    if not given:
        return None
    rewards = np.clip(given, -LARGEST, LARGEST)
    counts, edges = np.histogram(rewards, bins=HISTOGRAM_BINS)
    return RewardDistribution(
        count=rewards.size,
        mean=float(rewards.mean()),
        standard_deviation=float(rewards.std()),
        quantiles={str(q): float(np.percentile(rewards, q)) for q in QUANTILES},
        edges=tuple(float(edge) for edge in edges),
        counts=tuple(int(count) for count in counts),
    )


def _tied_pairs(rows: Sequence[Sequence[float]]) -> float | None:
    """Over all pairs of one prompt's candidates."""
    pairs = sum(math.comb(len(row), 2) for row in rows)
    tied = sum(math.comb(count, 2) for row in rows for count in Counter(row).values())
    return tied / pairs if pairs else None


def _effective_n(rows: Sequence[Sequence[float]], n: int) -> float | None:
    """log m − (m − 1)/m = the mean KL(best-of-n ‖ reference) over prompts, solved for m; n where nothing ties."""
    kls = [kl_best_of_n_estimate(row, min(n, len(row))) for row in rows]
    if not kls:
        return None
    kl, low, high = float(np.mean(kls)), 1.0, float(n)
    for _ in range(60):
        middle = (low + high) / 2
        below = math.log(middle) - (middle - 1) / middle < kl
        low, high = (middle, high) if below else (low, middle)
    return float(n) if kl >= kl_bound(n) else low


def _curve(pools: Sequence[Pool], n: int) -> tuple[GainPoint, ...]:
    """Best-of-k at k = 1, 2, 4, … and the largest k up to n that two prompts or more have candidates for."""
    lengths = sorted((len(entry.scored) for entry in pools), reverse=True)
    most = min(n, lengths[1]) if len(lengths) > 1 else 0
    if most < 2:
        return ()
    rows = [(_rewards(entry)[:most], entry.ranks[:most]) for entry in pools if len(entry.scored) >= most]
    value_BM, rank_BM = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    curve = n_curve(value_BM, rank_BM)
    ks = sorted({*(2**i for i in range(most.bit_length()) if 2**i <= most), most})
    points = []
    for k in ks:
        gain = mean_interval(curve.value_PM[:, k - 1] - curve.value_PM[:, 0])
        reward = float(curve.mean[k - 1])
        points.append(GainPoint(k=k, reward=reward, gain=gain.mean, gain_low=gain.low))
    return tuple(points)


def _rewards(entry: Pool) -> list[float]:
    """What its candidates are worth: what was cut off counts with its own reward, wherever it ranks."""
    return [min(max(one.reward, -LARGEST), LARGEST) for one in entry.scored if one.reward is not None]


def _leakage(pools: Sequence[Pool]) -> Leakage:
    sides = [(entry.side, group) for entry in pools for group in entry.groups]
    sessions = {side: {g.session for own, g in sides if own == side and g.session} for side in ("train", "held_out")}
    prompts = {side: {g.prompt_token_ids for own, g in sides if own == side} for side in ("train", "held_out")}
    texts = {group.prompt_token_ids: _said(group) for _, group in sides}
    found = near_duplicates([texts[prompt] for prompt in prompts["held_out"]], [texts[p] for p in prompts["train"]])
    return Leakage(
        prompts=len(prompts["held_out"] & prompts["train"]),
        sessions=len(sessions["held_out"] & sessions["train"]),
        near_duplicates=found,
        held_out_prompts=len(prompts["held_out"]),
    )


def _said(group: CandidateGroup) -> str:
    """What the caller wrote, without the template around it."""
    return group.prompt if group.messages is None else "\n".join(message.content for message in group.messages)
