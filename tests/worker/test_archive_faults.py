"""The archive's disk is full, its store is away, its files are damaged: nothing is trimmed that is not in it."""

from __future__ import annotations

import errno
import logging
import threading
from pathlib import Path

import pytest
import redis
from pyarrow import fs

from archive.manifest import DamagedManifest
from archive.merging import Limits as MergeLimits
from archive.reading import Archive, Question
from archive.repair import sweep
from archive.retention import Retention
from archive.storage import Storage
from archive.writing import write_batch
from bon_algos.contracts import LEDGER_CONSUMERS, LEDGER_STREAM
from tests.archive.records import NOON, archive_at, entries, feedback, group
from tests.worker import world
from tests.worker.forks import until
from worker.compaction import Compaction, Limits
from worker.compactor import Compactor

AT_ONCE = Limits(entries=1000, bytes=2**20, seconds=0.0, hot_groups=0, hot_seconds=0.0)
EVERYTHING = Question(("groups", "outcomes", "feedback", "exposures"))


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url) as connection:
        yield connection


class FailingStorage(Storage):
    """Takes so many files, then says what is wrong."""

    def __init__(self, directory: Path, takes: int, wrong: OSError) -> None:
        super().__init__(fs.LocalFileSystem(), str(directory))
        self.takes, self._wrong = takes, wrong

    def put(self, name: str, content: bytes) -> None:
        if self.takes <= 0:
            raise self._wrong
        self.takes -= 1
        super().put(name, content)


def opened(client, archive):
    made = Compaction(client, archive, AT_ONCE)
    made.open()
    return made


def archived(archive):
    return [one.record for one in archive.records(EVERYTHING)][::-1]


@pytest.mark.parametrize("takes", range(5))  # two segments, a manifest, its root; then all is there
def test_F29_a_full_disk_trims_nothing_and_the_batch_is_whole_when_there_is_room(client, tmp_path, takes):
    records = [group(1), feedback(group(1)), group(2)]
    world.deliver(client, *records)
    full = FailingStorage(tmp_path, takes, OSError(errno.ENOSPC, "No space left on device"))
    if takes < 4:
        with pytest.raises(OSError, match="No space left"):
            opened(client, Archive(full)).step(wait_seconds=0.01)
        assert archived(archive_at(tmp_path)) == []
        assert client.xlen(LEDGER_STREAM) == client.xpending(LEDGER_STREAM, LEDGER_CONSUMERS)["pending"] == 3
    full.takes = 100
    sweep(Archive(full))
    opened(client, Archive(full)).step(wait_seconds=0.01)
    assert archived(archive_at(tmp_path)) == records
    assert client.xlen(LEDGER_STREAM) == 0


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:-9], lambda whole: whole[:40] + b"?" + whole[41:]], ids=["cut", "bit"]
)
def test_F30_a_damaged_segment_is_passed_over_and_told(tmp_path, caplog, damage):
    archive = archive_at(tmp_path)
    (torn,) = write_batch(archive, entries(group(1))).segments
    write_batch(archive, entries(group(2)))
    (tmp_path / (torn.path or "")).write_bytes(damage((tmp_path / (torn.path or "")).read_bytes()))
    with caplog.at_level(logging.ERROR):
        assert archived(archive) == [group(2)]
    assert f"{torn.path} is passed over" in caplog.text
    assert sweep(archive) == ((), (), ())


def test_F30_a_damaged_manifest_stops_the_compactor_before_it_changes_anything(client, tmp_path):
    archive = archive_at(tmp_path)
    write_batch(archive, entries(group(1)))
    (manifest,) = (tmp_path / "_manifest").glob("2023-*")
    manifest.write_text(manifest.read_text()[:-5])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    world.deliver(client, group(2))
    for attempt in (lambda: sweep(archive), lambda: opened(client, archive)):
        with pytest.raises(DamagedManifest, match=r"the manifest 2023-11-15\.e0-[0-9a-f]{8}\.json cannot be read"):
            attempt()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert client.xlen(LEDGER_STREAM) == 1


def test_F31_a_compactor_waits_for_its_store_and_then_catches_up_and_merges(client, tmp_path, caplog):
    small = [group(number, created_at=NOON + number) for number in range(3)]
    for one in small:
        write_batch(archive_at(tmp_path / "ledger"), entries(one))
    world.deliver(client, group(4))
    away = FailingStorage(tmp_path / "ledger", 0, OSError("the store answers 503"))
    compactor = Compactor(
        client,
        Archive(away),
        tmp_path,
        AT_ONCE,
        Retention(),
        MergeLimits(2**20),
        lease_seconds=60,
        retention_seconds=60,
    )
    stopping = threading.Event()
    thread = threading.Thread(target=compactor.run, args=[stopping])
    with caplog.at_level(logging.INFO, "bonsai.compactor"):
        thread.start()
        until(lambda: "compaction failed, tried again in" in caplog.text, "the store is missed")
        assert client.xlen(LEDGER_STREAM) == 1
        away.takes = 100
        until(lambda: "3 batches up to" in caplog.text and client.xlen(LEDGER_STREAM) == 0, "it catches up")
        stopping.set()
        thread.join(60)
    archive = archive_at(tmp_path / "ledger")
    assert archived(archive) == [*small, group(4)]
    assert [len(batch.merged) for batch in archive.manifest.batches_newest_first()] == [0, 3]
