"""A compactor over damaged files: what it cannot look into it leaves and tells of, and all else goes on."""

from __future__ import annotations

import logging
import resource
import shutil
import threading
from contextlib import contextmanager

import pyarrow as pa
import pytest
import redis

from archive.merging import Limits as MergeLimits
from archive.reading import Question
from archive.repair import QUARANTINE
from archive.retention import Retention
from archive.tables import parquet_bytes
from archive.writing import write_batch
from bon_algos.contracts import ERASURES, LEDGER_STREAM, CandidateGroup, Erasure
from tests.archive.records import archive_at, entries, group
from tests.worker import world
from tests.worker.erasure import ADA, asked, frozen, of
from tests.worker.forks import until
from worker.compaction import Limits
from worker.compactor import Compactor
from worker.erasing import Eraser
from worker.sources import delete_content, pinned, read_sources

AT_ONCE = Limits(entries=1000, bytes=2**20, seconds=0.0, hot_groups=0, hot_seconds=0.0)
TEXTS_GO = Retention(text=1)


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url) as connection:
        yield connection


@contextmanager
def compactor(client, directory):
    """One at work, until the block is left; it has not died by then."""
    work = Compactor(
        client,
        archive_at(directory / "ledger"),
        directory,
        AT_ONCE,
        TEXTS_GO,
        MergeLimits(2**20),
        lease_seconds=60,
        retention_seconds=60,
    )
    stopping = threading.Event()
    thread = threading.Thread(target=work.run, args=[stopping])
    thread.start()
    try:
        yield
        assert thread.is_alive()
    finally:
        stopping.set()
        thread.join(60)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def receipt(client, erasure):
    return Erasure.model_validate_json(client.hget(ERASURES, erasure.id))


def is_settled(client, erasure):
    """What can be done now is done, and nothing waits in the stream."""
    return receipt(client, erasure).state != "requested" and client.xlen(LEDGER_STREAM) == 0


def prompts(directory):
    found = [one.record for one in archive_at(directory / "ledger").records(Question(("groups",)))]
    return {one.id: one.prompt for one in found if isinstance(one, CandidateGroup)}


def test_one_flipped_bit_holds_up_an_erasure_that_must_look_there_and_nothing_else(client, tmp_path, caplog):
    archive = archive_at(tmp_path / "ledger")
    (damaged,) = write_batch(archive, entries(of(ADA, 1, route="other"))).segments
    write_batch(archive, entries(of(ADA, 2), of("bob", 3)))
    path = tmp_path / "ledger" / (damaged.path or "")
    whole = path.read_bytes()
    flip_a_bit(path)
    erasure = asked(client)
    world.deliver(client, late := of("eve", 4))
    with caplog.at_level(logging.ERROR), compactor(client, tmp_path):
        until(lambda: is_settled(client, erasure), "it does what it can", 20)
        until(lambda: set(prompts(tmp_path).values()) == {""}, "retention goes on", 20)
    told = receipt(client, erasure)
    assert (told.state, told.erased.groups, told.unsearched) == ("erased", 1, (damaged.path,))
    assert f"{damaged.path} is left as it is: DamagedSegment" in caplog.text
    assert set(prompts(tmp_path)) == {of("bob", 3).id, late.id}
    eraser = Eraser(client, archive, tmp_path)
    assert [one.state for one in eraser.work()] == ["erased"]
    assert not eraser.has_work()  # another pass over everything would find no more
    path.write_bytes(whole)
    with compactor(client, tmp_path):
        until(lambda: receipt(client, erasure).state == "proven", "what was mended is looked into", 20)
    assert (receipt(client, erasure).unsearched, receipt(client, erasure).erased.groups) == ((), 2)
    assert not path.exists()


def test_a_segment_that_is_lost_holds_nothing_that_could_be_erased(client, tmp_path):
    archive = archive_at(tmp_path / "ledger")
    (lost,) = write_batch(archive, entries(of(ADA, 1, route="other"))).segments
    write_batch(archive, entries(of(ADA, 2), of("bob", 3)))
    (tmp_path / "ledger" / (lost.path or "")).unlink()
    erasure = asked(client)
    with compactor(client, tmp_path):
        until(lambda: receipt(client, erasure).state == "proven", "it is proven", 20)
    assert receipt(client, erasure).erased.groups == 1


def test_a_file_of_columns_that_nobody_knows_is_put_aside_and_goes_with_the_next_erasure(client, tmp_path):
    archive = archive_at(tmp_path / "ledger")
    write_batch(archive, entries(of("bob", 3)))
    name = "groups/tenant=default/day=2023-11-15/route=default/segment-1-0-2-0.parquet"
    archive.storage.put(name, parquet_bytes([pa.table({"said": [ADA]})]))
    world.deliver(client, of("eve", 4))
    with compactor(client, tmp_path):
        until(lambda: archive.storage.names(QUARANTINE) == [f"{QUARANTINE}/{name}"], "it is put aside", 20)
        erasure = asked(client)
        until(lambda: receipt(client, erasure).state == "proven", "nothing of it is left", 20)
    assert archive.storage.names(QUARANTINE) == []
    assert set(prompts(tmp_path)) == {of("bob", 3).id, of("eve", 4).id}


def test_a_list_that_cannot_be_read_holds_up_erasures_and_retention_until_it_is_gone(client, tmp_path, caplog):
    write_batch(archive_at(tmp_path / "ledger"), entries(group(1, prompt="old")))
    world.deliver(client, of(ADA, 2))
    frozen(client, tmp_path, "job_1")
    window = tmp_path / "jobs" / "job_1" / "window"
    (window / "groups.json").write_text('[["resp_')
    erasure = asked(client)
    with caplog.at_level(logging.ERROR), compactor(client, tmp_path):
        until(lambda: is_settled(client, erasure), "it does what it can", 20)
        until(lambda: "nothing is taken that is too old" in caplog.text, "retention waits", 20)
    told = receipt(client, erasure)
    assert (told.state, told.unsearched) == ("erased", ("jobs/job_1/window",))
    assert prompts(tmp_path) == {group(1).id: "old"}
    shutil.rmtree(window)
    with compactor(client, tmp_path):
        until(lambda: receipt(client, erasure).state == "proven", "nothing is left to look into", 20)
        until(lambda: prompts(tmp_path) == {group(1).id: ""}, "retention goes on", 20)


@contextmanager
def files_of(most):
    """Bytes: what is longer cannot be written, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_list_of_a_windows_groups_as_it_was(client, tmp_path):
    world.deliver(client, of(ADA, 1), of("bob", 2))
    frozen(client, tmp_path, "job_1")
    window = tmp_path / "jobs" / "job_1" / "window"
    before = read_sources(window)
    with files_of(64), pytest.raises(OSError, match="File too large"):
        delete_content(window, [of(ADA, 1).id])
    assert read_sources(window) == before
    delete_content(window, [of(ADA, 1).id])
    assert pinned(tmp_path) == {one.group_id for one in before} - {of(ADA, 1).id}
    assert sorted(path.name for path in window.iterdir()) == ["groups.json", "window.json"]
