"""What the gateway adds: to the latency of a request, in CPU, memory and bytes, beside its peers.

A stub in a process of its own answers as vLLM does: 16 candidates of 32 tokens after 20 ms, their scores after 5 ms.
Added latency is what a request through the gateway takes more than the same two calls made directly. The gateway has
one core to itself, with keys and ledger on; the stub, Redis and the generator share another.

    python -m benchmarks.gateway                        # 5 minutes
    python -m benchmarks.gateway --no-peers --requests 5000
    python -m benchmarks.gateway --profile              # where its time goes, and nothing else
    python -m benchmarks.gateway --real                 # real engines instead of the stub, and nothing else
"""

from __future__ import annotations

import asyncio
import os
import pstats
import signal
import sys
from argparse import Namespace
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final, NamedTuple
from zlib import decompress

from rich.console import Console

from benchmarks.claims import Claim, arguments, at_least, at_most, finish, markdown, table
from benchmarks.gateway import real
from benchmarks.gateway.load import Latencies, Saturation, memory, open_loop, saturated, slope
from benchmarks.gateway.stub import TOKENS, N
from benchmarks.gateway.systems import CannotRun, System, World, chat, direct, generate, litellm, ours, world
from bon_algos.contracts import LEDGER_STREAM

RATE: Final = 300.0
"""Requests a second, where latency is measured."""
WARM_SECONDS: Final = 3.0
QUANTILES: Final = (0.5, 0.99, 0.999)
CONNECTIONS: Final = 32
MOST_GROWTH: Final = 100
"""Bytes of a request that the gateway may keep: a group is a hundred times as large."""
KEPT_GROUPS: Final = 1000
"""Of the ledger's stream, so that Redis does not grow without end."""
COLUMNS: Final = (
    "n = 16", "added ms, p50", "p99", "p99.9", "failed", "generator late ms, p99", "requests/s", "CPU ms each",
    "requests per core·s",
)  # fmt: skip


STAYS: Final = ("of a request", "bytes")


class Measured(NamedTuple):
    name: str
    latencies: Latencies
    saturation: Saturation | None
    """None where only latency was measured."""


class Ledger(NamedTuple):
    """Means over groups, bytes."""

    in_redis: float
    compressed: float
    as_json: float


class Found(NamedTuple):
    systems: list[Measured]
    """The direct calls first, then three of ours, then peers."""
    absent: dict[str, str]
    """Peers that did not run, and why."""
    samples: list[tuple[int, float]]
    ledger: Ledger


def main() -> int:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (20)")
    parser.add_argument("--rate", type=float, default=RATE, help="requests a second where latency is measured (300)")
    parser.add_argument("--requests", type=int, default=50_000, help="over which memory is watched (50000)")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="without LiteLLM")
    parser.add_argument("--profile", action="store_true", help="only where the gateway's time goes")
    parser.add_argument("--real", type=int, nargs="?", const=60, metavar="PAIRS", help="only real engines (60 pairs)")
    options = parser.parse_args()
    console = Console()
    if options.profile:
        asyncio.run(profiled(options.seconds, options.rate, console))
        return 0
    if options.real is not None:
        pairs = real.pairs(options.real)
        console.print(table("By turns", real.COLUMNS, real.rows_of(pairs)))
        return finish(real.claims_of(pairs), options.json, {"pairs": [pair._asdict() for pair in pairs]}, console)
    if len(os.sched_getaffinity(0)) == 1:
        console.print("This machine has one core: the gateway shares it with everything else.", style="yellow")
    found = asyncio.run(measured(options, console))
    rows = rows_of(found)
    console.print(table(f"{options.rate:g} requests/s, then as many as go", COLUMNS, rows))
    console.print(table("What stays", STAYS, stays_of(found)))
    for name, reason in found.absent.items():
        console.print(f"{name} was not measured: {reason}", style="yellow")
    if options.markdown is not None:
        options.markdown.write_text(markdown(COLUMNS, rows))
    return finish(claims_of(found, options.rate), options.json, figures_of(found, options), console)


