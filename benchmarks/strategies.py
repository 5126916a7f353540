"""What the strategies save: adaptive best-of-n at the reward of fixed 16, distilled-first at a share of its gain.

    python -m benchmarks.strategies                # synthetic laws of rewards, and the demo's models (minutes)
    python -m benchmarks.strategies --synthetic    # without the models

Owns: worlds whose laws are known, and the rules that know them. Does not own: the rule itself, which is the gateway's
own (`bon_algos.stopping`, `bon_algos.escalation`). What it knows comes from 200 other prompts with 16 candidates each.
Rules are compared at the price at which they earn as much as fixed 16 does on the same prompts; beside that stands
what comes of the price that was learned.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from benchmarks.claims import Claim, arguments, at_least, at_most, finish, markdown, table
from bon_algos.escalation import Pair, learned_escalation
from bon_algos.order import mean_interval
from bon_algos.reward_laws import learned_law
from bon_algos.stopping import LoggedDraws, Outcome, Simulation, learned_rules, stops_of

Array = NDArray[np.float64]

N: Final = 16
CAP: Final = 64
HISTORY: Final = 200
PROMPTS: Final = 400
POOL: Final = 128
"""Draws of a held-out prompt of the demo beyond the first `CAP`, by which its own law is known."""
MOST_BEHIND: Final = 10.0
"""Points of fixed 16's tokens behind the rule that knows the law, where all prompts share one."""
MOST_OWN_LAWS: Final = 100.0
"""Per cent of fixed 16's tokens, in the mean over laws, where each prompt has its own place and spread: to know little
of a prompt costs much of what there is to save, and of some laws all of it."""
MOST_DEMO: Final = 80.0
MOST_OFF: Final = 10.0
"""Per cent of fixed 16's gain by which the learned price may earn less."""
DEMO: Final = "the demo's models"


class World(NamedTuple):
    """Prompts with enough draws for any rule, and other prompts' logged groups."""

    history: list[LoggedDraws]
    prompts: list[LoggedDraws]
    gain_per_token: Array
    """(B, CAP): what one more draw is worth by the prompt's own law after so many."""


# --- laws ------------------------------------------------------------------------------------------------

Draw = Callable[[Generator, tuple[int, int]], Array]
"""Standardised rewards, given a shape."""


def bimodal(rng: Generator, shape: tuple[int, int]) -> Array:
    """Three in ten answer well."""
    return np.where(rng.random(shape) < 0.3, 1.5, -0.5) + 0.3 * rng.normal(size=shape)


LAWS: Final[dict[str, Draw]] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "uniform": lambda rng, shape: np.sqrt(12) * (rng.random(shape) - 0.5),
    "exponential": lambda rng, shape: rng.exponential(size=shape) - 1,
    "Gumbel": lambda rng, shape: (rng.gumbel(size=shape) - 0.5772) / 1.2825,
    "Student, 4": lambda rng, shape: rng.standard_t(4, size=shape) / np.sqrt(2),
    "bimodal": bimodal,
}


def synthetic(law: Draw, seed: int, *, is_shared: bool) -> World:
    """All prompts have one law, or each shifts and stretches it: places of deviation 1, spreads from ½ to 2."""
    rng = np.random.default_rng(seed)
    count = HISTORY + PROMPTS
    shift_B, stretch_B = rng.normal(size=(count, 1)), np.exp2(rng.uniform(-1, 1, size=(count, 1)))
    if is_shared:
        shift_B, stretch_B = np.zeros_like(shift_B), np.ones_like(stretch_B)
    standard_BM = law(rng, (count, CAP))
    pool = np.sort(law(rng, (1, 200_000))[0])
    true_BM = stretch_B * gain_of_pool(pool, np.maximum.accumulate(standard_BM, axis=1))
    rows = [LoggedDraws(row, np.ones(CAP)) for row in shift_B + stretch_B * standard_BM]
    history = [LoggedDraws(row.reward[:N], row.tokens[:N]) for row in rows[:HISTORY]]
    return World(history, rows[HISTORY:], true_BM[HISTORY:])


def gain_of_pool(ascending_P: Array, best: Array) -> Array:
    """E (r − best)⁺ of a law that is known by many draws."""
    above = np.concatenate((np.cumsum(ascending_P[::-1])[::-1], [0.0]))
    place = np.searchsorted(ascending_P, best, side="right")
    gain: Array = (above[place] - best * (ascending_P.size - place)) / ascending_P.size
    return gain


