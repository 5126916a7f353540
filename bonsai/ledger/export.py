"""A route's part of the ledger as plain files: Parquet or JSON lines.

Owns: the files of an export. Does not own: reading the ledger (`worker.ledger`). What stands in a file is joined: late
rewards stand in their groups, and of feedback what counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import pyarrow as pa

from archive.tables import SegmentSet, parquet_bytes, row_of, table_of
from bon_algos.contracts import DEFAULT_TENANT, CandidateGroup, Feedback, RouteName, feedback_key
from bon_algos.ledger_entries import EntryId
from bonsai.ledger.place import NoLedger, Place
from worker.erasures import Erasures
from worker.ledger import groups_newest_first

GROUPS_IN_A_FILE: Final = 5000
_NOWHERE: Final = EntryId(0, 0)


class Counts(NamedTuple):
    groups: int
    feedback: int


class Window(NamedTuple):
    """Which groups are wanted."""

    route: RouteName
    tenant: str = DEFAULT_TENANT
    since: float | None = None


def export(place: Place, window: Window, target: Path, form: str) -> Counts:
    """Raises NoLedger where something stands in the target already."""
    if target.exists() and any(target.iterdir()):
        raise NoLedger(f"{target} is not empty: name a new directory")
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    num_groups = num_feedback = 0
    for number, groups in enumerate(_parts(_groups(place, window))):
        said = list(_feedback(place, groups))
        _write(target / f"groups-{number:05d}", "groups", groups, window, form)
        _write(target / f"feedback-{number:05d}", "feedback", said, window, form)
        num_groups, num_feedback = num_groups + len(groups), num_feedback + len(said)
    return Counts(num_groups, num_feedback)


def _groups(place: Place, window: Window) -> Iterator[CandidateGroup]:
    erasures = Erasures.read(place.client)
    groups = groups_newest_first(
        place.client, (window.route,), tenant=window.tenant, since=window.since, archive=place.archive
    )
    wanted = (group for group in groups if window.since is None or group.created_at >= window.since)
    return (group for group in wanted if not erasures.cover(group))


def _parts(groups: Iterator[CandidateGroup]) -> Iterator[list[CandidateGroup]]:
    while part := list(islice(groups, GROUPS_IN_A_FILE)):
        yield part


def _feedback(place: Place, groups: Sequence[CandidateGroup]) -> Iterator[Feedback]:
    with place.client.pipeline(transaction=False) as pipe:
        for group in groups:
            pipe.hvals(feedback_key(group.id))
        answers = cast("list[list[bytes]]", pipe.execute())
    return (Feedback.model_validate_json(one) for said in answers for one in said)


def _write(
    file: Path, kind: SegmentSet, records: Sequence[CandidateGroup | Feedback], window: Window, form: str
) -> None:
    if not records:
        return
    if form == "jsonl":
        file.with_suffix(".jsonl").write_text("".join(f"{record.model_dump_json()}\n" for record in records))
    else:
        file.with_suffix(".parquet").write_bytes(parquet_bytes([_table(kind, records, window)]))


def _table(kind: SegmentSet, records: Sequence[CandidateGroup | Feedback], window: Window) -> Any:
    """As in the archive, with tenant and route as columns, which a path tells there, and no place in the stream."""
    rows = [row_of(_NOWHERE, json.loads(record.model_dump_json())) for record in records]
    table = table_of(kind, rows).drop_columns(["entry_ms", "entry_seq"])
    for name in ("tenant", "route"):
        table = table.append_column(name, pa.array([getattr(window, name)] * len(rows), pa.string()))
    return table
