"""docs/ledger.md as it is written: what it shows of `datasets`, DuckDB and pandas works on an archive."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import duckdb
import pytest
from click.testing import CliRunner

from archive.writing import write_batch
from bonsai.cli import main
from tests.archive.records import DAY, archive_at, entries, feedback, group

PAGE = Path(__file__).parents[2] / "docs" / "ledger.md"


def shown(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), flags=re.S)


@pytest.fixture
def directory(tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two days, two routes, and an author who changed his mind."""
    archive = archive_at(tmp_path / "archive")
    first, other = group(1), group(2, route="other")
    write_batch(archive, entries(first, other, feedback(first, 1, value=False, author="a")))
    later = feedback(first, 2, value=True, author="a", created_at=first.created_at + 60)
    write_batch(archive, entries(group(3, created_at=first.created_at + DAY), later))
    for kind in ("groups", "feedback"):
        said = ["ledger", "segments", "--paths", kind, "--archive", str(tmp_path / "archive"), "--redis-url", redis_url]
        (tmp_path / f"{kind}.txt").write_text(CliRunner().invoke(main, said).output)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("directory")
def test_duckdb_sums_up_days_and_routes():
    sums, _ = shown("sql")
    rows = duckdb.execute(sums).fetchall()
    assert [(str(day), route, *numbers) for day, route, *numbers in rows] == [
        ("2023-11-15", "default", 1, 1.0, 0.0),
        ("2023-11-15", "other", 1, 1.0, 0.0),
        ("2023-11-16", "default", 1, 1.0, 0.0),
    ]


@pytest.mark.usefixtures("directory")
def test_duckdb_takes_the_newest_answer_to_a_question():
    _, newest = shown("sql")
    rows = duckdb.execute(newest).fetchall()
    assert [(name, json.loads(value)) for _, name, value in rows] == [("quality", True)]


@pytest.mark.usefixtures("directory")
def test_datasets_loads_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    code, _ = shown("python")
    code = code.replace('split="train")', f'split="train", cache_dir={str(tmp_path / "cache")!r})')
    groups = run(code)["groups"]
    assert sorted(groups["prompt"]) == ["0 1", "0 2", "0 3"]
    assert groups[0]["candidates"][1]["token_ids"] == [5, 7, 1]


@pytest.mark.usefixtures("directory")
def test_pandas_reads_it():
    _, code = shown("python")
    assert sorted(run(code)["prompts"]) == ["0 1", "0 3"]


def run(code: str) -> dict[str, Any]:
    """The page's own lines."""
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names
