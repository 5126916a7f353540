"""The archive in an S3 store that fails: what is named is there, and what is read is what was written."""

from __future__ import annotations

import pytest

from archive.fence import ALONE
from archive.merging import Limits, due, merge, remove_superseded
from archive.reading import Archive, Question
from archive.repair import sweep
from archive.retention import Retention, apply
from archive.retention import due as due_to_go
from archive.storage import open_storage
from archive.writing import write_batch
from tests.archive.records import DAY, NOON, entries, feedback, group
from tests.fixtures.object_store import CREDENTIALS, object_store

pytestmark = pytest.mark.slow
EVERYTHING = Question(("groups", "outcomes", "feedback", "exposures"))
MS = 1000 * 3_600_000
"""An hour of the stream's clock begins."""
RECORDS = [group(0), group(1, route="other"), feedback(group(0))]


@pytest.fixture(scope="module")
def store():
    with pytest.MonkeyPatch.context() as environment:
        for name, value in CREDENTIALS.items():
            environment.setenv(name, value)
        with object_store() as proxy:
            yield proxy


@pytest.fixture
def archive(store):
    return emptied(Archive(open_storage(store.url, request_seconds=2.0)))


@pytest.fixture
def hasty(store):
    """Its client tries once, so that a failure is told at once."""
    return emptied(Archive(open_storage(store.url, attempts=1)))


def emptied(archive):
    for name in archive.storage.names(""):
        archive.storage.delete(name)
    return archive


def records(archive):
    return [one.record for one in archive.records(EVERYTHING)]


def test_a_store_is_read_as_a_directory_is(archive):
    write_batch(archive, entries(*RECORDS))
    assert records(archive) == RECORDS[::-1]
    assert sweep(archive) == ((), (), ())
    assert len(archive.storage.names("groups")) == 2


def test_errors_that_pass_are_tried_again(archive, store):
    store.fail("500", "500")
    write_batch(archive, entries(*RECORDS))
    store.fail("500", "500")
    assert records(archive) == RECORDS[::-1]


def test_a_cut_body_is_not_taken_for_the_whole(hasty, store):
    write_batch(hasty, entries(*RECORDS))
    for place in range(10):  # each request of a reading once: a list, a manifest, segments, their lengths
        store.fail_at(place, "cut")
        try:
            found = records(hasty)
        except OSError:
            continue  # said so: the caller tries again
        assert found == RECORDS[::-1], place
    store.heal()
    assert records(hasty) == RECORDS[::-1]


def test_a_store_that_is_away_is_an_error_and_the_batch_is_repeated(archive, store):
    with store.always("500"), pytest.raises(OSError, match=r".+"):
        write_batch(archive, entries(*RECORDS))
    assert records(archive) == []
    write_batch(archive, entries(*RECORDS))
    assert records(archive) == RECORDS[::-1]
    with store.always("403"), pytest.raises(OSError, match=r".+"):
        records(archive)


def test_a_request_that_hangs_ends(archive, store):
    """By the client's own time limit, and the next attempt goes through."""
    write_batch(archive, entries(*RECORDS))
    store.fail("hang")
    assert records(archive) == RECORDS[::-1]


def test_interrupted_at_any_request_the_next_pass_makes_it_whole(hasty, store):
    """A store that fails from its k-th request on, and is there again later."""
    for number in range(0, 12, 2):
        emptied(hasty)
        store.fail_after(number)
        try:
            write_batch(hasty, entries(*RECORDS))
        except OSError:
            store.heal()
            sweep(hasty)
            write_batch(hasty, entries(*RECORDS))
        store.heal()
        assert records(hasty) == RECORDS[::-1]
        assert len(hasty.storage.names("groups")) == 2


def test_merging_interrupted_at_any_request_loses_no_row(archive, store):
    for number in (12, 22):
        for name in archive.storage.names(""):
            archive.storage.delete(name)
        for first_ms in (MS, MS + 60_000):
            write_batch(archive, entries(group(0), first_ms=first_ms))
        write_batch(archive, entries(group(2), first_ms=MS + 3_600_000))
        before = list(archive.records(EVERYTHING))
        store.fail_after(number)
        try:
            merge_and_tidy(archive)
        except OSError:
            store.fail_after(None)
            assert list(archive.records(EVERYTHING)) == before
            sweep(archive)
            merge_and_tidy(archive)
        store.fail_after(None)
        assert list(archive.records(EVERYTHING)) == before
        assert len(archive.storage.names("groups")) == 2


def merge_and_tidy(archive):
    (day,) = archive.manifest.days()
    batches = archive.manifest.read(day).batches
    for run in due(batches, batches[-1], Limits(bytes=2**20)):
        merge(archive, run, ALONE, now=0.0)
    remove_superseded(archive, day, 0.0, ALONE)


def test_retention_rewrites_in_a_store(archive):
    write_batch(archive, entries(*RECORDS))
    retention = Retention(text=1, keep=())
    apply(archive, due_to_go(archive, retention, NOON + 9 * DAY), retention, lambda segment, rows: frozenset())
    assert {one.prompt for one in records(archive) if one.kind == "group"} == {""}
    assert all(name.endswith(".r1.parquet") for name in archive.storage.names("groups"))


@pytest.mark.parametrize("url", ["ftp://a/b", "s3://", "s3://key:secret@bucket/a", "s3://b/a?anonymous=1", "file:///a"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="directory or s3://bucket/prefix"):
        open_storage(url)
