"""J-BOND under a binary reward: our tie-aware credit against eq. 17's strict one.

Owns the experiment; gradients are exact expectations.

Dimension key:  S worlds · K outcomes · P points of a path
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.claims import above
from benchmarks.papers.enumerable import (
    QuantileReward,
    World,
    cell,
    expected_quantile_reward,
    interval,
)
from benchmarks.papers.exact_jbond import TableRun, mean_path
from benchmarks.papers.findings import Curve, Effort, Finding, fields_of
from bon_algos.bond import quantile_reward_strict, quantile_reward_tie_aware

Tell = Callable[[float], None]
NUM_WORLDS: dict[Effort, int] = {"quick": 6, "default": 20, "full": 40}


RULES: dict[str, QuantileReward] = {"strict": quantile_reward_strict, "tie-aware": quantile_reward_tie_aware}
BINARY_STEPS = 200


def binary(effort: Effort, tell: Tell) -> Finding:
    rows, claims, curves = [], [], []
    shares = (0.1, 0.3, 0.7)
    for index, share in enumerate(shares):
        world = _right_and_wrong(share, NUM_WORLDS[effort], seed=5)
        for weight in (0.5, 1.0):
            paths = {
                rule: _right_path(TableRun(world, jeffreys_weight=weight, quantile_reward=reward))
                for rule, reward in RULES.items()
            }
            rows += [_binary_row(share, weight, rule, path_PS, world) for rule, path_PS in paths.items()]
            if share < 0.5:
                ahead = interval(paths["tie-aware"][50] - paths["strict"][50]).low
                name = f"P = {share:g}, β = {weight:g}: P(right) at step 50, tie-aware less strict, lower bound"
                claims.append(above(name, ahead, 0.0))
            curves += [_right_curve(share, rule, path_PS) for rule, path_PS in paths.items() if weight == 1]
        tell((index + 1) / len(shares))
    return Finding(
        title="J-BOND under a binary reward: tie-aware against strict",
        source="Ours; BOND (arXiv:2407.14622) eq. 17 is made for rewards that do not tie",
        method=f"{NUM_WORLDS[effort]} tables of 20 outcomes, 10 of them right with mass P in all; exact expected "
        f"gradients, steps of ½ on logits, η = .05, γ = 0, {BINARY_STEPS} steps. “Fires” is P(penalty) at the start "
        "(times its share). Curves: β = 1.",
        columns=("run", "fires", "P(right) at 50", "at 100", f"at {BINARY_STEPS}", "steps to .9"),
        rows=tuple(rows),
        claims=fields_of(claims),
        remarks="Where the answer is mostly wrong, strict eq. 17 hardly ever fires, for two anchor samples must both "
        "be right; imitation of the winner then does the work alone, and at β = 1 nothing is learned. The reward's "
        "gap between right and wrong is log 16·P² by the strict rule and log 16·(1 + P)/3 by the tie-aware one: "
        "equal at P = .768, where anchors arrive sooner or later. Hence no claim at P = .7: the two go together "
        "there, and the strict one ends a little ahead.",
        x_label="step",
        y_label="P(right)",
        curves=tuple(curves),
    )


def _right_and_wrong(share: float, num_worlds: int, seed: int) -> World:
    rng = torch.Generator().manual_seed(seed)
    logit_S2X = 0.7 * torch.randn(num_worlds, 2, 10, generator=rng, dtype=torch.float64)
    law_S2X = logit_S2X.softmax(-1) * torch.tensor([1 - share, share])[:, None]
    return World(law_S2X.flatten(1), (torch.arange(20) >= 10).double().expand(num_worlds, -1))


def _right_path(run: TableRun) -> Tensor:
    """P(right) from the start on. (P, S)."""
    path_PS = [(run.world.reference * run.world.reward).sum(-1)]
    for _ in range(BINARY_STEPS):
        run.step()
        run.follow(0.05)
        path_PS.append((run.logit_SK.detach().softmax(-1) * run.world.reward).sum(-1))
    return torch.stack(path_PS)


def _binary_row(share: float, weight: float, rule: str, path_PS: Tensor, world: World) -> tuple[str, ...]:
    penalty_SK = expected_quantile_reward(RULES[rule], world.reference, world.reward) / -math.log(16)
    fires = float((world.reference * penalty_SK).sum(-1).mean())
    reached_PS = path_PS >= 0.9
    steps_S = torch.where(reached_PS.any(dim=0), reached_PS.double().argmax(dim=0), BINARY_STEPS).double()
    late = bool((~reached_PS.any(dim=0)).any())
    values = [cell(path_PS[step]) for step in (50, 100, BINARY_STEPS)]
    return (
        f"P = {share:g}, β = {weight:g}, {rule}",
        f"{fires:.3f}",
        *values,
        ("≥ " if late else "") + cell(steps_S, 0),
    )


def _right_curve(share: float, rule: str, path_PS: Tensor) -> Curve:
    steps = tuple(float(step) for step in range(len(path_PS)))
    return Curve(label=f"P = {share:g}, {rule}", x=steps, y=mean_path(list(path_PS)))
