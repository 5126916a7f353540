"""What an experiment of a paper found, and how it is written down: JSON, a Markdown section, a picture.

Owns the form. Does not own any experiment (`exact`, `model`) nor the order and the report (`__main__`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from matplotlib import colormaps
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict

from benchmarks.claims import Claim, markdown

COLOURS = colormaps["tab20"]
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
Effort = Literal["quick", "default", "full"]
"""quick: minutes for all, one seed. default: every claim at one n, three seeds. full: every n that a paper has."""


class Curve(BaseModel):
    """One line or set of points of a picture."""

    model_config = ConfigDict(frozen=True)

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    is_line: bool = True


class Finding(BaseModel):
    """One claim of a paper, or one of ours, taken to the numbers."""

    model_config = ConfigDict(frozen=True)

    title: str
    source: str
    """Paper with its figure, equation or section."""
    method: str
    """What was done: policies, n, seeds, steps; one paragraph."""
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    claims: tuple[tuple[str, float, str, bool], ...]
    """Fields of `claims.Claim`."""
    remarks: str
    """What came out, and where a claim does not reproduce, that it does not and why."""
    x_label: str = ""
    y_label: str = ""
    curves: tuple[Curve, ...] = ()


class Experiment(NamedTuple):
    key: str
    """Of its files: a-z and hyphens."""
    run: Callable[[Effort, Callable[[float], None]], Finding]
    """Gets the effort, and whom to tell the share that is done."""


def as_claims(finding: Finding) -> list[Claim]:
    return [Claim(*one) for one in finding.claims]


def verdict(claims: Sequence[Claim]) -> str:
    """How a remark begins that says what a paper expects and what was found to be so."""
    missed = "; ".join(claim.name for claim in claims if not claim.holds)
    return f"Does not reproduce here, missed are: {missed}. Expected" if missed else "Reproduced"


def section(finding: Finding, picture: str | None) -> str:
    """The Markdown of a report."""
    claims = [
        (name, f"{value:.4g}", target, "yes" if holds else "**no**") for name, value, target, holds in finding.claims
    ]
    parts = [
        f"## {finding.title}\n",
        f"*{finding.source}*\n",
        f"{finding.method}\n",
        markdown(finding.columns, finding.rows),
        f"![{finding.title}]({picture})\n" if picture else "",
        markdown(("claim", "measured", "target", "holds"), claims),
        f"{finding.remarks}\n",
    ]
    return "\n".join(part for part in parts if part)


def draw(finding: Finding, file: Path) -> None:
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(finding.curves):
        form = "-" if curve.is_line else MARKERS[number % len(MARKERS)]
        axes.plot(curve.x, curve.y, form, color=COLOURS(number % COLOURS.N), label=curve.label, markersize=5)
    axes.set_xlabel(finding.x_label)
    axes.set_ylabel(finding.y_label)
    axes.set_title(finding.title, loc="left", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def fields_of(claims: Sequence[Claim]) -> tuple[tuple[str, float, str, bool], ...]:
    return tuple(tuple(claim) for claim in claims)  # type: ignore[misc]
