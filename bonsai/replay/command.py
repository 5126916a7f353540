"""The command `bonsai replay`: what a user can say. Everything else is imported when it runs."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any, Final

import click

from bonsai.ago import ago
from bonsai.shared_options import ARCHIVE, REDIS_URL, stack_directory

MOST_GROUPS: Final = 100_000


@click.command("replay")
@stack_directory("Of the running stack whose ledger is read.")
@REDIS_URL
@ARCHIVE
@click.option("--route", default="default", show_default=True)
@click.option("--tenant", default="default", show_default=True, help="Whose route it is.")
@click.option("--since", callback=ago, metavar="AGO", help="Not older than this: 90m, 12h, 7d.")
@click.option("--groups", type=click.IntRange(2, MOST_GROUPS), default=1000, show_default=True, help="The newest ones.")
@click.option("--reward-url", metavar="URL", help="The other reward model: unix:///path or http://127.0.0.1:PORT.")
@click.option("--reward-kind", type=click.Choice(["http", "vllm"]), default="http", show_default=True)
@click.option("--reward-name", metavar="NAME", help="Its name there, where it serves several.")
@click.option(
    "--reward-directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Of kind vllm.",
)
@click.option("--reward-window", type=click.IntRange(2), metavar="TOKENS", help="Of kind vllm.")
@click.option("--reward-config", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="JSON: as for up.")
@click.option("--reward-function", metavar="MODULE:FUNCTION", help="A Python function, started for the replay.")
@click.option("--reward-seconds", type=click.FloatRange(0.01, 3600), default=10.0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="The report, too.")
def replay_command(
    directory: Path,
    redis_url: str | None,
    archive: str,
    route: str,
    since: float | None,
    groups: int,
    tenant: str,
    json_file: Path | None,
    **reward: Any,
) -> None:
    """Re-rank logged candidates with another reward model, without generating a token."""
    from rich.console import Console

    from bonsai.replay.reward import RewardOptions
    from bonsai.replay.run import KNOWN, replayed
    from bonsai.replay.scores import Window
    from bonsai.replay.table import tables

    console = Console()
    window = Window(route, groups, since, tenant)
    options = RewardOptions(**{name.removeprefix("reward_"): value for name, value in reward.items()})
    try:
        report = asyncio.run(replayed(directory, redis_url, archive, window, options, console))
        if json_file is not None:
            json_file.write_text(report.model_dump_json(indent=1) + "\n")
    except KNOWN as error:
        console.print("failed", style="bold red", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    for table in tables(report):
        console.print(table)
