"""`bonsai report` against a gateway that runs: the table, the files, and words for what goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bonsai.cli import main
from tests.fixtures.gateway import World, still_world
from tests.service.records import BASE, STUDENT
from tests.service.test_reports import CONTENTS, root

__all__ = ["root", "still_world"]


@pytest.fixture
def told(still_world: World, root: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    key = still_world.client.post("/keys", {"name": "reader", "role": "viewer"}).json["key"]
    monkeypatch.setenv("BONSAI_API_KEY", key)
    return still_world


def asked(world: World, *arguments: str) -> Result:
    host, port = world.client.address
    return CliRunner().invoke(main, ["report", "--url", f"http://{host}:{port}", *arguments], env={"COLUMNS": "160"})


def test_the_summary_is_printed_and_the_files_are_saved_as_they_were_written(told: World, tmp_path: Path) -> None:
    shown = asked(told, STUDENT, "--out", str(tmp_path / "new" / "here"))
    assert shown.exit_code == 0, shown.output
    for words in (
        STUDENT,
        "win rate against the reference",
        "second reward model",
        "best-of-k of the reference",
        "words",
    ):
        assert words in shown.output
    assert {path.name: path.read_bytes() for path in (tmp_path / "new" / "here").iterdir()} == CONTENTS


def test_nothing_is_saved_unless_it_is_asked_for(told: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert asked(told, STUDENT).exit_code == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (BASE, "report_not_found"),
        ("pol-ffffffffffffffff", "policy_not_found"),
        ("../keys", "a policy's id is pol- and 16 hex digits"),
    ],
)
def test_what_has_no_report_is_said_in_words(told: World, policy: str, words: str) -> None:
    shown = asked(told, policy)
    assert shown.exit_code == 1
    assert "failed" in shown.output
    assert words in shown.output


def test_without_a_key_and_without_a_stack_it_says_so(
    told: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BONSAI_API_KEY")
    shown = asked(told, STUDENT, "--dir", str(tmp_path))
    assert shown.exit_code == 1
    assert "admin.key" in shown.output
