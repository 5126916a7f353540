"""What the demo shows while it waits: the part it is in, bars, and a running job.

Owns what moves on the screen. Does not own the tables that stay (`screen.py`) nor any number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from time import perf_counter
from typing import NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from bonsai.job_replies import Job

WIDTH = 100
LINE_EVERY = 15.0
"""Seconds between two lines about a job where there is no terminal."""
_BLOCKS = "▁▂▃▄▅▆▇█"


def fit(console: Console) -> Console:
    """The same console, `WIDTH` columns wide where there is no terminal or a wider one."""
    if not console.is_terminal or console.width > WIDTH:
        console.width = WIDTH
    return console


class Part(NamedTuple):
    """A part of the story and how long it took."""

    title: str
    seconds: float
    budget: float


class Parts:
    """The parts told so far."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: list[Part] = []

    @contextmanager
    def part(self, title: str, *, budget: float) -> Iterator[None]:
        """One part, with its heading; `budget` in seconds."""
        self._console.print()
        self._console.print(Rule(f"[bold]{len(self._told) + 1} · {title}[/]", align="left", style="green"))
        start = perf_counter()
        yield
        self._told.append(Part(title, perf_counter() - start, budget))

    def show(self) -> None:
        """The time of each part."""
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("part")
        table.add_column("seconds", justify="right")
        table.add_column("planned at most", justify="right", style="dim")
        for part in self._told:
            table.add_row(part.title, f"{part.seconds:.0f}", f"{part.budget:.0f}")
        total, planned = sum(part.seconds for part in self._told), sum(part.budget for part in self._told)
        table.add_row("[bold]together[/]", f"[bold]{total:.0f}[/]", f"{planned:.0f}")
        self._console.print(Padding(table, (1, 0, 0, 2)))


def bar(console: Console) -> Progress:
    """A progress bar with room for a note behind it."""
    return Progress(
        TextColumn("  {task.description}"),
        BarColumn(bar_width=28, complete_style="green"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("[dim]{task.fields[note]}[/]"),
        console=console,
    )


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as a row of blocks, lowest to highest, at most `width` of them (means of equal stretches)."""
    count = min(width, len(values))
    edges = [index * len(values) // count for index in range(count + 1)] if count else [0]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    if not means:
        return ""
    low, span = min(means), max(means) - min(means)
    return "".join(_BLOCKS[min(7, int(8 * (mean - low) / span))] if span else _BLOCKS[0] for mean in means)


class JobDisplay:
    """A running job: phase, progress, time left, reward so far as a sparkline, win rate and KL. Used as a context;
    where there is no terminal it prints a line now and then."""

    def __init__(self, console: Console, job: Job) -> None:
        self._console, self._job = console, job
        self._rewards: list[float] = []
        self._kl: float | None = None
        self._win_rate: float | None = None
        self._live = Live(self._view(), console=console, transient=True)
        self._spoken = perf_counter()

    def __enter__(self) -> JobDisplay:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._live.stop()
        if self._rewards:
            self._console.print(self._curve())

    def update(self, job: Job) -> None:
        reward = job.details.metrics.get("reward")
        # Methods that learn from the ledger measure now and then: what stays exactly equal was not measured again.
        if reward is not None and self._rewards[-1:] != [reward]:
            self._rewards.append(reward)
            self._kl = job.details.metrics.get("kl_policy_reference", self._kl)
            self._win_rate = job.details.metrics.get("win_rate", self._win_rate)
        self._job = job
        self._live.update(self._view())
        if not self._console.is_terminal and perf_counter() > self._spoken + LINE_EVERY:
            self._spoken = perf_counter()
            self._console.print(f"  {self._phase} {self._left}", style="dim")
            self._console.print(self._curve())

    @property
    def _phase(self) -> str:
        return f"{self._job.details.phase or self._job.status:<11}"

    @property
    def _left(self) -> str:
        left = self._job.details.seconds_left
        at = f"step {self._job.details.step}/{self._job.details.steps or '?'}"
        return at if left is None else f"{at} · {int(left) // 60}:{int(left) % 60:02d} left"

    def _view(self) -> RenderableType:
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(
            total=self._job.details.steps or 1, completed=self._job.details.step, width=28, complete_style="green"
        )
        line.add_row(f"  {self._phase}", bar, self._left)
        return Group(line, self._curve())

    def _curve(self) -> Text:
        reward = f"{self._rewards[-1]:+.2f}" if self._rewards else "–"
        kl = "–" if self._kl is None else f"{self._kl:.2f} nats"
        wins = "–" if self._win_rate is None else f"{self._win_rate:.0%}"
        curve = (sparkline(self._rewards, 40), "green")
        return Text.assemble(
            "  reward ", (reward, "bold"), "  ", curve, "  win rate ", (wins, "bold"), "  KL ", (kl, "bold")
        )
