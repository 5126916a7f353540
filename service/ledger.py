"""The ledger: every record is on the gateway's disk before its answer is out, and in Redis once, soon after.

Owns: what a frame of the spool holds, the drainer and its script, what the gateway tells about the ledger's state.
Does not own: the disk format (spool.py), what a record adds to an experiment (experiments.py).
The order of one gateway process is kept: a record is delivered only after all that were appended before it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha1
from typing import Any, Final

import msgspec
from isal.isal_zlib import compress, decompress
from pydantic_core import to_json
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError

from bon_algos.contracts import (
    LEDGER_COUNTS,
    LEDGER_STREAM,
    Candidate,
    CandidateGroup,
    Exposure,
    Feedback,
    Outcome,
    experiment_stats_key,
    feedback_key,
    of_tenant,
    seen_key,
    target_of,
)
from bon_algos.crash_points import crash_point
from service.experiments import statistics_increments
from service.spool import Frame, Position, Reading, Spool

SEEN_SECONDS: Final = 86_400
GATHER_SECONDS: Final = 0.02
"""Records that come within it travel together: a batch costs what a record does."""
FIRST_PAUSE_SECONDS: Final = 0.1
LONGEST_PAUSE_SECONDS: Final = 2.0
log = logging.getLogger("bonsai.ledger")

Record = Exposure | CandidateGroup | Outcome | Feedback

# KEYS: seen, stream, counts, statistics (only with increments). ARGV: life of `seen` in s, kind, id, data, the route
# whose usable groups this is one of or "", then field and summand by turns. Returns 0 when it was delivered before.
_DELIVER: Final = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
local entry = redis.call('XADD', KEYS[2], '*', 'kind', ARGV[2], 'id', ARGV[3], 'data', ARGV[4])
redis.call('SET', KEYS[1], entry, 'EX', ARGV[1])
if ARGV[5] ~= '' then redis.call('HINCRBY', KEYS[3], ARGV[5], 1) end
for i = 6, #ARGV, 2 do redis.call('HINCRBYFLOAT', KEYS[4], ARGV[i], ARGV[i + 1]) end
return 1
"""
_DELIVER_SHA: Final = sha1(_DELIVER.encode(), usedforsecurity=False).hexdigest()

# KEYS: seen, stream, feedback of its target. ARGV: life of `seen` in s, kind, id, data, question, its JSON. Of two
# answers to one question the later one counts, in whichever order gateways deliver them.
_DELIVER_FEEDBACK: Final = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
local entry = redis.call('XADD', KEYS[2], '*', 'kind', ARGV[2], 'id', ARGV[3], 'data', ARGV[4])
redis.call('SET', KEYS[1], entry, 'EX', ARGV[1])
local earlier = redis.call('HGET', KEYS[3], ARGV[5])
if not earlier or cjson.decode(earlier).created_at <= cjson.decode(ARGV[6]).created_at then
  redis.call('HSET', KEYS[3], ARGV[5], ARGV[6])
