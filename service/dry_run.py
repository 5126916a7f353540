"""What a job would learn from, told beforehand: the worker's own choice, without a GPU, within bounds.

Owns: reading the newest part of the window or a file, how long like jobs took. Does not own: which groups are fit
(`bon_algos.acceptance`), the numbers (`bon_algos.data_report`), whether the spec itself is right (jobs.py).

One at a time: a page of the ledger is many thousand candidates, and requests for text are served beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any, Final, cast

from pydantic import ValidationError
from redis.asyncio import Redis

from archive.reading import Archive, Question
from bon_algos.acceptance import Choice, Requirements, Unusable
from bon_algos.ancestors import Lineage
from bon_algos.chat import ChatTokenizer
from bon_algos.contracts import (
    CandidateGroup,
    DataReport,
    Feedback,
    FileRecord,
    JobSpec,
    TrainingRow,
    feedback_key,
    job_key,
    jobs_index,
)
from bon_algos.data_report import data_report
from bon_algos.ledger_entries import EntryId, NewestFirst
from bon_algos.row_files import Row, rows_of
from bon_algos.uploaded import Source, group_of
from service.ancestors import Ancestors
from service.errors import InvalidField, Overloaded
from service.files import Files
from service.ledger_reading import Entry, archive_pages, stream_page
from service.store import translated

MOST_ENTRIES: Final = 40_000
MOST_GROUPS: Final = 2_000
MOST_SECONDS: Final = 20.0
PAGE_ROWS: Final = 64
LIKE_JOBS: Final = 100
"""The newest jobs among which like ones are looked for."""


class DryRuns:
    """Tells of jobs that nobody submitted."""

    def __init__(
        self,
        redis: Redis,
        files: Files,
        archive: Archive,
        artefacts: Path,
        *,
        base_policy_id: str,
        reward_model_id: str,
        reward_template_digest: str,
        tokenizer: ChatTokenizer,
    ) -> None:
        """redis: one that answers in bytes."""
        self._redis, self._files, self._archive, self._tokenizer = redis, files, archive, tokenizer
        self._judged_by = {
            "base_policy": base_policy_id,
            "reward_model": reward_model_id,
            "reward_template_digest": reward_template_digest,
        }
        self._ancestors = Ancestors(redis, artefacts)
        self._busy = asyncio.Lock()

    async def of(self, spec: JobSpec, tenant: str) -> dict[str, Any]:
        """The report of the API. Raises Overloaded while another one is made, FileNotFound, InvalidField,
        StoreUnavailable."""
        if self._busy.locked():
            raise Overloaded("another dry run is under way here: come back in a moment", code="dry_run_busy")
        async with self._busy:
            ancestors = await self._ancestors.of(spec.policies)
            wanted = Requirements.of(spec, **self._judged_by)
            reading = _Reading(wanted, spec.window.max_groups)
            if spec.training_file is None:
                await self._read_ledger(reading, spec, tenant)
            else:
                await self._read_file(reading, spec.training_file, tenant)
            report = await asyncio.to_thread(reading.report, spec, ancestors)
            seconds, jobs = await self._expected(spec, tenant)
        return report_object(spec, report, seconds, jobs)

    async def _read_ledger(self, reading: _Reading, spec: JobSpec, tenant: str) -> None:
        newest_first = NewestFirst(tenant, spec.window.routes or (spec.route,))
        newest, before = "+", None
        while reading.has_room:
            page = await stream_page(self._redis, newest)
            if not page:
                await self._read_archive(reading, spec, tenant, newest_first, before)
                return
            before = EntryId.parse(page[-1][0])
            newest = f"({page[-1][0].decode()}"
            reading.num_entries += len(page)
            groups = await asyncio.to_thread(_groups_among, newest_first, page)
            await asyncio.to_thread(reading.take, groups, await self._feedback(spec, groups))

    async def _read_archive(
        self, reading: _Reading, spec: JobSpec, tenant: str, newest_first: NewestFirst, before: EntryId | None
    ) -> None:
        """What the stream has no more, as `worker.ledger.groups_newest_first` reads it. Raises StoreUnavailable."""
        routes = spec.window.routes or (spec.route,)
        alone = routes[0] if len(routes) == 1 else None
        question = Question(("groups", "outcomes"), tenant, alone, since=spec.window.since, before=before)
        async for page in archive_pages(self._archive, question):
            reading.num_entries += len(page)
            groups = list(newest_first.among(one.record for one in page))
            await asyncio.to_thread(reading.take, groups, await self._feedback(spec, groups))
            if not reading.has_room:
                return
        reading.is_whole = True

    async def _feedback(self, spec: JobSpec, groups: Sequence[CandidateGroup]) -> dict[str, list[Feedback]]:
        if spec.window.feedback is None:
            return {}
        with translated():
            async with self._redis.pipeline(transaction=False) as pipe:
                for group in groups:
                    pipe.hvals(feedback_key(group.id))
                said = cast("list[list[bytes]]", await pipe.execute())
        pairs = zip(groups, said, strict=True)
        return {group.id: [Feedback.model_validate_json(row) for row in rows] for group, rows in pairs}

    async def _read_file(self, reading: _Reading, file_id: str, tenant: str) -> None:
        record, path = await self._files.path(file_id, tenant)
        if record.policy_template_digest != self._tokenizer.template_digest:
            raise InvalidField("this file was read with another tokenizer: upload it again", param="training_file")
        reading.wanted = reading.wanted._replace(is_scored=record.has_rewards)
        await asyncio.to_thread(self._take_rows, reading, record, path)

    def _take_rows(self, reading: _Reading, record: FileRecord, path: Path) -> None:
        """As `worker.uploads.groups_of` reads them."""
        wanted = reading.wanted
        source = Source.of(record, wanted)
        with path.open("rb") as stream:
            rows = islice(rows_of(stream, record.format), reading.max_groups)
            while reading.has_room and (page := list(islice(rows, PAGE_ROWS))):
                reading.num_entries += len(page)
                reading.take([self._group(row, source) for row in page], {})
            reading.is_whole = next(rows, None) is None

    def _group(self, row: Row, source: Source) -> CandidateGroup:
        return group_of(TrainingRow.model_validate_json(row.document), row.line, source, self._tokenizer)

    async def _expected(self, spec: JobSpec, tenant: str) -> tuple[float | None, int]:
        """Seconds that a job takes of which finished ones of this method tell, and how many of them there are."""
        steps = getattr(spec.method.spec, "steps", None)
        with translated():
            ids = cast("list[bytes]", await self._redis.zrevrange(jobs_index(tenant), 0, LIKE_JOBS - 1))
            async with self._redis.pipeline(transaction=False) as pipe:
                for job_id in ids:
                    pipe.hmget(job_key(job_id.decode()), ["spec", "state", "spent_ms"])
                rows = cast("list[list[bytes | None]]", await pipe.execute())
        paces = [pace for row in rows if (pace := _seconds_per_step(row, spec.method.type)) is not None]
        return (median(paces) * steps, len(paces)) if paces and steps else (None, 0)


class _Reading:
    """What was read so far; of the chosen no tokens are kept but their number."""

    def __init__(self, wanted: Requirements, max_groups: int) -> None:
        self.wanted = wanted
        self.max_groups = min(max_groups, MOST_GROUPS)
        self.num_entries, self.num_groups = 0, 0
        self.is_whole = False
        """The end was met."""
        self._is_cut = max_groups > MOST_GROUPS
        self._ends_at = monotonic() + MOST_SECONDS
        self._feedback: dict[str, list[Feedback]] = {}
        self._choice: Choice | None = None
        self._tokens: dict[str, int] = {}

    @property
    def choice(self) -> Choice:
        if self._choice is None:
            self._choice = Choice(self.wanted, self.max_groups, lambda group_id: self._feedback.get(group_id, []))
        return self._choice

    @property
    def has_room(self) -> bool:
        return not self.choice.is_full and self.num_entries < MOST_ENTRIES and monotonic() < self._ends_at

    def take(self, groups: Sequence[CandidateGroup], feedback: dict[str, list[Feedback]]) -> None:
        self._feedback = feedback
        for group in groups:
            if self.choice.is_full:
                return
            self.num_groups += 1
            if self.choice.offer(group):
                self._tokens[group.id] = sum(len(one.token_ids) for one in group.candidates)
                self.choice.chosen[-1] = _without_tokens(group)

    def report(self, spec: JobSpec, ancestors: Lineage | Unusable) -> DataReport:
        return data_report(
            self.choice,
            self.wanted,
            self._tokens,
            n=spec.n,
            held_out_fraction=spec.held_out_fraction,
            groups_read=self.num_groups,
            # The worker's window ends where it is full as well, unless it is only ours that is.
            is_whole=self.is_whole or (self.choice.is_full and not self._is_cut),
            lineage=ancestors,
        )


def _groups_among(newest_first: NewestFirst, page: Sequence[Entry]) -> list[CandidateGroup]:
    return list(newest_first.groups(fields for _, fields in page))


def _without_tokens(group: CandidateGroup) -> CandidateGroup:
    bare = tuple(one.model_copy(update={"token_ids": (), "logprobs": ()}) for one in group.candidates)
    return group.model_copy(update={"candidates": bare})


def _seconds_per_step(row: Sequence[bytes | None], method: str) -> float | None:
    """Of a job that succeeded, evaluation and all attempts; None for any other, and for one of another version."""
    asked, state, spent_ms = row
    if state != b"succeeded" or not (asked and spent_ms):
        return None
    try:
        spec = JobSpec.model_validate_json(asked)
    except ValidationError:
        return None
    steps = getattr(spec.method.spec, "steps", None)
    if spec.method.type != method or not steps:
        return None
    return float(spent_ms) / 1000 / float(steps)


def report_object(spec: JobSpec, report: DataReport, seconds: float | None, jobs: int) -> dict[str, Any]:
    """The dry run of the API."""
    return {
        "object": "bonsai.dry_run",
        "spec": spec.model_dump(mode="json"),
        "data": report.model_dump(mode="json"),
        "expected_seconds": seconds,
        "expected_from_jobs": jobs,
    }
