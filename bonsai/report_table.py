"""A policy's report as tables for the terminal: its summary and the frontier."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from bon_algos.contracts import Interval, PolicyReport


def tables(report: PolicyReport) -> list[Table]:
    """What is printed."""
    title = f"{report.policy_id}, {report.held_out.prompts} held-out prompts, 95 % intervals"
    summary = Table("", "policy", "reference", f"best of {report.n}", title=title)
    for row in _rows(report):
        summary.add_row(*row)
    curve = Table("k", "reward", "win rate, %", "KL, nats", title="best-of-k of the reference")
    for point in report.frontier:
        if point.k in {report.n, report.frontier[-1].k} or point.k.bit_count() == 1:
            curve.add_row(str(point.k), _text(point.reward), _text(point.win_rate, 100), f"{point.kl:.2f}")
    return [summary, curve]


def _rows(report: PolicyReport) -> Iterator[tuple[str, ...]]:
    at_n = next((point for point in report.frontier if point.k == report.n), None)
    for name, rewards in (("reward", report.reward), ("second reward model", report.judge)):
        if rewards is not None:
            yield name, _text(rewards.policy), _text(rewards.reference), _text(rewards.best_of_n)
    won = "–" if at_n is None else _text(at_n.win_rate, 100)
    yield "win rate against the reference, %", _text(report.win_rate_reference, 100), "50", won
    yield f"win rate against best of {report.n}, %", _text(report.win_rate_best_of_n, 100), "", "50"
    yield "KL, nats", _text(report.kl_policy_reference), "0", "–" if at_n is None else f"{at_n.kl:.2f}"
    yield "KL / frontier's at equal win rate", _text(report.standing.kl_ratio), "", "1"
    lengths, cost = report.lengths, report.cost
    yield "tokens of the answer", _text(lengths.policy), _text(lengths.reference), _text(lengths.best_of_n)
    yield "tokens generated per answer", f"{cost.generated_policy:.0f}", "", f"{cost.generated_best_of_n:.0f}"
    yield "refusals, %", *(_text(side.share, 100) for side in (report.refusals_policy, report.refusals_reference)), ""
    yield "held-out prompts seen in training", str(report.held_out.seen_in_training), "", ""


def _text(interval: Interval | None, unit: float = 1.0) -> str:
    if interval is None:
        return "–"
    return f"{unit * interval.mean:.3g} ({unit * interval.low:.3g} to {unit * interval.high:.3g})"
