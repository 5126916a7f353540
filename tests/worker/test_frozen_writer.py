"""A compactor that is frozen at any step, wakes when another has worked, and goes on: nothing is lost or twice."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import cast

import pytest
import redis

from archive.fence import Alone, Overtaken
from archive.merging import Limits as MergeLimits
from archive.reading import Archive, Question
from archive.repair import sweep
from archive.writing import rewrite, write_batch
from bon_algos.contracts import COMPACTOR_LEASE, LEDGER_CONSUMERS, LEDGER_STREAM
from tests.archive.records import NOON, Fate, MortalRedis, MortalStorage, archive_at, entries, feedback, group
from tests.worker import world
from worker.archive_lease import ArchiveLease
from worker.compaction import Compaction, Limits, is_in_stream
from worker.merging import Merging

LIMITS = Limits(entries=2, bytes=2**20, seconds=0.0, hot_groups=0, hot_seconds=0.0)
EVERYTHING = Question(("groups", "outcomes", "feedback", "exposures"))
MERGES = MergeLimits(bytes=2**20)
HOURS = [round(1000 * (NOON + 3600 * number)) for number in (0, 1, 24)]
"""Of what is there before, of what the first writer works on, and of what comes meanwhile."""


class Frozen(Fate):
    """At its k-th step a process stops, and `meanwhile` happens before it goes on."""

    def __init__(self, at, meanwhile) -> None:
        super().__init__()
        self._at, self._meanwhile = at, meanwhile

    def step(self):
        if self.calls == self._at:
            self._meanwhile()
        return super().step()


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url) as connection:
        yield connection


def deliver(client, first_ms, *records):
    for entry in entries(*records, first_ms=first_ms):
        client.xadd(LEDGER_STREAM, dict(entry.fields), id=str(entry.id))


def work(client, archive, *, changes=True):
    """All that a compactor does, once; changes: of what is there already, too. Raises Overtaken."""
    with ArchiveLease(client, archive, 60) as lease:
        sweep(archive, lease, partial(is_in_stream, client))
        compaction = Compaction(client, archive, LIMITS, lease)
        compaction.open()
        while compaction.step(wait_seconds=0.01) is not None:
            pass
        if not changes:
            return
        for batch in list(archive.manifest.batches_newest_first()):
            rewrite(archive, batch, partial(without, "gone"), lease)
        merging = Merging(archive, MERGES, lease, grace_seconds=-1.0)
        while merging.step() is not None:
            pass
        merging.tidy()


def without(prompt, segment, rows):
    """As retention and erasures take some rows, and leave the others."""
    left = [row for row in rows if row.get("prompt") != prompt]
    return None if len(left) == len(rows) else (left, segment.lacks)


def taken_over(client, directory, *records):
    """The lease ran out; more arrives; another writes that, and leaves what is there as it is."""
    client.delete(COMPACTOR_LEASE)
    deliver(client, HOURS[2], *records)
    work(client, archive_at(directory), changes=False)


def archived(archive):
    return [one.record for one in archive.records(EVERYTHING)][::-1]


@pytest.mark.slow
def test_frozen_anywhere_and_overtaken(client, redis_url, tmp_path):
    at, num_overtaken, is_over = 0, 0, False
    while not is_over:
        client.flushall()
        directory = tmp_path / str(at)
        first = [group(1), group(2), feedback(group(1)), group(3, prompt="gone"), group(4)]
        later = [group(5), group(6, prompt="gone"), group(7)]
        deliver(client, HOURS[0], *first[:3])
        work(client, archive_at(directory))
        deliver(client, HOURS[1], *first[3:])
        frozen = cast(MortalRedis, MortalRedis.from_url(redis_url))
        frozen.fate = fate = Frozen(at, partial(taken_over, client, directory, *later))
        try:
            work(frozen, Archive(MortalStorage(directory, fate)))
        except (Overtaken, OSError):
            num_overtaken += 1
        frozen.fate = None
        frozen.close()
        is_over = fate.calls <= at
        if is_over:
            deliver(client, HOURS[2], *later)
        archive = archive_at(directory)
        work(client, archive)
        assert archived(archive) == [one for one in (*first, *later) if getattr(one, "prompt", "") != "gone"], at
        assert client.xpending(LEDGER_STREAM, LEDGER_CONSUMERS)["pending"] == 0
        named = {one.path for batch in archive.manifest.batches_newest_first() for one in batch.segments}
        there = {name for kind in ("groups", "feedback", "_quarantine") for name in archive.storage.names(kind)}
        assert there == named - {None}, at
        at += 1
    assert num_overtaken > 20


def test_whoever_had_the_lease_in_between_is_noticed(client, tmp_path):
    """Also when it gave it back: what the first knows of the archive is old."""
    archive = archive_at(tmp_path)
    with ArchiveLease(client, archive, 60) as first:
        client.delete(COMPACTOR_LEASE)
        first.confirm()  # ran out, and nobody came
        client.delete(COMPACTOR_LEASE)
        with ArchiveLease(client, archive, 60) as second:
            assert second.epoch == first.epoch + 1
            with pytest.raises(Overtaken):
                first.confirm()
        with pytest.raises(Overtaken):
            first.confirm()


def test_epochs_go_on_where_redis_was_lost(client, tmp_path):
    world.deliver(client, group(1))
    for _ in range(3):
        work(client, archive_at(tmp_path))
    client.flushall()
    with ArchiveLease(client, archive_at(tmp_path), 60) as lease:
        assert lease.epoch == 4


def test_what_was_not_acknowledged_is_not_by_one_that_was_overtaken(client, tmp_path):
    world.deliver(client, group(1), group(2))
    archive = archive_at(tmp_path)
    with ArchiveLease(client, archive, 60) as first:
        old = Compaction(client, archive, LIMITS, first)
        old.open()
        old.step(wait_seconds=0.01)
        world.deliver(client, group(3))
        client.delete(COMPACTOR_LEASE)
        with ArchiveLease(client, archive, 60):
            with pytest.raises(Overtaken):
                old.step(wait_seconds=0.01)
            assert client.xpending(LEDGER_STREAM, LEDGER_CONSUMERS)["pending"] == 1
            with pytest.raises(Overtaken):
                old.trim()


def test_what_is_read_by_one_that_was_overtaken_is_written_by_the_next(client, tmp_path):
    """It wakes and reads on, and is told before it writes: the group takes that for delivered, and the next one reads
    what is behind it."""
    archive = archive_at(tmp_path)
    with ArchiveLease(client, archive, 60) as first:
        old = Compaction(client, archive, replace(LIMITS, seconds=60.0), first)
        old.open()
        client.delete(COMPACTOR_LEASE)
        with ArchiveLease(client, archive, 60) as second:
            new = Compaction(client, archive, LIMITS, second)
            new.open()
            world.deliver(client, group(1))
            assert old.step(wait_seconds=0.01) is None
            with pytest.raises(Overtaken):
                first.confirm()
            world.deliver(client, group(2))
            new.step(wait_seconds=0.01)
    work(client, archive)
    assert archived(archive) == [group(1), group(2)]
    assert client.xpending(LEDGER_STREAM, LEDGER_CONSUMERS)["pending"] == 0


class Late:
    """A writer that is told only at the end that it was overtaken."""

    epoch = 1

    def confirm(self):
        raise Overtaken


def test_what_is_written_late_is_written_beside_what_counts(tmp_path):
    """Of the same stretch, from which somebody was erased meanwhile."""
    archive = archive_at(tmp_path)
    first, second = entries(group(1), group(2))
    write_batch(archive, [first, second._replace(fields={})], Alone(epoch=2))
    with pytest.raises(Overtaken):
        write_batch(archive, [first, second], Late())
    assert archived(archive) == [group(1)]
    assert len(sweep(archive, Alone(epoch=3)).deleted) == 1
    assert archived(archive) == [group(1)]
