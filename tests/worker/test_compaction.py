"""The stream becomes segments, whatever dies in between. A real Redis."""

from __future__ import annotations

import dataclasses
import zlib
from typing import cast

import pytest
import redis

from archive.fence import ALONE
from archive.merging import merge
from archive.reading import Archive, Question
from archive.repair import sweep
from archive.tables import SegmentSet
from bon_algos.contracts import LEDGER_CONSUMERS, LEDGER_STREAM
from tests.archive.records import Died, Fate, MortalRedis, MortalStorage, archive_at, entries, feedback, group, packed
from tests.worker import world
from worker.compaction import Compaction, Limits
from worker.ledger import groups_newest_first

EVERYTHING: tuple[SegmentSet, ...] = ("groups", "outcomes", "feedback", "exposures")
AT_ONCE = Limits(entries=1000, bytes=2**20, seconds=0.0, hot_groups=0, hot_seconds=0.0)


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url) as connection:
        yield connection


def compaction(client, archive, limits=AT_ONCE):
    made = Compaction(client, archive, limits)
    made.open()
    return made


def archived(archive):
    return [one.record for one in archive.records(Question(EVERYTHING))]


def test_a_stream_becomes_one_segment_for_each_kind_day_and_route(client, tmp_path):
    first, other = group(1), group(2, route="other")
    tomorrow = group(3, created_at=first.created_at + 86_400)
    world.deliver(client, first, other, tomorrow, feedback(first), world.outcome(other, [1.0, 2.0, 3.0]))
    batch = compaction(client, archive_at(tmp_path)).step()
    assert batch is not None
    name = f"segment-{batch.first}-{batch.last}.parquet"
    assert sorted(segment.path for segment in batch.segments) == [
        f"feedback/tenant=default/day=2023-11-15/route=default/{name}",
        f"groups/tenant=default/day=2023-11-15/route=default/{name}",
        f"groups/tenant=default/day=2023-11-15/route=other/{name}",
        f"groups/tenant=default/day=2023-11-16/route=default/{name}",
        f"outcomes/tenant=default/day=2023-11-15/route=other/{name}",
    ]
    assert all((tmp_path / segment.path).stat().st_size == segment.bytes for segment in batch.segments)


def test_what_comes_out_is_what_went_in(client, tmp_path):
    records = [group(1), group(2, store=False, session=None), feedback(group(1), value=0.25, comment="für dich ☂")]
    records += [world.outcome(records[0], [None, 2.0, 3.0]), feedback(group(2), 2, value="spam", author="a")]
    world.deliver(client, *records)
    archive = archive_at(tmp_path)
    compaction(client, archive).step()
    assert archived(archive) == records[::-1]


def test_a_batch_waits_until_it_is_large_or_old_enough(client, tmp_path):
    limits = Limits(entries=3, bytes=2**20, seconds=600.0, hot_groups=0, hot_seconds=0.0)
    world.deliver(client, group(1), group(2))
    made = compaction(client, archive_at(tmp_path), limits)
    assert made.step(wait_seconds=0.01) is None
    world.deliver(client, group(3), group(4))
    batch = made.step(wait_seconds=0.01)
    assert batch is not None
    assert batch.entries == 3


def test_the_stream_is_trimmed_only_behind_the_archive(client, tmp_path):
    """Three batches of two groups, and one group that is not written yet; at least the newest three stay."""
    limits = Limits(entries=2, bytes=2**20, seconds=600.0, hot_groups=3, hot_seconds=0.0)
    world.deliver(client, *(group(number) for number in range(7)))
    made = compaction(client, archive_at(tmp_path), limits)
    while made.step(wait_seconds=0.01) is not None:
        pass
    # Of the six that are written the newest two batches hold the newest three groups; batches stay whole.
    left = [zlib.decompress(fields[b"data"]) for _, fields in client.xrange(LEDGER_STREAM)]
    assert [group(number).model_dump_json().encode() for number in (2, 3, 4, 5, 6)] == left


def test_the_stream_is_trimmed_as_if_nothing_had_been_merged(client, tmp_path):
    """Where a batch was made of five the cut goes through it."""
    limits = Limits(entries=2, bytes=2**20, seconds=600.0, hot_groups=3, hot_seconds=0.0)
    for entry in entries(*(group(number) for number in range(11)), first_ms=1000):
        client.xadd(LEDGER_STREAM, dict(entry.fields), id=str(entry.id))
    archive = archive_at(tmp_path)
    made = compaction(client, archive, limits)
    while made.step(wait_seconds=0.01) is not None:
        pass
    before = client.xrange(LEDGER_STREAM)
    merge(archive, archive.manifest.read("1970-01-01").batches, ALONE, now=0.0)
    assert made.trim() == 0
    more = dataclasses.replace(limits, hot_groups=1)
    assert compaction(client, archive, more).trim() == 2
    assert client.xrange(LEDGER_STREAM) == before[2:]


