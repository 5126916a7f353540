"""An uploaded file as the groups a job learns from, its missing rewards measured.

Owns: finding the file, proving that it is what was checked at its upload, having the reward model score what came
without rewards, and log-probs that it does not tell. Does not own: how rows are read (`bon_algos.row_files`,
`bon_algos.uploaded`), which groups are fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final, cast

import redis

from bon_algos.acceptance import Requirements
from bon_algos.chat import ChatTokenizer
from bon_algos.contracts import CandidateGroup, FileRecord, TrainingRow, files_key
from bon_algos.row_files import rows_of
from bon_algos.scoring import Completion, Score
from bon_algos.steps import SequenceLogprobs
from bon_algos.uploaded import Source, group_of
from worker.dataset import FrozenWindow, PromptPool
from worker.durable import sha256_file
from worker.errors import JobFailed
from worker.mixture import logprobs_of

GROUPS_AT_ONCE: Final = 64
"""Scored in one go."""

Scorer = Callable[[Sequence[Completion]], Sequence[Score]]


def read_record(client: redis.Redis, tenant: str, file_id: str) -> FileRecord:
    """Raises JobFailed."""
    row = cast("bytes | None", client.hget(files_key(tenant), file_id))
    if row is None:
        raise JobFailed("file_not_found", f"there is no file {file_id} any more")
    record = FileRecord.model_validate_json(row)
    if record.status != "processed":
        raise JobFailed("file_unusable", f"{file_id} has {len(record.faults)} faults or more: GET /v1/files/{file_id}")
    return record


def checked_path(artefacts: Path, record: FileRecord) -> Path:
    """Where the file is. Raises JobFailed when it is not the one that was checked."""
    path = artefacts / record.path
    if path.is_symlink() or not path.is_file():
        raise JobFailed("file_not_found", f"the content of {record.id} is not among the artefacts")
    if sha256_file(path) != record.digest:
        raise JobFailed("file_damaged", f"{record.id} does not match its digest {record.digest[:16]}")
    return path


def groups_of(
    path: Path, record: FileRecord, wanted: Requirements, tokenizer: ChatTokenizer, score: Scorer, max_groups: int
) -> Iterator[CandidateGroup]:
    """The groups of the first `max_groups` rows. Raises JobFailed for a file that was read for another policy."""
    if tokenizer.template_digest != record.policy_template_digest:
        raise JobFailed("file_of_another_policy", f"{record.id} was read with another tokenizer: upload it again")
    source = Source.of(record, wanted)
    with path.open("rb") as stream:
        rows = islice(rows_of(stream, record.format), max_groups)
        read = (group_of(TrainingRow.model_validate_json(row.document), row.line, source, tokenizer) for row in rows)
        if record.has_rewards:
            yield from read
            return
        while groups := list(islice(read, GROUPS_AT_ONCE)):
            yield from scored(groups, score)


def scored(groups: Sequence[CandidateGroup], score: Scorer) -> Iterator[CandidateGroup]:
    """The groups with the reward model's rewards; what it has none for stays without."""
    asked = [Completion(group.prompt, group.messages, one.text) for group in groups for one in group.candidates]
    scores = iter(score(asked))
    for group in groups:
        candidates = tuple(one.model_copy(update={"reward": next(scores).reward}) for one in group.candidates)
        yield group.model_copy(update={"candidates": candidates})


def with_reference_logprobs(
    window: FrozenWindow, law: SequenceLogprobs, check: Callable[[], None], *, is_any_law: bool
) -> FrozenWindow:
    """The window, training pools whose log-probs no file tells with those the trainer computes of the reference.

    is_any_law: nor are those of whoever else drew a candidate what is meant."""
    lacking = [pool for pool in window.train if _lacks_logprobs(pool, is_any_law)]
    rows = logprobs_of(law, lacking, check)
    told = {
        id(pool): pool.model_copy(update={"reference_logprobs": tuple(row.tolist())})
        for pool, row in zip(lacking, rows, strict=True)
    }
    return window._replace(train=tuple(told.get(id(pool), pool) for pool in window.train))


def _lacks_logprobs(pool: PromptPool, is_any_law: bool) -> bool:
    return any(not one.token_logprobs or (is_any_law and one.policy is not None) for one in pool.candidates)
