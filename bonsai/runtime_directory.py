"""Where a stack keeps things: a state directory that lasts and a runtime directory for sockets. Both 0700.

Owns the names below them and the lock that makes a second supervisor in the same directory impossible.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

LONGEST_SOCKET_PATH = 107
"""Bytes in `sockaddr_un` on Linux, less the closing zero."""
_LONGEST_NAME = len("/12345678-1234-1234-1234-123456789012")
"""vLLM names its internal sockets with a UUID."""


class StackRunsAlready(Exception):
    """Another supervisor holds this state directory."""


class UnsafeDirectory(Exception):
    """A directory or a secret that others can reach, or that is not one, stands where ours should be."""


@dataclass(frozen=True)
class StateDirectory:
    root: Path
    """Absolute."""
    runtime: Path
    """Sockets: short enough for one, gone after a reboot."""

    @property
    def redis(self) -> Path:
        return self.root / "redis"

    @property
    def spool(self) -> Path:
        return self.root / "spool"

    @property
    def artefacts(self) -> Path:
        return self.root / "artefacts"

    @property
    def record(self) -> Path:
        return self.root / "up.json"

    @property
    def admin_key(self) -> Path:
        return self.root / "admin.key"

    @property
    def key_pepper(self) -> Path:
        return self.root / "key-pepper"

    @property
    def redis_socket(self) -> Path:
        return self.runtime / "redis.sock"

    @property
    def policy_socket(self) -> Path:
        return self.runtime / "policy.sock"

    @property
    def reward_socket(self) -> Path:
        return self.runtime / "reward.sock"

    @property
    def judge_socket(self) -> Path:
        return self.runtime / "judge.sock"

    def log(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.log"


def open_state(directory: Path, environment: Mapping[str, str]) -> StateDirectory:
    """Make both directories and what is in them, private to this user. Raises UnsafeDirectory or OSError."""
    root = directory.absolute()
    runtime = runtime_directory(root, environment)
    state = StateDirectory(root, runtime)
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    root.chmod(0o700)
    for path in (runtime, state.redis, state.spool, state.artefacts, root / "logs"):
        path.mkdir(mode=0o700, exist_ok=True)
    _check_private(runtime)
    return state


def runtime_directory(root: Path, environment: Mapping[str, str]) -> Path:
    """One per state directory and user: below XDG_RUNTIME_DIR, else below the directory for temporary files.

    Its name is a digest because a socket's path must fit in 107 bytes. Raises UnsafeDirectory when the base
    itself is too long.
    """
    name = f"bonsai-{os.getuid()}-{sha256(bytes(root)).hexdigest()[:12]}"
    bases = [environment.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"]
    for base in filter(None, bases):
        path = Path(base) / name
        is_short = len(bytes(path)) + _LONGEST_NAME <= LONGEST_SOCKET_PATH
        if is_short and os.access(base, os.W_OK | os.X_OK):
            return path
    raise UnsafeDirectory(f"no directory for sockets: set XDG_RUNTIME_DIR to a writable path (tried {bases})")


def clear_runtime(state: StateDirectory) -> None:
    """Remove every socket; nothing listens any more. Killed engines leave theirs behind, under random names."""
    for path in state.runtime.iterdir():
        if path.is_socket():
            path.unlink(missing_ok=True)


def remove_runtime(state: StateDirectory) -> None:
    """Clear it, and remove it unless something that is not ours lies in it."""
    clear_runtime(state)
    with suppress(OSError):
        state.runtime.rmdir()


def _check_private(path: Path) -> None:
    """/tmp is shared: somebody else may have made our directory first, or a link in its place."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UnsafeDirectory(f"{path} is not a directory of this user")
    path.chmod(0o700)


@contextmanager
def locked(state: StateDirectory) -> Iterator[None]:
    """Hold the state directory; a supervisor that dies lets go of it at once. Raises StackRunsAlready."""
    with (state.root / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StackRunsAlready(f"a stack already runs in {state.root}") from error
        yield
