"""Which processes belong to a recorded stack: small tables of processes, by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bonsai.leftovers import (
    Guard,
    ProcessRow,
    RunRecord,
    belonging,
    kill_leftovers,
    read_record,
    read_row,
    write_record,
)

GUARD = Guard(name="policy", pid=100, start_ticks=5_000)


def row(pid: int, *, parent: int = 1, session: int = 100, start: int = 5_001, state: str = "S") -> ProcessRow:
    return ProcessRow(pid=pid, parent=parent, session=session, start_ticks=start, state=state)


def test_the_guard_its_session_and_what_is_below_it() -> None:
    rows = [
        row(100, start=5_000),
        row(101, parent=100),
        row(102, parent=101, session=102),  # a session of its own, below the guard
        row(7, session=7),
    ]
    assert belonging([GUARD], rows) == {100, 101, 102}


def test_a_dead_guards_session_is_still_ours() -> None:
    assert belonging([GUARD], [row(101), row(102)]) == {101, 102}


def test_a_reused_pid_is_not_ours() -> None:
    """Process 100 started at another time: the number was given to somebody else, with a session of his own."""
    assert belonging([GUARD], [row(100, start=9_000), row(101, start=9_001)]) == set()


def test_what_is_older_than_the_guard_is_not_ours() -> None:
    assert belonging([GUARD], [row(101, start=4_999)]) == set()


def test_zombies_are_gone_already() -> None:
    assert belonging([GUARD], [row(100, start=5_000, state="Z")]) == set()


def test_proc_is_read_as_the_kernel_writes_it() -> None:
    own = read_row(os.getpid())
    assert own is not None
    assert (own.pid, own.parent, own.session) == (os.getpid(), os.getppid(), os.getsid(0))
    assert read_row(2**22 + 1) is None


def test_a_record_of_another_boot_kills_nobody(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as bystander:
        found = read_row(bystander.pid)
        assert found is not None
        guard = Guard(name="policy", pid=bystander.pid, start_ticks=found.start_ticks)
        record = RunRecord(boot_id="another", supervisor=1, url="", guards=(guard,))
        write_record(tmp_path / "up.json", record)
        assert kill_leftovers(tmp_path / "up.json") == 0
        assert bystander.poll() is None
        assert read_record(tmp_path / "up.json") is None
        bystander.communicate(b"\n", timeout=20)


def test_a_torn_record_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "up.json").write_text('{"boot_id": ')
    assert read_record(tmp_path / "up.json") is None
