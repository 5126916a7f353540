"""What Redis knows of a job, beside the job's files: from it `bonsai rebuild` takes up a job whose Redis was lost.

Owns the file. Does not own the fields, which are Redis' own, whatever they are.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Final, cast

import redis

from bon_algos.contracts import SCHEMA_VERSION, job_key
from worker.durable import full_disk_told, sync
from worker.errors import DiskFull

JOB_FILE: Final = "job.json"
log = logging.getLogger(__name__)


def keep(client: redis.Redis, artefacts: Path, job_id: str) -> None:
    """Write the job as it is now. Without Redis, without room, or where Redis has lost it, the file stays as it was."""
    try:
        fields = cast("dict[bytes, bytes]", client.hgetall(job_key(job_id)))
    except redis.RedisError as error:
        log.warning("the record of %s was not kept: %s", job_id, type(error).__name__)
        return
    if not fields:
        return
    told = {name.decode(): value.decode() for name, value in fields.items()}
    record = json.dumps({"schema_version": SCHEMA_VERSION, "job_id": job_id, "fields": told}, indent=1)
    try:
        with full_disk_told():
            _write(artefacts / "jobs" / job_id, record)
    except DiskFull as full:
        log.warning("the record of %s was not kept: %s", job_id, full)


def _write(directory: Path, record: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    aside = directory / f".{JOB_FILE}.{os.getpid()}"
    try:
        aside.write_text(record)
        sync(aside)
        aside.replace(directory / JOB_FILE)
    finally:
        aside.unlink(missing_ok=True)
    sync(directory)
