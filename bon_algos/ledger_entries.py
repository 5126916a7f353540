"""Entries of the ledger's stream as records, for everybody who reads it. Pure.

Owns: how an entry holds a record. Does not own: writing entries (service/ledger.py), paging, what a reader does about
a record of another version.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from pydantic import ValidationError

from bon_algos.contracts import LEDGER_RECORD, CandidateGroup, Exposure, Feedback, Outcome

Fields = Mapping[bytes, bytes]


class UnreadableRecord(ValueError):
    """Not this version's, or damaged; the text names no content."""


def record_of(fields: Fields) -> CandidateGroup | Exposure | Feedback | Outcome:
    """Raises UnreadableRecord."""
    try:
        return LEDGER_RECORD.validate_json(zlib.decompress(fields[b"data"]))
    except (ValidationError, zlib.error, KeyError) as error:
        raise UnreadableRecord(f"a record of the ledger cannot be read: {type(error).__name__}") from None


def group_of(fields: Fields) -> CandidateGroup | None:
    """None for an entry of another kind, which is not parsed. Raises UnreadableRecord."""
    if fields.get(b"kind") != b"group":
        return None
    record = record_of(fields)
    if not isinstance(record, CandidateGroup):
        raise UnreadableRecord("an entry of the ledger is called a group and holds none")
    return record
