"""An entry of the audit, chained to the one before: its fields and its digest.

Owns: the form of an entry, which gateway, worker and command write alike, and how a script writes one. Does not own:
when there is one, reading and checking the stream (service/audit.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from time import time
from typing import Any, Final

from bon_algos.contracts import AUDIT_STREAM

GENESIS: Final = "0" * 64
"""What the first entry holds as the digest of the one before."""
MOST_TRIES: Final = 200
"""Of a script whose entry others were faster than. Each time somebody else's change was made."""

AUDIT_LUA: Final = (
    f"local AUDIT, GENESIS = '{AUDIT_STREAM}', '{GENESIS}'\n"
    + """
local function is_newest(digest)
  local newest = redis.call('XREVRANGE', AUDIT, '+', '-', 'COUNT', 1)
  if #newest == 0 then return digest == GENESIS end
  local fields = newest[1][2]
  for i = 1, #fields, 2 do
    if fields[i] == 'digest' then return fields[i + 1] == digest end
  end
  return digest == ''
end
local function note(entry) redis.call('XADD', AUDIT, '*', unpack(cjson.decode(entry))) end
"""
)
"""Lua has no sha256: the entry is made outside and given to the script with the digest that it follows. Defines
`is_newest(digest)`, whether that is the newest entry's, which a script asks before it writes anything, and
`note(entry)`. Where it is not, the script does nothing and is run again with another entry."""


def chained(event: str, *, tenant: str, by: str, previous: str, **fields: str) -> dict[str, str]:
    """A whole entry of now. by: the id of a key, or which process. previous: digest of the newest entry. fields: never
    a key, never what was said in a request for text."""
    entry = {"event": event, "tenant": tenant, "by": by, "at": f"{time():.6f}", **fields, "previous": previous}
    return {**entry, "digest": entry_digest(entry)}


def newest_digest(rows: Sequence[tuple[Any, Mapping[Any, Any]]]) -> str:
    """What the next entry follows. rows: the newest entry, if there is one, as XREVRANGE gives it, in text or bytes."""
    if not rows:
        return GENESIS
    fields = rows[0][1]
    digest = fields.get("digest") or fields.get(b"digest") or ""
    return digest.decode() if isinstance(digest, bytes) else str(digest)


def script_values(entry: Mapping[str, str]) -> tuple[str, str]:
    """The two arguments by which a script is given an entry: for `is_newest` and for `note`."""
    return entry["previous"], json.dumps([part for field in entry.items() for part in field])


def entry_digest(fields: Mapping[str, str]) -> str:
    """sha256 over everything that an entry says, the digest of the one before included."""
    said = {name: value for name, value in fields.items() if name != "digest"}
    return sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
