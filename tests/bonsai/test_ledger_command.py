"""`bonsai ledger`: an export that others can read, and what retention would take. A real Redis."""

from __future__ import annotations

import json

import pytest
import redis
from click.testing import CliRunner
from pyarrow import parquet

from archive.reading import Archive
from archive.writing import write_batch
from bon_algos.contracts import CandidateGroup, feedback_key
from bonsai.cli import main
from tests.archive.records import DAY, NOON, entries, feedback, group
from tests.worker import world
from worker.archive_lease import ArchiveLease
from worker.compaction import Compaction, Limits

LIMITS = Limits(entries=2, bytes=2**20, seconds=600.0, hot_groups=1, hot_seconds=0.0)


@pytest.fixture
def place(redis_url, tmp_path):
    """Options that name a ledger: four groups of one route, the older ones archived, and one with feedback."""
    directory = tmp_path / "archive"
    with redis.Redis.from_url(redis_url) as client:
        unscored = group(0)
        bare = tuple(one.model_copy(update={"reward": None}) for one in unscored.candidates)
        unscored = unscored.model_copy(update={"candidates": bare})
        world.deliver(client, unscored, world.outcome(unscored, [3.0, 4.0, 5.0]))
        world.deliver(client, *(group(number) for number in (1, 2, 3)), group(4, route="other"))
        said = feedback(group(1), comment="good")
        client.hset(feedback_key(said.group_id or ""), said.question, said.model_dump_json())
        compaction = Compaction(client, Archive.at(str(directory)), LIMITS)
        compaction.open()
        while compaction.step(wait_seconds=0.01) is not None:
            pass
    return ["--redis-url", redis_url, "--archive", str(directory), "--dir", str(tmp_path / "stack")]


def run(*arguments: str):
    return CliRunner().invoke(main, ["ledger", *arguments])


def test_an_export_is_joined_and_of_one_route(place, tmp_path):
    done = run("export", *place, "--format", "jsonl", str(tmp_path / "out"))
    assert (done.exit_code, done.output) == (0, f"4 groups and 1 pieces of feedback in {tmp_path / 'out'}\n")
    lines = (tmp_path / "out" / "groups-00000.jsonl").read_text().splitlines()
    groups = [CandidateGroup.model_validate_json(line) for line in lines]
    assert groups[:3] == [group(3), group(2), group(1)]
    assert [one.reward for one in groups[3].candidates] == [3.0, 4.0, 5.0]


def test_the_same_as_parquet(place, tmp_path):
    assert run("export", *place, str(tmp_path / "out")).exit_code == 0
    rows = parquet.read_table(tmp_path / "out" / "groups-00000.parquet").to_pylist()
    assert [row["id"] for row in rows] == [group(number).id for number in (3, 2, 1, 0)]
    assert {row["route"] for row in rows} == {"default"}
    (said,) = parquet.read_table(tmp_path / "out" / "feedback-00000.parquet").to_pylist()
    assert (said["comment"], json.loads(said["value"])) == ("good", True)


def test_an_export_writes_over_nothing(place, tmp_path):
    (tmp_path / "mine").write_text("")
    done = run("export", *place, str(tmp_path))
    assert done.exit_code == 1
    assert "is not empty: name a new directory" in done.output


def test_L11_no_other_format(place, tmp_path):
    assert run("export", *place, "--format", "pickle", str(tmp_path / "out")).exit_code == 2


def test_a_dry_run_says_what_would_go_and_changes_nothing(place, tmp_path):
    before = {path: path.read_bytes() for path in (tmp_path / "archive").rglob("*") if path.is_file()}
    done = run("retention", *place, "--dry-run", "--retention", '{"text": 1}')
    assert done.exit_code == 0, done.output
    (text,) = (line for line in done.output.splitlines() if "text" in line)
    # Five groups in four segments; the one with feedback keeps its texts.
    assert [cell for cell in text.replace("│", " ").split() if cell.isdigit()] == ["4", "4", "1"]
    assert {path: path.read_bytes() for path in before} == before


def test_retention_is_carried_out_under_the_lease_alone(place, redis_url):
    with redis.Redis.from_url(redis_url) as client, ArchiveLease(client, Archive.at(place[3]), 60):
        done = run("retention", *place, "--retention", '{"text": 1}')
        assert done.exit_code == 1
        assert "another process writes into the archive" in done.output
    assert run("retention", *place, "--retention", '{"text": 1}').exit_code == 0
    again = run("retention", *place, "--dry-run", "--retention", '{"text": 1}')
    assert not [cell for cell in again.output.replace("│", " ").split() if cell.isdigit() and cell != "0"]


def test_retention_passes_a_damaged_segment_over_and_says_so(place, caplog):
    archive = Archive.at(place[3])
    segments = [one for batch in archive.manifest.batches_newest_first() for one in batch.segments]
    damaged = next(one for one in segments if one.kind == "groups" and one.route == "default")
    archive.storage.put(damaged.path or "", archive.storage.get(damaged.path or "")[:-9])
    for more in (["--dry-run"], []):
        caplog.clear()
        done = run("retention", *place, *more, "--retention", '{"text": 1}')
        assert (done.exit_code, int(cells(done.output, "text")[1]) > 0) == (0, True)
        assert f"{damaged.path} is left as it is: DamagedSegment" in caplog.text


@pytest.mark.parametrize("said", ["{", '{"text": -1}', '{"scores": 1000000}', "[]"])
def test_L28_times_that_make_no_sense_are_refused(place, said):
    done = run("retention", *place, "--dry-run", "--retention", said)
    assert done.exit_code == 1
    assert "failed --retention" in done.output


@pytest.fixture
def small(redis_url, tmp_path):
    """Options that name a ledger of three small batches of one day, and one of the next."""
    archive = Archive.at(str(tmp_path / "archive"))
    for number, seconds in enumerate((0, 1, 2, DAY)):
        write_batch(archive, entries(group(number, created_at=NOON + seconds)))
    return ["--redis-url", redis_url, "--archive", str(tmp_path / "archive"), "--dir", str(tmp_path / "stack")]


def cells(output: str, word: str) -> list[str]:
    """Of the table's line that has this word."""
    (line,) = (line for line in output.splitlines() if word in line)
    return line.replace("│", " ").split()


def test_segments_are_shown_by_day_and_as_paths(small):
    shown = run("segments", *small)
    assert cells(shown.output, "2023-11-15")[1:4] == ["groups", "3", "3"]
    paths = run("segments", *small, "--paths", "groups").output.split()
    assert [row["id"] for path in paths for row in parquet.read_table(path).to_pylist()] == [
        group(number).id for number in range(4)
    ]


def test_merging_by_hand_says_first_what_it_would_do(small, redis_url):
    before = run("segments", *small, "--paths", "groups").output
    planned = run("merge", *small, "--dry-run")
    assert cells(planned.output, "2023-11-15")[1:4] == ["3", "3", "1"]
    assert run("segments", *small, "--paths", "groups").output == before
    with redis.Redis.from_url(redis_url) as client, ArchiveLease(client, Archive.at(small[3]), 60):
        assert "another process writes into the archive" in run("merge", *small).output
    assert cells(run("merge", *small).output, "2023-11-15")[1:4] == ["3", "3", "1"]
    assert len(run("segments", *small, "--paths", "groups").output.split()) == 2
    assert "2023-11-15" not in run("merge", *small, "--dry-run").output


@pytest.mark.parametrize("said", ["0", "-1", "many"])
def test_a_target_that_makes_no_sense_is_refused(small, said):
    assert run("merge", *small, "--bytes", said).exit_code == 2
