"""Small segments become large ones: every row is kept, whatever dies, whoever reads meanwhile."""

from __future__ import annotations

from collections import Counter
from math import inf

import pytest

from archive.fence import ALONE
from archive.manifest import StaleView
from archive.merging import Limits, Unmergeable, due, merge, remove_superseded
from archive.reading import Archive, Question
from archive.repair import sweep
from archive.retention import Retention, apply
from archive.retention import due as due_to_go
from archive.tables import SegmentSet
from archive.writing import rewrite, write_batch
from tests.archive.records import DAY, NOON, Died, Fate, MortalStorage, archive_at, entries, feedback, group
from tests.worker import world

KINDS: tuple[SegmentSet, ...] = ("groups", "outcomes", "feedback", "exposures")
EVERYTHING = Question(KINDS)
HOUR = 3600.0
LIMITS = Limits(bytes=2**20)


def batch_at(seconds, number):
    """So long after the first noon: a group of either route, feedback on one, and a late reward of the other."""
    first, other = (group(number + k, created_at=NOON + seconds, route=route) for k, route in enumerate(("a", "b")))
    return entries(first, other, feedback(first, number), world.outcome(other, [1.0, 2.0, 3.0]))


def fill(archive: Archive, *times: float) -> Archive:
    for place, seconds in enumerate(times):
        write_batch(archive, batch_at(seconds, 10 * place))
    return archive


@pytest.fixture
def archive(tmp_path) -> Archive:
    """Three batches in one hour, two in the next, one in the hour that is not over."""
    return fill(archive_at(tmp_path), 0, 60, 120, HOUR, HOUR + 60, 2 * HOUR)


def batches(archive):
    return list(archive.manifest.batches_newest_first())[::-1]


def runs(archive, limits=LIMITS):
    newest = batches(archive)[-1]
    return [run for day in archive.manifest.days() for run in due(archive.manifest.read(day).batches, newest, limits)]


def merge_all(archive, limits=LIMITS):
    while planned := runs(archive, limits):
        merge(archive, planned[0], ALONE, now=0.0)


def tidy(archive):
    for day in archive.manifest.days():
        remove_superseded(archive, day, inf, ALONE)


def stored(archive):
    """Every record with its place in the stream, in the order of a reading."""
    return list(archive.records(EVERYTHING))


def rows(archive) -> Counter[str]:
    """Of all segments that are named: which, and how often each."""
    segments = [one for batch in batches(archive) for one in batch.segments if one.path is not None]
    return Counter(f"{one.partition} {row}" for one in segments for row in archive.load(one).to_pylist())


def named_and_there(archive):
    named = {one.path for batch in batches(archive) for one in batch.segments if one.path is not None}
    return named, {name for kind in (*KINDS, "unreadable") for name in archive.storage.names(kind)}


def test_an_hour_that_is_over_becomes_one_batch_with_every_row_in_its_place(archive):
    before, in_order = rows(archive), stored(archive)
    merge_all(archive)
    assert [len(batch.merged) for batch in batches(archive)] == [3, 2, 0]
    assert (rows(archive), stored(archive)) == (before, in_order)
    tidy(archive)
    named, there = named_and_there(archive)
    assert named == there
    assert len(there) == 3 * 4  # a file for each kind and route of three batches
    assert stored(archive) == in_order


def test_a_day_that_is_over_becomes_one(archive):
    merge_all(archive)
    fill(archive, DAY)
    before = stored(archive)
    merge_all(archive)
    assert [len(batch.merged) for batch in batches(archive)] == [6, 0]
    assert stored(archive) == before


def test_what_a_merged_batch_tells_is_what_its_batches_told(archive):
    totals = [one.totals for batch in batches(archive) for one in batch.segments if one.kind == "groups"]
    whole = sum(one.entries for one in batches(archive)), sum(one.groups for one in batches(archive))
    position = archive.manifest.position()
    merge_all(archive)
    merged = [one.totals for batch in batches(archive) for one in batch.segments if one.kind == "groups"]
    for name in ("groups", "candidates", "scored", "reward_sum", "candidate_tokens"):
        assert sum(getattr(one, name) for one in merged) == sum(getattr(one, name) for one in totals)
    assert whole == (sum(one.entries for one in batches(archive)), sum(one.groups for one in batches(archive)))
    assert archive.manifest.position() == position


