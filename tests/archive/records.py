"""Entries of a stream, and a store that dies at a chosen call."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from pyarrow import fs

from archive.reading import Archive
from archive.storage import Storage
from archive.writing import Entry
from bon_algos.contracts import Feedback
from bon_algos.ledger_entries import EntryId
from tests.worker import world

DAY = 86_400.0
NOON = 1_700_049_600.0
"""2023-11-15, UTC."""


def group(number: int, **fields: Any):
    """A second after the one before."""
    values = {"created_at": NOON + number, "user": f"user-{number}", "session": f"session-{number}"} | fields
    candidates = [
        world.candidate(token_ids=(5, 7, 1), logprobs=(-0.1, -1 / 3, -2e-9), reward=0.5 * k, text=f"said {number} {k}")
        for k in range(3)
    ]
    return world.group(f"resp_{number:032x}", [0, number], candidates=candidates, **values)


def feedback(of: Any, number: int = 0, **fields: Any) -> Feedback:
    values: dict[str, Any] = {
        "id": f"fb_{number:032x}", "created_at": of.created_at + 1, "group_id": of.id, "session": None,
        "route": of.route, "tenant": of.tenant, "experiment": None, "arm": of.arm, "arm_reason": of.arm_reason,
        "author": None, "name": "quality", "candidate": 0, "value": True, "better": None, "worse": None,
        "comment": None, "correction": None,
    }  # fmt: skip
    return Feedback(**(values | fields))


def entries(*records: Any, first_ms: int | None = None) -> list[Entry]:
    """As they stand in the stream, a millisecond apart; first_ms: of the first one's id."""
    start = round(records[0].created_at * 1000) if first_ms is None else first_ms
    return [
        Entry(EntryId(start + place, 0), {b"kind": one.kind.encode(), b"id": one.id.encode(), b"data": packed(one)})
        for place, one in enumerate(records)
    ]


def packed(record: Any) -> bytes:
    return zlib.compress(record.model_dump_json().encode())


class Died(BaseException):
    """The process ends here: nothing catches it."""


class Fate:
    """Counts what reaches outside the process, and ends it at one of them, before or after its effect."""

    def __init__(self) -> None:
        self.calls = 0
        self._dies_at: int | None = None
        self._is_after = False

    @contextmanager
    def dying_at(self, call: int, *, after: bool) -> Iterator[None]:
        self.calls, self._dies_at, self._is_after = 0, call, after
        try:
            yield
        finally:
            self._dies_at = None

    @contextmanager
    def step(self) -> Iterator[None]:
        is_here = self.calls == self._dies_at
        self.calls += 1
        if is_here and not self._is_after:
            raise Died
        yield
        if is_here:
            raise Died


class MortalStorage(Storage):
    def __init__(self, directory: Path, fate: Fate) -> None:
        super().__init__(fs.LocalFileSystem(), str(directory))
        self._fate = fate

    def put(self, name: str, content: bytes) -> None:
        with self._fate.step():
            super().put(name, content)

    def delete(self, name: str) -> None:
        with self._fate.step():
            super().delete(name)


class MortalRedis(redis.Redis):
    fate: Fate | None = None

    def execute_command(self, *args: Any, **options: Any) -> Any:
        if self.fate is None:
            return super().execute_command(*args, **options)
        with self.fate.step():
            return super().execute_command(*args, **options)


def archive_at(directory: Path) -> Archive:
    return Archive.at(str(directory))
