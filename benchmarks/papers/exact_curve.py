"""What best-of-k is worth for every k from one pool of draws, and whether its standard error tells how far off it is.

Owns the experiment. Worth by enumeration; pools are sampled, prompts too.

Dimension key:  B prompts · K outcomes · M draws of a prompt
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.claims import Claim, at_least
from benchmarks.papers.enumerable import World, tables
from benchmarks.papers.findings import Effort, Finding, fields_of
from bon_algos.order import Array, NCurve, n_curve

Tell = Callable[[float], None]
NUM_POOLS: Final[Mapping[Effort, int]] = {"quick": 100, "default": 400, "full": 1600}
NUM_PROMPTS: Final = 50
M: Final = 16
SIZES: Final = (1, 2, 4, 8, 16)


def curve(effort: Effort, tell: Tell) -> Finding:
    world, rng = tables(1000, 20, seed=17), np.random.default_rng(18)
    exact = {k: float((world.best_of(k) * world.reward).sum(-1).mean()) for k in SIZES}
    pools: list[NCurve] = []
    for number in range(NUM_POOLS[effort]):
        pools.append(_of_a_pool(world, rng))
        tell((number + 1) / NUM_POOLS[effort])
    mean_PM, error_PM = np.stack([one.mean for one in pools]), np.stack([one.standard_error for one in pools])
    return Finding(
        title="The n-curve of one pool, and its standard error",
        source="algorithms.md 1.1: the Rao–Blackwell weights, every n at once",
        method=f"1000 tables of 20 outcomes are all prompts there are; {len(pools)} pools of {NUM_PROMPTS} of them, "
        f"{M} draws each. Reward of best-of-k by `n_curve`, against its enumeration over all prompts. Held: by the "
        "mean of a pool and 1.96 of its standard errors to either side.",
        columns=("k", "enumerated", "mean of pools", "spread of pools", "mean standard error", "held"),
        rows=tuple(_row(k, exact[k], mean_PM[:, k - 1], error_PM[:, k - 1]) for k in SIZES),
        claims=fields_of(_claims(exact, mean_PM, error_PM)),
        remarks="One pool gives every k without bias, and its standard error is the spread "
        "that other pools would show.",
    )


def _of_a_pool(world: World, rng: np.random.Generator) -> NCurve:
    prompt_B = torch.from_numpy(rng.integers(len(world.reward), size=NUM_PROMPTS))
    law_BK, reward_BK = world.reference[prompt_B].numpy(), world.reward[prompt_B].numpy()
    drawn = [rng.choice(reward_K, M, p=law_K) for law_K, reward_K in zip(law_BK, reward_BK, strict=True)]
    return n_curve(drawn, drawn)


def _row(k: int, exact: float, mean_P: Array, error_P: Array) -> tuple[str, ...]:
    held = _held(exact, mean_P, error_P).mean()
    return (str(k), *(f"{one:.3f}" for one in (exact, mean_P.mean(), mean_P.std(ddof=1), error_P.mean(), held)))


def _held(exact: float, mean_P: Array, error_P: Array) -> NDArray[np.bool_]:
    held_P: NDArray[np.bool_] = np.abs(mean_P - exact) <= 1.96 * error_P
    return held_P


def _claims(exact: Mapping[int, float], mean_PM: Array, error_PM: Array) -> list[Claim]:
    return [
        at_least(
            f"k = {k}: pools whose interval holds the enumerated worth",
            float(_held(exact[k], mean_PM[:, k - 1], error_PM[:, k - 1]).mean()),
            0.9,
        )
        for k in SIZES
    ]
