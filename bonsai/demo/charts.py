"""The demo's picture: the measured table and three curves, as one PNG.

Owns the drawing and the words of the table (`columns_of`, `cells_of`, shared with the terminal). Does not own any
estimate (`measure.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from bon_algos.contracts import Interval
from bon_algos.order import kl_bound
from bonsai import machine
from bonsai.demo.measure import Measured, Row
from worker.drawing import AMBER, BLUE, FAINT, GREEN, STYLE, band, doubling

COLUMNS: Final = (
    "arm",
    "reward",
    "gold reward",
    "win rate, %",
    "KL, nats",
    "tokens per answer",
    "p50, ms",
    "p95, ms",
    "answers per s",
)

_REWARD, _GOLD, _POLICY = BLUE, AMBER, GREEN


def plus_minus(interval: Interval | None, *, scale: float = 1.0, digits: int = 2) -> str:
    """`1.84±0.05`: the mean and half of its 95 % interval."""
    if interval is None:
        return "–"
    reach = (interval.high - interval.low) / 2
    return f"{interval.mean * scale:.{digits}f}±{reach * scale:.{digits}f}"


def cells_of(row: Row) -> tuple[str, ...]:
    """One line of the table, in the order of `COLUMNS`."""
    quality, speed = row.quality, row.speed
    return (
        row.arm,
        plus_minus(quality.reward),
        plus_minus(quality.gold),
        plus_minus(quality.win_rate, scale=100, digits=1),
        plus_minus(quality.kl_policy_reference),
        f"{speed.tokens_per_answer:.0f}",
        f"{speed.p50_ms:.0f}",
        f"{speed.p95_ms:.0f}",
        f"{speed.answers_per_second:.1f}",
    )


def save(measured: Measured, path: Path) -> None:
    """Draw the picture into `path`, whose directory exists."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12.6, 7.4), facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            2, 3, height_ratios=(1, 2.3), left=0.055, right=0.975, top=0.90, bottom=0.135, hspace=0.32, wspace=0.36
        )
        _title(figure, measured)
        _table(figure.add_subplot(grid[0, :]), measured)
        _cost(figure.add_subplot(grid[1, 0]), measured)
        _selection(figure.add_subplot(grid[1, 1]), measured)
        _drift(figure.add_subplot(grid[1, 2]), measured)
        figure.savefig(path, dpi=150)


def _title(figure: Figure, measured: Measured) -> None:
    share = measured.comparison.gain_share
    cheaper = measured.best.speed.tokens_per_answer / measured.distilled.speed.tokens_per_answer
    figure.text(
        0.055,
        0.945,
        f"One sample of the distilled policy: {share.mean:.0%} of the reward gain of best-of-{measured.n}, "
        f"{cheaper:.0f} times fewer tokens",
        fontsize=14,
        fontweight="bold",
    )
    note = (
        f"{measured.prompts} held-out prompts, 95 % intervals over prompts; win rate against one sample of the "
        f"reference; answers per s with the engine saturated · {measured.method}, "
        f"{measured.training_seconds:.0f} s of training\n{machine.one_line(measured.machine)}"
    )
    figure.text(0.055, 0.018, note, fontsize=7.5, color=FAINT, linespacing=1.5)


def _table(axes: Axes, measured: Measured) -> None:
    axes.set_axis_off()
    widths = (0.19, 0.11, 0.11, 0.10, 0.11, 0.13, 0.07, 0.07, 0.11)
    table = axes.table(
        [list(cells_of(row)) for row in measured.rows],
        colLabels=list(COLUMNS),
        colWidths=list(widths),
        cellLoc="right",
        bbox=Bbox.unit(),
    )
    table.auto_set_font_size(False)
    for (line, column), cell in table.get_celld().items():
        cell.visible_edges = "B"
        cell.set_edgecolor("#d5dbe3")
        cell.PAD = 0.04
        text = cell.get_text()
        text.set_fontsize(10.5)
        if line == 0:
            text.set_color(FAINT)
        if line == len(measured.rows):
            text.set_fontweight("bold")
            text.set_color(_POLICY)
        cell.set_text_props(horizontalalignment="left" if column == 0 else "right")


