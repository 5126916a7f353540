"""What every benchmark does with its numbers: a table, a JSON file, an exit status.

Owns the form of a claim and of the command line, no measurement. A claim is one sentence with one number, and
the benchmark exits 1 when a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bonsai import machine

LONGEST_NUMBER: Final = 20
"""Characters, with its interval: what is longer is a sentence."""


class Claim(NamedTuple):
    """A statement about one measured number."""

    name: str
    value: float
    target: str
    holds: bool


def at_least(name: str, value: float, target: float) -> Claim:
    """Holds when value ≥ target; never for NaN."""
    return Claim(name, value, f"≥ {target:g}", value >= target)


def at_most(name: str, value: float, target: float) -> Claim:
    """Holds when value ≤ target; never for NaN."""
    return Claim(name, value, f"≤ {target:g}", value <= target)


def above(name: str, value: float, target: float) -> Claim:
    """Holds when value > target; never for NaN."""
    return Claim(name, value, f"> {target:g}", value > target)


def arguments(description: str) -> argparse.ArgumentParser:
    """The command line of a benchmark, to which it may add its own options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write claims, figures and machine to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown to FILE")
    return parser


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for the terminal, first column left, numbers right. Where it is too narrow, sentences are folded; a
    number or a verdict is not."""
    drawn = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_style="bold")
    for index, column in enumerate(columns):
        longest = max((len(row[index]) for row in rows), default=0)
        kept = longest if index and longest <= LONGEST_NUMBER else None
        drawn.add_column(column, justify="right" if index else "left", vertical="bottom", min_width=kept)
    for row in rows:
        drawn.add_row(*row)
    return drawn


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table for a page."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def finish(
    claims: Sequence[Claim], json_file: Path | None, figures: Mapping[str, object], console: Console | None = None
) -> int:
    """Print the claims and the machine, write the JSON file, and say with which status to exit.

    `figures` is what the benchmark measured, as JSON can hold it. ValueError without a claim: a benchmark that
    claims nothing cannot fail.
    """
    if not claims:
        raise ValueError("a benchmark needs at least one claim")
    console = console or Console()
    rows = [(c.name, f"{c.value:.4g}", c.target, "yes" if c.holds else "NO") for c in claims]
    console.print(table("Claims", ("claim", "measured", "target", "holds"), rows))
    here = machine.describe()
    console.print(machine.one_line(here), style="dim")
    if json_file is not None:
        report = {"machine": here, "claims": [_as_json(claim) for claim in claims], "figures": dict(figures)}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return 0 if all(claim.holds for claim in claims) else 1


def _as_json(claim: Claim) -> dict[str, object]:
    """NaN and infinities have no place in JSON: null."""
    return {**claim._asdict(), "value": claim.value if math.isfinite(claim.value) else None}
