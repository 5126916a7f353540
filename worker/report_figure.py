"""A report as one picture: win rate and reward against KL with the frontier and the policy on it, and the n-curve.

Owns the drawing. Does not own any number. Drawn without a display; the gateway only passes the bytes on.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bon_algos.contracts import FrontierPoint, Interval, PolicyReport
from worker.drawing import AMBER, BLUE, FAINT, GREEN, STYLE, band, doubling

_FRONTIER, _POLICY, _JUDGE = BLUE, GREEN, AMBER
Of = Callable[[FrontierPoint], Interval]


def report_figure(report: PolicyReport) -> bytes:
    """A PNG of about 1900 × 760 pixels."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12.8, 5.1), facecolor="white")
        FigureCanvasAgg(figure)
        left, middle, right = figure.subplots(1, 3)
        figure.subplots_adjust(left=0.06, right=0.945, top=0.81, bottom=0.2, wspace=0.27)
        _words(figure, report)
        _against_kl(left, report, lambda point: point.win_rate, report.win_rate_reference)
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        left.set(title="Win rate against KL", ylabel="wins against one sample of the reference")
        _against_kl(middle, report, lambda point: point.reward, report.reward.policy)
        middle.set(title="Reward against KL", ylabel="reward")
        _n_curve(right, report)
        picture = BytesIO()
        figure.savefig(picture, dpi=150, metadata={"Software": None})
    return picture.getvalue()


def _words(figure: Figure, report: PolicyReport) -> None:
    won, stands, seen = report.win_rate_reference, report.standing.kl_ratio, report.held_out
    at_ratio = "" if stands is None else f", at {stands.mean:.2f} times the KL of the frontier there"
    title = f"{report.policy_id}: one sample wins {won.mean:.1%} against the reference{at_ratio}"
    figure.text(0.06, 0.925, title, fontsize=13, fontweight="bold")
    second = "" if report.judge is not None else " · no second reward model"
    note = (
        f"{seen.prompts} held-out prompts, {seen.seen_in_training} of them seen in training; 95 % intervals over "
        f"prompts · {report.method}, distilled from best-of-{report.n} of {report.base_policy_id} · the line: "
        f"best-of-k of the reference, exact for its draws, k = 1 to {report.frontier[-1].k}{second}"
    )
    figure.text(0.06, 0.035, note, fontsize=7.5, color=FAINT)


def _against_kl(axes: Axes, report: PolicyReport, of: Of, policy: Interval) -> None:
    points, kl = report.frontier, report.kl_policy_reference
    band(axes, [point.kl for point in points], [of(point) for point in points], _FRONTIER, "best-of-k frontier")
    for k in sorted({1, 4, report.n, points[-1].k}):
        for point in points:
            if point.k == k:
                at = (point.kl, of(point).mean)
                axes.plot(*at, "o", color=_FRONTIER, markersize=4.5, zorder=4)
                axes.annotate(f"k = {k}", at, (6, -11), textcoords="offset points", color=_FRONTIER, fontsize=8.5)
    reach = [[policy.mean - policy.low], [policy.high - policy.mean]], [[kl.mean - kl.low], [kl.high - kl.mean]]
    axes.errorbar(kl.mean, policy.mean, *reach, fmt="D", color=_POLICY, markersize=6, zorder=5, label="this policy")
    axes.set_xlabel("KL to the reference, nats per completion")
    axes.margins(x=0.13, y=0.09)
    axes.legend(loc="lower right")


def _n_curve(axes: Axes, report: PolicyReport) -> None:
    """Reward of best-of-k, and what the second reward model says of it, where it was asked."""
    points = report.frontier
    band(axes, [point.k for point in points], [point.reward for point in points], _FRONTIER, "best-of-k")
    _level(axes, report.reward.policy, _POLICY, "this policy, one sample")
    axes.set_title("The n-curve")
    axes.set_xlabel("k")
    axes.set_ylabel("reward", color=_FRONTIER)
    doubling(axes, 1, points[-1].k)
    axes.axvline(report.n, color=FAINT, linestyle=":", linewidth=1)
    if report.judge is None:
        axes.legend(loc="lower right")
        return
    second = axes.twinx()
    second.spines["right"].set_visible(True)
    known = [(point.k, point.judge) for point in points if point.judge is not None]
    band(second, [k for k, _ in known], [judge for _, judge in known], _JUDGE, "best-of-k, second reward model")
    _level(second, report.judge.policy, _JUDGE, "this policy, second reward model")
    second.set_ylabel("second reward model, which chose nothing", color=_JUDGE)
    handles = [*axes.get_legend_handles_labels()[0], *second.get_legend_handles_labels()[0]]
    second.legend(handles=handles, loc="lower right", fontsize=8)


def _level(axes: Axes, interval: Interval, colour: str, label: str) -> None:
    axes.axhspan(interval.low, interval.high, color=colour, alpha=0.12, linewidth=0)
    axes.axhline(interval.mean, color=colour, linestyle="--", linewidth=1.4, label=label)
