"""A finding is kept for the code that found it, and for no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from benchmarks.papers import digests
from benchmarks.papers.__main__ import run_all
from benchmarks.papers.findings import Effort, Experiment, Finding


def test_what_ended_is_not_run_again_by_the_same_code_and_is_by_other_code(tmp_path: Path) -> None:
    asked = []

    def run(effort: Effort, tell: Callable[[float], None]) -> Finding:
        asked.append(effort)
        return Finding(title="t", source="s", method="m", columns=(), rows=(), claims=(), remarks=str(len(asked)))

    def found(code: str) -> str:
        return run_all([Experiment("law", run)], "quick", tmp_path / code, Console(quiet=True))["law"].remarks

    assert [found("one"), found("one"), found("other"), found("one")] == ["1", "1", "2", "1"]


def test_a_digest_changes_with_any_byte_of_any_file(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.py", "b.py")]
    for file in files:
        file.write_text("n = 24\n")
    before = digests.of_files(files)
    assert digests.of_files(files) == before
    files[1].write_text("n = 32\n")
    assert digests.of_files(files) != before
