"""LITI: a finished policy taken back towards its reference, share by share.

Owns the experiment. A policy is a product of softmaxes, whose logits are its weights; gradients are exact.

Dimension key:  S worlds · K outcomes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from benchmarks.claims import Claim, above
from benchmarks.papers.enumerable import (
    ProductWorld,
    Worth,
    cell,
    descend,
    expected_surrogate,
    interval,
    product_logprob,
    products,
    worth,
)
from benchmarks.papers.findings import Curve, Effort, Finding, fields_of

Tell = Callable[[float], None]
NUM_WORLDS: Final[Mapping[Effort, int]] = {"quick": 12, "default": 40, "full": 100}
N: Final = 16
SHARES: Final = (0.25, 0.5, 0.75, 1.0)


def interpolation(effort: Effort, tell: Tell) -> Finding:
    here = products(NUM_WORLDS[effort], seed=1)
    finished = _finished(here, 400 if effort == "quick" else 1000)
    tell(0.9)
    found = {share: _taken_back(here, finished, share) for share in SHARES}
    return Finding(
        title="LITI: a policy taken back towards its reference",
        source="WARP (arXiv:2406.16768), LITI",
        method=f"{len(finished)} worlds: sequences of 3 tokens from 6 symbols, a policy that is a product of "
        f"softmaxes, trained by BOND at n = {N} and β = ½ with exact gradients. Its logits are then put a share of the "
        "way from the reference's to where they ended; nothing is trained again.",
        columns=("share", "win rate", "KL(π ‖ ref)", "reward"),
        rows=tuple((f"{share:g}", cell(one.win_rate), cell(one.kl), cell(one.reward)) for share, one in found.items()),
        claims=fields_of(_claims(found)),
        remarks="A dial: win rate and KL rise together along it, and each quarter of the way brings less win rate than "
        "the one before, and less for each nat. Reward is in standard deviations of the reference's.",
        x_label="KL(π ‖ ref), nats",
        y_label="win rate",
        curves=(
            Curve(
                label="shares of ¼ to 1",
                x=tuple(float(one.kl.mean()) for one in found.values()),
                y=tuple(float(one.win_rate.mean()) for one in found.values()),
            ),
        ),
    )


def _finished(here: ProductWorld, steps: int) -> Tensor:
    """The logits that training ends at."""
    logit_STV, world = here.logits.clone().requires_grad_(), here.world
    best_SK, tilt_SK, reference_SK = world.best_of(N), world.log_tilt(N), world.reference.log()

    def loss() -> Tensor:
        logprob_SK = product_logprob(logit_STV)
        return expected_surrogate(logprob_SK, reference_SK, best_SK, tilt_SK, jeffreys_weight=0.5).sum()

    descend([logit_STV], loss, steps, 0.05)
    return logit_STV.detach()


def _taken_back(here: ProductWorld, finished: Tensor, share: float) -> Worth:
    return worth(product_logprob(torch.lerp(here.logits, finished, share)), here.world)


def _claims(found: Mapping[float, Worth]) -> list[Claim]:
    claims, path = [], list(found.items())
    for (less, before), (more, after) in pairwise(path):
        label = f"share {more:g} less {less:g}, lower bound"
        claims.append(above(f"win rate, {label}", interval(after.win_rate - before.win_rate).low, 0.0))
        claims.append(above(f"KL(π ‖ ref), {label}", interval(after.kl - before.kl).low, 0.0))
    first, *_, third, last = found.values()
    of_last = (last.win_rate - third.win_rate) / (last.kl - third.kl)
    dearer = interval((first.win_rate - 0.5) / first.kl - of_last).low
    return [*claims, above("win rate for a nat, first quarter less last, lower bound", dearer, 0.0)]