end
return 1
"""
_DELIVER_FEEDBACK_SHA: Final = sha1(_DELIVER_FEEDBACK.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class LedgerStatus:
    has_room: bool
    """False: the last record was dropped."""
    pending_bytes: int
    """On this disk and not in Redis yet."""
    dropped: int
    """Records that found no room since the process began."""
    damaged: int
    """Places on the disk that could not be read back."""
    refusals: int
    """How often the disk refused something else than a record, which was tried again."""
    redis: str
    """ok, away, or starting before the first delivery."""


class Ledger:
    """The ledger of one gateway process."""

    def __init__(self, spool: Spool, redis: Redis) -> None:
        """redis: a client of the drainer's own, so that a slow server delays nobody else."""
        self._spool = spool
        self._redis = redis
        self._written = asyncio.Event()
        self._delivered = asyncio.Event()
        self._first_own_segment = spool.active
        self._unmeasured: dict[str, bytes] = {}
        self._dropped = 0
        self._has_room = True
        self._redis_state = "starting"
        self._awaited: dict[object, float] = {}

    def append(self, record: Record) -> bool:
        """Put a record on disk; False when there was no room and it was dropped and counted."""
        self._has_room = self._spool.append(_frame(record))
        if not self._has_room:
            self._dropped += 1
            log.error("ledger full: %s %s dropped, %d so far", record.kind, record.id, self._dropped)
        self._delivered.clear()
        self._written.set()
        return self._has_room

    @property
    def status(self) -> LedgerStatus:
        return LedgerStatus(
            has_room=self._has_room,
            pending_bytes=self._spool.pending_bytes,
            dropped=self._dropped,
            damaged=self._spool.damaged,
            refusals=self._spool.refusals,
            redis=self._redis_state,
        )

    @contextmanager
    def awaits(self, moment: float) -> Iterator[None]:
        """Until the block is left, a record made at this moment (seconds) may still be appended."""
        held = object()
        self._awaited[held] = moment
        try:
            yield
        finally:
            del self._awaited[held]

    @property
    def awaited_since(self) -> float | None:
        """The earliest moment whose records may still be appended; None: nothing is under way."""
        return min(self._awaited.values(), default=None)

    def begin_segment(self) -> int:
        """What is appended from now on is in this segment of the disk or a later one. Raises OSError."""
        segment = self._spool.begin_segment()
        self._written.set()
        return segment

    def holds_none_before(self, segment: int) -> bool:
        """Whether all that was appended before this segment is in Redis, and gone from the disk."""
        return self._spool.cursor.segment >= segment

    async def run(self, measure_again: Callable[[CandidateGroup], None]) -> None:
        """Deliver until cancelled. measure_again: called for each single-sample group of an earlier process whose
        reward was never measured because that process ended first."""
        position, pause = self._spool.cursor, FIRST_PAUSE_SECONDS
        while True:
            self._written.clear()
            try:
                frames, position = await self._delivered_from(position)
                if position != self._spool.cursor:
                    self._spool.acknowledge(position)
            except (RedisError, OSError) as error:
                if isinstance(error, RedisError):
                    self._note_redis("away", f"{type(error).__name__}, {self._spool.pending_bytes} bytes wait")
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            pause = FIRST_PAUSE_SECONDS
            if position.segment >= self._first_own_segment:
                self._hand_over(measure_again)
            if not frames:
                if not self._written.is_set():
                    self._delivered.set()
                await self._written.wait()
                await asyncio.sleep(GATHER_SECONDS)

    async def drain(self, seconds: float) -> None:
        """Wait until Redis has everything, if it is there."""
        if self._redis_state == "away":
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._delivered.wait()

    async def _delivered_from(self, position: Position) -> Reading:
        """What stands there, in Redis now. Raises RedisError, OSError."""
        reading = self._spool.read(position)
        if reading.frames or self._redis_state != "ok":  # else there is nothing to ask Redis
            await self._deliver(reading.frames)
        return reading

    async def _deliver(self, frames: Sequence[Frame]) -> None:
        heads = [_head(frame.payload) for frame in frames]
        async with self._redis.pipeline(transaction=False) as pipe:
            # Loaded with every batch: a restarted server has forgotten it, and it is small beside the records.
            pipe.script_load(_DELIVER)
            pipe.script_load(_DELIVER_FEEDBACK)
            for head, data in heads:
                if head["kind"] == "feedback":
                    _deliver_feedback(pipe, head, data)
                    continue
                increments = [part for pair in head["increments"].items() for part in pair]
                keys = [seen_key(head["id"]), LEDGER_STREAM, LEDGER_COUNTS]
                keys += [experiment_stats_key(head["experiment"])] if increments else []
                arguments = [SEEN_SECONDS, head["kind"], head["id"], data, head["usable"], *increments]
                pipe.evalsha(_DELIVER_SHA, len(keys), *keys, *arguments)
            await pipe.execute()
        crash_point("drain.delivered")
        self._note_redis("ok", "delivering")
        for frame, (head, data) in zip(frames, heads, strict=True):
            if frame.end.segment < self._first_own_segment:
                self._remember_unmeasured(head, data)

    def _remember_unmeasured(self, head: dict[str, Any], data: bytes) -> None:
        if head["unmeasured"]:
            self._unmeasured[head["id"]] = data
        self._unmeasured.pop(head["measures"], None)

    def _hand_over(self, measure_again: Callable[[CandidateGroup], None]) -> None:
        while self._unmeasured:
            _, data = self._unmeasured.popitem()
            measure_again(CandidateGroup.model_validate_json(decompress(data)))

    def _note_redis(self, state: str, detail: str) -> None:
        if state != self._redis_state:
            log.log(logging.WARNING if state == "away" else logging.INFO, "Redis is %s: %s", state, detail)
        self._redis_state = state


def _deliver_feedback(pipe: Pipeline, head: dict[str, Any], data: bytes) -> None:
    text = decompress(data)
    feedback = Feedback.model_validate_json(text)
    keys = [
        seen_key(head["id"]),
        LEDGER_STREAM,
        feedback_key(target_of(feedback.group_id, feedback.session, feedback.tenant)),
    ]
    arguments = [SEEN_SECONDS, head["kind"], head["id"], data, feedback.question, text]
    pipe.evalsha(_DELIVER_FEEDBACK_SHA, len(keys), *keys, *arguments)


def without_content(group: CandidateGroup) -> CandidateGroup:
    """What `store: false` keeps: ids, rewards and counts, no text and no tokens."""
    bare = tuple(_without_text(candidate) for candidate in group.candidates)
    nothing = {"prompt": "", "messages": None, "prompt_token_ids": (), "tags": ()}
    return group.model_copy(update={**nothing, "candidates": bare})


def _without_text(candidate: Candidate) -> Candidate:
    return candidate.model_copy(update={"text": "", "token_ids": (), "logprobs": ()})


def _frame(record: Record) -> bytes:
    """A line of what the drainer must know, then the record as it will stand in the stream: delivering is copying."""
    head: dict[str, object] = {
        "kind": record.kind,
        "id": record.id,
        "experiment": record.experiment,
        "increments": {} if isinstance(record, Feedback) else statistics_increments(record),
        "usable": "",
        "unmeasured": False,
        "measures": record.group_id if isinstance(record, Outcome) else "",
    }
    kept = record
    if isinstance(record, CandidateGroup):
        head["usable"] = of_tenant(record.tenant, record.route) if record.is_unbiased and record.requested > 1 else ""
        head["unmeasured"] = record.store and record.status == "single" and not record.scored
        kept = record if record.store else without_content(record)
    return to_json(head) + b"\n" + compress(_RECORD.encode(kept), level=1)


def _members(record: object) -> dict[str, Any]:
    told = dict(vars(record))
    if isinstance(record, Candidate):
        del told["alternatives"]  # not logged
    return told


_RECORD: Final = msgspec.json.Encoder(enc_hook=_members)
"""What pydantic would write of a record, in two thirds of the instructions."""


def _head(payload: bytes) -> tuple[dict[str, Any], bytes]:
    line, _, data = payload.partition(b"\n")
    return json.loads(line), data
