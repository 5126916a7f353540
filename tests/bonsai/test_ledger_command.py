"""`bonsai ledger`: an export that others can read, and what retention would take. A real Redis."""

from __future__ import annotations

import json

import pytest
import redis
from click.testing import CliRunner
from pyarrow import parquet

from archive.reading import Archive
from bon_algos.contracts import CandidateGroup, feedback_key
from bonsai.cli import main
from tests.archive.records import feedback, group
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


@pytest.mark.parametrize("said", ["{", '{"text": -1}', '{"scores": 1000000}', "[]"])
def test_L28_times_that_make_no_sense_are_refused(place, said):
    done = run("retention", *place, "--dry-run", "--retention", said)
    assert done.exit_code == 1
    assert "failed --retention" in done.output
