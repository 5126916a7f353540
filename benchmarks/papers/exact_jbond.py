"""J-BOND's dynamics on tables of outcomes: the drift of its KL, and γ.

Owns a run with exact expected gradients, the drift law and BOND's Fig. 6. Its Fig. 5 is a question of noise
(`exact_noise`).

Dimension key:  S worlds · K outcomes · P points of a path
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.claims import Claim, above, at_most
from benchmarks.papers.enumerable import (
    QuantileReward,
    World,
    best_of_n_laws,
    cell,
    expected_quantile_reward,
    expected_surrogate,
    interpolated,
    interval,
    tables,
    vector_u,
    worth,
)
from benchmarks.papers.findings import Curve, Effort, Finding, fields_of, verdict
from bon_algos.anchor import EmaAnchor
from bon_algos.bond import quantile_reward_strict

Tell = Callable[[float], None]
NUM_WORLDS: dict[Effort, int] = {"quick": 6, "default": 20, "full": 40}


class TableRun:
    """J-BOND's expected gradient on the logits of a table, as test vector TV7 has it: plain steps of ½."""

    def __init__(
        self,
        world: World,
        *,
        jeffreys_weight: float = 0.5,
        kl_strength: float = 0.0,
        has_printed_sign: bool = False,
        is_natural: bool = False,
        quantile_reward: QuantileReward = quantile_reward_strict,
        learning_rate: float = 0.5,
    ) -> None:
        self.world, self.quantile_reward, self.learning_rate = world, quantile_reward, learning_rate
        self.jeffreys_weight, self.kl_strength = jeffreys_weight, kl_strength
        self.has_printed_sign, self.is_natural = has_printed_sign, is_natural
        self.logit_SK = world.reference.log().requires_grad_()
        self.anchor = EmaAnchor({"logits": self.logit_SK})
        self.reward_PS, self.kl_PS = [start_S := torch.zeros(len(world.reward)).double()], [start_S]

    @property
    def anchor_logprob(self) -> Tensor:
        return self.anchor.tensors["logits"].double().log_softmax(-1)

    def step(self) -> None:
        anchor_SK, logprob_SK = self.anchor_logprob, self.logit_SK.log_softmax(-1)
        tilt_SK = expected_quantile_reward(self.quantile_reward, anchor_SK.exp(), self.world.reward)
        if self.has_printed_sign:  # +γ·d in the advantage, by a tilt that turns −γ·d around
            tilt_SK = tilt_SK + 2 * self.kl_strength / self.jeffreys_weight * (logprob_SK - anchor_SK).detach()
        loss_S = expected_surrogate(
            logprob_SK,
            anchor_SK,
            best_of_n_laws(anchor_SK.exp(), self.world.reward, 2),
            tilt_SK,
            jeffreys_weight=self.jeffreys_weight,
            kl_strength=self.kl_strength,
        )
        slope_SK = torch.autograd.grad(loss_S.sum(), self.logit_SK)[0]
        with torch.no_grad():
            self.logit_SK -= self.learning_rate * (slope_SK / logprob_SK.exp() if self.is_natural else slope_SK)

    def follow(self, rate: float) -> None:
        self.anchor.update({"logits": self.logit_SK}, rate)

    def run(self, steps: int, rate: float, every: int = 1) -> TableRun:
        for step in range(1, steps + 1):
            self.step()
            if step % every == 0:
                self.follow(rate)
            seen = worth(self.logit_SK.detach().log_softmax(-1), self.world)
            self.reward_PS.append(seen.reward)
            self.kl_PS.append(seen.kl)
        return self

    def reward_at(self, kl: float) -> Tensor:
        paths = torch.stack(self.kl_PS), torch.stack(self.reward_PS)
        return interpolated(torch.full_like(self.kl_PS[0], kl), *paths)


def mean_path(path_PS: list[Tensor]) -> tuple[float, ...]:
    return tuple(float(one_S.mean()) for one_S in path_PS)


# --- the drift law ---------------------------------------------------------------------------------------

RATES = (0.01, 0.02, 0.05)
DRIFT_TIMES = 6.0
"""η·t at the end."""


