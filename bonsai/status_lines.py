"""One line per process: what it does, what it waits for, where it logs.

Owns how a stack's status looks on a terminal (lines that change in place) and in a log (one line per change).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bonsai.processes import ProcessStatus, State
from bonsai.supervisor import Watch

_STYLES: dict[State, str] = {
    "waiting": "dim",
    "starting": "yellow",
    "ready": "green",
    "restarting": "magenta",
    "stopping": "dim",
    "failed": "red",
    "stopped": "dim",
}


@contextmanager
def status_lines(console: Console) -> Iterator[Watch]:
    """A watcher for `running_stack` that shows each process's status."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=8, transient=False) as live:
            yield lambda statuses: live.update(status_table(statuses))
    else:
        yield _plain(console)


def status_table(statuses: Sequence[ProcessStatus]) -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(4):
        table.add_column(no_wrap=True, overflow="ellipsis")
    for status in statuses:
        table.add_row(
            status.name,
            Text(status.state, _STYLES[status.state]),
            Text(detail(status)),
            Text(shown_path(status.log), "dim"),
        )
    return table


def detail(status: ProcessStatus) -> str:
    if status.state == "starting" and status.detail == "":
        return "…"
    again = f"restarted {status.restarts}×" if status.restarts else ""
    return " · ".join(filter(None, (status.detail, again)))


def shown_path(path: Path) -> str:
    """Relative to the current directory where it lies below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def key_header(admin_key: Path) -> str:
    """curl's argument that sends the key in a file; the key itself is never printed."""
    return f'-H "Authorization: Bearer $(cat {shlex.quote(shown_path(admin_key))})"'


def _plain(console: Console) -> Watch:
    """One line whenever a process's state changes; its waiting is not narrated second by second."""
    known: dict[str, State] = {}

    def watch(statuses: Sequence[ProcessStatus]) -> None:
        for status in statuses:
            if status.state != "waiting" and known.get(status.name) != status.state:
                known[status.name] = status.state
                words = (f"{status.name:<8}", f"{status.state:<10}", detail(status), shown_path(status.log))
                console.print("  ".join(filter(None, words)), markup=False, highlight=False, soft_wrap=True)

    return watch
