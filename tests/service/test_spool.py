"""The spool: what was appended comes back, in order, whatever happened to the file's end in between."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.spool import Frame, Position, Spool, SpoolLocked

MAX_BYTES = 2**20
HEADER = 12
"""Magic, length, CRC-32."""


def payloads(spool: Spool) -> list[bytes]:
    """Everything from the cursor on."""
    found, position = [], spool.cursor
    while True:
        frames, end = spool.read(position)
        found += [frame.payload for frame in frames]
        if end == position:
            return found
        position = end


def reopened(spool: Spool, directory, max_bytes: int = MAX_BYTES) -> Spool:
    spool.close()
    return Spool(directory, max_bytes)


@given(st.lists(st.binary(max_size=300), max_size=20), st.integers(1, 2000))
def test_frames_come_back_in_order_over_segments_and_restarts(tmp_path_factory, written, segment_bytes):
    directory = tmp_path_factory.mktemp("spool")
    spool = Spool(directory, MAX_BYTES, segment_bytes)
    for payload in written:
        assert spool.append(payload)
    assert payloads(spool) == written
    spool = reopened(spool, directory)
    assert payloads(spool) == written
    spool.close()


@given(st.data())
def test_acknowledging_a_frame_leaves_exactly_those_after_it(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("spool")
    written = data.draw(st.lists(st.binary(max_size=50), min_size=1, max_size=10))
    spool = Spool(directory, MAX_BYTES, segment_bytes=data.draw(st.integers(1, 200)))
    for payload in written:
        spool.append(payload)
    frames: list[Frame] = []
    position = spool.cursor
    while len(frames) < len(written):
        found, position = spool.read(position)
        frames += found
    done = data.draw(st.integers(1, len(frames)))
    spool.acknowledge(frames[done - 1].end)
    assert payloads(spool) == written[done:]
    assert spool.pending_bytes == sum(HEADER + len(payload) for payload in written[done:])
    spool = reopened(spool, directory)
    assert payloads(spool) == written[done:]
    spool.close()


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=6), st.data())
def test_a_cut_tail_loses_the_frames_it_cut_and_nothing_else(tmp_path_factory, written, data):
    """The process died in the middle of a write: a prefix of the file is left."""
    directory = tmp_path_factory.mktemp("spool")
    spool = Spool(directory, MAX_BYTES)
    for payload in written:
        spool.append(payload)
    path, [size] = next(directory.glob("*.spool")), {spool.total_bytes}
    kept = data.draw(st.integers(0, size))
    os.truncate(path, kept)
    ends, at = [], 0
    for payload in written:
        at += HEADER + len(payload)
        ends.append(at)
    whole = [payload for payload, end in zip(written, ends, strict=True) if end <= kept]
    spool = reopened(spool, directory)
    spool.append(b"after the crash")
    assert payloads(spool) == [*whole, b"after the crash"]
    assert spool.damaged == (kept not in (0, *ends))
    spool.close()


@given(st.lists(st.binary(min_size=1, max_size=50), min_size=3, max_size=6), st.data())
def test_a_flipped_bit_loses_the_frame_it_is_in_and_nothing_else(tmp_path_factory, written, data):
    directory = tmp_path_factory.mktemp("spool")
    spool = Spool(directory, MAX_BYTES)
    for payload in written:
        spool.append(payload)
    path = next(directory.glob("*.spool"))
    content = bytearray(path.read_bytes())
    hit = data.draw(st.integers(0, len(content) - 1))
    content[hit] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    at, kept = 0, []
    for payload in written:
        end = at + HEADER + len(payload)
        if not at <= hit < end:
            kept.append(payload)
        at = end
    assert payloads(spool) == kept
    assert spool.damaged >= 1
    spool.close()


def test_damage_is_passed_over_once(tmp_path):
    spool = Spool(tmp_path, MAX_BYTES)
    spool.append(b"one")
    os.truncate(next(tmp_path.glob("*.spool")), 5)
    spool = reopened(spool, tmp_path)
    frames, end = spool.read(spool.cursor)
    assert (frames, spool.damaged) == ([], 1)
    assert spool.read(end) == ([], end)
    assert spool.damaged == 1
    spool.close()


def test_delivered_segments_are_deleted(tmp_path):
    """Each frame takes 12 + 8 bytes and a segment is full at 20: one frame each."""
    spool = Spool(tmp_path, MAX_BYTES, segment_bytes=20)
    for i in range(5):
        spool.append(b"%08d" % i)
    assert len(list(tmp_path.glob("*.spool"))) == 5
    frames, end = spool.read(Position(4, 0))
    assert [frame.payload for frame in frames] == [b"00000003"]
    spool.acknowledge(end)
    assert len(list(tmp_path.glob("*.spool"))) == 2
    spool.close()


def test_the_cap_refuses_whole_frames_and_room_comes_back(tmp_path):
    """100 bytes hold five frames of 12 + 8."""
    spool = Spool(tmp_path, max_bytes=100, segment_bytes=40)
    assert [spool.append(b"%08d" % i) for i in range(6)] == [True] * 5 + [False]
    assert payloads(spool) == [b"%08d" % i for i in range(5)]
    frames, _ = spool.read(spool.cursor)
    spool.acknowledge(spool.read(frames[-1].end).end)
    assert spool.append(b"00000006")
    spool.close()


def test_a_full_disk_leaves_no_torn_frame(tmp_path):
    """A process that may write 1,000 bytes to a file: the frame that does not fit is refused, and nothing of it stays.

    12 + 300 bytes each: three fit, of the fourth only 64 would."""
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from service.spool import Spool\n"
        "spool = Spool(Path(sys.argv[1]), 2**20)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "print([spool.append(b'x' * 300) for _ in range(4)], spool.append(b'y' * 30))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "[True, True, True, False] True\n"
    spool = Spool(tmp_path, MAX_BYTES)
    assert payloads(spool) == [b"x" * 300] * 3 + [b"y" * 30]
    assert spool.damaged == 0
    spool.close()


def test_a_frame_longer_than_one_reading_comes_back(tmp_path):
    spool = Spool(tmp_path, 64 * 2**20)
    long = os.urandom(9 * 2**20)
    for payload in (b"before", long, b"after"):
        spool.append(payload)
    assert payloads(spool) == [b"before", long, b"after"]
    spool.close()


@pytest.mark.parametrize("left", [b"", b"garbage", bytes(20)])
def test_an_unreadable_cursor_reads_everything_again(tmp_path, left):
    spool = Spool(tmp_path, MAX_BYTES)
    spool.append(b"one")
    spool.acknowledge(spool.read(spool.cursor).end)
    (tmp_path / "cursor").write_bytes(left)
    spool = reopened(spool, tmp_path)
    assert payloads(spool) == [b"one"]
    spool.close()


def test_one_process_per_directory(tmp_path):
    spool = Spool(tmp_path, MAX_BYTES)
    with pytest.raises(SpoolLocked, match=r"another gateway process writes into .*BONSAI_SPOOL"):
        Spool(tmp_path, MAX_BYTES)
    spool.close()
    Spool(tmp_path, MAX_BYTES).close()
