"""What requests leave behind: bytes of a group on disk and in Redis, and the memory of a gateway over many requests.

Owns: counting them, the slope of the memory with its interval. Does not own: the load (load.py).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple
from zlib import decompress

import numpy as np

from benchmarks.gateway.load import Ask, family
from benchmarks.gateway.systems import World, generate
from benchmarks.stub_stack import Gateway
from bon_algos.contracts import LEDGER_STREAM, Interval
from service.spool import Spool

CONNECTIONS: Final = 32
GROUPS: Final = 500
"""Over which bytes are taken."""
KEPT_GROUPS: Final = 1000
"""Of the ledger's stream, so that Redis does not grow without end."""
MOST_SPOOLED: Final = 2**30
SAMPLES: Final = 200
BLOCK: Final = 10
"""Samples next to each other are alike: that many are drawn together."""
RESAMPLES: Final = 2000
REQUESTS_OF_SLOPE: Final = 10_000


class Ledger(NamedTuple):
    """Means over groups, bytes."""

    in_spool: float
    in_redis: float
    compressed: float
    as_json: float


class Stays(NamedTuple):
    ledger: Ledger
    memory: list[tuple[int, float]]
    """(requests so far, resident MB)."""
    failed: int
    """Requests that were not answered as they should have been."""

    @property
    def slope(self) -> Interval:
        return slope(self.memory)


async def stays(around: World, one: Gateway, requests: int) -> Stays:
    """Of a process that has not been overloaded: else a leak fills what the overload left behind."""
    ask = generate(around, one).ask
    await around.redis.delete(LEDGER_STREAM)
    failed = await _asked(ask, GROUPS)
    ledger = await _ledger(around, spooled(one.spool))
    memory, more_failed = await _memory(around, ask, requests, one.process.pid)
    return Stays(ledger, memory, failed + more_failed)


async def _asked(ask: Ask, requests: int) -> int:
    """How many of them failed."""
    numbers = iter(range(requests))

    async def one() -> int:
        return sum([not await ask() for _ in numbers])

    return sum(await asyncio.gather(*(one() for _ in range(CONNECTIONS))))


def spooled(directory: Path) -> float:
    """Bytes of a frame in a segment that has any: what is delivered is deleted soon. NaN where none has."""
    with tempfile.TemporaryDirectory() as copy:
        for segment in directory.glob("*.spool"):
            with suppress(FileNotFoundError):
                shutil.copy(segment, copy)
        with closing(Spool(Path(copy), MOST_SPOOLED)) as spool:
            frames = spool.read(spool.cursor).frames
    return frames[-1].end.offset / len(frames) if frames else float("nan")


async def _ledger(around: World, in_spool: float) -> Ledger:
    """Of the groups that have come to Redis."""
    rows: Any = await around.redis.xrange(LEDGER_STREAM)
    taken: Any = await around.redis.memory_usage(LEDGER_STREAM, samples=0)
    data = [fields[b"data"] for _, fields in rows]
    return Ledger(
        in_spool=in_spool,
        in_redis=taken / len(rows),
        compressed=sum(map(len, data)) / len(data),
        as_json=sum(len(decompress(one)) for one in data) / len(data),
    )


async def _memory(around: World, ask: Ask, requests: int, pid: int) -> tuple[list[tuple[int, float]], int]:
    """Samples, and how many requests failed; while the ledger's stream is kept short."""
    samples, failed, sent = [], 0, 0
    for part in range(1, SAMPLES + 1):
        due = requests * part // SAMPLES
        failed += await _asked(ask, due - sent)
        sent = due
        await around.redis.xtrim(LEDGER_STREAM, maxlen=KEPT_GROUPS)
        samples.append((sent, resident_mb(pid)))
    return samples, failed


def resident_mb(pid: int) -> float:
    """Of a process and its descendants."""
    pages = sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in family(pid))
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def slope(samples: Sequence[tuple[int, float]]) -> Interval:
    """MB more for 10,000 requests, of the least-squares line through the second half: the first fills caches.

    The interval is that of a moving-block bootstrap of the residuals, for memory moves in steps and keeps its level.
    ValueError with fewer samples than two blocks in that half.
    """
    later = np.array(samples[len(samples) // 2 :])
    if len(later) < 2 * BLOCK:
        raise ValueError(f"a slope needs {4 * BLOCK} samples, these are {len(samples)}")
    x, y = later[:, 0] / REQUESTS_OF_SLOPE, later[:, 1]
    mean, level = np.polyfit(x, y, 1)
    residuals = y - (level + mean * x)
    generator = np.random.default_rng(0)
    starts_RB = generator.integers(0, len(y) - BLOCK + 1, (RESAMPLES, -(-len(y) // BLOCK)))
    drawn_RS = residuals[(starts_RB[..., None] + np.arange(BLOCK)).reshape(RESAMPLES, -1)[:, : len(y)]]
    centred = x - x.mean()
    errors_R = drawn_RS @ centred / (centred @ centred)
    low, high = np.quantile(mean + errors_R, (0.025, 0.975))
    return Interval(mean=float(mean), low=float(low), high=float(high))