def jbond_drift(effort: Effort, tell: Tell) -> Finding:
    world = _fine(NUM_WORLDS[effort], seed=3)
    rows, claims, curves = [], [], []
    for index, rate in enumerate(RATES):
        anchor_PS, policy_PS = _drift(world, rate)
        row, of_rate = _drift_row(rate, anchor_PS, policy_PS)
        rows.append(row)
        claims += of_rate
        curves += _drift_curves(rate, anchor_PS, policy_PS)
        tell((index + 1) / len(RATES))
    return Finding(
        title="J-BOND: KL grows linearly, no faster than the anchor's rate",
        source="BOND (arXiv:2407.14622), sections 5 and 6; the law ηt − 1 + e^(−ηt) is ours",
        method=f"{len(world.reward)} worlds of {world.reward.shape[1]} outcomes whose quantiles are finer towards the "
        "top, so that 9 nats are there to be climbed; J-BOND at β = ½, γ = 0, exact expected gradients divided by "
        f"the policy, so that it keeps up with its anchor; η·t up to {DRIFT_TIMES:g}. Slopes from η·t = 2 to the end. "
        "Law of the anchor: ηt − 1 + e^(−ηt); envelope of the policy: log m − (m − 1)/m with m = 2(1 + η)^t, "
        "best-of-2 of such an anchor.",
        columns=(
            "η",
            "anchor: slope/η",
            "of its law",
            "most above it",
            "policy: slope/η",
            "of its envelope",
            "most above it",
        ),
        rows=tuple(rows),
        claims=fields_of(claims),
        remarks=f"{verdict(claims)}: linear, and the slope is below η for anchor and policy alike. It is "
        "below the laws' as well: were policy and anchor to move without lag, J-BOND's reward would give .953 of the "
        "slope of best-of-2 "
        "(top of the fixed point's log-ratio less its mean, without ties), although per anchor it goes further, .201 "
        "nats for .193.",
        x_label="η·t",
        y_label="KL to the reference, nats",
        curves=tuple(curves),
    )


def _fine(num_worlds: int, seed: int, num_outcomes: int = 100) -> World:
    rng = torch.Generator().manual_seed(seed)
    gap_SK = 0.5 + torch.rand(num_worlds, num_outcomes - 1, generator=rng, dtype=torch.float64)
    above_SK = (-9.5 * gap_SK.cumsum(-1) / gap_SK.sum(-1, keepdim=True)).exp()
    edge_SK = torch.cat((torch.ones(num_worlds, 1), above_SK, torch.zeros(num_worlds, 1)), dim=-1)
    reward_SK = torch.arange(num_outcomes).double().expand(num_worlds, -1)
    return World(-edge_SK.diff(dim=-1), reward_SK)


def _drift(world: World, rate: float) -> tuple[Tensor, Tensor]:
    """KL to the reference of anchor and policy after every step. (P, S) each."""
    run, anchor_PS, policy_PS = TableRun(world, is_natural=True, learning_rate=1.0), [], []
    for _ in range(round(DRIFT_TIMES / rate)):
        run.step()
        run.follow(rate)
        anchor_PS.append(worth(run.anchor_logprob, world).kl)
        policy_PS.append(worth(run.logit_SK.detach().log_softmax(-1), world).kl)
    return torch.stack(anchor_PS), torch.stack(policy_PS)


def _envelope(steps: int, rate: float) -> Tensor:
    """log m − (m − 1)/m with m = 2(1 + η)^t, from the first step on. (P, 1)."""
    size_P = 2 * (1 + rate) ** torch.arange(1, steps + 1).double()
    return (size_P.log() - (size_P - 1) / size_P)[:, None]


def _law(steps: int, rate: float) -> Tensor:
    """ηt − 1 + e^(−ηt), from the first step on. (P, 1)."""
    time_P = rate * torch.arange(1, steps + 1).double()
    return (time_P - 1 + (-time_P).exp())[:, None]


def _drift_row(rate: float, anchor_PS: Tensor, policy_PS: Tensor) -> tuple[tuple[str, ...], list[Claim]]:
    steps, start = len(anchor_PS), round(2 / rate)
    row, claims = [f"{rate:g}"], []
    for who, path_PS, law_P1 in (
        ("anchor", anchor_PS, _law(steps, rate)),
        ("policy", policy_PS, _envelope(steps, rate)),
    ):
        slope_S, of_law = ((path[-1] - path[start - 1]) / (steps - start) / rate for path in (path_PS, law_P1))
        row += [cell(slope_S), f"{float(of_law):.3f}", cell((path_PS - law_P1).max(dim=0).values)]
        claims.append(at_most(f"η = {rate:g}: slope/η of the {who}'s KL, upper bound", interval(slope_S).high, 1.0))
        above_law = interval((path_PS - law_P1).max(dim=0).values).high
        claims.append(at_most(f"η = {rate:g}: {who}'s KL above its law, most, upper bound", above_law, 0.0))
    return tuple(row), claims


def _drift_curves(rate: float, anchor_PS: Tensor, policy_PS: Tensor) -> list[Curve]:
    times = tuple(rate * (step + 1) for step in range(len(anchor_PS)))
    curves = [
        Curve(label=f"{who}, η = {rate:g}", x=times, y=mean_path(list(path_PS)))
        for who, path_PS in (("anchor", anchor_PS), ("policy", policy_PS))
    ]
    if rate == RATES[-1]:
        curves.append(
            Curve(label="ηt − 1 + e^(−ηt)", x=times, y=tuple(x - 1 + math.exp(-x) for x in times), is_line=False)
        )
    return curves


