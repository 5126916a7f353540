"""The tables and lines of the demo in a terminal, 100 columns wide; plain where there is none.

Owns what stays on the screen. Does not own what moves (`progress.py`), the order of the story (`story.py`) nor any
number.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bonsai import machine
from bonsai.client import ExperimentSummary, Policy
from bonsai.demo.charts import COLUMNS, cells_of, plus_minus
from bonsai.demo.measure import Measured
from bonsai.generation_replies import Choice, Generation
from bonsai.job_replies import Job


def show_side_by_side(
    console: Console, prompt: str, one: Generation, best: Generation, one_gold: float, best_gold: float
) -> None:
    """One sample of the reference beside the best of n, both with their rewards."""
    table = Table(show_header=True, header_style="dim", expand=True, padding=(0, 1))
    table.add_column("one sample", ratio=1)
    table.add_column(f"best of {len(best.choices)}", ratio=1, style="green")
    table.add_row(Text(one.completion.strip()), Text(best.completion.strip()))
    table.add_row(_worth(one.reward, one_gold), _worth(best.reward, best_gold))
    console.print(f"\n  [bold]{escape(prompt)}[/] …")
    console.print(Padding(table, (0, 0, 0, 2)))


def _worth(reward: float | None, gold: float) -> str:
    said = "not scored" if reward is None else f"reward {reward:+.2f}"
    return f"[dim]{said} · gold {gold:+.2f}[/]"


def show_candidates(console: Console, choices: Sequence[Choice], golds: Sequence[float]) -> None:
    """Every candidate with its reward, best first, the served one marked."""
    scored = [
        (choice.reward, choice, gold) for choice, gold in zip(choices, golds, strict=True) if choice.reward is not None
    ]
    low = min(reward for reward, _, _ in scored)
    span = max(reward for reward, _, _ in scored) - low or 1.0
    table = Table(box=None, padding=(0, 1), header_style="dim", expand=True)
    for name in ("", "reward", "", "gold"):
        table.add_column(name, justify="right" if name in ("reward", "gold") else "left", no_wrap=True)
    table.add_column("candidate", ratio=1, no_wrap=True, overflow="ellipsis")
    for reward, choice, gold in sorted(scored, key=lambda entry: -entry[0]):
        blocks = "█" * (1 + round(11 * (reward - low) / span))
        style = "bold green" if choice.selected else ""
        mark = "→" if choice.selected else ""
        text = escape(" ".join(choice.text.split()))
        table.add_row(mark, f"{reward:+.2f}", f"[cyan]{blocks:<12}[/]", f"{gold:+.2f}", text, style=style)
    console.print(Padding(table, (1, 0, 0, 2)))


def show_report(console: Console, job: Job) -> None:
    """What the job found about its own policy, on prompts of the ledger that it did not learn from."""
    report = job.details.report
    if report is None:
        return
    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_column(style="dim")
    table.add_column()
    table.add_row("one sample of the reference", plus_minus(report.reward_reference))
    table.add_row(f"best of {report.n} of the reference", plus_minus(report.reward_best_of_n))
    table.add_row("one sample of the policy", f"[bold green]{plus_minus(report.reward_policy)}[/]")
    table.add_row("share of the gain", f"{report.gain_share:.0%}")
    table.add_row("win rate against one sample", f"{plus_minus(report.win_rate, scale=100, digits=1)} %")
    table.add_row("KL to the reference", f"{plus_minus(report.kl_policy_reference)} nats")
    where = f"{report.prompts} prompts held out of the ledger, {report.samples_per_prompt} samples each"
    console.print(f"  The job's own report, on {where}:")
    console.print(Padding(table, (0, 0, 0, 2)))


def show_policy(console: Console, policy: Policy) -> None:
    """By what the engine proved that it serves this policy."""
    found = policy.fingerprint
    console.print(f"  [bold]{policy.id}[/] is served, state {policy.state}.")
    if found is None:
        return
    verdict = "[green]passed[/]" if found.passed else f"[red]refused, {escape(found.reason)}[/]"
    console.print(
        f"  Fingerprint over {found.tokens} tokens: {verdict}. Nats per token, mean: engine against trainer "
        f"{found.mean_abs_difference:.1e}, policy against base {found.mean_abs_base_distance:.2f}."
    )


def show_experiment(console: Console, experiment: ExperimentSummary) -> None:
    table = Table(header_style="dim", padding=(0, 1))
    for name in ("arm", "weight", "units", "answers", "reward", "tokens per answer"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for arm in experiment.arms:
        tokens = arm.candidate_tokens_per_answer
        table.add_row(
            arm.arm,
            f"{arm.weight / 100:.0f} %",
            str(arm.exposures),
            str(arm.answers),
            plus_minus(arm.reward),
            "–" if tokens is None else f"{tokens:.0f}",
        )
    console.print(Padding(table, (0, 0, 0, 2)))


def show_measured(console: Console, measured: Measured) -> None:
    """The measured table, and what follows from it in words."""
    table = Table(box=SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0))
    for name in COLUMNS:
        is_arm = name == COLUMNS[0]
        table.add_column(
            name.replace(" ", "\n"), justify="left" if is_arm else "right", vertical="bottom", no_wrap=True
        )
    for row in measured.rows:
        table.add_row(*cells_of(row), style="bold green" if row is measured.distilled else "")
    console.print(table)
    share, gain, gold = measured.comparison.gain_share, measured.comparison.reward_gain, measured.comparison.gold_gain
    _say(
        console,
        f"One sample of the distilled policy keeps [bold]{share.mean:.0%}[/] ({share.low:.0%} to {share.high:.0%}) "
        f"of the reward gain of best-of-{measured.n}. Against one sample of the reference, paired by prompt: reward "
        f"{gain.mean:+.2f} ({gain.low:+.2f} to {gain.high:+.2f}), gold {gold.mean:+.2f} ({gold.low:+.2f} to "
        f"{gold.high:+.2f}).",
    )
    curve = measured.curve
    if curve.fall is not None:
        _say(
            console,
            f"Gold reward of best-of-n peaks at [bold]n = {curve.peak}[/] and is {curve.fall.mean:.2f} "
            f"({curve.fall.low:.2f} to {curve.fall.high:.2f}) lower at n = {curve.k[-1]}, where the reward is highest.",
        )
    here = machine.one_line(measured.machine)
    _say(console, f"[dim]{measured.prompts} held-out prompts; 95 % intervals over prompts. {here}[/]")


def _say(console: Console, text: str) -> None:
    console.print(Padding(text, (0, 0, 0, 2)))


def show_curl_lines(console: Console, url: str, key: str, prompt: str, policy: str, job: str, n: int) -> None:
    """Lines to try while the server is up; printed unwrapped so that they can be copied. key: curl's argument."""
    body = f"{key} -H 'content-type: application/json' -d '{{\"prompt\": \"{prompt}\"}}'"
    lines = (
        ("what the route answers now: one sample of the distilled policy", f"curl -s '{url}/generate?n={n}' {body}"),
        (f"best of {n} of the reference", f"curl -s {url}/generate -H 'x-bonsai-arm: base:{n}' {body}"),
        ("one sample of the reference", f"curl -s {url}/generate -H 'x-bonsai-arm: base:1' {body}"),
        ("the policy", f"curl -s {key} {url}/policies/{policy}"),
        ("its report, as a model card", f"curl -s {key} '{url}/policies/{policy}/report?format=markdown'"),
        ("the job", f"curl -s {key} {url}/distill/{job}"),
    )
    for what, line in lines:
        console.print(f"  [dim]# {what}[/]")
        console.print(f"  {escape(line)}", soft_wrap=True)
