"""`bonsai distill dry-run`: what a job would learn from, as a table.

Owns: the command and the table. Does not own: the numbers (service/dry_run.py).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bon_algos.contracts import DataReport, JobSpec
from bonsai.gateway_address import GatewayAddress

if TYPE_CHECKING:
    from rich.table import Table

    from bonsai.job_replies import DryRun

BARS = " ▁▂▃▄▅▆▇█"


@click.command("dry-run")
@click.argument("spec_file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.pass_obj
def dry_run_command(gateway: GatewayAddress, spec_file: Path) -> None:
    """What a job would learn from. SPEC_FILE is the body of POST /distill; nothing is submitted.

    Status 1 when the job would fail.
    """
    from pydantic import ValidationError
    from rich.console import Console

    from bonsai.client import BonsaiError

    console = Console()
    try:
        spec = JobSpec.model_validate_json(spec_file.read_bytes())
        told = asyncio.run(_told(spec, gateway))
    except (ValidationError, BonsaiError, OSError, ValueError) as error:
        console.print("failed", style="bold red", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    console.print(table(told))
    sys.exit(1 if told.data.would_fail else 0)


async def _told(spec: JobSpec, gateway: GatewayAddress) -> DryRun:
    async with gateway.open_client() as client:
        return await client.dry_run(spec)


def table(told: DryRun) -> Table:
    """What was told, one line for each."""
    from rich.table import Table
    from rich.text import Text

    shown = Table("", "what a job would learn from", show_header=True)
    for name, words in (*_rows(told.data), ("expected", _duration(told))):
        shown.add_row(name, Text(words, style="bold red" if name == "would fail" else ""))
    return shown


def _rows(data: DataReport) -> Iterator[tuple[str, str]]:
    part = "" if data.is_whole else "; the newest part of the window"
    yield "groups", f"{data.accepted} of {data.groups_read} accepted{part}"
    for reason, count in sorted(data.rejected.items(), key=lambda row: -row[1]):
        yield "  rejected", f"{count} {reason}"
    yield "prompts", f"{data.train_prompts} to learn from, {data.held_out_prompts} held out"
    if data.candidates_per_prompt is not None:
        each = data.candidates_per_prompt
        yield "candidates of a prompt", f"{each.least:g} to {each.most:g}, median {each.median:g}"
    if data.rewards is not None:
        share = data.rewards.quantiles
        yield "rewards", f"median {share['50']:.3g}, 5 % {share['5']:.3g}, 95 % {share['95']:.3g}"
        yield "", _histogram(data.rewards.counts)
    if data.tied_pairs is not None and data.effective_n is not None:
        yield "ties", f"{data.tied_pairs:.1%} of pairs; best-of-n is worth an untied n of {data.effective_n:.1f}"
    for point in data.curve:
        over = f"{point.gain:+.3g} over one sample, at least {point.gain_low:+.3g}"
        yield f"best of {point.k}", f"{point.reward:.3g}, {over}"
    if data.leakage is not None:
        near, held_out = data.leakage.near_duplicates, data.leakage.held_out_prompts
        yield "leakage", f"{near} of {held_out} held-out prompts are nearly one that is learned from"
    for trouble in data.would_fail:
        yield "would fail", f"{trouble.code}: {trouble.message}"


def _histogram(counts: tuple[int, ...]) -> str:
    most = max(counts)
    return "".join(BARS[-(-count * (len(BARS) - 1) // most)] for count in counts)


def _duration(told: DryRun) -> str:
    if told.expected_seconds is None:
        return "unknown: no job of this method has ended here"
    return f"{told.expected_seconds / 60:.1f} min, by {told.expected_from_jobs} jobs like it"
