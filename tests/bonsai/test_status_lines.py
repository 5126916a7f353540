"""One line per process, on a terminal and in a log."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

from rich.console import Console

from bonsai.processes import ProcessStatus, State
from bonsai.status_lines import status_lines, status_table


def status(state: State, detail: str = "", *, name: str = "policy", restarts: int = 0) -> ProcessStatus:
    return ProcessStatus(name, state, detail, Path("/state/logs/policy.log"), 1, restarts)


def shown(statuses: list[ProcessStatus], width: int = 100) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(status_table(statuses))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_line_names_state_reason_and_log() -> None:
    line = shown([status("starting", "loading the model (7 s)")])
    assert line.split() == ["policy", "starting", "loading", "the", "model", "(7", "s)", "/state/logs/policy.log"]


def test_a_long_reason_stays_on_its_line() -> None:
    assert shown([status("starting", "engine: " + "x" * 500)]).count("\n") == 1


def test_a_reason_is_text_not_markup() -> None:
    assert "expected [bold] here" in shown([status("failed", "expected [bold] here")])


def test_a_log_gets_one_line_per_change_of_state() -> None:
    console = Console(file=StringIO(), width=100)
    with status_lines(console) as watch:
        watch([status("waiting"), status("starting", "importing vLLM (1 s)")])
        watch([status("starting", "importing vLLM (2 s)")])
        watch([status("ready")])
        watch([status("ready", restarts=1)])
    assert isinstance(console.file, StringIO)
    assert [line.split()[1] for line in console.file.getvalue().splitlines()] == ["starting", "ready"]
