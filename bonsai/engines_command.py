"""The command `bonsai engines`: which replicas there are, what each is to hold and what it holds.

Owns: what a user can say and how the answer looks. Does not own: the answer (`GET /engines`).
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bonsai.gateway_address import GatewayAddress, asks_gateway

if TYPE_CHECKING:
    from rich.table import Table

    from bonsai.engine_replies import Engine, EngineAdapter


@click.command("engines")
@asks_gateway
def engines_command(url: str, directory: Path) -> None:
    """The policy engines: their state, and which policies each is to hold, holds and has proved."""
    from rich.console import Console

    from bonsai.client import BonsaiError

    console = Console()

    async def ask() -> list[Engine]:
        async with GatewayAddress(url, directory).open_client(timeout_seconds=10.0) as client:
            return await client.engines()

    try:
        found = asyncio.run(ask())
    except (BonsaiError, ValueError, OSError) as error:
        console.print("failed", style="bold red", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    console.print(engines_table(found, time.time()))


def engines_table(engines: list[Engine], now: float) -> Table:
    """One row for each policy of each engine. now: Unix seconds."""
    from rich.table import Table

    table = Table("engine", "state", "slots", "policy", "wanted", "there", "served", "proved", "used", "why not")
    for engine in engines:
        held = sum(adapter.resident for adapter in engine.adapters)
        own = [engine.id, engine.reason or engine.state, f"{held}/{engine.slots}"]
        for place, adapter in enumerate(engine.adapters or [None]):
            table.add_row(*(own if place == 0 else [""] * len(own)), *_cells(adapter, now))
    return table


def _cells(adapter: EngineAdapter | None, now: float) -> list[Any]:
    if adapter is None:
        return ["-"]
    return [
        adapter.policy,
        "yes" if adapter.wanted else "",
        "leaving" if adapter.draining else "yes" if adapter.resident else "",
        "yes" if adapter.served else "",
        _ago(adapter.proven_at, now),
        _ago(adapter.used_at, now),
        adapter.reason or "",
    ]


def _ago(moment: float | None, now: float) -> str:
    return "" if moment is None else f"{max(0.0, now - moment):.0f} s ago"