def test_what_is_young_is_not_trimmed(client, tmp_path):
    limits = Limits(entries=2, bytes=2**20, seconds=600.0, hot_groups=0, hot_seconds=3600.0)
    world.deliver(client, *(group(number) for number in range(4)))
    made = compaction(client, archive_at(tmp_path), limits)
    while made.step(wait_seconds=0.01) is not None:
        pass
    assert client.xlen(LEDGER_STREAM) == 4


def test_what_may_not_be_kept_any_longer_is_trimmed_however_few_there_are(client, tmp_path):
    limits = Limits(entries=2, bytes=2**20, seconds=600.0, hot_groups=100, hot_seconds=3600.0, longest_seconds=1e-3)
    for number in range(3):
        fields = {"kind": "group", "id": "x", "data": packed(group(number))}
        client.xadd(LEDGER_STREAM, fields, id=f"{1000 + number}-0")
    made = compaction(client, archive_at(tmp_path), limits)
    made.step(wait_seconds=0.01)
    assert [name for name, _ in client.xrange(LEDGER_STREAM)] == [b"1002-0"]  # which is in no segment yet


def die_and_go_on(redis_url, directory, call, *, after):
    """Compact four records, dying at an outside call, then once more from the start; whether it died."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
        records = [group(1), group(2, route="other"), feedback(group(1)), world.outcome(group(2), [1.0, 2.0, 3.0])]
        world.deliver(client, *records)
    fate, died = Fate(), False
    mortal = cast(MortalRedis, MortalRedis.from_url(redis_url))
    mortal.fate = fate
    with fate.dying_at(call, after=after):
        try:
            run(mortal, Archive(MortalStorage(directory, fate)))
        except Died:
            died = True
    mortal.fate = None
    mortal.close()
    with redis.Redis.from_url(redis_url) as client:
        archive = archive_at(directory)
        run(client, archive)
        assert archived(archive) == records[::-1]
        assert client.xlen(LEDGER_STREAM) == 0
        assert client.xpending(LEDGER_STREAM, LEDGER_CONSUMERS)["pending"] == 0
    named = {segment.path for batch in archive.manifest.batches_newest_first() for segment in batch.segments}
    assert {name for kind in EVERYTHING for name in archive.storage.names(kind)} == named
    return died


def run(client, archive):
    sweep(archive)
    made = compaction(client, archive)
    made.step(wait_seconds=0.01)
    made.trim()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_step_nothing_is_lost_and_nothing_is_twice(redis_url, tmp_path, after):
    call = 0
    while die_and_go_on(redis_url, tmp_path / f"{call}", call, after=after):
        call += 1
    assert call > 10  # four segments, a manifest, reading, acknowledging, trimming: each was the last once


def test_a_record_of_another_version_is_kept_as_it_came_and_stops_nobody(client, tmp_path):
    client.xadd(LEDGER_STREAM, {"kind": "group", "id": "x", "data": b"not even compressed"})
    world.deliver(client, group(1))
    archive = archive_at(tmp_path)
    batch = compaction(client, archive).step()
    assert archived(archive) == [group(1)]
    (unread,) = (segment for segment in batch.segments if segment.kind == "unreadable")
    assert archive.load(unread).column("data").to_pylist() == [b"not even compressed"]


def test_a_window_goes_on_where_the_stream_was_trimmed(client, tmp_path):
    """As if nothing had been moved: the same groups, in the same order, with the rewards that came later."""
    groups = [group(number) for number in range(6)]
    late = group(6)
    unscored = late.model_copy(
        update={"candidates": tuple(one.model_copy(update={"reward": None}) for one in late.candidates)}
    )
    world.deliver(client, unscored, *groups, world.outcome(unscored, [1.0, 2.0, 3.0]), group(7, route="other"))
    before = list(groups_newest_first(client, "default"))
    archive = archive_at(tmp_path)
    limits = Limits(entries=3, bytes=2**20, seconds=600.0, hot_groups=1, hot_seconds=0.0)
    made = compaction(client, archive, limits)
    while made.step(wait_seconds=0.01) is not None:
        pass
    assert client.xlen(LEDGER_STREAM) < 6
    assert list(groups_newest_first(client, "default", archive=archive, page_entries=2)) == before
    assert [one.reward for one in before[-1].candidates] == [1.0, 2.0, 3.0]


def test_a_stream_that_was_lost_is_read_from_its_beginning(client, tmp_path):
    archive = archive_at(tmp_path)
    world.deliver(client, group(1))
    made = compaction(client, archive)
    made.step()
    client.flushall()
    world.deliver(client, group(2))
    with pytest.raises(redis.ResponseError, match="NOGROUP"):
        made.step()
    made.open()
    made.step()
    assert archived(archive) == [group(2), group(1)]
