"""Records as rows of Parquet files, and back.

Owns: the schema of each set, what text and tokens are in it, one file's bytes. Does not own: where a file goes.

Tenant, day and route are the path's. Every row has the place of its entry in the stream. What DuckDB or pandas would
not look into is JSON in a column: messages, the sampling law, the value of feedback. A null where a record needs text
or tokens says that their time was up: such a group is read as one that was not to be stored, and feeds no training.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, cast

import pyarrow as pa
from pyarrow import parquet

from bon_algos.contracts import LEDGER_RECORD, CandidateGroup, Exposure, Feedback, Outcome
from bon_algos.ledger_entries import EntryId

LedgerRecord = CandidateGroup | Exposure | Feedback | Outcome
SegmentSet = Literal["groups", "outcomes", "feedback", "exposures", "unreadable"]
SET_OF: Final[Mapping[str, SegmentSet]] = {
    "group": "groups",
    "outcome": "outcomes",
    "feedback": "feedback",
    "exposure": "exposures",
}
ROWS_IN_A_GROUP: Final = 1024
COMPRESSION_LEVEL: Final = 3

_PLACE: Final = [pa.field("entry_ms", pa.int64()), pa.field("entry_seq", pa.int32())]
_HEAD: Final = [
    pa.field("id", pa.string()),
    pa.field("schema_version", pa.int16()),
    pa.field("created_at", pa.float64()),
]
_ARM: Final = [
    pa.field("experiment", pa.string()),
    pa.field("arm_policy", pa.string()),
    pa.field("arm_n", pa.int32()),
    pa.field("arm_reason", pa.string()),
]
_CANDIDATE: Final = pa.struct(
    [
        pa.field("text", pa.string()),
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("logprobs", pa.list_(pa.float64())),
        pa.field("finish_reason", pa.string()),
        pa.field("reward", pa.float64()),
        pa.field("disagreement", pa.float64()),
        pa.field("failure", pa.string()),
        pa.field("policy_id", pa.string()),
    ]
)
SCHEMAS: Final[Mapping[SegmentSet, pa.Schema]] = {
    "groups": pa.schema(
        [
            *_PLACE,
            *_HEAD,
            *_ARM,
            *(pa.field(name, pa.string()) for name in ("session", "user", "policy_id", "reward_model_id")),
            *(pa.field(f"{name}_digest", pa.string()) for name in ("reward_template", "policy_template", "settings")),
            pa.field("prompt", pa.string()),
            pa.field("messages", pa.string()),
            pa.field("prompt_token_ids", pa.list_(pa.int32())),
            pa.field("sampling", pa.string()),
            pa.field("requested", pa.int32()),
            pa.field("candidates", pa.list_(_CANDIDATE)),
            pa.field("softness", pa.float64()),
            pa.field("selected", pa.int32()),
            pa.field("status", pa.string()),
            pa.field("stop_reason", pa.string()),
            pa.field("gain_missed", pa.float64()),
            pa.field("store", pa.bool_()),
            pa.field("engine_seconds", pa.float64()),
            pa.field("total_seconds", pa.float64()),
        ]
    ),
    "outcomes": pa.schema(
        [
            *_PLACE,
            *_HEAD,
            *_ARM,
            pa.field("group_id", pa.string()),
            pa.field("reward_model_id", pa.string()),
            pa.field("rewards", pa.list_(pa.float64())),
        ]
    ),
    "exposures": pa.schema([*_PLACE, *_HEAD, *_ARM, pa.field("group_id", pa.string())]),
    "feedback": pa.schema(
        [
            *_PLACE,
            *_HEAD,
            *_ARM,
            *(pa.field(name, pa.string()) for name in ("group_id", "session", "author", "name", "value")),
            *(pa.field(name, pa.int32()) for name in ("candidate", "better", "worse")),
            *(pa.field(name, pa.string()) for name in ("comment", "correction")),
        ]
    ),
    "unreadable": pa.schema([*_PLACE, pa.field("kind", pa.string()), pa.field("data", pa.binary())]),
}
_JSON: Final = ("messages", "sampling", "value")
_CANDIDATE_TEXT: Final = ("text",)
_CANDIDATE_TOKENS: Final = ("token_ids", "logprobs")


class Stored(NamedTuple):
    """A record and its place in the stream."""

    entry: EntryId
    record: LedgerRecord


def row_of(entry: EntryId, document: Mapping[str, Any]) -> dict[str, Any]:
    """A record's JSON, read and valid, as a row of its set."""
    row = {**document, "entry_ms": entry.ms, "entry_seq": entry.seq}
    arm = row.get("arm") or {}
    row |= {"arm_policy": arm.get("policy"), "arm_n": arm.get("n")}
    for name in _JSON:
        if row.get(name) is not None:
            row[name] = json.dumps(row[name], ensure_ascii=False)
    return row


