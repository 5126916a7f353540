"""Uploaded files: their content among the artefacts, what is known of them in Redis.

Owns: receiving, keeping, listing and deleting them, a tenant's number of them. Does not own: the form they come in
(file_form.py), whether their rows are good (file_check.py), what a job does with one (worker/uploads.py).

A file is stored under the digest of its content, and its id is made of that: the same content again is the same file.
The record is written after the content is safe and deleted before it: a record's content is there. What a gateway that
was killed in between leaves, lost_uploads.py removes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from tempfile import NamedTemporaryFile
from time import time
from typing import Any, Final, cast

from redis.asyncio import Redis
from starlette.requests import Request

from bon_algos.chat import ChatTokenizer
from bon_algos.contracts import FINAL_JOB_STATES, FileRecord, files_key, job_key, jobs_index
from bon_algos.crash_points import crash_point
from service.errors import Conflict, FileNotFound
from service.file_check import Findings, check_apart
from service.file_form import FileForm, Received, receive
from service.store import translated

PURPOSE: Final = "fine-tune"
MAX_FILES: Final = 1000
"""Of a tenant."""

# KEYS: files of the tenant. ARGV: file id, record, the most files. Returns the record that is kept, the earlier one of
# the same content if there is one; "" when there are too many.
_KEEP: Final = """
local earlier = redis.call('HGET', KEYS[1], ARGV[1])
if earlier then return earlier end
if redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[3]) then return '' end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return ARGV[2]
"""

# KEYS: files and jobs of the tenant. ARGV: file id, the prefix of a job's key, then the final states. Returns the
# record that is deleted, "" when there is none, or the id of a job that has not ended and learns from it. Not of the
# open jobs alone: a paused one is none of them.
_DELETE: Final = """
local record = redis.call('HGET', KEYS[1], ARGV[1])
if not record then return '' end
local is_final = {}
for i = 3, #ARGV do is_final[ARGV[i]] = true end
for _, job in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  local state = redis.call('HGET', ARGV[2] .. job, 'state')
  if state and not is_final[state] then
    local spec = redis.call('HGET', ARGV[2] .. job, 'spec')
    if spec and cjson.decode(spec).training_file == ARGV[1] then return job end
  end
end
redis.call('HDEL', KEYS[1], ARGV[1])
return record
"""


class Files:
    """The files of one Redis and one directory of artefacts."""

    def __init__(
        self,
        redis: Redis,
        *,
        artefacts: Path,
        max_bytes: int,
        tokenizer: ChatTokenizer,
        policy_directory: Path,
        window: int,
    ) -> None:
        """window: of the policy engine, tokens."""
        self._redis, self._artefacts, self._max_bytes = redis, artefacts, max_bytes
        self._tokenizer, self._policy_directory, self._window = tokenizer, policy_directory, window
        self._keep = redis.register_script(_KEEP)
        self._delete = redis.register_script(_DELETE)

    async def upload(self, request: Request, form: type[FileForm], tenant: str) -> FileRecord:
        """The file of a form, received, checked and kept, with or without faults. Raises InvalidField for a form or a
        format of another kind, Conflict (too_many_files), and what `receive` raises."""
        directory = self._artefacts / "files" / tenant
        directory.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=directory, prefix="arriving-", delete=False) as target:
            try:
                received = await receive(request, target, form, self._max_bytes)
                target.flush()
                findings = await check_apart(Path(target.name), self._tokenizer, self._window, self._policy_directory)
                record = self._record(received, findings, tenant)
                await asyncio.to_thread(_settle, target.fileno(), target.name, self._artefacts / record.path)
                crash_point("file.settled")
            finally:
                Path(target.name).unlink(missing_ok=True)
        return await self.keep(record)

    async def keep(self, record: FileRecord) -> FileRecord:
        """Record a file whose content is at its home, or find the earlier one of the same content. Raises Conflict
        (too_many_files)."""
        own = self._artefacts / record.path
        with translated():
            kept = cast(
                str,
                await self._keep(
                    keys=[files_key(record.tenant)], args=[record.id, record.model_dump_json(), MAX_FILES]
                ),
            )
        crash_point("file.recorded")
        if not kept:
            own.unlink()
            raise Conflict(f"there are {MAX_FILES} files already: delete some first", code="too_many_files")
        found = FileRecord.model_validate_json(kept)
        if found.stored_as != record.stored_as:
            own.unlink()
        return found

    def _record(self, received: Received, findings: Findings, tenant: str) -> FileRecord:
        return FileRecord(
            id=f"file-{received.digest[:32]}",
            tenant=tenant,
            filename=received.filename,
            bytes=received.num_bytes,
            created_at=time(),
            digest=received.digest,
            stored_as=f"{received.digest}-{token_hex(4)}",
            format=findings.format,
            status="error" if findings.faults else "processed",
            rows=findings.rows,
            faults=findings.faults,
            has_rewards=findings.has_rewards,
            longest_completion=findings.longest_completion,
            window=self._window,
            policy_template_digest=self._tokenizer.template_digest,
        )

    async def get(self, file_id: str, tenant: str) -> FileRecord:
        """Raises FileNotFound."""
        with translated():
            row = cast("str | None", await self._redis.hget(files_key(tenant), file_id))
        if row is None:
            raise FileNotFound("no such file")
        return FileRecord.model_validate_json(row)

    async def all(self, tenant: str) -> Sequence[FileRecord]:
        """Newest first."""
        with translated():
            rows = cast("list[str]", await self._redis.hvals(files_key(tenant)))
        found = [FileRecord.model_validate_json(row) for row in rows]
        return sorted(found, key=lambda record: (record.created_at, record.id), reverse=True)

    async def path(self, file_id: str, tenant: str) -> tuple[FileRecord, Path]:
        """Where the content of a file is. Raises FileNotFound."""
        record = await self.get(file_id, tenant)
        path = self._artefacts / record.path
        if path.is_symlink() or not path.is_file():
            raise FileNotFound("the content of this file is gone", code="file_content_gone")
        return record, path

    async def delete(self, file_id: str, tenant: str) -> None:
        """Raises FileNotFound, and Conflict (file_in_use) while a job that has not ended learns from it."""
        with translated():
            said = cast(
                str,
                await self._delete(
                    keys=[files_key(tenant), jobs_index(tenant)], args=[file_id, job_key(""), *FINAL_JOB_STATES]
                ),
            )
        if not said:
            raise FileNotFound("no such file")
        if not said.startswith("{"):
            raise Conflict(f"{said} learns from this file: cancel it first, or wait for its end", code="file_in_use")
        crash_point("file.forgotten")
        with suppress(FileNotFoundError):
            (self._artefacts / FileRecord.model_validate_json(said).path).unlink()


def _settle(descriptor: int, arriving: str, home: Path) -> None:
    """At its home once it is on disk, readable for the worker's user in the gateway's group."""
    os.fchmod(descriptor, 0o640)
    os.fsync(descriptor)
    os.replace(arriving, home)
    directory = os.open(home.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def file_object(record: FileRecord) -> dict[str, Any]:
    """The file of OpenAI's API, and what was found in it."""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": int(record.created_at),
        "filename": record.filename,
        "purpose": PURPOSE,
        "status": record.status,
        "status_details": "; ".join(_words(fault.line, fault.message) for fault in record.faults) or None,
        "bonsai": {
            "format": record.format,
            "rows": record.rows,
            "has_rewards": record.has_rewards,
            "faults": [fault.model_dump() for fault in record.faults],
            "sha256": record.digest,
        },
    }


def _words(line: int | None, message: str) -> str:
    return f"the file {message}" if line is None else f"line {line}: {message}"
