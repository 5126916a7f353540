"""Files that no manifest names: what is lost is found again, what is over goes, and the rest is put aside."""

from __future__ import annotations

import pytest

from archive.fence import ALONE, Alone
from archive.manifest import DayManifest
from archive.merging import Limits, due, merge
from archive.names import FileName, Stretch
from archive.reading import Archive, Question
from archive.repair import QUARANTINE, sweep
from archive.writing import rewrite, write_batch
from bon_algos.ledger_entries import EntryId
from tests.archive.records import DAY, NOON, archive_at, entries, feedback, group

EVERYTHING = Question(("groups", "feedback"))


@pytest.fixture
def archive(tmp_path) -> Archive:
    """Three batches of one day, and one of the next."""
    made = archive_at(tmp_path)
    for number, seconds in enumerate((0, 60, 120, DAY)):
        record = group(number, created_at=NOON + seconds)
        write_batch(made, entries(record, feedback(record)))
    return made


def stored(archive):
    return list(archive.records(EVERYTHING))


def batches(archive):
    return list(archive.manifest.batches_newest_first())[::-1]


def lose(archive, *gone):
    """As a manifest that was written over by a writer that had not seen these."""
    for batch in gone:
        archive.manifest.change(
            batch.day,
            lambda known: DayManifest(batches=tuple(one for one in known.batches if one not in gone)),
            ALONE,
        )


def test_a_batch_that_was_lost_from_its_manifest_is_in_it_again(archive):
    before, batch = stored(archive), batches(archive)[1]
    lose(archive, batch)
    assert len(stored(archive)) == len(before) - 2
    assert set(sweep(archive).named) == {segment.path for segment in batch.segments}
    assert stored(archive) == before
    assert batches(archive)[1] == batch
    assert sweep(archive) == ((), (), ())


def test_a_lost_day_is_found_again(archive, tmp_path):
    before = stored(archive)
    day = archive.manifest.days()[0]
    (lost,) = (tmp_path / "_manifest").glob(f"{day}.*")
    lost.unlink()
    with pytest.raises(OSError, match="No such file"):
        stored(archive)
    sweep(archive, Alone(epoch=1), lambda stretch: False)
    assert stored(archive) == before


def test_an_archive_without_any_manifest_is_found_again(archive, tmp_path):
    """Where the stream has nothing of it any more."""
    before, known = stored(archive), batches(archive)
    for path in (tmp_path / "_manifest").iterdir():
        path.unlink()
    sweep(archive, ALONE, lambda stretch: False)
    assert (stored(archive), batches(archive)) == (before, known)


def test_an_archive_from_before_there_were_roots_is_taken_up_as_it_is(archive, tmp_path):
    before, known = stored(archive), batches(archive)
    for path in (tmp_path / "_manifest").iterdir():
        if path.name.startswith("root"):
            path.unlink()
        else:
            path.rename(path.with_name(f"{path.name.partition('.')[0]}.json"))
    assert (stored(archive), batches(archive)) == (before, known)
    assert sweep(archive, Alone(epoch=1)) == ((), (), ())
    late = group(9, created_at=NOON + 200)
    write_batch(archive, entries(late, first_ms=known[-1].last.ms + 1), Alone(epoch=1))
    assert [one.record for one in stored(archive)] == [late, *(one.record for one in before)]


def test_what_the_stream_still_has_is_written_again_and_not_taken_for_whole(archive):
    """A batch of which only some files were written when its writer died."""
    newest = batches(archive)[-1]
    lose(archive, newest)
    archive.storage.delete(newest.segments[0].path)
    done = sweep(archive, ALONE, lambda stretch: stretch == newest.stretch)
    assert done.deleted == (newest.segments[1].path,)


def test_a_lost_batch_below_a_merged_one_is_not_taken_for_merged(archive):
    """The first and the third of three are merged, with the second's files between them unknown."""
    before, second = stored(archive), batches(archive)[1]
    lose(archive, second)
    day = archive.manifest.read(second.day).batches
    (run,) = due(day, batches(archive)[-1], Limits(bytes=2**20))
    merge(archive, run, ALONE, now=0.0)
    done = sweep(archive)
    assert set(done.named) == {segment.path for segment in second.segments}
    assert stored(archive) == before
    for batch in batches(archive):
        rewrite(archive, batch, lambda segment, rows: (rows, ()))
    assert stored(archive) == before


def test_what_cannot_be_read_or_named_is_put_aside(archive, tmp_path):
    """Out of the way of DuckDB and others who read every file there is."""
    odd = "groups/tenant=default/day=2023-11-15/route=default/notes.parquet"
    torn = "groups/tenant=default/day=2023-11-15/route=default/segment-1-0-2-0.parquet"
    before = stored(archive)
    for name in (odd, torn):
        archive.storage.put(name, b"PAR1")
    done = sweep(archive)
    assert set(done.quarantined) == {odd, torn}
    assert archive.storage.get(f"{QUARANTINE}/{odd}") == b"PAR1"
    assert not (tmp_path / odd).exists()
    assert (stored(archive), sweep(archive)) == (before, ((), (), ()))


def test_a_file_that_shares_entries_with_what_is_named_is_put_aside(archive):
    batch = batches(archive)[1]
    content = archive.storage.get(batch.segments[0].path)
    stretch = Stretch(EntryId(batch.first.ms + 1, 0), EntryId(batch.last.ms + 5, 0))
    path = FileName(batch.segments[0].partition, stretch, epoch=0).path
    archive.storage.put(path, content)
    assert sweep(archive).quarantined == (path,)
