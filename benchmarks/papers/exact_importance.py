"""Candidates that another policy drew: what best-of-n law is learned from them, with weights and without.

Owns the experiment. Every law is exact, groups of candidates are sampled; the weights are the library's.

Dimension key:  S tables · K outcomes · M candidates of a group · G groups
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import torch
from numpy.random import Generator

from benchmarks.claims import Claim, above
from benchmarks.papers.enumerable import cell, interval, tables
from benchmarks.papers.findings import Effort, Finding, fields_of
from bon_algos.importance import best_of_n_weights_of_shares, mixture_logprob, shares_of_reference
from bon_algos.order import Array, best_of_n_law

Tell = Callable[[float], None]
NUM_TABLES: Final[Mapping[Effort, int]] = {"quick": 6, "default": 24, "full": 96}
NUM_GROUPS: Final = 200
"""Of a table."""
M: Final = 64
LEARNED_N: Final = 4
OTHER_N: Final = 8
"""The other policy is a distilled one: best-of-8 of the reference, and a tenth of the reference."""

REFERENCE: Final = "reference's alone"
AS_IF: Final = "half of each, all taken as the reference's"
OWN_RATIO: Final = "half of each, each by its own ratio"
MIXTURE: Final = "half of each, by the mixture"
OTHER: Final = "the other's alone, by their ratio"
OTHER_CAPPED_AT_2: Final = "the other's alone, by their ratio, at most 2"
OTHER_CAPPED_AT_1: Final = "the other's alone, by their ratio, at most 1"
OTHER_AS_IF: Final = "the other's alone, taken as the reference's"
CAPS: Final[Mapping[str, float]] = {OTHER_CAPPED_AT_2: 2.0, OTHER_CAPPED_AT_1: 1.0}
OF_REFERENCE: Final[Mapping[str, int]] = {REFERENCE: M, AS_IF: M // 2, OWN_RATIO: M // 2, MIXTURE: M // 2} | {
    OTHER: 0,
    OTHER_CAPPED_AT_2: 0,
    OTHER_CAPPED_AT_1: 0,
    OTHER_AS_IF: 0,
}
"""How many of a group's candidates the reference drew."""


def other_policy(effort: Effort, tell: Tell) -> Finding:
    world = tables(NUM_TABLES[effort], 20, seed=9)
    errors: dict[str, list[tuple[float, float]]] = {label: [] for label in OF_REFERENCE}
    for table, (law_K, reward_K) in enumerate(zip(world.reference.numpy(), world.reward.numpy(), strict=True)):
        for label in OF_REFERENCE:
            rng = np.random.default_rng([table, M])
            errors[label].append(_errors(label, law_K, reward_K, rng))
        tell((table + 1) / len(world.reward))
    of_group, of_mean = (
        {label: torch.tensor([pair[place] for pair in pairs]) for label, pairs in errors.items()} for place in (0, 1)
    )
    return Finding(
        title="Candidates of another policy",
        source="algorithms.md 1.7; the balance heuristic (Veach and Guibas, 1995)",
        method=f"{NUM_TABLES[effort]} tables of 20 outcomes; the other policy is nine tenths best-of-{OTHER_N} of the "
        f"reference. Best-of-{LEARNED_N} of the reference is learned from groups of {M} candidates. Distance: total "
        f"variation between what is imitated and the exact law, for a group, and for the mean of {NUM_GROUPS} groups.",
        columns=("candidates", "distance, one group", "distance, mean of groups"),
        rows=tuple((label, cell(of_group[label], 3), cell(of_mean[label], 3)) for label in OF_REFERENCE),
        claims=fields_of(_claims(of_group, of_mean)),
        remarks="Taken as the reference's, another policy's candidates teach a greedier law than best-of-n, however "
        "many there are. Weighed by the mixture of all who drew, none counts for more than twice a draw of the "
        "reference, and they teach more than as many draws of the reference: more of them are where best-of-n is. A "
        "cap on ratios leaves a bias towards what the other policy draws.",
    )


def _errors(label: str, law_K: Array, reward_K: Array, rng: Generator) -> tuple[float, float]:
    """Total variation to best-of-n's law: mean over groups, and of the groups' mean."""
    exact_K = best_of_n_law(law_K, reward_K, LEARNED_N)
    other_K = 0.9 * best_of_n_law(law_K, reward_K, OTHER_N) + 0.1 * law_K
    groups_GK = np.stack([_imitated(label, law_K, other_K, reward_K, rng) for _ in range(NUM_GROUPS)])
    distance_G = np.abs(groups_GK - exact_K).sum(axis=1) / 2
    return float(distance_G.mean()), float(np.abs(groups_GK.mean(axis=0) - exact_K).sum() / 2)


def _imitated(label: str, law_K: Array, other_K: Array, reward_K: Array, rng: Generator) -> Array:
    """The law that imitation of one group goes to. (K,)."""
    num_reference = OF_REFERENCE[label]
    of_reference = rng.choice(len(law_K), num_reference, p=law_K)
    drawn_M = np.concatenate([of_reference, rng.choice(len(law_K), M - num_reference, p=other_K)])
    reference_M = np.log(law_K[drawn_M])
    sampled_M, cap = _sampled(label, law_K, other_K, drawn_M), CAPS.get(label, math.inf)
    share_M = shares_of_reference(reference_M, sampled_M, max_importance=cap)
    weight_M = best_of_n_weights_of_shares(reward_K[drawn_M], share_M, LEARNED_N)
    imitated_K: Array = np.bincount(drawn_M, weights=weight_M, minlength=len(law_K)).astype(np.float64)
    return imitated_K


def _sampled(label: str, law_K: Array, other_K: Array, drawn_M: Array) -> Array:
    """log-probs that the group's draws are taken to have. (M,)."""
    reference_M: Array = np.log(law_K[drawn_M])
    other_M: Array = np.log(other_K[drawn_M])
    num_reference = OF_REFERENCE[label]
    if label in (REFERENCE, AS_IF, OTHER_AS_IF):
        return reference_M
    if label == OWN_RATIO:
        return np.concatenate([reference_M[:num_reference], other_M[num_reference:]])
    return mixture_logprob([reference_M, other_M], [num_reference, M - num_reference])


def _claims(of_group: Mapping[str, torch.Tensor], of_mean: Mapping[str, torch.Tensor]) -> list[Claim]:
    as_if = interval(of_mean[AS_IF] - of_mean[MIXTURE]).low
    capped = interval(of_mean[OTHER_CAPPED_AT_1] - of_mean[OTHER]).low
    own = interval(of_group[OWN_RATIO] - of_group[MIXTURE]).low
    return [
        above("distance of the mean: taken as the reference's less by the mixture, lower bound", as_if, 0.0),
        above("distance of a group: each by its own ratio less by the mixture, lower bound", own, 0.0),
        above("distance of the mean: ratios of at most 1 less ratios without a cap, lower bound", capped, 0.0),
    ]
