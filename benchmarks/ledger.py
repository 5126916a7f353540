"""What a candidate takes in Redis and in Parquet, how fast the compactor is, how far behind at 200 groups per second.

    python -m benchmarks.ledger [--json FILE]

Owns: the load and the clock. The compactor is the process that `bonsai up` starts, the Redis a server of its own with
an append-only file, the archive a directory; groups are delivered as the gateway's drainer does. Texts are words drawn
at random from a vocabulary of 5,000 and compress worse than English.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import redis
from rich.console import Console

from archive.reading import Archive
from benchmarks.claims import Claim, arguments, at_least, at_most, finish, table
from bon_algos.contracts import COMPACTOR_LEASE, LEDGER_STREAM, Arm, Candidate, CandidateGroup, Sampling
from bonsai import redis_server

CANDIDATES: Final = 16
TOKENS: Final = 64
RATE: Final = 200
SECONDS: Final = 20
BACKLOG: Final = 4000
DISTINCT: Final = 200
"""Different groups; more would be the generator's time."""
BATCH_SECONDS: Final = 2.0
POLICY: Final = "pol-" + "0" * 16
"""Of no model."""


class Figures(NamedTuple):
    groups_per_second: float
    """Of a backlog, from the first entry read to the last one in the manifest."""
    groups_per_processor_second: float
    """The same, of the compactor's own time: what other processes take does not count."""
    redis_bytes: float
    """Of a candidate, with all that Redis keeps beside it."""
    parquet_bytes: float
    worst_lag_seconds: float
    """From an entry's time in the stream to a manifest that names it, the batch's own wait included."""


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(__doc__ or "").parse_args(argv)
    figures = measure()
    console = Console()
    title = f"Groups of {CANDIDATES} candidates of {TOKENS} tokens"
    rows = [
        ("groups per second, backlog", f"{figures.groups_per_second:.0f}"),
        ("groups per processor second", f"{figures.groups_per_processor_second:.0f}"),
        ("bytes per candidate, Redis", f"{figures.redis_bytes:.0f}"),
        ("bytes per candidate, Parquet", f"{figures.parquet_bytes:.0f}"),
        (f"worst lag at {RATE} groups/s, batches of {BATCH_SECONDS:g} s", f"{figures.worst_lag_seconds:.1f} s"),
    ]
    console.print(table(title, ("", "measured"), rows))
    return finish(claims_of(figures), options.json, figures._asdict(), console)


def claims_of(figures: Figures) -> list[Claim]:
    return [
        at_least("the compactor keeps up with 200 groups per second", figures.groups_per_second, RATE),
        at_most(
            "a candidate takes in Parquet, of what it takes in Redis", figures.parquet_bytes / figures.redis_bytes, 0.6
        ),
        at_most("worst compaction lag at 200 groups per second, s", figures.worst_lag_seconds, 3 * BATCH_SECONDS),
    ]


def measure() -> Figures:
    packed = [zlib.compress(group(number).model_dump_json().encode(), 1) for number in range(DISTINCT)]
    with (
        tempfile.TemporaryDirectory(prefix="bonsai-") as name,
        running_redis(Path(name)) as url,
        redis.Redis.from_url(url) as client,
    ):
        before = _memory(client)
        deliver(client, packed, BACKLOG)
        redis_bytes = (_memory(client) - before) / (BACKLOG * CANDIDATES)
        archive = Archive.at(str(Path(name) / "artefacts" / "ledger"))
        with compactor(Path(name), url) as pid:
            _wait_for(lambda: client.exists(COMPACTOR_LEASE) > 0)
            began, used = time.perf_counter(), _processor_seconds(pid)
            _wait_for(lambda: archived(archive) >= BACKLOG)
            seconds, used = time.perf_counter() - began, _processor_seconds(pid) - used
            segments = [one for batch in archive.manifest.batches_newest_first() for one in batch.segments]
            parquet_bytes = sum(one.bytes for one in segments) / (BACKLOG * CANDIDATES)
            lag = worst_lag(client, archive, packed)
    return Figures(BACKLOG / seconds, BACKLOG / used, redis_bytes, parquet_bytes, lag)


