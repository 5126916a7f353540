"""What the gateway adds: to the latency of a request, in CPU, memory and bytes, beside its peers.

A stub in a process of its own answers as vLLM does: 16 candidates of 32 tokens after 20 ms, their scores after 5 ms.
Added latency is what a request takes more than the same calls of engines made directly, at the same rate. The gateway
has one core to itself, with keys and ledger on; the stub, Redis and the generator share another. Peers come from PyPI:
LiteLLM's proxy passes one call on, with token ids and log-probs as we get and keep them, and once texts alone; optillm
and TensorZero take the best of 16 with 17 calls.

    python -m benchmarks.gateway                        # 10 minutes; peers' environments two more, once
    python -m benchmarks.gateway --no-peers --requests 5000
    python -m benchmarks.gateway --memory               # what stays of 50,000 requests, and nothing else
    python -m benchmarks.gateway --profile              # where its time goes, and nothing else
    python -m benchmarks.gateway --real                 # real engines instead of the stub, and nothing else
"""

from __future__ import annotations

import asyncio
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Final

from rich.console import Console

from benchmarks.claims import arguments, finish, markdown, table
from benchmarks.gateway import profiling, real, report
from benchmarks.gateway.environments import CannotRun
from benchmarks.gateway.load import Saturation, open_loop, saturated, together
from benchmarks.gateway.peers import PEERS, Peer
from benchmarks.gateway.report import Found, Measured
from benchmarks.gateway.stays import Stays, stays
from benchmarks.gateway.systems import System, World, chat, generate, ours, world
from bonsai.demo import progress

RATE: Final = 300.0
"""Requests a second, where latency is measured."""
SLOWER: Final = (3, 30)
"""Parts of that rate, at which latency is measured as well; at the last nothing waits for anything else."""
PEERS_PART: Final = 10
"""Peers are asked for at most this part of that rate, and for half of what they answer at most."""
WARM_SECONDS: Final = 3.0


def main() -> int:
    options = _parser().parse_args()
    console = progress.fit(Console(highlight=False))
    if options.profile:
        return _profiled(options, console)
    if options.real is not None:
        return _real(options, console)
    if len(os.sched_getaffinity(0)) == 1:
        console.print("This machine has one core: the gateway shares it with everything else.", style="yellow")
    return _memory(options, console) if options.memory else _everything(options, console)


def _parser() -> ArgumentParser:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (20)")
    parser.add_argument("--rate", type=float, default=RATE, help="requests a second where latency is measured (300)")
    parser.add_argument("--requests", type=int, default=50_000, help="over which memory is watched (50000)")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="without LiteLLM, optillm, TensorZero")
    parser.add_argument("--memory", action="store_true", help="only what stays of requests")
    parser.add_argument("--profile", action="store_true", help="only where the gateway's time goes")
    parser.add_argument("--real", type=int, nargs="?", const=120, metavar="PAIRS", help="only real engines (120 pairs)")
    return parser


def _everything(options: Namespace, console: Console) -> int:
    found = asyncio.run(measured(options, console))
    tables = [(report.COLUMNS, report.rows_of(found)), (report.SATURATED_COLUMNS, report.saturated_rows_of(found))]
    for title, (columns, rows) in zip(("At so many requests/s", "As many as go"), tables, strict=True):
        console.print(table(title, columns, rows))
    console.print(table("What stays", report.STAYS_COLUMNS, report.stays_of(found.stays)))
    for line in report.absence_of(found.absent):
        console.print(line, style="yellow")
    _write(options, *tables)
    return finish(report.claims_of(found), options.json, report.figures_of(found), console)


def _memory(options: Namespace, console: Console) -> int:
    found = asyncio.run(remembered(options.requests))
    rows = report.stays_of(found)
    console.print(table("What stays", report.STAYS_COLUMNS, rows))
    _write(options, (report.STAYS_COLUMNS, rows))
    return finish(report.claims_of_stays(found), options.json, report.figures_of_stays(found), console)


def _profiled(options: Namespace, console: Console) -> int:
    try:
        found = asyncio.run(profiling.profiled(options.seconds))
    except CannotRun as error:
        console.print(f"There is no profile: {error}", style="yellow")
        return 1
    rows, functions = profiling.rows_of(found), profiling.functions_of(found)
    console.print(table("Where the time of /generate goes", profiling.COLUMNS, rows))
    console.print(table("Functions", profiling.FUNCTION_COLUMNS, functions))
    _write(options, (profiling.COLUMNS, rows))
    return finish(profiling.claims_of(found), options.json, profiling.figures_of(found), console)


def _real(options: Namespace, console: Console) -> int:
    pairs = real.pairs(options.real)
    rows = real.rows_of(pairs)
    console.print(table("By turns", real.COLUMNS, rows))
    _write(options, (real.COLUMNS, rows))
    return finish(real.claims_of(pairs), options.json, real.figures_of(pairs), console)


def _write(options: Namespace, *tables: tuple[Sequence[str], Sequence[Sequence[str]]]) -> None:
    if options.markdown is not None:
        options.markdown.write_text("\n".join(markdown(columns, rows) for columns, rows in tables))


async def measured(options: Namespace, console: Console) -> Found:
    async with world() as around:
        async with ours(around) as one:
            console.print("measuring /generate", style="dim")
            best_of = generate(around, one)
            found = [await measure(best_of, options.rate, options.seconds)]
            found += [await latencies(best_of, options.rate / part, options.seconds) for part in SLOWER]
            console.print("measuring /v1/chat/completions", style="dim")
            found.append(await measure(chat(around, one), options.rate, options.seconds))
        console.print(f"measuring memory over {options.requests} requests", style="dim")
        async with ours(around) as one:
            left = await stays(around, one, options.requests)
        peers: list[Measured] = []
        absent: dict[str, str] = {}
        for name, peer in PEERS.items() if options.peers else ():
            console.print(f"measuring {name}", style="dim")
            try:
                peers.append(await beside(around, peer, options.rate / PEERS_PART, options.seconds))
            except CannotRun as error:
                absent[name] = str(error)
        return Found(found, peers, absent, left)


async def remembered(requests: int) -> Stays:
    async with world() as around, ours(around) as one:
        return await stays(around, one, requests)


async def measure(system: System, rate: float, seconds: float) -> Measured:
    """Latency, and then as many as go."""
    found = await latencies(system, rate, seconds)
    return found._replace(saturation=await _saturated(system, seconds))


async def beside(around: World, peer: Peer, most: float, seconds: float) -> Measured:
    """As many as go, and then latency at a rate that it can keep up with."""
    async with peer(around) as system:
        saturation = await _saturated(system, seconds)
        found = await latencies(system, max(1.0, min(most, saturation.per_second // 2)), seconds)
        return found._replace(saturation=saturation)


async def _saturated(system: System, seconds: float) -> Saturation:
    return await saturated(system.ask, seconds / 3, system.pid)


async def latencies(system: System, rate: float, seconds: float) -> Measured:
    await open_loop(system.ask, rate / 3, WARM_SECONDS)
    before = await open_loop(system.alone, rate, seconds / 4)
    found = await open_loop(system.ask, rate, seconds)
    after = await open_loop(system.alone, rate, seconds / 4)
    return Measured(system.name, rate, together(before, after), found, None)


if __name__ == "__main__":
    sys.exit(main())
