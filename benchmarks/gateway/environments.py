"""Programs from PyPI that the benchmark runs and ours must not be installed beside: each has an environment of its own.

Owns: making them from their lock files. Does not own: what is done with them (peers.py, profiling.py).
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PIP: Final = ("-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps", "--require-hashes")


class CannotRun(Exception):
    """A program that is not there; the text says why."""


def environment_of(program: str) -> Path:
    """Directory of the program's commands, made once for each version of its lock file. Raises CannotRun.

    program: its lock file in `requirements/`, without suffix.
    """
    lock = ROOT / "requirements" / f"{program}.txt"
    directory = ROOT / ".venv" / f"{program}-{hashlib.sha256(lock.read_bytes()).hexdigest()[:16]}"
    commands = directory / "bin"
    if not (directory / "complete").exists():
        for command in (
            (sys.executable, "-m", "venv", "--clear", str(directory)),
            (str(commands / "python"), *PIP, "-r", str(lock)),
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise CannotRun(f"it could not be installed: {_last_line(done.stderr)}")
        (directory / "complete").touch()
    return commands


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no reason given")
