"""Entries of the ledger's stream as records, for everybody who reads it. Pure.

Owns: how an entry holds a record, its place in the stream, how a reward that was measured later joins its group. Does
not own: writing entries (service/ledger.py), paging, what a reader does about a record of another version.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

from pydantic_core import from_json

from bon_algos.contracts import LEDGER_RECORD, CandidateGroup, Exposure, Feedback, Outcome, Record

Fields = Mapping[bytes, bytes]
log = logging.getLogger("bonsai.ledger")


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
    with _translated():
        return LEDGER_RECORD.validate_json(zlib.decompress(fields[b"data"]))


def record_and_document(fields: Fields) -> tuple[CandidateGroup | Exposure | Feedback | Outcome, dict[str, Any]]:
    """The record, and the JSON that it was read from. Raises UnreadableRecord."""
    with _translated():
        document = from_json(zlib.decompress(fields[b"data"]))
        return LEDGER_RECORD.validate_python(document), document


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (ValueError, zlib.error, KeyError) as error:
        raise UnreadableRecord(f"a record of the ledger cannot be read: {type(error).__name__}") from None


def group_of(fields: Fields) -> CandidateGroup | None:
    """None for an entry of another kind, which is not parsed. Raises UnreadableRecord."""
    if fields.get(b"kind") != b"group":
        return None
    record = record_of(fields)
    if not isinstance(record, CandidateGroup):
        raise UnreadableRecord("an entry of the ledger is called a group and holds none")
    return record


class NewestFirst:
    """The groups of some routes of a tenant from entries that come newest first, each once.

    An outcome is delivered after its group, so on the way back it is met first: one pass joins them.
    """

    def __init__(self, tenant: str, routes: Collection[str]) -> None:
        self._tenant, self._routes = tenant, routes
        self._outcomes: dict[str, Outcome] = {}
        self._seen: set[str] = set()

    def groups(self, entries: Iterable[Fields]) -> Iterator[CandidateGroup]:
        """Those among the next entries. What cannot be read is left out: of another version, it must not take the
        others from anybody."""
        for fields in entries:
            if fields.get(b"kind") not in (b"group", b"outcome"):
                continue
            try:
                record = record_of(fields)
            except UnreadableRecord as error:
                log.warning("%s", error)
                continue
            yield from self.among([record])

    def among(self, records: Iterable[Record]) -> Iterator[CandidateGroup]:
        """Those among the next records."""
        for record in records:
            if isinstance(record, Outcome):
                self._outcomes[record.group_id] = record
            elif isinstance(record, CandidateGroup) and self._is_asked_for(record):
                self._seen.add(record.id)
                yield with_outcome(record, self._outcomes.pop(record.id, None))

    def _is_asked_for(self, group: CandidateGroup) -> bool:
        return group.tenant == self._tenant and group.route in self._routes and group.id not in self._seen


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
