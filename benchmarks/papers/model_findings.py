"""From arms to a table and a picture: what the experiments on the demo's model share.

Owns sizes, seeds and the form of rows and curves. Does not own which arms are compared, nor what is claimed of them
(`model`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np

from benchmarks.papers import model_jobs
from benchmarks.papers.findings import Curve, Effort
from benchmarks.papers.model_frontier import Frontier, frontier
from benchmarks.papers.model_jobs import JUDGED_DRAWS, Job, Sizes
from benchmarks.papers.model_lab import (
    Draws,
    Judged,
    best_of,
    distinct_2,
    gold_of,
    lengths_of,
    winners,
)
from bon_algos.contracts import Interval, Method
from bon_algos.order import mean_interval

Tell = Callable[[float], None]
Seeds = list[list[Judged]]
"""Of each seed its judgements, in the order of the steps."""

DIRECTORY: Final = Path("out") / "papers-model"
"""Where the ledger and every job's result are kept: an experiment that was interrupted goes on where it was, and a job
that two of them share is trained once."""
N: Final = 16
SEEDS: Final[Mapping[Effort, int]] = {"quick": 1, "default": 3, "full": 3}
SIZES: Final[Mapping[Effort, Sizes]] = {
    "quick": Sizes(64, 32, 16, 256),
    "default": Sizes(512, 64, 64, 256),
    "full": Sizes(512, 64, 64, 256),
}
STEPS: Final[Mapping[Effort, int]] = {"quick": 6, "default": 32, "full": 32}
MANY_STEPS: Final[Mapping[Effort, int]] = {"quick": 6, "default": 32, "full": 96}
"""Of lines over steps."""
LEAST_KL: Final = 0.1
"""Nats of the frontier; below, a ratio is noise."""
FARTHEST: Final = 8.0
"""Nats; what lies beyond is named in a picture's legend instead of drawn."""

COLUMNS: Final = (
    "policy",
    "share of gain, %",
    "win rate, %",
    "KL, nats",
    "KL ÷ frontier's",
    "gold",
    "tokens",
    "distinct-2",
)


class Arm(NamedTuple):
    """A job but for its seed."""

    method: Method
    all_weights: bool = False
    candidates: int | None = None
    targets: Literal["counted", "pooled", "learned"] = "counted"
    judged_draws: int = JUDGED_DRAWS

    def job(self, seed: int) -> Job:
        fresh = self.method.type in ("jbond", "rloo")
        return Job.model_validate({**self._asdict(), "seed": seed, "judgements": 3 if fresh else 1})


class Found(NamedTuple):
    """What an experiment's arms came to."""

    arms: dict[str, Seeds]
    reference: Draws
    frontier: Frontier

    def last(self, label: str) -> list[Judged]:
        return [judgements[-1] for judgements in self.arms[label]]

    def ratios(self, label: str) -> list[float]:
        """Of each seed, see `ratio`."""
        return [self.ratio(one) for one in self.last(label)]

    def ratio(self, judged: Judged) -> float:
        """KL in units of the frontier's at the win rate reached; NaN where that is next to nothing, and beyond it."""
        floor = self.frontier.kl_at(judged.win_rate)
        return judged.kl / floor if floor > LEAST_KL else float("nan")


def found(arms: Mapping[str, Arm], effort: Effort, tell: Tell) -> Found:
    sizes = SIZES[effort]
    jobs = {label: [arm.job(seed) for seed in range(SEEDS[effort])] for label, arm in arms.items()}
    by_job = model_jobs.results([job for own in jobs.values() for job in own], sizes, DIRECTORY, tell)
    reference = model_jobs.reference(sizes, DIRECTORY)
    return Found({label: [by_job[job] for job in own] for label, own in jobs.items()}, reference, frontier(reference))


# --- tables and pictures ---------------------------------------------------------------------------------


def over_seeds(values: Sequence[float]) -> Interval:
    if len(values) < 2 or not np.isfinite(values).all():
        return Interval(mean=values[0], low=values[0], high=values[0]) if np.isfinite(values).all() else NOTHING
    return mean_interval(values)


NOTHING: Final = Interval.model_construct(mean=float("nan"), low=float("nan"), high=float("nan"))