def on_the_demo() -> World:
    """The demo's policy and reward model; each prompt's own law is known by many draws of its own."""
    from benchmarks.papers.model_lab import Bench, Draws, lengths_of
    from bonsai.demo.prompts import held_out_prompts, training_prompts

    def logged(draws: Draws) -> list[LoggedDraws]:
        return [
            LoggedDraws(to_serve(reward, is_complete), tokens)
            for reward, is_complete, tokens in zip(draws.reward, draws.is_complete, lengths_of(draws), strict=True)
        ]

    bench = Bench()
    history = logged(bench.draw(bench.reference, training_prompts()[:HISTORY], N, seed=1))
    own = logged(bench.draw(bench.reference, held_out_prompts(), CAP, seed=2))
    pool = logged(bench.draw(bench.reference, held_out_prompts(), POOL, seed=3))
    true_BM = [known_gain(prompt, further) for prompt, further in zip(own, pool, strict=True)]
    return World(history, own, np.stack(true_BM))


def to_serve(reward_M: Array, is_complete_M: NDArray[np.bool_]) -> Array:
    """As the gateway takes them: incomplete candidates have no reward where there is a complete one."""
    return np.where(is_complete_M, reward_M, np.nan) if is_complete_M.any() else reward_M


def known_gain(prompt: LoggedDraws, pool: LoggedDraws) -> Array:
    rewards = np.concatenate((pool.reward, prompt.reward))
    usable = np.sort(rewards[np.isfinite(rewards)])
    best = np.fmax.accumulate(prompt.reward)
    gain = np.where(np.isnan(best), np.inf, gain_of_pool(usable, np.nan_to_num(best)))
    per_token: Array = gain * usable.size / rewards.size / pool.tokens.mean()
    return per_token


# --- adaptive --------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """Of one world."""

    title: str
    fixed: Outcome
    single: float
    """Mean reward of one draw."""
    known: Outcome
    """By the rule that knows each prompt's law and draws one by one."""
    adaptive: Outcome
    """At the price at which it earns what fixed 16 earns here."""
    learned: Outcome
    """At the price that was learned."""

    def tokens(self, outcome: Outcome) -> float:
        """In per cent of fixed 16's."""
        return float(100 * outcome.tokens.mean() / self.fixed.tokens.mean())

    @property
    def off(self) -> float:
        """By how much the learned price earns more than fixed 16, in per cent of what that gains over one draw."""
        fixed = np.nanmean(self.fixed.reward)
        return float(100 * (np.nanmean(self.learned.reward) - fixed) / (fixed - self.single))

    @property
    def cells(self) -> tuple[str, ...]:
        shares = [mean_interval(100 * one.tokens / self.fixed.tokens.mean()) for one in (self.known, self.adaptive)]
        return (
            self.title,
            *(f"{one.mean:.0f}±{one.high - one.mean:.0f}" for one in shares),
            f"{self.tokens(self.learned):.0f}",
            f"{self.off:+.1f}",
        )

    @property
    def figures(self) -> dict[str, float]:
        tokens = {name: self.tokens(getattr(self, name)) for name in ("known", "adaptive", "learned")}
        return {**tokens, "learned_reward_off": self.off, "fixed_reward": float(np.nanmean(self.fixed.reward))}


def line(title: str, world: World) -> Line:
    stops = stops_of(N, CAP)
    law = learned_law([draws.reward[np.isfinite(draws.reward)] for draws in world.history])
    played = Simulation.of_paths(law, world.prompts, stops)
    fixed = played.fixed(N)
    target = float(np.nanmean(fixed.reward))
    knowing = replace(played, stops=tuple(range(1, CAP + 1)), gain_per_token_BS=world.gain_per_token)
    rule = learned_rules(world.history, stops, [N]).get(N)
    return Line(
        title,
        fixed,
        float(np.nanmean([prompt.reward for prompt in world.prompts])),
        knowing.outcome(knowing.price_for(target)),
        played.outcome(played.price_for(target)),
        fixed if rule is None else played.outcome(rule.price),
    )


ADAPTIVE: Final = (
    "rewards",
    "tokens, law known, %",
    "tokens, adaptive, %",
    "tokens at its learned price, %",
    "reward there, % of the gain",
)


