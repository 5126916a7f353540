"""What goes when, on a clock that a test turns; what is kept whatever its age."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from archive.reading import Archive, Question
from archive.retention import Ages, Retention, apply, due
from archive.writing import write_batch
from tests.archive.records import DAY, NOON, archive_at, entries, feedback, group

GROUPS = Question(("groups",))


@pytest.fixture
def archive(tmp_path) -> Archive:
    """One group a day for three days, and feedback on the first."""
    made = archive_at(tmp_path)
    for day in range(3):
        records = [group(day, created_at=NOON + day * DAY)]
        write_batch(made, entries(*records, *([feedback(records[0], comment="good")] if day == 0 else [])))
    return made


def pass_of(archive, retention, days, spared=()):
    """What retention does so many days after the first noon."""
    now = NOON + days * DAY
    apply(archive, due(archive, retention, now), retention, lambda segment, rows: frozenset(spared))


def groups(archive):
    return [one.record for one in archive.records(GROUPS)][::-1]


def test_texts_go_first_and_scores_stay(archive):
    pass_of(archive, Retention(text=1.5, keep=()), days=2.25)
    first, second, _ = groups(archive)
    assert (first.prompt, {one.text for one in first.candidates}) == ("", {""})
    assert [one.reward for one in first.candidates] == [0.0, 0.5, 1.0]
    assert first.candidates[0].token_ids == (5, 7, 1)
    assert (first.store, second.store) == (False, True)  # nobody learns from half a group
    assert second == group(1, created_at=NOON + DAY)
    assert [one.record.comment for one in archive.records(Question(("feedback",)))] == [None]


def test_tokens_go_by_a_time_of_their_own(archive):
    pass_of(archive, Retention(tokens=1.5, keep=()), days=2.25)
    first = groups(archive)[0]
    assert first.prompt_token_ids == first.candidates[0].token_ids == first.candidates[0].logprobs == ()
    assert first.candidates[0].text == "said 0 0"


def test_with_the_scores_whole_segments_go_and_their_totals_stay(archive):
    before = {segment.path for batch in archive.manifest.batches_newest_first() for segment in batch.segments}
    pass_of(archive, Retention(text=1, tokens=1, scores=1.5, keep=()), days=2.25)
    assert [one.id for one in groups(archive)] == [group(1).id, group(2).id]
    gone = [s for b in archive.manifest.batches_newest_first() for s in b.segments if s.path is None]
    (of_groups,) = (one.totals for one in gone if one.kind == "groups")
    assert (of_groups.groups, of_groups.candidates, of_groups.reward_sum, of_groups.candidate_tokens) == (1, 3, 1.5, 9)
    assert len(archive.storage.names("groups")) == 2
    assert len(before) == 4


def test_aggregates_go_last_and_the_position_stays(archive):
    retention = Retention(text=1, tokens=1, scores=1, aggregates=1, keep=())
    position = archive.manifest.position()
    for days in (5.0, 6.0, 7.0):
        pass_of(archive, retention, days)
    assert groups(archive) == []
    assert archive.manifest.position() == position
    left = [segment for batch in archive.manifest.batches_newest_first() for segment in batch.segments]
    assert left == []


def test_what_is_spared_keeps_all_its_content(archive):
    pass_of(archive, Retention(text=1, tokens=1, scores=1.5), days=5, spared=[group(0).id])
    assert groups(archive) == [group(0, created_at=NOON)]
    assert [one.record.comment for one in archive.records(Question(("feedback",)))] == ["good"]


def test_a_pass_is_not_repeated_and_a_plan_changes_nothing(archive):
    retention = Retention(text=1, keep=())
    planned = due(archive, retention, NOON + 9 * DAY)
    assert [one.classes for one in planned] == [("text",)] * 4
    assert due(archive, retention, NOON + 9 * DAY) == planned
    pass_of(archive, retention, days=9)
    assert due(archive, retention, NOON + 9 * DAY) == []


def test_a_route_may_have_times_of_its_own(tmp_path):
    archive = archive_at(tmp_path)
    write_batch(archive, entries(group(0), group(1, route="legal"), group(2, route="legal", tenant="acme")))
    retention = Retention(text=1, keep=(), routes={"legal": Ages(), "acme/legal": Ages(text=30)})
    pass_of(archive, retention, days=10)
    assert [one.prompt for one in groups(archive)] == ["", "0 1", "0 2"]


@pytest.mark.parametrize(
    "ages",
    [
        {"text": -1},
        {"text": 0},
        {"scores": 1_000_000},
        {"text": float("nan")},
        {"text": 10, "tokens": 1, "scores": 5},
        {"tokens": 1, "scores": 5},
        {"aggregates": 5},
        {"scores": 9, "text": 1, "tokens": 1, "aggregates": 5},
        {"embeddings": 1},
        {"keep": ["everything"]},
    ],
)
def test_L28_times_that_make_no_sense_are_refused(ages):
    with pytest.raises(ValidationError):
        Retention.model_validate(ages)


def test_the_stream_keeps_nothing_longer_than_the_shortest_time():
    retention = Retention(text=30, routes={"chat": Ages(tokens=2)})
    assert retention.shortest_of_all == 2 * DAY
    assert Retention().shortest_of_all is None


def test_a_death_in_the_middle_is_made_good_by_the_next_pass(tmp_path):
    from archive.repair import sweep
    from tests.archive.records import Died, Fate, MortalStorage

    for call in range(6):
        for after in (False, True):
            directory, fate = tmp_path / f"{call}{after}", Fate()
            mortal = Archive(MortalStorage(directory, fate))
            write_batch(mortal, entries(group(0), group(1, route="other"), feedback(group(0))))
            try:
                with fate.dying_at(call, after=after):
                    pass_of(mortal, Retention(text=1, keep=()), days=9)
            except Died:
                pass
            archive = archive_at(directory)
            sweep(archive)
            pass_of(archive, Retention(text=1, keep=()), days=9)
            assert [one.prompt for one in groups(archive)] == ["", ""]
            named = {s.path for batch in archive.manifest.batches_newest_first() for s in batch.segments}
            files = {name for kind in ("groups", "feedback") for name in archive.storage.names(kind)}
            assert files == named