def cell(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
    """Mean over seeds ± half of its 95 % interval."""
    interval = over_seeds(values)
    if not np.isfinite(interval.mean):
        return "–"
    half = f"±{scale * (interval.high - interval.mean):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * interval.mean:.{digits}f}{half}"


def row(label: str, found_: Found) -> tuple[str, ...]:
    last = found_.last(label)
    return (
        label,
        cell([one.gain_share for one in last], 1, 100),
        cell([one.win_rate for one in last], 1, 100),
        cell([one.kl for one in last], 2),
        cell(found_.ratios(label), 2),
        cell([one.gold for one in last], 2),
        cell([one.length for one in last], 1),
        cell([one.distinct_2 for one in last], 3),
    )


def reference_rows(reference: Draws, curve: Frontier, n: int = N) -> list[tuple[str, ...]]:
    """One sample of the reference, and the best of n of them."""
    gold, length = gold_of(reference), lengths_of(reference)
    place = curve.n.index(n)
    texts = [group[: len(best)] for group, best in zip(reference.texts, winners(reference, n), strict=True)]
    worth = [f"{best_of(value, reference.order, n).mean():.{digits}f}" for value, digits in ((gold, 2), (length, 1))]
    best = (f"{100 * curve.win_rate[place]:.1f}", f"{curve.kl[place]:.2f}", "1", *worth)
    one = ("0", "50.0", "0", "–", f"{gold.mean():.2f}", f"{length.mean():.1f}", f"{distinct_2(texts):.3f}")
    return [
        ("one sample, reference", *one),
        (f"best of {n}, reference", "100", *best, f"{distinct_2(winners(reference, n)):.3f}"),
    ]


def points(label: str, x: Sequence[float], y: Sequence[float], *, is_line: bool = False) -> Curve:
    """As far as they fit the picture."""
    near = [(a, b) for a, b in zip(x, y, strict=True) if a <= FARTHEST]
    beyond = [a for a in x if a > FARTHEST]
    label += f" (beyond: {', '.join(f'{a:.0f}' for a in beyond)} nats)" if beyond else ""
    return Curve(label=label, x=tuple(a for a, _ in near), y=tuple(b for _, b in near), is_line=is_line)


def described(effort: Effort, steps: int, *, prompts: int = 16, judged_draws: int = JUDGED_DRAWS) -> str:
    sizes = SIZES[effort]
    return (
        f"The demo's policy (2.9 M parameters, LoRA of rank 8 unless said otherwise), {steps} steps of {prompts} "
        f"prompts, {SEEDS[effort]} seed(s), {sizes.train_prompts} training prompts with {sizes.train_draws} logged "
        f"candidates each. Judged on {sizes.held_out_prompts} held-out prompts with {judged_draws} samples each "
        f"against {sizes.held_out_draws} draws of the reference, of which the frontier is made, too. KL is the mean of "
        "Σ_t KL(π ‖ π_ref) of the next token along own samples. ± is half of a 95 % interval over seeds."
    )


def win_against_kl(seen: Found, labels: Sequence[str]) -> tuple[Curve, ...]:
    """Every seed of every arm beside the frontier."""
    drawn = [
        points(label, [one.kl for one in seen.last(label)], [one.win_rate for one in seen.last(label)])
        for label in labels
    ]
    return (Curve(label=FRONTIER, x=tuple(seen.frontier.kl), y=tuple(seen.frontier.win_rate)), *drawn)


def share_against_kl(seen: Found, labels: Sequence[str]) -> tuple[Curve, ...]:
    drawn = [
        points(label, [one.kl for one in seen.last(label)], [one.gain_share for one in seen.last(label)])
        for label in labels
    ]
    return (reward_frontier(seen.frontier), *drawn)


def reward_frontier(curve: Frontier) -> Curve:
    one, best = curve.reward[0], curve.reward[curve.n.index(N)]
    return Curve(label=FRONTIER, x=tuple(curve.kl), y=tuple((curve.reward - one) / (best - one)))


FRONTIER: Final = "best-of-n of the reference, exact"
KL_LABEL: Final = "KL to the reference, nats"
WIN_LABEL: Final = "win rate against one sample of the reference"
SHARE_LABEL: Final = f"share of the reward gain of best-of-{N}"