async def measured(options: Namespace, console: Console) -> Found:
    async with world() as around:
        await open_loop(direct(around).ask, options.rate, WARM_SECONDS)
        first = await open_loop(direct(around).ask, options.rate, options.seconds / 2)
        async with ours(around) as one:
            systems = []
            for system in (generate(one), chat(one)):
                console.print(f"measuring {system.name}", style="dim")
                systems.append(await measure(system, options))
            slowly = await open_loop(generate(one).ask, options.rate / 3, options.seconds)
            systems.append(Measured(f"/generate, at {options.rate / 3:g}/s", slowly, None))
            ledger = await ledger_of(around)
        console.print(f"measuring memory over {options.requests} requests", style="dim")
        # Of a fresh process: in one that was overloaded a leak fills what the overload has left behind.
        async with ours(around) as one:
            samples = await watched(around, generate(one), options.requests)
        second = await open_loop(direct(around).ask, options.rate, options.seconds / 2)
        systems.insert(0, Measured("the two calls, directly: their own latency", _both(first, second), None))
        absent: dict[str, str] = {}
        if options.peers:
            await beside("LiteLLM", litellm(around), options, systems, absent, console)
        return Found(systems, absent, samples, ledger)


async def measure(system: System, options: Namespace) -> Measured:
    await open_loop(system.ask, options.rate / 3, WARM_SECONDS)
    latencies = await open_loop(system.ask, options.rate, options.seconds)
    return Measured(system.name, latencies, await saturated(system.ask, options.seconds / 3, system.pid))


def _both(first: Latencies, second: Latencies) -> Latencies:
    return Latencies(
        [*first.milliseconds, *second.milliseconds], [*first.late, *second.late], first.failed + second.failed
    )


async def beside(
    name: str,
    peer: AbstractAsyncContextManager[System],
    options: Namespace,
    systems: list[Measured],
    absent: dict[str, str],
    console: Console,
) -> None:
    """Measure a peer, at a rate that it can keep up with: a tenth of ours."""
    console.print(f"measuring {name}", style="dim")
    try:
        async with peer as system:
            await open_loop(system.ask, 5, WARM_SECONDS)
            latencies = await open_loop(system.ask, options.rate / 10, options.seconds)
            saturation = await saturated(system.ask, options.seconds / 3, system.pid)
            systems.append(Measured(f"{system.name}, at {options.rate / 10:g}/s", latencies, saturation))
    except CannotRun as error:
        absent[name] = str(error)


async def watched(around: World, system: System, requests: int) -> list[tuple[int, float]]:
    """Memory of the gateway, while the ledger's stream is kept short."""

    async def trim() -> None:
        while True:
            await around.redis.xtrim(LEDGER_STREAM, maxlen=KEPT_GROUPS)
            await asyncio.sleep(1)

    trimming = asyncio.create_task(trim())
    try:
        return await memory(system.ask, requests, CONNECTIONS, system.pid)
    finally:
        trimming.cancel()


async def ledger_of(around: World) -> Ledger:
    """Of the newest groups."""
    await around.redis.xtrim(LEDGER_STREAM, maxlen=KEPT_GROUPS, approximate=False)
    rows: Any = await around.redis.xrange(LEDGER_STREAM)
    taken: Any = await around.redis.memory_usage(LEDGER_STREAM, samples=0)
    data = [fields[b"data"] for _, fields in rows]
    return Ledger(
        in_redis=taken / len(rows),
        compressed=sum(map(len, data)) / len(data),
        as_json=sum(len(decompress(one)) for one in data) / len(data),
    )


async def profiled(seconds: float, rate: float, console: Console) -> None:
    """Under cProfile everything takes about twice as long, so half the rate; shares are what to look at."""
    async with world() as around:
        file = around.directory / "profile"
        async with ours(around, file) as one:
            system = generate(one)
            await open_loop(system.ask, rate / 2, seconds)
            one.process.send_signal(signal.SIGTERM)
            await one.process.wait()
        for title, key in (("With what they call", 3), ("By themselves", 2)):
            console.print(table(title, ("function", "calls", "own s", "with callees s"), top(file, key)))


