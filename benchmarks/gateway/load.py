"""Requests at equal distances whatever became of the earlier ones, and as many as go.

Owns: when requests are sent, how long they took, how late the generator itself was, what a process spent meanwhile.
Does not own: what is asked (systems.py).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np

from bonsai.leftovers import read_rows

Ask = Callable[[], Awaitable[bool]]
"""One request to its end; whether it was answered as it should be."""


class Latencies(NamedTuple):
    milliseconds: Sequence[float]
    """Of those that were answered, from when each was sent."""
    late: Sequence[float]
    """Of all: milliseconds between when it was to be sent and when it was."""
    failed: int

    def at(self, quantile: float) -> float:
        return float(np.quantile(self.milliseconds, quantile)) if self.milliseconds else float("nan")

    def late_at(self, quantile: float) -> float:
        return float(np.quantile(self.late, quantile))


class Saturation(NamedTuple):
    answered: int
    failed: int
    seconds: float
    cpu_seconds: float
    """Of the measured process and what it started."""

    @property
    def per_second(self) -> float:
        return self.answered / self.seconds

    @property
    def cpu_milliseconds(self) -> float:
        """For one request."""
        return 1000 * self.cpu_seconds / self.answered if self.answered else float("nan")

    @property
    def busy(self) -> float:
        """Share of a core."""
        return self.cpu_seconds / self.seconds

    @property
    def per_core_second(self) -> float:
        """Requests in a second of CPU."""
        return 1000 / self.cpu_milliseconds


def together(first: Latencies, second: Latencies) -> Latencies:
    return Latencies(
        [*first.milliseconds, *second.milliseconds], [*first.late, *second.late], first.failed + second.failed
    )


async def open_loop(ask: Ask, rate: float, seconds: float) -> Latencies:
    """`rate` requests a second."""
    milliseconds: list[float] = []
    late: list[float] = []

    async def one() -> bool:
        sent = perf_counter()
        is_good = await ask()
        if is_good:
            milliseconds.append(1000 * (perf_counter() - sent))
        return is_good

    begun, under_way = perf_counter(), []
    for number in range(round(rate * seconds)):
        due = begun + number / rate
        if (rest := due - perf_counter()) > 0:
            await asyncio.sleep(rest)
        late.append(1000 * max(0.0, perf_counter() - due))
        under_way.append(asyncio.create_task(one()))
    answers = await asyncio.gather(*under_way)
    return Latencies(milliseconds, late, answers.count(False))


async def closed_loop(ask: Ask, connections: int, seconds: float, pid: int) -> Saturation:
    """Each connection asks again as soon as it was answered."""
    answers: list[bool] = []
    spent, begun = cpu_seconds(pid), perf_counter()

    async def one() -> None:
        while perf_counter() < begun + seconds:
            answers.append(await ask())

    await asyncio.gather(*(one() for _ in range(connections)))
    took = perf_counter() - begun
    return Saturation(answers.count(True), answers.count(False), took, cpu_seconds(pid) - spent)


async def saturated(ask: Ask, seconds: float, pid: int, connections: Sequence[int] = (8, 32, 96)) -> Saturation:
    """Of several numbers of connections the one that got most answers."""
    found = [await closed_loop(ask, count, seconds, pid) for count in connections]
    return max(found, key=lambda one: one.per_second)


def cpu_seconds(pid: int) -> float:
    """That a process and its descendants have computed."""
    ticks = 0
    for one in family(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    rows, found = read_rows(), [pid]
    for parent in found:
        found += [row.pid for row in rows if row.parent == parent]
    return found
