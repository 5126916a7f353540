"""Ten times more requests than there is room for, and SIGTERM in the middle of them.

A gateway process stands before stub engines that take a fixed time for every request (`stub_stack`). Requests come at
ten times the rate that its token budget allows, whether or not earlier ones were answered. Measured is the gateway: how
much of its capacity it serves meanwhile, how fast the others are refused, what refusals cost the engine, and whether a
request that was accepted is lost when the gateway is told to stop.

    python -m benchmarks.overload              # 30 s of overload, 10 drains: 2 minutes
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any, Final, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.claims import Claim, arguments, at_least, at_most, finish, markdown, table
from benchmarks.stub_stack import SECONDS_EACH, Gateway, Reply, Setting, gateway, setting
from bon_algos.contracts import LEDGER_STREAM

PLACES: Final = 20
"""Requests that the token budget has room for at once; the capacity is so many in SECONDS_EACH."""
TIMES: Final = 10
"""The rate of requests, in capacities."""
WARM_SECONDS: Final = 3 * SECONDS_EACH
"""Until the queue is full; not counted."""
DRAINED: Final = 50
"""Accepted at the moment of SIGTERM: all places, and more that wait."""
COLUMNS: Final = ("answer", "requests", "p50 ms", "p99 ms", "longest ms")


class Overload(NamedTuple):
    replies: Sequence[Reply]
    started: float
    seconds: float
    engine_requests: int
    most_in_engine: int
    peak_mib: float
    """Of the gateway's memory."""

    def served(self) -> list[Reply]:
        return [reply for reply in self.replies if reply.status == 200]

    def refused(self) -> list[Reply]:
        return [reply for reply in self.replies if reply.status == 503 and reply.code == "overloaded"]

    def goodput(self) -> float:
        """Of the capacity: answers that came after the warm-up and before the last request was sent."""
        begin, end = self.started + WARM_SECONDS, self.started + self.seconds
        counted = sum(begin <= reply.asked_at + reply.seconds < end for reply in self.served())
        return counted / (end - begin) / (PLACES / SECONDS_EACH)


class Drain(NamedTuple):
    accepted: int
    failed: int
    """Of those, without an answer 200."""
    unlogged: int
    """Of those, not in the ledger when the process had ended."""
    exit_status: int
    seconds: float


def main() -> int:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="of overload (30)")
    parser.add_argument("--drains", type=int, default=10, help="SIGTERMs under load (10)")
    options = parser.parse_args()
    console = Console()
    overload, drains = asyncio.run(measured(options.seconds, options.drains, console))
    rows = rows_of(overload)
    console.print(table(f"{TIMES} times more than the capacity", COLUMNS, rows))
    if options.markdown is not None:
        options.markdown.write_text(markdown(COLUMNS, rows))
    return finish(claims_of(overload, drains), options.json, figures_of(overload, drains), console)


async def measured(seconds: float, num_drains: int, console: Console) -> tuple[Overload, list[Drain]]:
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("overload", total=1 + num_drains)
        async with setting() as around:
            async with gateway(around, PLACES) as one:
                overload = await overloaded(around, one, seconds)
            progress.update(task, advance=1, description="drains")
            drains = []
            for _ in range(num_drains):
                drains.append(await drained(around))
                progress.advance(task)
            return overload, drains


async def overloaded(around: Setting, one: Gateway, seconds: float) -> Overload:
    """Requests at equal distances, each on its way whatever became of the others."""
    rate = TIMES * PLACES / SECONDS_EACH
    started = monotonic()
    under_way = []
    for number in range(round(seconds * rate)):
        await asyncio.sleep(max(0.0, started + number / rate - monotonic()))
        under_way.append(asyncio.create_task(one.ask()))
    replies = await asyncio.gather(*under_way)
    return Overload(
        replies=replies,
        started=started,
        seconds=seconds,
        engine_requests=around.engines.num_requests,
        most_in_engine=around.engines.most_active,
        peak_mib=peak_mib(one.process.pid),
    )


async def drained(around: Setting) -> Drain:
    """SIGTERM while all places are taken and others wait."""
    await around.redis.delete(LEDGER_STREAM)
    async with gateway(around, PLACES) as one:
        under_way = [asyncio.create_task(one.ask()) for _ in range(DRAINED)]
        await one.until(lambda told: _open(told["limits"]) == DRAINED)
        asked_at = monotonic()
        one.process.send_signal(signal.SIGTERM)
        replies = await asyncio.gather(*under_way)
        exit_status = await one.process.wait()
        seconds = monotonic() - asked_at
    logged = int(await around.redis.xlen(LEDGER_STREAM))
    failed = sum(reply.status != 200 for reply in replies)
    return Drain(DRAINED, failed, DRAINED - logged, exit_status, seconds)


def _open(limits: dict[str, Any]) -> int:
    return int(limits["requests_in_flight"] + limits["requests_waiting"])


def peak_mib(pid: int) -> float:
    """The most memory that a process had, MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def rows_of(overload: Overload) -> list[tuple[str, ...]]:
    kinds = Counter(f"{reply.status} {reply.code}".strip() for reply in overload.replies)
    rows = []
    for kind, count in sorted(kinds.items()):
        of_kind = [reply for reply in overload.replies if f"{reply.status} {reply.code}".strip() == kind]
        milliseconds = [_milliseconds(of_kind, quantile) for quantile in (0.5, 0.99, 1.0)]
        rows.append((kind, str(count), *(f"{one:.1f}" for one in milliseconds)))
    return rows


def _milliseconds(replies: Sequence[Reply], quantile: float) -> float:
    return 1000 * float(np.quantile([reply.seconds for reply in replies], quantile)) if replies else float("nan")


def claims_of(overload: Overload, drains: Sequence[Drain]) -> list[Claim]:
    other = len(overload.replies) - len(overload.served()) - len(overload.refused())
    return [
        at_least("goodput under overload, share of the capacity", overload.goodput(), 0.9),
        at_most("refusal, p99, ms", _milliseconds(overload.refused(), 0.99), 20),
        at_most("neither served nor refused with a time to come back", other, 0),
        at_most("engine requests that served nobody", overload.engine_requests - len(overload.served()), 0),
        at_most(f"most requests in the engine at once, of {PLACES} places", overload.most_in_engine, PLACES),
        at_most(
            f"failed of {sum(drain.accepted for drain in drains)} accepted before SIGTERM",
            sum(drain.failed for drain in drains),
            0,
        ),
        at_most("of them not in the ledger at the end", sum(drain.unlogged for drain in drains), 0),
        at_most("drains that did not end with status 0", sum(drain.exit_status != 0 for drain in drains), 0),
    ]


def figures_of(overload: Overload, drains: Sequence[Drain]) -> dict[str, object]:
    return {
        "places": PLACES,
        "seconds_each": SECONDS_EACH,
        "times": TIMES,
        "goodput": overload.goodput(),
        "served": len(overload.served()),
        "refused": len(overload.refused()),
        "refusal_ms": {str(q): _milliseconds(overload.refused(), q) for q in (0.5, 0.9, 0.99, 1.0)},
        "served_ms": {str(q): _milliseconds(overload.served(), q) for q in (0.5, 0.9, 0.99, 1.0)},
        "gateway_peak_mib": overload.peak_mib,
        "drains": [drain._asdict() for drain in drains],
    }


if __name__ == "__main__":
    sys.exit(main())
