"""Logged candidates under another reward model: who wins, what that costs by either reward, and the n-curve of both.

Owns: what one re-scored group tells and the estimates over groups. Does not own: reading the ledger, scoring. Without
torch. A prompt is one observation, however many groups it has.

Dimension key:  B groups of one n · M candidates of a group
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bon_algos.contracts import CandidateGroup, Interval, Record
from bon_algos.order import Array, mean_interval, n_curve
from bon_algos.serving_order import serving_ranks


class Reranked(NamedTuple):
    """One group under both reward models: its candidates that have a reward of the old one, in drawing order."""

    prompt: str
    """Equal for equal prompts."""
    old_M: Array
    new_M: Array
    is_complete_M: NDArray[np.bool_]
    old_winner: int
    new_winner: int

    @property
    def is_flipped(self) -> bool:
        return self.old_winner != self.new_winner

    @property
    def regret_new(self) -> float:
        """New reward lost by serving the old winner; negative where completeness decided."""
        return float(self.new_M[self.new_winner] - self.new_M[self.old_winner])

    @property
    def regret_old(self) -> float:
        """Old reward lost by serving the new winner."""
        return float(self.old_M[self.old_winner] - self.old_M[self.new_winner])

    @property
    def rank_correlation(self) -> float | None:
        return kendall_tau(self.old_M, self.new_M)


def reranked(group: CandidateGroup, prompt: str, rewards: Mapping[int, float]) -> Reranked:
    """A group with new rewards by place; every candidate that has an old one needs a new one.

    Raises KeyError for one that is missing, ValueError for a group without rewards.
    """
    places = [i for i, candidate in enumerate(group.candidates) if candidate.reward is not None]
    if not places:
        raise ValueError("the group has no rewards")
    old = group.model_copy(update={"candidates": tuple(group.candidates[i] for i in places)})
    renewed = tuple(group.candidates[i].model_copy(update={"reward": rewards[i]}) for i in places)
    new = old.model_copy(update={"candidates": renewed})
    return Reranked(
        prompt=prompt,
        old_M=np.array([candidate.reward for candidate in old.candidates], dtype=np.float64),
        new_M=np.array([candidate.reward for candidate in new.candidates], dtype=np.float64),
        is_complete_M=np.array([candidate.is_complete for candidate in old.candidates]),
        old_winner=_best(old),
        new_winner=_best(new),
    )


def _best(group: CandidateGroup) -> int:
    best = group.best
    assert best is not None
    return best


def kendall_tau(first_M: ArrayLike, second_M: ArrayLike) -> float | None:
    """τ-b: of all pairs that neither side ties, the share ordered alike less the share ordered otherwise, with ties
    taken into account; in [−1, 1]. None where one side ties all its pairs.

    (M,), (M,)
    """
    first, second = np.asarray(first_M, dtype=np.float64), np.asarray(second_M, dtype=np.float64)
    above = np.triu_indices(len(first), k=1)
    one = np.sign(first[:, None] - first)[above]
    other = np.sign(second[:, None] - second)[above]
    untied = float(np.count_nonzero(one)) * float(np.count_nonzero(other))
    return float(one @ other) / untied**0.5 if untied else None


class CurvePoint(Record):
    """Best-of-k, each chosen and valued by the reward model named; `new_by_old` is valued by the new one and chosen by
    the old one."""

    k: int
    old: Interval
    new: Interval
    new_by_old: Interval


class Comparison(Record):
    """What replaying shows; intervals are 95 %, over prompts."""

    groups: int
    prompts: int
    flips: Interval
    """Share of groups whose winner changes."""
    regret_new: Interval
    """New reward lost by serving the old winners."""
    regret_old: Interval
    """Old reward lost by serving the new winners."""
    rank_correlation: Interval | None
    """Kendall's τ-b; None where fewer than two prompts have one."""
    n: int | None
    """Of the curve: the most frequent one among whole groups; None without a curve."""
    curve_groups: int
    curve: tuple[CurvePoint, ...]


def compare(groups: Sequence[Reranked], whole: Sequence[bool]) -> Comparison:
    """whole: which groups are independent draws without a loss, so that a curve may be estimated from them.

    ValueError with fewer than two prompts.
    """
    correlated = [group for group in groups if group.rank_correlation is not None]
    n, alike = _of_one_n([group for group, is_whole in zip(groups, whole, strict=True) if is_whole])
    return Comparison(
        groups=len(groups),
        prompts=len({group.prompt for group in groups}),
        flips=_over_prompts(groups, [float(group.is_flipped) for group in groups]),
        regret_new=_over_prompts(groups, [group.regret_new for group in groups]),
        regret_old=_over_prompts(groups, [group.regret_old for group in groups]),
        rank_correlation=_over_prompts(correlated, [group.rank_correlation or 0.0 for group in correlated])
        if _num_prompts(correlated) > 1
        else None,
        n=n,
        curve_groups=len(alike),
        curve=_curve(alike) if alike else (),
    )


def _of_one_n(groups: Sequence[Reranked]) -> tuple[int | None, list[Reranked]]:
    """The most frequent n of two prompts or more, the larger one of equals, and its groups."""
    by_n: dict[int, list[Reranked]] = {}
    for group in groups:
        by_n.setdefault(len(group.old_M), []).append(group)
    fitting = {n: own for n, own in by_n.items() if _num_prompts(own) > 1}
    if not fitting:
        return None, []
    n = max(fitting, key=lambda n: (len(fitting[n]), n))
    return n, fitting[n]


def _curve(groups: Sequence[Reranked]) -> tuple[CurvePoint, ...]:
    old_BM, new_BM = np.stack([group.old_M for group in groups]), np.stack([group.new_M for group in groups])
    is_complete_BM = np.stack([group.is_complete_M for group in groups])
    by_old, by_new = serving_ranks(old_BM, is_complete_BM), serving_ranks(new_BM, is_complete_BM)
    prompts = [group.prompt for group in groups]
    pairs = ((old_BM, by_old), (new_BM, by_new), (new_BM, by_old))
    curves = [n_curve(value_BM, rank_BM, prompts).intervals() for value_BM, rank_BM in pairs]
    return tuple(
        CurvePoint(k=k, old=old, new=new, new_by_old=new_by_old)
        for k, (old, new, new_by_old) in enumerate(zip(*curves, strict=True), start=1)
    )


def _num_prompts(groups: Sequence[Reranked]) -> int:
    return len({group.prompt for group in groups})


def _over_prompts(groups: Sequence[Reranked], value_B: ArrayLike) -> Interval:
    """The mean of each prompt's mean, with its interval."""
    number = {prompt: place for place, prompt in enumerate(dict.fromkeys(group.prompt for group in groups))}
    place_B = [number[group.prompt] for group in groups]
    return mean_interval(np.bincount(place_B, weights=np.asarray(value_B)) / np.bincount(place_B))
