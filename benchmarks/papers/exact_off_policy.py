"""vBoN's gradient from samples of another policy: truncated importance and TOPR's taper, taken to where they end.

Owns the experiment. Gradients are exact expectations over the other policy's law; the weights are the library's.

Dimension key:  S worlds · K outcomes · T tokens · V symbols
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, NamedTuple

from torch import Tensor

from benchmarks.claims import Claim, above
from benchmarks.papers.enumerable import ProductWorld, cell, descend, interval, kl, product_logprob, products, worth
from benchmarks.papers.findings import Effort, Finding, fields_of
from bon_algos.importance import tapered_advantage, truncated_importance
from bon_algos.vbon import variational_return

Tell = Callable[[float], None]
NUM_WORLDS: Final[Mapping[Effort, int]] = {"quick": 6, "default": 24, "full": 96}
N: Final = 4
STEPS: Final = 800
Weigh = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Advantages, log-probs of the policy, those of who drew -> advantages as they are learned from. (S, K) each."""


def _by_importance(advantage_SK: Tensor, logprob_SK: Tensor, sampled_SK: Tensor, *, cap: float) -> Tensor:
    return advantage_SK * truncated_importance(logprob_SK, sampled_SK, max_importance=cap)


EXACT, CAP_2, CAP_1, TOPR, AS_IF = "importance, no cap", "capped at 2", "capped at 1", "TOPR", "taken as the policy's"
WEIGHTS: Final[Mapping[str, Weigh]] = {
    EXACT: partial(_by_importance, cap=math.inf),
    CAP_2: partial(_by_importance, cap=2.0),
    CAP_1: partial(_by_importance, cap=1.0),
    TOPR: tapered_advantage,
    AS_IF: lambda advantage_SK, logprob_SK, sampled_SK: advantage_SK,
}


class Row(NamedTuple):
    """Of S policies where they end."""

    win_rate: Tensor
    kl: Tensor
    kl_best: Tensor
    """KL(π ‖ BoN); nats."""


def other_policy_gradient(effort: Effort, tell: Tell) -> Finding:
    here = products(NUM_WORLDS[effort], seed=9)
    world = here.world
    other_SK = 0.9 * world.best_of(2 * N) + 0.1 * world.reference
    rows = {}
    for index, (name, weigh) in enumerate(WEIGHTS.items()):
        rows[name] = _end(here, other_SK, weigh)
        tell((index + 1) / len(WEIGHTS))
    return Finding(
        title="Gradients from another policy's samples",
        source="truncated importance; TOPR (arXiv:2503.14286), eq. 8; vBoN's objective (arXiv:2407.06057)",
        method=f"{len(world.reward)} worlds: sequences of 3 tokens from 6 symbols, a policy that is a product of "
        "softmaxes and cannot express best-of-n (one that can ends there by any weights: no advantage is left). Who "
        f"draws is nine tenths best-of-{2 * N} of the reference and never learns. KL(π ‖ best-of-{N}) is brought down "
        f"from the reference, {STEPS} steps of Adam at .05, by exact expectations over what that policy draws; the "
        "baseline is the policy's mean return.",
        columns=("samples", "win rate", "KL(π ‖ ref)", "KL(π ‖ BoN)"),
        rows=tuple((name, *map(cell, row)) for name, row in rows.items()),
        claims=fields_of(_claims(rows)),
        remarks="Without a cap the expected gradient is that of the policy's own samples; its variance grows with the "
        "length of a completion. A cap leaves a bias that no number of samples removes: the lower, the more. TOPR's "
        "is as large as that of samples taken as they are: it leaves good ones unweighed, and what it is for, that "
        "bad ones are not pushed down without end, an exact expectation over few outcomes does not show.",
    )


def _end(here: ProductWorld, other_SK: Tensor, weigh: Weigh) -> Row:
    world, logit_STV = here.world, here.logits.clone().requires_grad_()
    tilt_SK, sampled_SK = world.log_tilt(N), other_SK.log()

    def loss() -> Tensor:
        logprob_SK = product_logprob(logit_STV)
        held_SK = logprob_SK.detach()
        return_SK = variational_return(tilt_SK, held_SK, world.reference.log())
        advantage_SK = return_SK - (held_SK.exp() * return_SK).sum(-1, keepdim=True)
        return -(other_SK * weigh(advantage_SK, held_SK, sampled_SK) * logprob_SK).sum()

    descend([logit_STV], loss, STEPS, 0.05)
    logprob_SK = product_logprob(logit_STV.detach())
    seen = worth(logprob_SK, world)
    return Row(seen.win_rate, seen.kl, kl(logprob_SK.exp(), world.best_of(N)))


def _claims(rows: Mapping[str, Row]) -> list[Claim]:
    farther = [(EXACT, CAP_2), (CAP_2, CAP_1), (EXACT, TOPR)]
    return [
        above(
            f"KL(π ‖ BoN): {more} less {less}, lower bound",
            interval(rows[more].kl_best - rows[less].kl_best).low,
            0.0,
        )
        for less, more in farther
    ]
