"""The secrets of a stack: the key of its administrator, and what the gateway hashes all keys with.

Owns: making both in the state directory, once, for this user alone. Does not own: what a key is (`service.api_key`).
Both outlive the stack: with another pepper no key that was given out opens anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from bonsai.runtime_directory import StateDirectory, UnsafeDirectory
from service.api_key import new_key, new_pepper, read_admin_key, read_pepper

MODE = 0o600


def make_secrets(state: StateDirectory) -> None:
    """Both files, unless they are there. Raises UnsafeDirectory when one is there and cannot be used, OSError."""
    _make(state.admin_key, new_key)
    _make(state.key_pepper, new_pepper)
    try:
        read_admin_key(state.admin_key)
        read_pepper(state.key_pepper)
    except ValueError as error:
        raise UnsafeDirectory(str(error)) from None


def _make(file: Path, secret: Callable[[], str]) -> None:
    """Written aside first: a file that is there is whole."""
    if os.path.lexists(file):
        return
    aside = file.with_name(f"{file.name}.new")
    aside.unlink(missing_ok=True)
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, MODE)
    with os.fdopen(descriptor, "w") as opened:
        os.fchmod(descriptor, MODE)
        opened.write(f"{secret()}\n")
        opened.flush()
        os.fsync(descriptor)
    aside.rename(file)
