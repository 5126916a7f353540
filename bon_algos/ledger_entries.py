"""Entries of the ledger's stream as records, for everybody who reads it. Pure.

Owns: how an entry holds a record, its place in the stream, how a reward that was measured later joins its group. Does
not own: writing entries (service/ledger.py), paging, what a reader does about a record of another version.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import NamedTuple, Self

from pydantic import ValidationError

from bon_algos.contracts import LEDGER_RECORD, CandidateGroup, Exposure, Feedback, Outcome

Fields = Mapping[bytes, bytes]


class EntryId(NamedTuple):
    """Where an entry stands in the stream: the server's clock, and a counter within the millisecond."""

    ms: int
    seq: int

    @classmethod
    def parse(cls, text: bytes | str) -> Self:
        """`1700000000000-0`."""
        ms, _, seq = (text.decode() if isinstance(text, bytes) else text).partition("-")
        return cls(int(ms), int(seq))

    def __str__(self) -> str:
        return f"{self.ms}-{self.seq}"


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


def with_outcome(group: CandidateGroup, outcome: Outcome | None) -> CandidateGroup:
    """The group with an outcome's rewards where it had none. An outcome of another reward model, or of another
    number of candidates, is not this group's."""
    if outcome is None or outcome.reward_model_id != group.reward_model_id:
        return group
    if len(outcome.rewards) != len(group.candidates):
        return group
    candidates = tuple(
        candidate if reward is None or candidate.reward is not None else candidate.model_copy(update={"reward": reward})
        for candidate, reward in zip(group.candidates, outcome.rewards, strict=True)
    )
    return group.model_copy(update={"candidates": candidates})
