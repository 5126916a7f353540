"""What a replay has shown, as tables."""

from __future__ import annotations

from rich.table import Table

from bon_algos.contracts import Interval
from bonsai.replay.scores import ReplayReport


def tables(report: ReplayReport) -> list[Table]:
    """What is printed: the comparison, and the curves where there are any."""
    found = report.comparison
    summary = Table(title=f"{report.old_reward_model} → {report.new_reward_model}", show_header=False)
    for name, value in (
        ("groups · prompts", f"{found.groups} · {found.prompts}"),
        ("skipped", ", ".join(f"{count} {reason}" for reason, count in report.skipped.items()) or "none"),
        ("winners that change, %", _interval(found.flips, 100.0)),
        ("new reward lost by the old winners", _interval(found.regret_new)),
        ("old reward lost by the new winners", _interval(found.regret_old)),
        ("rank correlation, Kendall's τ-b", _interval(found.rank_correlation)),
    ):
        summary.add_row(name, value)
    if found.n is None:
        return [summary]
    curve = Table(
        "k", "old reward", "new reward", "new reward, old choice", title=f"best-of-k, {found.curve_groups} groups"
    )
    for point in found.curve:
        if point.k in _shown(found.n):
            curve.add_row(str(point.k), *(_interval(one) for one in (point.old, point.new, point.new_by_old)))
    return [summary, curve]


def _shown(n: int) -> set[int]:
    """The powers of two up to n, and n."""
    return {n} | {2**power for power in range(n.bit_length())}


def _interval(interval: Interval | None, unit: float = 1.0) -> str:
    if interval is None:
        return "–"
    return f"{unit * interval.mean:.3g} ({unit * interval.low:.3g} to {unit * interval.high:.3g})"