def test_no_file_grows_over_the_target(archive):
    largest = max(one.bytes for batch in batches(archive) for one in batch.segments)
    merge_all(archive, Limits(bytes=2 * largest))
    assert [len(batch.merged) for batch in batches(archive)] == [2, 0, 2, 0]
    assert all(one.bytes <= 2 * largest for batch in batches(archive) for one in batch.segments)


def test_no_file_spans_more_than_retention_allows(archive):
    fill(archive, DAY)
    merge_all(archive, Limits(bytes=2**20, seconds=HOUR + 1))
    assert [len(batch.merged) for batch in batches(archive)] == [4, 2, 0]


def test_what_retention_has_touched_is_not_counted_as_if_it_had_not(archive):
    retention = Retention(text=30 / 86_400, keep=())  # 30 seconds
    apply(archive, due_to_go(archive, retention, NOON + 40), retention, lambda segment, rows: ())
    merge_all(archive)
    assert [len(batch.merged) for batch in batches(archive)] == [0, 2, 2, 0]


def test_retention_goes_on_where_segments_were_merged(archive):
    merge_all(archive)
    retention = Retention(text=1, tokens=1, scores=1, keep=())
    apply(archive, due_to_go(archive, retention, NOON + 2 * DAY), retention, lambda segment, rows: ())
    assert stored(archive) == []
    assert sum(one.totals.groups for batch in batches(archive) for one in batch.segments) == 12
    fill(archive, 3 * DAY)
    merge_all(archive)
    assert sum(one.totals.groups for batch in batches(archive)[:1] for one in batch.segments) == 12


def test_who_began_to_read_before_reads_on(archive, tmp_path):
    """From a manifest whose files are all gone by then."""
    in_order = stored(archive)
    for read_so_far in range(0, len(in_order), 3):
        reading = archive.records(EVERYTHING)
        found = [next(reading) for _ in range(read_so_far)]
        others = archive_at(tmp_path)
        for batch in batches(others):
            rewrite(others, batch, lambda segment, rows: (rows, segment.lacks))
        merge_all(others)
        tidy(others)
        assert [*found, *reading] == in_order


def test_superseded_files_stay_for_a_time(archive):
    (first, *_) = runs(archive)
    old = {one.path for batch in first for one in batch.segments}
    merge(archive, first, ALONE, now=1000.0)
    assert remove_superseded(archive, first[0].day, 999.0, ALONE) == []
    assert sweep(archive) == ((), (), ())
    assert set(remove_superseded(archive, first[0].day, 1000.0, ALONE)) == old
    assert remove_superseded(archive, first[0].day, 1000.0, ALONE) == []


def test_a_damaged_segment_stays_out_and_stops_nobody(archive, tmp_path):
    (first, second) = runs(archive)
    damaged = first[1].segments[0].path or ""
    (tmp_path / damaged).write_bytes(b"PAR1")
    with pytest.raises(Unmergeable) as refused:
        merge(archive, first, ALONE, now=0.0)
    newest = batches(archive)[-1]
    again = due(archive.manifest.read(newest.day).batches, newest, LIMITS, frozenset([damaged]))
    assert refused.value.path == damaged
    assert again == [second]


def test_a_plan_of_what_has_changed_is_refused(archive):
    (first, _) = runs(archive)
    rewrite(archive, first[0], lambda segment, rows: ([], ()) if segment.kind == "feedback" else None)
    with pytest.raises(StaleView):
        archive.manifest.replace(first, first[0], ALONE)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_write_every_row_is_there_once(tmp_path, after):
    call, died = 0, True
    while died:
        directory, fate = tmp_path / str(call), Fate()
        for number, seconds in enumerate((0, 60, HOUR)):
            write_batch(
                archive_at(directory), entries(made := group(number, created_at=NOON + seconds), feedback(made))
            )
        in_order = stored(archive_at(directory))
        mortal = Archive(MortalStorage(directory, fate))
        try:
            with fate.dying_at(call, after=after):
                merge_all(mortal)
                tidy(mortal)
            died = False
        except Died:
            assert stored(archive_at(directory)) == in_order
        archive = archive_at(directory)
        sweep(archive)
        merge_all(archive)
        tidy(archive)
        named, there = named_and_there(archive)
        assert (stored(archive), there) == (in_order, named)
        assert len(batches(archive)) == 2
        call += died
    assert call == 12  # two files, two manifests with their roots, two old manifests and four files away