def claims_of(shared: Sequence[Line], own: Sequence[Line], demo: Sequence[Line]) -> list[Claim]:
    claims = [
        at_most(
            f"{one.title}: points behind the law known", one.tokens(one.adaptive) - one.tokens(one.known), MOST_BEHIND
        )
        for one in shared
    ]
    mean = float(np.mean([one.tokens(one.adaptive) for one in own]))
    claims.append(at_most("each its own: tokens, %, mean over laws", mean, MOST_OWN_LAWS))
    claims += [at_most(f"{one.title}: tokens, %", one.tokens(one.adaptive), MOST_DEMO) for one in demo]
    lowest = min(one.off for one in [*shared, *own, *demo])
    return [*claims, at_least("reward at a learned price, % of the gain, at worst", lowest, -MOST_OFF)]


# --- distilled first -------------------------------------------------------------------------------------

KEPT_GAINS: Final = (0.5, 0.8, 0.9, 0.95, 1.0)
STUDENT_MEAN: Final = 1.0
"""Deviations above the base policy's mean: a little more than half of what best-of-16 gains."""
ROUTES: Final = 40
"""Each with probes of its own: a threshold from 200 of them is off by as much as the gain that they show."""
FRESH: Final = 2000
MOST_KEPT_OFF: Final = 0.03
DISTILLED: Final = ("kept gain, wanted", "kept", "± of a route", "escalated, %", "tokens, % of fixed 16")


class Kept(NamedTuple):
    wanted: float
    kept: float
    deviation: float
    escalated: float

    @property
    def cells(self) -> tuple[str, ...]:
        tokens = 100 * (1 + N * self.escalated) / N
        numbers = (f"{self.kept:.3f}", f"{self.deviation:.3f}", f"{100 * self.escalated:.0f}", f"{tokens:.0f}")
        return (f"{self.wanted:g}", *numbers)


def distilled_first(wanted: float) -> Kept:
    """Mean over routes, with the deviation of one from it."""
    kept, escalated = zip(*(_on_a_route(wanted, seed) for seed in range(ROUTES)), strict=True)
    return Kept(wanted, float(np.mean(kept)), float(np.std(kept)), float(np.mean(escalated)))


def _on_a_route(wanted: float, seed: int) -> tuple[float, float]:
    """What is kept and how much is escalated on other prompts than the probes: normal rewards, a prompt's place is the
    same for both policies and of deviation ½ over prompts."""
    rng = np.random.default_rng(seed)
    place = 0.5 * rng.normal(size=HISTORY + FRESH)
    sample = place + STUDENT_MEAN + rng.normal(size=place.size)
    best = place + rng.normal(size=(N, place.size)).max(axis=0)
    pairs = [Pair(*pair) for pair in zip(sample.tolist(), best.tolist(), strict=True)]
    rule = learned_escalation(pairs[:HISTORY], wanted)
    sample, best = sample[HISTORY:], best[HISTORY:]
    is_escalated = sample < rule.threshold
    served = np.where(is_escalated, np.maximum(sample, best), sample)
    kept = (served.mean() - sample.mean()) / (best.mean() - sample.mean())
    return float(kept), float(is_escalated.mean())


def main() -> int:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--synthetic", action="store_true", help="without the demo's models")
    options = parser.parse_args()
    console = Console()
    with Progress(console=console) as progress:
        shared, own = (
            [
                line(f"{title}, {name}", synthetic(law, seed, is_shared=is_shared))
                for seed, (title, law) in progress.track(list(enumerate(LAWS.items())), description=name)
            ]
            for name, is_shared in (("one for all", True), ("each its own", False))
        )
        demo = [] if options.synthetic else [line(DEMO, on_the_demo())]
    lines, kept = [*shared, *own, *demo], [distilled_first(wanted) for wanted in KEPT_GAINS]
    title = f"Adaptive best-of-n at the reward of fixed {N}: waves of {N // 4} and more, at most {CAP}"
    console.print(table(title, ADAPTIVE, [one.cells for one in lines]))
    console.print(table("Distilled first", DISTILLED, [one.cells for one in kept]))
    if options.markdown:
        rows = [markdown(ADAPTIVE, [one.cells for one in lines]), markdown(DISTILLED, [one.cells for one in kept])]
        options.markdown.write_text("\n".join(rows))
    claims = claims_of(shared, own, demo)
    claims += [
        at_least(f"distilled first: kept where {one.wanted:g} is wanted", one.kept, one.wanted - MOST_KEPT_OFF)
        for one in kept
    ]
    figures = {one.title: one.figures for one in lines} | {f"kept {one.wanted}": one._asdict() for one in kept}
    return finish(claims, options.json, figures, console)


if __name__ == "__main__":
    sys.exit(main())