# --- γ ---------------------------------------------------------------------------------------------------

STRENGTHS = (0.0, 0.5, 1.0, 2.0)
TV7 = {(0.0, False): (13.930, 0.3072, 16.828, 1.3073), (1.0, False): (12.980, 0.1613, 15.245, 0.5603)} | {
    (1.0, True): (16.458, 1.2384, 17.866, 2.2883)
}
"""Mean reward and KL at steps 50 and 100 of test vector U, by γ and whether its sign is the printed one."""


def jbond_gamma(effort: Effort, tell: Tell) -> Finding:
    rows, claims = _tv7()
    tell(0.2)
    world = tables(NUM_WORLDS[effort], 20, seed=4)
    runs = {(strength, False): TableRun(world, kl_strength=strength).run(150, 0.05) for strength in STRENGTHS}
    runs[1.0, True] = TableRun(world, kl_strength=1.0, has_printed_sign=True).run(150, 0.05)
    rows += [_gamma_row(f"tables, {_gamma_name(*key)}", run) for key, run in runs.items()]
    for weaker, stronger in pairwise(STRENGTHS):
        less = interval(runs[stronger, False].kl_PS[100] - runs[weaker, False].kl_PS[100]).high
        claims.append(at_most(f"KL at step 100, γ = {stronger:g} less γ = {weaker:g}, upper bound", less, 0.0))
    more = interval(runs[1.0, True].kl_PS[50] - runs[0.0, False].kl_PS[50]).low
    claims.append(above("KL at step 50, printed sign at γ = 1 less γ = 0, lower bound", more, 0.0))
    tell(1.0)
    better_S = runs[2.0, False].reward_at(0.3) - runs[0.0, False].reward_at(0.3)
    claims.append(above("reward at .3 nats, γ = 2 less γ = 0, lower bound", interval(better_S).low, 0.0))
    steps = tuple(float(step) for step in range(151))
    return Finding(
        title="J-BOND: a larger γ drifts more slowly, and the printed minus sign does not",
        source="BOND (arXiv:2407.14622), Fig. 6, eq. 19 and Algorithm 2",
        method=f"Test vector U (20 outcomes), then {NUM_WORLDS[effort]} tables of 20 outcomes with random masses and "
        "order; exact expected gradients, steps of ½ on logits, η = .05, β = ½. U: mean reward; tables: gain in "
        "standard deviations of the reference's reward.",
        columns=("run", "reward at 50", "KL at 50", "reward at 100", "KL at 100", "reward at .3 nats"),
        rows=tuple(rows),
        claims=fields_of(claims),
        remarks=f"{verdict(claims)}: KL at a fixed step falls with γ, and reward at the same KL rises a little, by "
        f"{cell(better_S)} standard deviations from γ = 0 to 2. Algorithm 2 prints the term with a minus sign; taken "
        "by the letter it pushes the policy away from its anchor, and reward at the same KL falls.",
        x_label="step",
        y_label="KL to the reference, nats",
        curves=tuple(Curve(label=_gamma_name(*key), x=steps, y=mean_path(run.kl_PS)) for key, run in runs.items()),
    )


def _gamma_name(strength: float, has_printed_sign: bool) -> str:
    return f"γ = {strength:g}" + (" with the printed sign" if has_printed_sign else "")


def _tv7() -> tuple[list[tuple[str, ...]], list[Claim]]:
    world, rows, away = vector_u(), [], []
    for (strength, has_printed_sign), expected in TV7.items():
        run = TableRun(world, kl_strength=strength, has_printed_sign=has_printed_sign).run(100, 0.05)
        mean, spread = _moments(world)
        reward = [mean + spread * float(run.reward_PS[step]) for step in (50, 100)]
        nats = [float(run.kl_PS[step]) for step in (50, 100)]
        seen = (reward[0], nats[0], reward[1], nats[1])
        rows.append((f"U, {_gamma_name(strength, has_printed_sign)}", *(f"{one:.4f}" for one in seen), "–"))
        away.append(max(abs(one - other) for one, other in zip(nats, (expected[1], expected[3]), strict=True)))
        away.append(max(abs(one - other) / 10 for one, other in zip(reward, (expected[0], expected[2]), strict=True)))
    return rows, [at_most("test vector TV7, furthest digit (KL; reward/10)", max(away), 6e-5)]


def _moments(world: World) -> tuple[float, float]:
    mean = float((world.reference * world.reward).sum())
    return mean, math.sqrt(float((world.reference * world.reward.square()).sum()) - mean**2)


def _gamma_row(name: str, run: TableRun) -> tuple[str, ...]:
    values = [path_PS[step] for step in (50, 100) for path_PS in (run.reward_PS, run.kl_PS)]
    return (name, *map(cell, values), cell(run.reward_at(0.3)))
