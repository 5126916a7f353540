"""What gradient noise decides, on tables of outcomes with sampled gradients.

Owns the moving anchor against hard copies (BOND, Fig. 5) and all candidates by their weights against winners alone
(ours). Laws and worths are exact; only gradients are sampled.

Dimension key:  S tables · K outcomes · N candidates · R groups of tables
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.claims import Claim, above, at_most
from benchmarks.papers.enumerable import World, Worth, cell, interpolated, interval, kl, tables, worth
from benchmarks.papers.exact_jbond import TableRun, mean_path
from benchmarks.papers.findings import Curve, Effort, Finding, fields_of, verdict
from bon_algos.anchor import EmaAnchor
from bon_algos.bond import best_of_two, j_bond_loss, quantile_reward_tie_aware
from bon_algos.imitation import best_of_n_imitation
from bon_algos.order import Array, best_of_n_weights

Tell = Callable[[float], None]

# --- the anchor's motion ---------------------------------------------------------------------------------

RATE, COPY_STEPS = 0.02, 50
TABLES_PER_GROUP = 128
NUM_GROUPS: dict[Effort, int] = {"quick": 4, "default": 8, "full": 24}
AT_NATS = (0.3, 0.7)
STEPS = {0.5: 250, 0.1: 600}
"""Of a run, by the size of its steps."""


class NoisyRun:
    """J-BOND with one policy sample and two anchor samples for each table and step."""

    def __init__(self, world: World, learning_rate: float, *, is_copied: bool, seed: int) -> None:
        self.world, self.learning_rate, self.is_copied = world, learning_rate, is_copied
        self.rng = torch.Generator().manual_seed(seed)
        self.logit_SK = world.reference.log().requires_grad_()
        self.anchor = EmaAnchor({"logits": self.logit_SK})
        self.policy_P: list[Worth] = [self._worth(self.logit_SK)]
        self.anchor_P: list[Worth] = [self._worth(self.logit_SK)]

    def run(self, steps: int) -> NoisyRun:
        for step in range(1, steps + 1):
            self._step()
            if not self.is_copied or step % COPY_STEPS == 0:
                self.anchor.update({"logits": self.logit_SK}, 1.0 if self.is_copied else RATE)
            if step % 5 == 0:
                self.policy_P.append(self._worth(self.logit_SK))
                self.anchor_P.append(self._worth(self.anchor.tensors["logits"].double()))
        return self

    def _step(self) -> None:
        anchor_SK, logprob_SK = self.anchor.tensors["logits"].double().log_softmax(-1), self.logit_SK.log_softmax(-1)
        own_S1 = torch.multinomial(logprob_SK.detach().exp(), 1, generator=self.rng)
        pair_S2 = torch.multinomial(anchor_SK.exp(), 2, replacement=True, generator=self.rng)
        reward_S, reward_S2 = self.world.reward.gather(1, own_S1)[:, 0], self.world.reward.gather(1, pair_S2)
        winner_S1 = pair_S2.gather(1, best_of_two(reward_S2)[:, None])
        loss, _ = j_bond_loss(
            logprob_SK.gather(1, winner_S1)[:, 0],
            logprob_SK.gather(1, own_S1)[:, 0],
            anchor_SK.gather(1, own_S1)[:, 0],
            quantile_reward_tie_aware(reward_S, reward_S2),
        )
        (slope_SK,) = torch.autograd.grad(loss * len(reward_S), self.logit_SK)
        with torch.no_grad():
            self.logit_SK -= self.learning_rate * slope_SK

    def _worth(self, logit_SK: Tensor) -> Worth:
        """Means over each group of tables. (R,)."""
        of_tables = worth(logit_SK.detach().log_softmax(-1), self.world)
        return Worth(*(one_S.view(-1, TABLES_PER_GROUP).mean(dim=1) for one_S in of_tables))


def reward_at(path: list[Worth], nats: float) -> Tensor:
    kl_PR, reward_PR = torch.stack([one.kl for one in path]), torch.stack([one.reward for one in path])
    return interpolated(torch.full_like(kl_PR[0], nats), kl_PR, reward_PR)


def jbond_ema(effort: Effort, tell: Tell) -> Finding:
    world = tables(NUM_GROUPS[effort] * TABLES_PER_GROUP, 20, seed=6)
    few = tables(8 if effort == "quick" else 48, 20, seed=7)
    exact, noisy = {}, {}
    for rate, steps in STEPS.items():
        for is_copied in (False, True):
            run = TableRun(few, learning_rate=rate, quantile_reward=quantile_reward_tie_aware)
            exact[rate, is_copied] = run.run(steps, *((1.0, COPY_STEPS) if is_copied else (RATE, 1)))
            noisy[rate, is_copied] = NoisyRun(world, rate, is_copied=is_copied, seed=8).run(steps)
            tell((len(noisy)) / 4)
    return Finding(
        title="J-BOND: an anchor that moves against one that is copied",
        source="BOND (arXiv:2407.14622), Fig. 5: η = .02 against a copy every 50 steps, γ = 0",
        method=f"Exact: {len(few.reward)} tables of 20 outcomes, expected gradients. 1 sample: {len(world.reward)} "
        "tables, one policy sample and two anchor samples of each at each step, reported by groups of "
        f"{TABLES_PER_GROUP}; n = 2, β = ½, plain steps of ½ or .1 on logits. Reward: gain in standard deviations of "
        "the reference's, where the KL (1 sample: the mean KL of a group) is that given.",
        columns=("run", *(f"reward at {nats:g} nats" for nats in AT_NATS), "reward, end", "KL, end"),
        rows=tuple(_ema_rows(exact, noisy)),
        claims=fields_of(_ema_claims(noisy)),
        remarks=_ema_remarks(exact, noisy),
        x_label="KL(π ‖ ref), nats",
        y_label="reward, standard deviations of the reference's",
        curves=_ema_curves(exact[0.5, False], exact[0.5, True], noisy),
    )


Exact = dict[tuple[float, bool], TableRun]
Noisy = dict[tuple[float, bool], NoisyRun]
"""By size of the steps and whether the anchor is copied."""


def _ema_rows(exact: Exact, noisy: Noisy) -> list[tuple[str, ...]]:
    rows = []
    for rate, is_copied in exact:
        name = f"steps of {rate:g}, {'copied' if is_copied else 'moving average'}"
        rows.append(_exact_row(f"exact, {name}", exact[rate, is_copied]))
        rows.append(_noisy_row(f"1 sample, {name}", noisy[rate, is_copied].policy_P))
        if not is_copied:
            rows.append(_noisy_row(f"1 sample, {name}: the anchor itself", noisy[rate, is_copied].anchor_P))
    return rows


def _exact_row(name: str, run: TableRun) -> tuple[str, ...]:
    return (name, *(cell(run.reward_at(nats)) for nats in AT_NATS), cell(run.reward_PS[-1]), cell(run.kl_PS[-1]))


def _noisy_row(name: str, path: list[Worth]) -> tuple[str, ...]:
    at = [cell(reward_at(path, nats)) if path[-1].kl.min() >= nats else "–" for nats in AT_NATS]
    return (name, *at, cell(path[-1].reward), cell(path[-1].kl))


def _ahead_exact(exact: Exact, rate: float, nats: float) -> Tensor:
    return exact[rate, False].reward_at(nats) - exact[rate, True].reward_at(nats)


def _ahead(noisy: Noisy, rate: float, nats: float) -> Tensor:
    return reward_at(noisy[rate, False].policy_P, nats) - reward_at(noisy[rate, True].policy_P, nats)


def _ema_claims(noisy: Noisy) -> list[Claim]:
    """An average of noisy weights is better than the weights: its noise is less, and KL counts noise."""
    smooth = noisy[0.5, False]
    averaged = interval(reward_at(smooth.anchor_P, 0.3) - reward_at(smooth.policy_P, 0.3))
    return [
        above(
            "1 sample, steps of ½, reward at .3 nats: the averaged anchor less its policy, lower bound", averaged.low, 0
        ),
        above(
            "1 sample, steps of .1, reward at .7 nats: moving average less copies, lower bound",
            interval(_ahead(noisy, 0.1, 0.7)).low,
            0.0,
        ),
    ]


def _ema_remarks(exact: Exact, noisy: Noisy) -> str:
    said = "; ".join(
        f"at {nats:g} nats and steps of {rate:g}: {cell(_ahead_exact(exact, rate, nats))} with exact gradients, "
        f"{cell(_ahead(noisy, rate, nats))} with one sample"
        for nats in AT_NATS
        for rate in STEPS
    )
    return (
        f"{verdict(_ema_claims(noisy))}, as a difference of a hundredth or two. Reward of the moving "
        f"average less that of copies, {said}. So two things are in it: with small steps the policy lags, "
        "and a copied anchor that jumps costs "
        "reward with no noise at all; with large steps and exact gradients copies are as good or better, and noise "
        "turns that around. Noise speaks for averages in another way too: the averaged anchor, an average of the "
        "weights, is clearly better than its own policy where steps are large."
    )


def _ema_curves(smooth: TableRun, copied: TableRun, noisy: Noisy) -> tuple[Curve, ...]:
    curves = [
        Curve(label=f"exact, {name}", x=mean_path(run.kl_PS), y=mean_path(run.reward_PS))
        for name, run in (("moving average", smooth), ("copied", copied))
    ]
    for is_copied, name in ((False, "moving average"), (True, "copied")):
        path = noisy[0.5, is_copied].policy_P
        curves.append(_path_curve(f"1 sample, {name}", path))
    curves.append(_path_curve("1 sample, the averaged anchor", noisy[0.5, False].anchor_P))
    return tuple(curves)


def _path_curve(label: str, path: list[Worth]) -> Curve:
    return Curve(label=label, x=mean_path([one.kl for one in path]), y=mean_path([one.reward for one in path]))


# --- all candidates against winners ----------------------------------------------------------------------

GROUP = 16
SIZES = (2, 4, 8, 16)
NUM_TABLES: dict[Effort, int] = {"quick": 16, "default": 48, "full": 128}
IMITATION_STEPS = 200


def winner_only(reward_N: Array, n: int) -> Array:
    """All on the best of the first n: what imitation of served answers has."""
    weight_N = np.zeros(GROUP)
    weight_N[reward_N[:n].argmax()] = 1.0
    return weight_N


def block_winners(reward_N: Array, n: int) -> Array:
    """Evenly on the winners of all disjoint blocks of n."""
    places = reward_N.reshape(-1, n).argmax(axis=1) + np.arange(0, GROUP, n)
    return np.bincount(places, minlength=GROUP) * n / GROUP


WEIGHTINGS: dict[str, Callable[[Array, int], Array]] = {
    "winner of the first n": winner_only,
    "winners of blocks of n": block_winners,
    "all 16 by their weights": best_of_n_weights,
}


class Outcome(NamedTuple):
    variance: Tensor
    """Of the gradient at the start, summed over logits."""
    win_rate: Tensor
    kl_best: Tensor
    """KL(BoN ‖ π) after all steps; nats."""


def weights(effort: Effort, tell: Tell) -> Finding:
    world = tables(NUM_TABLES[effort], 20, seed=9)
    found: dict[int, dict[str, Outcome]] = {}
    for index, n in enumerate(SIZES):
        found[n] = {name: _imitated(world, weigh, n) for name, weigh in WEIGHTINGS.items()}
        tell((index + 1) / len(SIZES))
    return Finding(
        title="Imitation: all 16 candidates by their weights against winners alone, equal data",
        source="Ours; BOND (arXiv:2407.14622) eq. 13 keeps the winner",
        method=f"{len(world.reward)} tables of 20 outcomes, a fresh group of {GROUP} candidates for each at each of "
        f"{IMITATION_STEPS} steps, plain steps of .3 on logits; all weightings see the same groups. Variance: of the "
        "gradient at the reference, over 200 groups of each table, summed over logits.",
        columns=("weighting", "gradient variance", "of the winner's", "win rate", "KL(BoN ‖ π)"),
        rows=tuple(_weights_row(n, name, found[n]) for n in SIZES for name in WEIGHTINGS),
        claims=fields_of([claim for n in SIZES[:-1] for claim in _weights_claims(n, found[n])]),
        remarks="The expected gradient is the same, its noise is less: all 16 by their weights vary less than the "
        "winners of blocks, which see the same candidates, and far less than one winner. At n = 16 all weight is on "
        "the winner of 16 and the three are one. Less noise is less KL(BoN ‖ π) after equal steps; it hardly shows "
        "in the win rate, where noise to either side cancels.",
        x_label="n",
        y_label="variance of the gradient, summed over logits",
        curves=tuple(
            Curve(label=name, x=SIZES, y=tuple(float(found[n][name].variance.mean()) for n in SIZES))
            for name in WEIGHTINGS
        ),
    )


def _imitated(world: World, weigh: Callable[[Array, int], Array], n: int) -> Outcome:
    rng = torch.Generator().manual_seed(10)
    start_SK, best_SK = world.reference.log(), world.best_of(n)
    slopes = torch.stack([_slope(start_SK, world, weigh, n, rng) for _ in range(200)])
    logit_SK = start_SK
    for _ in range(IMITATION_STEPS):
        logit_SK = logit_SK - 0.3 * _slope(logit_SK, world, weigh, n, rng)
    logprob_SK = logit_SK.log_softmax(-1)
    return Outcome(slopes.var(dim=0).sum(-1), worth(logprob_SK, world).win_rate, kl(best_SK, logprob_SK.exp()))


def _slope(
    logit_SK: Tensor, world: World, weigh: Callable[[Array, int], Array], n: int, rng: torch.Generator
) -> Tensor:
    """Of one group of candidates for each table."""
    drawn_SN = torch.multinomial(world.reference, GROUP, replacement=True, generator=rng)
    reward_SN = world.reward.gather(1, drawn_SN).numpy()
    weight_SN = torch.from_numpy(np.stack([weigh(reward_N, n) for reward_N in reward_SN]))
    logit_SK = logit_SK.detach().requires_grad_()
    loss_S = best_of_n_imitation(logit_SK.log_softmax(-1).gather(1, drawn_SN), weight_SN)
    return torch.autograd.grad(loss_S.sum(), logit_SK)[0]


def _weights_row(n: int, name: str, found: dict[str, Outcome]) -> tuple[str, ...]:
    own, winner = found[name], found["winner of the first n"]
    share_S = own.variance / winner.variance
    return (f"n = {n}: {name}", cell(own.variance), cell(share_S), cell(own.win_rate), cell(own.kl_best))


def _weights_claims(n: int, found: dict[str, Outcome]) -> list[Claim]:
    winner, blocks, every = found.values()
    less = interval(every.variance / blocks.variance).high
    nearer = interval(every.kl_best - winner.kl_best).high
    return [
        at_most(f"n = {n}: gradient variance, all 16 over winners of blocks, upper bound", less, 1.0),
        at_most(f"n = {n}: KL(BoN ‖ π), all 16 less the winner of the first n, upper bound", nearer, 0.0),
    ]
