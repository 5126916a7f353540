"""The parent of one process of the stack: runs a command, and sees to it that nothing of it outlives the stack.

Run by file path (`python -I -S guard.py LIFELINE NICENESS COMMAND…`), so that it starts in milliseconds; imports
the standard library only. LIFELINE is the read end of a pipe whose other end the supervisor holds: when the
supervisor dies, however it dies, the pipe closes and every descendant of this guard is killed. That covers
descendants in sessions of their own (a training process): the guard is their subreaper, so they stay in its tree.

Does not own restarts, logs or deadlines: those are the supervisor's (`processes`).
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_libc = ctypes.CDLL(None, use_errno=True)


def main(arguments: list[str]) -> int:
    lifeline, niceness, command = int(arguments[0]), int(arguments[1]), arguments[2:]
    os.set_inheritable(lifeline, False)
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wake = _signals_as_bytes()
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        _become(command, guard, niceness)
    return _watch(child, lifeline, wake)


def _become(command: list[str], guard: int, niceness: int) -> None:
    """In the child: die with the guard, then be the command. Never returns."""
    try:
        signal.set_wakeup_fd(-1)
        for number in (*FORWARDED, signal.SIGCHLD, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != guard:
            os._exit(1)
        os.nice(niceness)
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(127)


def _signals_as_bytes() -> int:
    """A descriptor from which each signal that arrives is read as one byte."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (*FORWARDED, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    return read_end


def _watch(child: int, lifeline: int, wake: int) -> int:
    """Until the child has ended or the lifeline is cut; the exit status a shell would report."""
    while True:
        readable, _, _ = select.select([lifeline, wake], [], [])
        if lifeline in readable:
            _kill_descendants()
            return 128 + signal.SIGKILL
        for number in os.read(wake, 512):
            if number != signal.SIGCHLD:
                _signal(child, number)
        status = _reap(child)
        if status is not None:
            _kill_descendants()
            return status


def _reap(child: int) -> int | None:
    """Collect whatever has ended; the child's exit status when it is among them."""
    status = None
    while True:
        try:
            pid, raw = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == child:
            code = os.waitstatus_to_exitcode(raw)
            status = code if code >= 0 else 128 - code


def _kill_descendants() -> None:
    """Again and again, since a process may fork between the look and the blow, until there is no child left."""
    while True:
        for pid in descendants(os.getpid()):
            _signal(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def descendants(root: int) -> list[int]:
    """Every process below `root`, children before grandchildren. Linux only: read from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found = list(children.get(root, ()))
    for pid in found:
        found.extend(children.get(pid, ()))
    return found


def _parent(process: Path) -> int | None:
    try:
        # The name in parentheses may itself hold spaces and parentheses.
        return int((process / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
