"""The commands `bonsai ledger …`: what a user can say, and what is printed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from bonsai.ago import ago
from bonsai.shared_options import ARCHIVE, REDIS_URL, in_order, stack_directory

_WHERE = (
    stack_directory("Of the running stack whose ledger it is."),
    REDIS_URL,
    ARCHIVE,
)


@click.group("ledger")
def ledger_command() -> None:
    """What was logged: take it elsewhere, and see what retention takes."""


@ledger_command.command("export")
@in_order(_WHERE)
@click.option("--format", "form", type=click.Choice(["parquet", "jsonl"]), default="parquet", show_default=True)
@click.option("--tenant", default="default", show_default=True)
@click.option("--route", default="default", show_default=True)
@click.option("--since", callback=ago, metavar="AGO", help="Not older than this: 90m, 12h, 7d.")
@click.argument("target", type=click.Path(path_type=Path, file_okay=False))
def export_command(
    directory: Path, redis_url: str | None, archive: str, form: str, target: Path, **window: Any
) -> None:
    """Write a route's groups, with the rewards that were measured later, and the feedback that counts into TARGET, a
    new directory."""
    from bonsai.ledger.export import Window, export

    with _place(directory, redis_url, archive) as place:
        counts = export(place, Window(**window), target, form)
    click.echo(f"{counts.groups} groups and {counts.feedback} pieces of feedback in {target}")


@ledger_command.command("segments")
@in_order(_WHERE)
@click.option(
    "--paths",
    "kind",
    type=click.Choice(["groups", "outcomes", "feedback", "exposures", "unreadable"]),
    help="Only say where the files of one kind are, each on a line: for those who read them themselves.",
)
def segments_command(directory: Path, redis_url: str | None, archive: str, kind: Any) -> None:
    """Show what files the archive consists of."""
    from rich.console import Console

    from bonsai.ledger.segments import addresses, overview

    with _place(directory, redis_url, archive) as place:
        if kind is None:
            Console().print(overview(place.archive))
        for address in addresses(place.archive, kind) if kind is not None else ():
            click.echo(address)


_retention = click.option(
    "--retention",
    envvar="BONSAI_RETENTION",
    default="{}",
    metavar="JSON",
    help="Days by class, as the compactor has it.",
)


@ledger_command.command("merge")
@in_order(_WHERE)
@_retention
@click.option(
    "--bytes",
    "target_bytes",
    envvar="BONSAI_MERGE_BYTES",
    type=click.IntRange(min=1),
    default=64 * 2**20,
    show_default=True,
    help="Of a file at most.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be merged, and change nothing.")
def merge_command(
    directory: Path, redis_url: str | None, archive: str, retention: str, target_bytes: int, *, dry_run: bool
) -> None:
    """Make large files of small ones, as the compactor does every minute."""
    from rich.console import Console

    from bonsai.ledger.segments import merged

    with _place(directory, redis_url, archive) as place:
        for table in merged(place, retention, target_bytes, dry_run=dry_run):
            Console().print(table)


@ledger_command.command("retention")
@in_order(_WHERE)
@_retention
@click.option("--dry-run", is_flag=True, help="Say what would go, and change nothing.")
def retention_command(directory: Path, redis_url: str | None, archive: str, retention: str, *, dry_run: bool) -> None:
    """Take what is older than its class may be, as the compactor does every hour."""
    from rich.console import Console

    from bonsai.ledger.retention import retained

    with _place(directory, redis_url, archive) as place:
        for table in retained(place, retention, dry_run=dry_run):
            Console().print(table)


def _place(directory: Path, redis_url: str | None, archive: str) -> Any:
    from bonsai.ledger.place import opened

    return opened(directory, redis_url, archive, on_failure=_fail)


def _fail(reason: str) -> None:
    click.echo(f"failed {reason}", err=True)
    sys.exit(1)
