"""An API key as text: `sk-bonsai-<12 public>-<48 secret>`, and the private files that a gateway is started with.

Owns: how a key is made, what is kept of it, reading the admin key's file and the pepper's. Does not own: which keys
there are (keys.py). The secret has 48 base62 characters, 285 bits, so a fast keyed hash is enough; without the pepper,
which is never in Redis, what Redis keeps cannot even be tried.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import stat
import string
from pathlib import Path
from typing import Final

PUBLIC_LENGTH: Final = 12
SECRET_LENGTH: Final = 48
PREFIX: Final = "sk-bonsai-"
MAX_FILE_BYTES: Final = 1024
_ALPHABET: Final = string.digits + string.ascii_letters
_KEY = re.compile(rf"sk-bonsai-([0-9A-Za-z]{{{PUBLIC_LENGTH}}})-[0-9A-Za-z]{{{SECRET_LENGTH}}}")
_PEPPER = re.compile(r"[0-9a-f]{64}")


def new_key() -> str:
    """A key that nobody has seen."""
    return f"{PREFIX}{_letters(PUBLIC_LENGTH)}-{_letters(SECRET_LENGTH)}"


def new_pepper() -> str:
    return secrets.token_hex(32)


def key_id(key: str) -> str | None:
    """The name under which a key is known, from its public part; None for what is no key at all."""
    found = _KEY.fullmatch(key)
    return None if found is None else f"key_{found[1]}"


def public_part(identity: str) -> str:
    """What may be shown of the key with this id."""
    return PREFIX + identity.removeprefix("key_")


def key_digest(key: str, pepper: bytes) -> str:
    """What is kept of a key: HMAC-SHA-256 over all of it."""
    return hmac.digest(pepper, key.encode(), "sha256").hex()


def read_admin_key(file: Path) -> str:
    """The key in a private file. Raises ValueError that says what is wrong with the file, and never what is in it."""
    key = read_private(file)
    if key_id(key) is None:
        raise ValueError(f"{file} does not hold a key: sk-bonsai-, 12 and 48 letters or digits, with hyphens between")
    return key


def read_pepper(file: Path) -> bytes:
    """The secret that keys are hashed with. Raises ValueError."""
    text = read_private(file)
    if not _PEPPER.fullmatch(text):
        raise ValueError(f"{file} does not hold a pepper: 64 hexadecimal digits, as `openssl rand -hex 32` makes them")
    return bytes.fromhex(text)


def read_private(file: Path) -> str:
    """The text of a plain file of ours that nobody else can read. Raises ValueError."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{file} is not a plain file")
        if found.st_uid != os.geteuid():
            raise ValueError(f"{file} belongs to another user")
        if stat.S_IMODE(found.st_mode) != 0o600:
            raise ValueError(f"{file} has mode {stat.S_IMODE(found.st_mode):04o}; it must be 0600")
        content = os.read(descriptor, MAX_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > MAX_FILE_BYTES or not content.isascii():
        raise ValueError(f"{file} is longer than {MAX_FILE_BYTES} bytes, or not plain text")
    return content.decode("ascii").strip()


def _letters(count: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(count))
