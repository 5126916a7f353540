"""An entry of the audit, chained to the one before: its fields and its digest.

Owns: the form of an entry, which gateway, worker and command write alike. Does not own: the stream, reading and
checking it (service/audit.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from time import time
from typing import Final

GENESIS: Final = "0" * 64
"""What the first entry holds as the digest of the one before."""


def chained(event: str, *, tenant: str, by: str, previous: str, **fields: str) -> dict[str, str]:
    """A whole entry of now. by: the id of a key, or which process. previous: digest of the newest entry. fields: never
    a key, never what was said in a request for text."""
    entry = {"event": event, "tenant": tenant, "by": by, "at": f"{time():.6f}", **fields, "previous": previous}
    return {**entry, "digest": entry_digest(entry)}


def entry_digest(fields: Mapping[str, str]) -> str:
    """sha256 over everything that an entry says, the digest of the one before included."""
    said = {name: value for name, value in fields.items() if name != "digest"}
    return sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
