"""docs/ledger.md as it is written: what it shows of `datasets`, DuckDB and pandas works on an archive."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import duckdb
import pytest

from archive.writing import write_batch
from tests.archive.records import DAY, archive_at, entries, feedback, group

PAGE = Path(__file__).parents[2] / "docs" / "ledger.md"


def shown(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), flags=re.S)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two days, two routes, and an author who changed his mind."""
    archive = archive_at(tmp_path / "archive")
    first, other = group(1), group(2, route="other")
    write_batch(archive, entries(first, other, feedback(first, 1, value=False, author="a")))
    later = feedback(first, 2, value=True, author="a", created_at=first.created_at + 60)
    write_batch(archive, entries(group(3, created_at=first.created_at + DAY), later))
    return tmp_path / "archive"


def test_duckdb_sums_up_days_and_routes(directory):
    sums, _ = shown("sql")
    rows = duckdb.execute(sums.replace("ARCHIVE", str(directory))).fetchall()
    assert [(str(day), route, *numbers) for day, route, *numbers in rows] == [
        ("2023-11-15", "default", 1, 1.0, 0.0),
        ("2023-11-15", "other", 1, 1.0, 0.0),
        ("2023-11-16", "default", 1, 1.0, 0.0),
    ]


def test_duckdb_takes_the_newest_answer_to_a_question(directory):
    _, newest = shown("sql")
    rows = duckdb.execute(newest.replace("ARCHIVE", str(directory))).fetchall()
    assert [(name, json.loads(value)) for _, name, value in rows] == [("quality", True)]


def test_datasets_loads_it(directory, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    code, _ = shown("python")
    code = code.replace('split="train")', f'split="train", cache_dir={str(tmp_path / "cache")!r})')
    groups = run(code, directory)["groups"]
    assert sorted(groups["prompt"]) == ["0 1", "0 2", "0 3"]
    assert groups[0]["candidates"][1]["token_ids"] == [5, 7, 1]


def test_pandas_reads_it(directory):
    _, code = shown("python")
    assert sorted(run(code, directory)["prompts"]) == ["0 1", "0 3"]


def run(code: str, directory: Path) -> dict[str, Any]:
    """The page's own lines."""
    names: dict[str, Any] = {"archive": str(directory)}
    exec(compile(code, str(PAGE), "exec"), names)
    return names