def _processor_seconds(pid: int) -> float:
    """That the process has used so far, of all cores."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def worst_lag(client: redis.Redis, archive: Archive, packed: Sequence[bytes]) -> float:
    """RATE groups each second for SECONDS, looking at the manifest ten times as often."""
    start, delivered, worst = time.perf_counter(), 0, 0.0
    while (passed := time.perf_counter() - start) < SECONDS:
        due = int(passed * RATE) - delivered
        deliver(client, packed, due)
        delivered += due
        waiting: Any = client.xrange(LEDGER_STREAM, f"({archive.manifest.position()}", count=1)
        if waiting:
            worst = max(worst, client.time()[0] - int(waiting[0][0].split(b"-")[0]) / 1000)
        time.sleep(0.1)
    return worst


def group(number: int) -> CandidateGroup:
    draw = random.Random(number)
    words = [f"{draw.choice('bcdfglmnprst')}{draw.choice('aeiou')}{k:x}" for k in range(5000)]

    def ids() -> tuple[int, ...]:
        return tuple(draw.randrange(32_000) for _ in range(TOKENS))

    candidates = tuple(
        Candidate(
            text=" ".join(draw.choices(words, k=TOKENS)),
            token_ids=ids(),
            logprobs=tuple(_float32(-draw.expovariate(1.0)) for _ in range(TOKENS)),
            finish_reason="stop",
            reward=draw.gauss(0, 1),
        )
        for _ in range(CANDIDATES)
    )
    return CandidateGroup(
        id=f"resp_{number:032x}", created_at=time.time(), route="default", arm=Arm(policy=POLICY, n=CANDIDATES),
        arm_reason="default", policy_id=POLICY, reward_model_id="rm-" + "0" * 16, reward_template_digest="",
        policy_template_digest="", settings_digest="", prompt=" ".join(draw.choices(words, k=TOKENS)),
        prompt_token_ids=ids(), sampling=Sampling(max_tokens=TOKENS), requested=CANDIDATES, candidates=candidates,
        selected=0, status="ok",
    )  # fmt: skip


def _float32(value: float) -> float:
    """As engines give log-probs."""
    import numpy as np

    return float(np.float32(value))


def deliver(client: redis.Redis, packed: Sequence[bytes], count: int) -> None:
    with client.pipeline(transaction=False) as pipe:
        for number in range(count):
            data = packed[number % len(packed)]
            pipe.xadd(LEDGER_STREAM, {"kind": "group", "id": f"resp_{number:032x}", "data": data})
        pipe.execute()


def archived(archive: Archive) -> int:
    return sum(batch.entries for batch in archive.manifest.batches_newest_first())


def _memory(client: redis.Redis) -> int:
    told: Any = client.info("memory")
    return int(told["used_memory"])


def _wait_for(condition: Any, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the compactor did not come to its end")
        time.sleep(0.05)


@contextmanager
def running_redis(directory: Path) -> Iterator[str]:
    """As `bonsai up` starts it."""
    socket = directory / "redis.sock"
    argv = redis_server.server_argv(redis_server.system_server().executable, socket, directory)
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"unix://{socket}"
    try:
        _wait_for(lambda: _answers(url))
        yield url
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with redis.Redis.from_url(url) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


@contextmanager
def compactor(directory: Path, url: str) -> Iterator[int]:
    """Its process id."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "BONSAI_REDIS_URL": url,
        "BONSAI_ARTEFACTS": str(directory / "artefacts"),
        "BONSAI_COMPACTION_SECONDS": str(BATCH_SECONDS),
        "BONSAI_COMPACTION_ENTRIES": "1000",
    }
    process = subprocess.Popen([sys.executable, "-m", "worker.compactor"], env=environment, stderr=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