def parquet_bytes(tables: Iterable[pa.Table]) -> bytes:
    """One file of some tables of one schema, of which it holds no more at a time than it must. Log-probs go byte by
    byte: those of a float32 engine have four bytes that are all alike. ValueError without a table."""
    sink, writer = pa.BufferOutputStream(), None
    for table in _in_groups(tables):
        writer = writer or _writer(sink, table.schema)
        writer.write_table(table, row_group_size=ROWS_IN_A_GROUP)
    if writer is None:
        raise ValueError("a file needs a table")
    writer.close()
    return cast(bytes, sink.getvalue().to_pybytes())


def _writer(sink: pa.BufferOutputStream, schema: pa.Schema) -> parquet.ParquetWriter:
    logprobs = "candidates.list.element.logprobs.list.element"
    return parquet.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        compression_level=COMPRESSION_LEVEL,
        use_dictionary=[one for one in _leaves(schema) if one != logprobs],
        column_encoding={logprobs: "BYTE_STREAM_SPLIT"} if "candidates" in schema.names else None,
    )


def _in_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables that fill groups, but for the last."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= ROWS_IN_A_GROUP:
            whole = pa.concat_tables(held)
            cut = len(whole) - len(whole) % ROWS_IN_A_GROUP
            yield whole.slice(0, cut)
            held = [whole.slice(cut)]
    if held:
        yield pa.concat_tables(held)


def read_table(content: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    return parquet.ParquetFile(pa.BufferReader(content)).read(columns=None if columns is None else list(columns))


def backwards(content: bytes, before: EntryId | None, rows: int) -> Iterator[pa.Table]:
    """The last rows of a file first, so many at a time and each time in the stream's order. before: without the entries
    from this one on."""
    file = parquet.ParquetFile(pa.BufferReader(content))
    for number in reversed(range(file.num_row_groups)):
        if before is not None and _first_ms(file, number) > before.ms:
            continue
        group = file.read_row_group(number)
        end = len(group) if before is None else bisect_left(_places(group), before)
        for start in reversed(range(0, end, rows)):
            yield group.slice(start, min(rows, end - start))


def _first_ms(file: parquet.ParquetFile, number: int) -> int:
    statistics = file.metadata.row_group(number).column(0).statistics
    return 0 if statistics is None else int(statistics.min)


def _places(table: pa.Table) -> list[tuple[int, int]]:
    """Of each row in the stream."""
    return list(zip(table.column("entry_ms").to_pylist(), table.column("entry_seq").to_pylist(), strict=True))


def table_of(kind: SegmentSet, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SCHEMAS[kind])


def stored(kind: SegmentSet, table: pa.Table, tenant: str, route: str | None) -> list[Stored]:
    """The records of a table. Raises ValueError where a row is none."""
    record_kind = next(name for name, of in SET_OF.items() if of == kind)
    return [_stored(row, {"kind": record_kind, "tenant": tenant, "route": route}) for row in table.to_pylist()]


def _stored(row: dict[str, Any], more: Mapping[str, Any]) -> Stored:
    entry = EntryId(row.pop("entry_ms"), row.pop("entry_seq"))
    policy, n = row.pop("arm_policy"), row.pop("arm_n")
    row |= {**more, "arm": None if policy is None else {"policy": policy, "n": n}}
    for name in _JSON:
        if row.get(name) is not None:
            row[name] = json.loads(row[name])
    return Stored(entry, LEDGER_RECORD.validate_python(_unstripped(row) if "candidates" in row else row))


def _unstripped(row: dict[str, Any]) -> dict[str, Any]:
    """Texts and tokens whose time was up, as `store: false` leaves them."""
    is_stripped = row["prompt"] is None or row["prompt_token_ids"] is None
    row["store"] = row["store"] and not is_stripped
    row["prompt"] = row["prompt"] or ""
    row["prompt_token_ids"] = row["prompt_token_ids"] or ()
    for one in row["candidates"]:
        one["text"] = one["text"] or ""
        one["token_ids"], one["logprobs"] = one["token_ids"] or (), one["logprobs"] or ()
    return row


def without_text(row: dict[str, Any]) -> dict[str, Any]:
    """A row of groups or feedback with its texts gone."""
    return _without(row, ("prompt", "messages", "comment", "correction"), _CANDIDATE_TEXT)


def without_tokens(row: dict[str, Any]) -> dict[str, Any]:
    return _without(row, ("prompt_token_ids",), _CANDIDATE_TOKENS)


def _without(row: dict[str, Any], names: Sequence[str], of_candidates: Sequence[str]) -> dict[str, Any]:
    gone = dict.fromkeys(of_candidates)
    return {
        **row,
        **{name: None for name in names if name in row},
        **({"candidates": [{**one, **gone} for one in row["candidates"]]} if "candidates" in row else {}),
    }


def _leaves(schema: pa.Schema) -> list[str]:
    """The paths of a schema's columns as Parquet names them."""

    def below(path: str, kind: pa.DataType) -> list[str]:
        if pa.types.is_list(kind):
            return below(f"{path}.list.element", kind.value_type)
        if pa.types.is_struct(kind):
            return [leaf for one in kind for leaf in below(f"{path}.{one.name}", one.type)]
        return [path]

    return [leaf for one in schema for leaf in below(one.name, one.type)]
