"""The directories of a job's attempts: each writes into one of its own, and none outlives its job.

Owns their names, and what is removed when, policies and reports that never came to be included. Does not own what an
attempt writes (`checkpoint`, `publish`, `rollouts`, `report_files`).

    <artefacts>/jobs/<job>/window/             frozen once, kept
    <artefacts>/jobs/<job>/<epoch>.log         kept
    <artefacts>/jobs/<job>/<epoch>-<8 hex>/    an attempt; the hex, because a Redis that lost its last second in a
                                               power cut gives an epoch twice
"""

from __future__ import annotations

import logging
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, cast

import redis
from pydantic import ValidationError

from bon_algos.contracts import (
    FINAL_JOB_STATES,
    POLICIES_INDEX,
    Manifest,
    PolicyRecord,
    job_key,
    policy_key,
    report_digest,
)
from bon_algos.crash_points import crash_point

log = logging.getLogger(__name__)

ORPHAN_SECONDS: Final = 86_400.0
"""How long a policy's directory may wait for its registration; another job that makes the same weights adopts it. And a
report for its policy's directory."""

DOOMED: Final = ".deleted-"
"""Begins the name of a policy's directory that is being removed, by a worker or by a gateway."""

_NAME: Final = re.compile(r"([0-9]+)-[0-9a-f]{8}")


def begin(job_directory: Path, epoch: int) -> Path:
    """A new attempt's directory."""
    attempt = job_directory / f"{epoch}-{secrets.token_hex(4)}"
    attempt.mkdir(parents=True)
    return attempt


def forget_before(attempt: Path) -> None:
    """Remove what attempts of lower epochs left. Never a later one's: who asks may have been fenced meanwhile."""
    for other in _attempts(attempt.parent):
        if _epoch(other) < _epoch(attempt):
            shutil.rmtree(other, ignore_errors=True)


def forget(job_directory: Path) -> None:
    """Remove all attempts of a job that has ended."""
    for attempt in _attempts(job_directory):
        shutil.rmtree(attempt, ignore_errors=True)
    crash_point("attempts.forgotten")


def sweep(client: redis.Redis, artefacts: Path) -> None:
    """Remove what ended jobs left because their last process was killed, or because others ended them: attempts,
    policies that were written and never registered, and reports of such. What belongs to a job Redis does not know
    stays."""
    for job_directory in (artefacts / "jobs").glob("*"):
        if next(_attempts(job_directory), None) is not None and has_ended(client, job_directory.name):
            forget(job_directory)
    for home in (artefacts / "policies").glob("*"):
        if _is_orphan(client, home):
            log.warning("policy %s was never registered and its job has ended: removed", home.name[:16])
            _doom(home)
    for doomed in (artefacts / "policies").glob(f"{DOOMED}*"):
        shutil.rmtree(doomed, ignore_errors=True)
    _sweep_reports(client, artefacts)


def _doom(home: Path) -> None:
    """Half a policy under its name would be none that a sweep knows, and hold up that of the reports for ever."""
    with suppress(FileNotFoundError):  # another worker sweeps too
        home.rename(home.with_name(f"{DOOMED}{home.name}.{secrets.token_hex(4)}"))
        crash_point("orphan.renamed")


def _sweep_reports(client: redis.Redis, artefacts: Path) -> None:
    """A report is written before its policy, and alone names nobody."""
    waiting = [one for one in (artefacts / "reports").glob("*") if _is_old(one)]
    try:
        named = _named_reports(client, artefacts) if waiting else set()
    except (OSError, ValidationError) as error:
        log.warning("reports are not swept, since a policy does not say which is its own: %s", error)
        return
    for report in waiting:
        if report.name not in named:
            log.warning("report %s is no policy's: removed", report.name[:16])
            shutil.rmtree(report, ignore_errors=True)
            crash_point("report.removed")


def _named_reports(client: redis.Redis, artefacts: Path) -> set[str]:
    """Of all policies, be they registered or only there."""
    homes = (home for home in (artefacts / "policies").glob("*") if not home.name.startswith("."))
    manifests = [Manifest.model_validate_json((home / "manifest.json").read_bytes()) for home in homes]
    for name in cast("list[bytes | str]", client.zrange(POLICIES_INDEX, 0, -1)):
        row = client.hget(policy_key(name if isinstance(name, str) else name.decode()), "record")
        record = None if row is None else PolicyRecord.model_validate_json(row)
        manifests += [] if record is None or record.manifest is None else [record.manifest]
    return {report_digest(one.report_files) for one in manifests}


def _is_old(directory: Path) -> bool:
    with suppress(FileNotFoundError):  # another worker sweeps too
        return time.time() - directory.stat().st_mtime >= ORPHAN_SECONDS
    return False


def _attempts(job_directory: Path) -> Iterator[Path]:
    return (path for path in job_directory.glob("*") if _NAME.fullmatch(path.name))


def _epoch(attempt: Path) -> int:
    return int(attempt.name.partition("-")[0])


def has_ended(client: redis.Redis, job_id: str) -> bool:
    """False also for a job that Redis does not know."""
    state = client.hget(job_key(job_id), "state")
    return state is not None and (state if isinstance(state, str) else state.decode()) in FINAL_JOB_STATES


def _is_orphan(client: redis.Redis, home: Path) -> bool:
    if home.name.startswith("."):  # of an import that was killed while it wrote, or doomed
        return not home.name.startswith(DOOMED) and _is_old(home)
    if client.exists(policy_key(f"pol-{home.name[:16]}")):
        return False
    try:
        if not _is_old(home):
            return False
        manifest = Manifest.model_validate_json((home / "manifest.json").read_text())
    except (OSError, ValidationError):
        return False
    # What was imported belongs to whoever did that.
    is_over = manifest.job_id is not None and has_ended(client, manifest.job_id)
    return is_over and not _was_published(client, home)


def _was_published(client: redis.Redis, home: Path) -> bool:
    """Whether any job succeeded with it: then the registry had it, and lacks it because Redis was lost and the files
    could not be read when it was rebuilt. Its manifest may name another job, whose directory this one adopted."""
    jobs = (home.parents[1] / "jobs").glob("job_*")
    policy_ids = (client.hget(job_key(one.name), "policy_id") for one in jobs)
    return any(one in (f"pol-{home.name[:16]}", f"pol-{home.name[:16]}".encode()) for one in policy_ids)
