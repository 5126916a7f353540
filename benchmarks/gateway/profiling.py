"""Where the gateway's time goes, by part: a sampling profiler looks into it while it is under load.

Owns: which file belongs to which part, shares of samples. Does not own: the load (load.py). py-spy is a process of its
own: the gateway stands still for a moment at each sample and does nothing more than it would without.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks.claims import Claim, at_most
from benchmarks.gateway.environments import CannotRun, environment_of
from benchmarks.gateway.load import closed_loop
from benchmarks.gateway.systems import generate, ours, world

CONNECTIONS: Final = 24
WARM_SECONDS: Final = 3.0
SAMPLES_A_SECOND: Final = 400
FUNCTIONS: Final = 20
MOST_REST: Final = 15.0
"""Per cent."""
REST: Final = "event loop, sockets, the rest"
LOOP: Final = "Runner.run (asyncio/"
"""All frames of the gateway's main thread up to here are about its start."""
OURS: Final = ("service/", "bon_algos/")
WAITS: Final = ("_worker (concurrent/futures/thread.py",)
"""Threads that wait for work are idle, though the profiler takes them for busy."""
COLUMNS: Final = ("part", "% of CPU", "ms of a request")
FUNCTION_COLUMNS: Final = ("the last function of ours, with what it calls elsewhere", "% of CPU")

PARTS: Final[Mapping[str, Sequence[str]]] = {
    "HTTP: server, framework, middleware": (
        "uvicorn/", "starlette/", "fastapi/", "service/server.py", "service/edge.py", "service/draining.py",
        "service/plain_route.py",
    ),
    "key, limits, queue": (
        "service/access.py", "service/authentication.py", "service/keys.py", "service/api_key.py", "service/limits.py",
        "service/fair_queue.py", "service/allowances.py", "service/request_cost.py",
    ),
    "body: reading and validation": ("service/json_body.py", "service/generation.py"),
    "route, arm, prompt": (
        "service/serving.py", "service/routing.py", "service/experiments.py", "service/strategies.py",
        "service/learned.py", "service/catalogue.py", "service/replays.py",
    ),
    "engine client: drawing": (
        "service/vllm.py", "service/replica.py", "service/fleet.py", "service/pool.py", "service/waves.py",
    ),
    "reward": ("service/reward.py", "bon_algos/scoring.py"),
    "choice": ("service/best_of_n.py",),
    "ledger: frame, spool, Redis": (
        "service/ledger.py", "service/spool.py", "service/spool_report.py", "redis/",
    ),
    "reply": ("service/routes/", "service/replies.py"),
    "both engine clients: HTTP": ("service/engine_http.py", "service/engine_connection.py"),
}  # fmt: skip
"""What the files of a frame are about; of a stack the innermost that is here counts."""


class Profile(NamedTuple):
    milliseconds: float
    """CPU of a request, without the profiler."""
    stacks: Mapping[tuple[str, ...], int]
    """Frames, outermost first, and how many samples."""


async def profiled(seconds: float) -> Profile:
    """Of `/generate`, at as many requests as go. Raises CannotRun."""
    spy = await asyncio.to_thread(environment_of, "tools/py_spy") / "py-spy"
    async with world() as around, ours(around) as one:
        system = generate(around, one)
        await closed_loop(system.ask, CONNECTIONS, WARM_SECONDS, system.pid)
        spent = await closed_loop(system.ask, CONNECTIONS, seconds, system.pid)
        file = around.directory / "stacks"
        load = asyncio.create_task(closed_loop(system.ask, CONNECTIONS, seconds + WARM_SECONDS, system.pid))
        await _recorded(spy, system.pid, seconds, file)
        await load
        return Profile(spent.cpu_milliseconds, stacks_of(file.read_text().splitlines()))


async def _recorded(spy: Path, pid: int, seconds: float, file: Path) -> None:
    told = ("--pid", str(pid), "--duration", f"{seconds:.0f}", "--rate", str(SAMPLES_A_SECOND))
    written = ("--format", "raw", "--function", "--output", str(file))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(spy, "record", *told, *written, stdout=pipe, stderr=pipe)
    _, said = await process.communicate()
    if process.returncode != 0:
        raise CannotRun(f"py-spy cannot look into the gateway (it needs CAP_SYS_PTRACE): {said.decode().strip()}")


def stacks_of(lines: Iterable[str]) -> dict[tuple[str, ...], int]:
    """py-spy's lines, `frame;frame;frame count` with the outermost first; without threads that wait, and without frames
    around the event loop."""
    stacks: Counter[tuple[str, ...]] = Counter()
    for line in lines:
        frames, _, count = line.rpartition(" ")
        stack = tuple(frames.split(";"))
        if not stack[-1].startswith(WAITS):
            stacks[_inside_the_loop(stack)] += int(count)
    return dict(stacks)


def _inside_the_loop(stack: tuple[str, ...]) -> tuple[str, ...]:
    begins = next((i for i, frame in enumerate(stack, 1) if frame.startswith(LOOP)), 0)
    return stack[begins:]


def part_of(stack: Sequence[str]) -> str:
    """Frames read `name (path:line)`."""
    for frame in reversed(stack):
        path = frame.rpartition("(")[2]
        for part, beginnings in PARTS.items():
            if path.startswith(tuple(beginnings)):
                return part
    return REST


def last_of_ours(stack: Sequence[str]) -> str | None:
    """None where only the server, the event loop and libraries are on it."""
    return next((frame for frame in reversed(stack) if frame.rpartition("(")[2].startswith(OURS)), None)


def parts_of(profile: Profile) -> dict[str, float]:
    """Shares, in the order of a request's way."""
    shares = Counter(dict.fromkeys([*PARTS, REST], 0))
    for stack, count in profile.stacks.items():
        shares[part_of(stack)] += count
    total = shares.total()
    return {part: count / total for part, count in shares.items()}


def rows_of(profile: Profile) -> list[tuple[str, ...]]:
    rows = [
        (part, f"{100 * share:.1f}", f"{share * profile.milliseconds:.2f}") for part, share in parts_of(profile).items()
    ]
    return [*rows, ("together", "100", f"{profile.milliseconds:.2f}")]


def claims_of(profile: Profile) -> list[Claim]:
    """A file that was renamed or is new falls out of the parts above."""
    return [at_most("% of CPU that no part accounts for", 100 * parts_of(profile)[REST], MOST_REST)]


def figures_of(profile: Profile) -> dict[str, object]:
    return {"cpu_ms": profile.milliseconds, "parts": parts_of(profile), "functions": functions_of(profile)}


def functions_of(profile: Profile) -> list[tuple[str, ...]]:
    counts: Counter[str] = Counter()
    for stack, count in profile.stacks.items():
        if (frame := last_of_ours(stack)) is not None:
            counts[frame] += count
    total = sum(profile.stacks.values())
    return [(frame, f"{100 * count / total:.1f}") for frame, count in counts.most_common(FUNCTIONS)]
