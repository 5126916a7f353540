"""The command `bonsai report`: a policy's report in the terminal, and its files where a user wants them.

Everything that is not an option is imported when it runs.
"""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import click

from bonsai.gateway_address import GatewayAddress, asks_gateway

if TYPE_CHECKING:
    from bon_algos.contracts import PolicyReport

FILES: Final[dict[str, Literal["json", "markdown", "png"]]] = {
    "report.json": "json",
    "README.md": "markdown",
    "report.png": "png",
}


@click.command("report")
@click.argument("policy")
@asks_gateway
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where report.json, README.md and report.png are saved.",
)
@click.option("--open", "shows", is_flag=True, help="Show the picture, saved in --out or else below --dir.")
def report_command(policy: str, url: str, directory: Path, out: Path | None, shows: bool) -> None:
    """What POLICY was worth on held-out prompts."""
    from rich.console import Console

    from bonsai.client import BonsaiError
    from bonsai.report_table import tables

    console = Console()
    out = out or (directory / "reports" / policy if shows else None)
    try:
        report = asyncio.run(fetched(GatewayAddress(url, directory), policy, out))
    except (BonsaiError, OSError, ValueError) as error:
        console.print("failed", style="bold red", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    for table in tables(report):
        console.print(table)
    for note in filter(None, (report.judge_note, report.standing.note)):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        console.print(f"saved in {out}", markup=False, highlight=False, soft_wrap=True)
    if shows and out is not None:
        click.launch(str(out / "report.png"))


async def fetched(gateway: GatewayAddress, policy: str, out: Path | None) -> PolicyReport:
    """The report; its files in `out`, whose parents are made. Raises BonsaiError, OSError or ValueError."""
    from bon_algos.contracts import POLICY_ID_PATTERN

    if re.fullmatch(POLICY_ID_PATTERN, policy) is None:
        raise ValueError("a policy's id is pol- and 16 hex digits; GET /policies lists them")
    async with gateway.open_client() as client:
        report = await client.report(policy)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            for name, form in FILES.items():
                (out / name).write_bytes(await client.report_file(policy, form))
    return report
