"""What a supervisor that was killed may have left behind, and its removal.

Owns the record of a running stack (`up.json`: boot, supervisor, guards with their start times) and the rule for
what may be killed. Each guard leads a session of its own, so everything it started carries the guard's pid as
session id, unless it made a session itself; those are found as descendants.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError


class Guard(BaseModel):
    """One guard process; the start time tells it from a later process with the same pid."""

    model_config = ConfigDict(frozen=True)

    name: str
    pid: int
    start_ticks: int
    """Clock ticks after boot."""


class RunRecord(BaseModel):
    """A stack that runs, or ran until its supervisor was killed."""

    model_config = ConfigDict(frozen=True)

    boot_id: str
    supervisor: int
    url: str
    guards: tuple[Guard, ...]


@dataclass(frozen=True)
class ProcessRow:
    """What /proc says of one process."""

    pid: int
    parent: int
    session: int
    start_ticks: int
    state: str


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def read_row(pid: int) -> ProcessRow | None:
    """None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The name in parentheses may itself hold spaces and parentheses.
    fields = stat.rpartition(")")[2].split()
    return ProcessRow(
        pid=pid,
        parent=int(fields[1]),
        session=int(fields[3]),
        start_ticks=int(fields[19]),
        state=fields[0],
    )


def read_rows() -> list[ProcessRow]:
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [row for pid in pids if (row := read_row(pid)) is not None]


def belonging(guards: Iterable[Guard], rows: Iterable[ProcessRow]) -> set[int]:
    """The pids that belong to these guards, dead or alive; zombies are not counted.

    A session id is never given to another process while the session has members. So with the guard dead, its
    session holds only what it left; with a process of that pid alive but started at another time, the number was
    reused and nothing of it is ours.
    """
    alive = {row.pid: row for row in rows if row.state not in "ZX"}
    ours: set[int] = set()
    for guard in guards:
        leader = alive.get(guard.pid)
        if leader is not None and leader.start_ticks != guard.start_ticks:
            continue
        session = (row for row in alive.values() if row.session == guard.pid)
        ours |= {row.pid for row in session if row.start_ticks >= guard.start_ticks}
    return _with_descendants(ours, alive.values())


def _with_descendants(pids: set[int], rows: Iterable[ProcessRow]) -> set[int]:
    rows, found = list(rows), set(pids)
    while more := {row.pid for row in rows if row.parent in found} - found:
        found |= more
    return found


def read_record(path: Path) -> RunRecord | None:
    """None when there is none, or when it is not readable as one (a crash while the disk was full)."""
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def write_record(path: Path, record: RunRecord) -> None:
    """In one step: a reader sees the old record or the new one."""
    aside = path.with_suffix(".tmp")
    aside.write_text(record.model_dump_json(indent=1) + "\n")
    aside.replace(path)


def kill_leftovers(path: Path, timeout_seconds: float = 10.0) -> int:
    """Kill what the recorded stack left and forget the record; how many processes were killed.

    The caller holds the state directory's lock, so no supervisor is alive. Raises TimeoutError when a process
    does not go away (it hangs in the kernel).
    """
    record = read_record(path)
    if record is None or record.boot_id != boot_id():
        path.unlink(missing_ok=True)
        return 0
    killed: set[int] = set()
    deadline = time.monotonic() + timeout_seconds
    while pids := belonging(record.guards, read_rows()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes of an earlier run do not end: {sorted(pids)}")
        for pid in pids:
            _kill(pid)
        killed |= pids
        time.sleep(0.02)
    path.unlink(missing_ok=True)
    return len(killed)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