def top(file: Path, key: int, count: int = 50) -> list[tuple[str, ...]]:
    """The functions that took most. key: 2 by their own time, 3 by that of what they call as well."""
    stats: Any = pstats.Stats(str(file))
    rows: list[tuple[str, ...]] = []
    for (path, line, name), entry in sorted(stats.stats.items(), key=lambda one: -one[1][key])[:count]:
        where = "/".join(Path(path).parts[-2:]) if line else ""
        rows.append((f"{where}:{line} {name}"[:80], str(entry[1]), f"{entry[2]:.2f}", f"{entry[3]:.2f}"))
    return rows


def rows_of(found: Found) -> list[tuple[str, ...]]:
    base = found.systems[0].latencies
    rows = [_row(found.systems[0], [base.at(q) for q in QUANTILES])]
    rows += [_row(one, [one.latencies.at(q) - base.at(q) for q in QUANTILES]) for one in found.systems[1:]]
    return rows


def _row(one: Measured, milliseconds: list[float]) -> tuple[str, ...]:
    spent = one.saturation
    more = ["", "", ""]
    if spent is not None:
        more = [f"{spent.per_second:.0f}", f"{spent.cpu_milliseconds:.2f}", f"{spent.per_core_second:.0f}"]
    shown = [f"{quantile:.2f}" for quantile in milliseconds]
    return one.name, *shown, str(one.latencies.failed), f"{one.latencies.late_at(0.99):.1f}", *more


def stays_of(found: Found) -> list[tuple[str, ...]]:
    ledger, first, last = found.ledger, found.samples[0], found.samples[-1]
    return [
        ("the group as JSON", f"{ledger.as_json:.0f}"),
        ("the group in the ledger, compressed", f"{ledger.compressed:.0f}"),
        ("the group in Redis, with its share of the stream", f"{ledger.in_redis:.0f}"),
        (f"the gateway's memory, slope over the second half of {last[0]} requests", f"{slope(found.samples):.0f}"),
        (f"its resident MiB after {first[0]} and after {last[0]} requests", f"{first[1]:.0f} · {last[1]:.0f}"),
    ]


def claims_of(found: Found, rate: float) -> list[Claim]:
    base, best_of = found.systems[0].latencies, found.systems[1]
    claims = [
        at_most(f"added by /generate at {rate:g}/s, p50, ms", best_of.latencies.at(0.5) - base.at(0.5), 2),
        at_most("the same, p99, ms", best_of.latencies.at(0.99) - base.at(0.99), 6),
        at_most("memory, bytes more for each request", slope(found.samples), MOST_GROWTH),
        at_most("requests that were not answered", sum(map(_failed, found.systems[:4])), 0),
    ]
    own = best_of.saturation
    peers = [one for one in found.systems[4:] if one.saturation is not None]
    for peer in peers:
        if own is not None and peer.saturation is not None:
            ratio = own.per_core_second / peer.saturation.per_core_second
            claims.append(at_least(f"requests per core·s ÷ those of {peer.name.split(':')[0]}", ratio, 8))
    return claims


def _failed(one: Measured) -> int:
    return one.latencies.failed + (0 if one.saturation is None else one.saturation.failed)


def figures_of(found: Found, options: Namespace) -> dict[str, object]:
    return {
        "n": N,
        "tokens_each": TOKENS,
        "rate": options.rate,
        "systems": [_figures(one) for one in found.systems],
        "absent": found.absent,
        "memory_bytes_per_request": slope(found.samples) if len(found.samples) > 3 else None,
        "memory_mib": found.samples,
        "ledger_bytes_per_group": found.ledger._asdict(),
    }


def _figures(one: Measured) -> dict[str, object]:
    saturation = (
        None if one.saturation is None else {**one.saturation._asdict(), "per_second": one.saturation.per_second}
    )
    return {
        "name": one.name,
        "ms": {str(q): one.latencies.at(q) for q in QUANTILES},
        "late_ms": {str(q): one.latencies.late_at(q) for q in QUANTILES},
        "failed": one.latencies.failed,
        "saturation": saturation,
    }


if __name__ == "__main__":
    sys.exit(main())
