"""A disk that refuses to open, read, cut or mark: serving goes on, nothing accepted is lost, all arrives once."""

from __future__ import annotations

import asyncio
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from bon_algos.contracts import SPOOLS
from service.ledger import Ledger
from service.loops import running_loops
from service.spool import Spool
from service.spool_report import SpoolReport
from tests.fixtures.gateway import read_ledger
from tests.service.records import group
from tests.service.test_spool import payloads, reopened

MAX_BYTES = 2**20


@contextmanager
def limited(kind: int) -> Iterator[None]:
    """This process gets nothing more of this kind."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


@contextmanager
def obstructed(file: Path) -> Iterator[None]:
    """A directory has a file's name, so that it can neither be made nor read."""
    aside = file.with_suffix(".aside")
    if file.exists():
        file.rename(aside)
    file.mkdir()
    try:
        yield
    finally:
        file.rmdir()
        if aside.exists():
            aside.rename(file)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


# --- the spool alone --------------------------------------------------------------------------------------


def test_without_a_next_segment_the_full_one_goes_on(tmp_path, caplog):
    """12 + 8 bytes each, and a segment is full at 20."""
    written = [b"%08d" % i for i in range(6)]
    spool = Spool(tmp_path, MAX_BYTES, segment_bytes=20)
    with obstructed(tmp_path / "00000002.spool"):
        assert all(spool.append(payload) for payload in written[:4])
    assert (spool.active, spool.refusals) == (1, 3)
    assert len(caplog.records) == 1
    assert all(spool.append(payload) for payload in written[4:])
    assert spool.active == 3
    assert payloads(spool) == written
    spool = reopened(spool, tmp_path)
    assert payloads(spool) == written
    spool.close()


def test_no_frame_goes_into_a_socket_when_descriptors_ran_out(tmp_path):
    spool = Spool(tmp_path, MAX_BYTES)
    assert spool.append(b"before")
    with limited(resource.RLIMIT_NOFILE), pytest.raises(OSError, match="Too many open files"):
        spool.begin_segment()
    near, far = socket.socketpair()  # with the lowest numbers that are free
    with near, far:
        assert spool.append(b"of somebody else")
        for end in (near, far):
            end.setblocking(False)
            with pytest.raises(BlockingIOError):
                end.recv(1)
    assert payloads(spool) == [b"before", b"of somebody else"]
    spool.close()


def test_a_torn_frame_that_cannot_be_cut_off_is_written_over(tmp_path):
    """1,000 bytes fit into a file: of the fourth frame of 12 + 300 bytes 64 are written, and ftruncate gives EIO."""
    script = (
        "import ctypes, errno, platform, resource, struct, sys\n"
        "from pathlib import Path\n"
        "from service.spool import Spool\n"
        "spool = Spool(Path(sys.argv[1]), 2**20)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "number = {'x86_64': 77, 'aarch64': 46}[platform.machine()]\n"
        # seccomp: load the number of the system call; if it is ftruncate's, answer EIO; else allow it.
        "steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | errno.EIO), (0x06, 0, 0, 0x7FFF0000)]\n"
        "code = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *step) for step in steps))\n"
        "program = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', len(steps), ctypes.addressof(code)))\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.prctl(38, 1, 0, 0, 0) == libc.prctl(22, 2, program, 0, 0) == 0\n"
        "print([spool.append(b'x' * 300) for _ in range(4)], spool.append(b'y' * 30))\n"
        "frames, end = spool.read(spool.cursor)\n"
        "print([frame.payload[:1] for frame in frames], spool.damaged)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert done.stdout == "[True, True, True, False] True\n[b'x', b'x', b'x', b'y'] 0\n", done.stderr


# --- from the spool into Redis ----------------------------------------------------------------------------


@asynccontextmanager
async def delivering(spool: Spool, redis: Redis) -> AsyncIterator[Ledger]:
    ledger = Ledger(spool, redis)
    async with running_loops(ledger.run(lambda unmeasured: None)):
        yield ledger
    spool.close()


def appended(ledger: Ledger, *names: str) -> None:
    for name in names:
        assert ledger.append(group([(1.0, 3), (2.0, 4)]).model_copy(update={"id": name}))


def arrived(redis_url: str) -> list[str]:
    return [record.id for record in read_ledger(redis_url)]


@pytest.mark.anyio
async def test_a_cursor_that_cannot_be_written_is_written_later(tmp_path, redis, redis_url, caplog):
    spool = Spool(tmp_path, MAX_BYTES)
    async with delivering(spool, redis) as ledger:
        await until(lambda: ledger.status.redis == "ok")
        appended(ledger, "one", "two")
        with limited(resource.RLIMIT_FSIZE):
            await until(lambda: spool.refusals > 1)
            assert arrived(redis_url) == ["one", "two"]
            assert ledger.status.pending_bytes > 0
        assert [record.message for record in caplog.records if "cannot move the cursor" in record.message] != []
        await until(lambda: ledger.status.pending_bytes == 0)
        appended(ledger, "three")
        await until(lambda: ledger.status.pending_bytes == 0)
        assert ledger.status.refusals == spool.refusals
    assert arrived(redis_url) == ["one", "two", "three"]
    assert len([record for record in caplog.records if "cannot move the cursor" in record.message]) == 1
    spool = Spool(tmp_path, MAX_BYTES)
    assert payloads(spool) == []
    spool.close()


@pytest.mark.anyio
async def test_a_segment_that_cannot_be_read_is_delivered_when_it_can(tmp_path, redis, redis_url):
    spool = Spool(tmp_path, MAX_BYTES)
    async with delivering(spool, redis) as ledger:
        await until(lambda: ledger.status.redis == "ok")
        with obstructed(tmp_path / "00000001.spool"):
            appended(ledger, "one", "two")
            await until(lambda: spool.refusals > 1)
            assert arrived(redis_url) == []
        await until(lambda: ledger.status.pending_bytes == 0)
    assert arrived(redis_url) == ["one", "two"]


@pytest.mark.anyio
async def test_a_spool_that_cannot_begin_a_segment_is_not_called_clean(tmp_path, redis):
    spool = Spool(tmp_path, MAX_BYTES)
    async with delivering(spool, redis) as ledger:
        appended(ledger, "one")
        await until(lambda: ledger.status.pending_bytes == 0)
        report = SpoolReport(redis, ledger, "mine")
        with obstructed(tmp_path / "00000002.spool"):
            async with running_loops(report.run()):
                await until(lambda: spool.refusals == 1)
            assert await redis.hget(SPOOLS, "mine") is None
        await report.tell()
    assert float(await redis.hget(SPOOLS, "mine")) > 0
