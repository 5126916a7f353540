"""What Redis knows of a job, beside the journal: from it `bonsai rebuild` takes up jobs that no worker had begun, and
knows of those that others than their worker have ended.

Owns: the files `registry/jobs/<job>.json`, when they are written. Does not own: the worker's own record of a job that
it has (`worker/job_record.py`), restoring (`bonsai rebuild`).

Whatever happens to a job puts its name among the unrecorded ones, in the same script (`JOB_LUA`), and it is taken out
once its file says so: what could not be written is written later, by whichever gateway comes by.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final, cast

from pydantic import Field, ValidationError
from redis.asyncio import Redis

from archive.storage import put_durably
from bon_algos.contracts import FINAL_JOB_STATES, SCHEMA_VERSION, UNRECORDED_JOBS, Record, job_key
from bon_algos.crash_points import crash_point
from service.durable_files import sole_writer
from service.errors import StoreFull, StoreUnavailable
from service.store import translated

DIRECTORY: Final = Path("registry") / "jobs"
"""Below the artefact directory."""
POLL_SECONDS: Final = 1.0
PROMPT_SECONDS: Final = 2.0
"""So long at most a reply waits for the record of what it says."""
log = logging.getLogger("bonsai.jobs")

# KEYS: job, the unrecorded ones. ARGV: job id, then state, epoch and wish to cancel of what was recorded. What is
# another by now is recorded with the next look.
_RECORDED: Final = """
local now = redis.call('HMGET', KEYS[1], 'state', 'epoch', 'cancel')
for i = 1, 3 do
  if (now[i] or '') ~= ARGV[i + 1] then return end
end
redis.call('SREM', KEYS[2], ARGV[1])
"""


class JobFile(Record):
    """A job as it was: this process' record, and the worker's, `jobs/<id>/job.json`."""

    schema_version: int = SCHEMA_VERSION
    job_id: str = Field(pattern=r"^job_[0-9a-z]{1,64}$")
    fields: dict[str, str]

    @property
    def rank(self) -> tuple[bool, int]:
        """Of two records of a job the higher one is newer: what has ended stays so, and each attempt has its epoch."""
        return self.fields.get("state") in FINAL_JOB_STATES, int(self.fields.get("epoch") or 0)


class JobRecords:
    """Keeps the records of one Redis' jobs in one artefact directory."""

    def __init__(self, redis: Redis, artefacts: Path) -> None:
        self._redis = redis
        self._directory = artefacts / DIRECTORY
        self._recorded = redis.register_script(_RECORDED)

    async def run(self) -> None:
        """Write what is unrecorded until cancelled."""
        complaint = ""
        while True:
            try:
                await self.write()
                complaint = ""
            except (OSError, StoreUnavailable, StoreFull) as error:
                if str(error) != complaint:
                    log.error("jobs are not recorded beside the artefacts: %s", error)
                complaint = str(error)
            await asyncio.sleep(POLL_SECONDS)

    async def write(self) -> None:
        """Raises StoreUnavailable, StoreFull, and OSError for the last one that could not be written, after the
        others."""
        hindrance: OSError | None = None
        with translated():
            for job_id in sorted(cast("set[str]", await self._redis.smembers(UNRECORDED_JOBS))):
                try:
                    await self._write(job_id)
                except OSError as error:
                    hindrance = error
        if hindrance is not None:
            raise hindrance

    async def write_promptly(self, job_id: str) -> None:
        """Before a reply tells of it. A failure is logged, and made good by `run`: the job is in Redis already."""
        try:
            async with asyncio.timeout(PROMPT_SECONDS):
                with translated():
                    await self._write(job_id)
        except (OSError, StoreUnavailable, StoreFull) as error:
            log.warning("job %s is not recorded beside the artefacts yet: %s", job_id, error)

    async def _write(self, job_id: str) -> None:
        fields = cast("dict[str, str]", await self._redis.hgetall(job_key(job_id)))
        crash_point("record.asked")
        if fields:
            await asyncio.to_thread(_keep, self._directory, JobFile(job_id=job_id, fields=fields))
        told = (fields.get(name, "") for name in ("state", "epoch", "cancel"))
        await self._recorded(keys=[job_key(job_id), UNRECORDED_JOBS], args=[job_id, *told])
        crash_point("record.told")


def _keep(directory: Path, record: JobFile) -> None:
    """Whole or not at all, also after a power cut; and never over a newer one, which another gateway may have written
    while this one stood still."""
    file = directory / f"{record.job_id}.json"
    with sole_writer(directory):
        former = _read(file)
        if former is None or (former.rank <= record.rank and former != record):
            put_durably(file, record.model_dump_json(indent=1).encode())
            crash_point("record.renamed")


def _read(file: Path) -> JobFile | None:
    try:
        return JobFile.model_validate_json(file.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