def _cost(axes: Axes, measured: Measured) -> None:
    """Reward against what an answer costs."""
    curve, length = measured.curve, measured.one.quality.tokens.mean
    shown = [i for i, k in enumerate(curve.k) if k <= 4 * measured.n]
    tokens = [curve.k[i] * length for i in shown]
    band(axes, tokens, [curve.reward[i] for i in shown], _REWARD, "best-of-n of the reference")
    for row, n in ((measured.one, 1), (measured.best, measured.n)):
        label = f"n = {n}"
        _point(axes, row.speed.tokens_per_answer, row.quality.reward, _REWARD, label, (6, -13))
    _point(axes, measured.distilled.speed.tokens_per_answer, measured.distilled.quality.reward, _POLICY, "distilled")
    doubling(axes, tokens[0], tokens[-1])
    axes.set(title="Reward against cost", xlabel="tokens generated per answer", ylabel="reward")


def _selection(axes: Axes, measured: Measured) -> None:
    """What selecting harder does to the reward and to the gold reward."""
    curve = measured.curve
    gold_axes = axes.twinx()
    gold_axes.spines["right"].set_visible(True)
    band(axes, curve.k, curve.reward, _REWARD, "reward")
    band(gold_axes, curve.k, curve.gold, _GOLD, "gold reward")
    if curve.fall is not None:
        at = curve.k.index(curve.peak)
        peak = curve.gold[at].mean
        gold_axes.plot([curve.peak], [peak], "v", color=_GOLD, markersize=8, zorder=5)
        note = f"gold peaks\nat n = {curve.peak}"
        gold_axes.annotate(note, (curve.peak, peak), (0, 9), textcoords="offset points", color=_GOLD, ha="center")
    low, high = gold_axes.get_ylim()
    gold_axes.set_ylim(low, high + 0.2 * (high - low))
    doubling(axes, 1, curve.k[-1])
    axes.set(title="Best-of-n, ever larger n", xlabel="n")
    axes.set_ylabel("reward", color=_REWARD)
    gold_axes.set_ylabel("gold reward", color=_GOLD)


def _drift(axes: Axes, measured: Measured) -> None:
    """Reward against the distance from the reference."""
    curve, policy = measured.curve, measured.distilled.quality
    band(axes, curve.kl, curve.reward, _REWARD, "best-of-n")
    for k in (1, 4, measured.n, curve.k[-1]):
        if k in curve.k:
            at = curve.k.index(k)
            _point(axes, curve.kl[at], curve.reward[at], _REWARD, f"n = {k}", (-8, 5), "right")
    if policy.kl_policy_reference is not None:
        kl = policy.kl_policy_reference
        _point(axes, kl.mean, policy.reward, _POLICY, "distilled", (8, -12))
        axes.plot([kl.low, kl.high], [policy.reward.mean] * 2, color=_POLICY)
    limit = 2 * kl_bound(measured.n)
    axes.axvline(limit, color=FAINT, linestyle=":", linewidth=1)
    axes.text(
        limit, axes.get_ylim()[0], f" twice best-of-{measured.n}", color=FAINT, rotation=90, ha="right", va="bottom"
    )
    axes.margins(x=0.1)
    axes.set(title="Reward against drift", xlabel="KL to the reference, nats", ylabel="reward")


def _point(
    axes: Axes,
    x: float,
    interval: Interval,
    colour: str,
    label: str,
    shift: tuple[float, float] = (8, 4),
    align: Literal["left", "right"] = "left",
) -> None:
    axes.plot([x, x], [interval.low, interval.high], color=colour, zorder=4)
    axes.plot([x], [interval.mean], "o", color=colour, markersize=7, zorder=5)
    axes.annotate(label, (x, interval.mean), shift, textcoords="offset points", color=colour, ha=align)
