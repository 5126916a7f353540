"""What Celery runs: claim the job, train it in a process of its own, give it back if that process died.

Owns the process. Does not own the training (`job_process`) and loads none of its libraries: an idle worker is
small, and a device is never touched before a process of its own holds the job.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import redis

from worker import attempts, lease
from worker.connection import open_redis
from worker.errors import JobCancelled, JobParked, LeaseLost
from worker.lease import Claim, Lease

log = logging.getLogger(__name__)

LOG_TAIL_BYTES = 1800
"""Fits, with the exit code, into what a released lease keeps."""


def distill(
    job_id: str,
    *,
    redis_url: str,
    artefacts: Path,
    lease_seconds: float,
    processes: int,
    run: Callable[[str, Claim, Path], int] | None = None,
) -> None:
    """Drive one job to its end, or do nothing when it is not this worker's to drive. Safe to run twice.

    run: trains (job, claim, log) in a process and returns its exit code; `run_job_process` unless told.
    """
    # The second is not connected before the job has ended: over a link that was idle for so long nothing may pass.
    with _connected(redis_url, lease_seconds) as first, _connected(redis_url, lease_seconds) as client:
        worker = f"{socket.gethostname()}:{os.getpid()}"
        own = lease.claim(first, job_id, lease_seconds=lease_seconds, worker=worker, processes=processes)
        if isinstance(own, str):
            log.info("job %s is not to be run: %s", job_id, own)
        else:
            log_file = artefacts / "jobs" / job_id / f"{own.epoch}.log"
            try:
                reason = _drive(run or run_job_process, job_id, own, log_file)
            except JobParked:
                _hand_over(Lease(client, job_id, own, lease_seconds=lease_seconds, heartbeat_seconds=lease_seconds))
            else:
                _give_back(client, job_id, own, reason)
        attempts.sweep(client, artefacts)


def _connected(redis_url: str, lease_seconds: float) -> redis.Redis:
    """All that is asked here may be carried out twice."""
    return open_redis(redis_url, lease_seconds, tries_again=True)


def _hand_over(own: Lease) -> None:
    """Nothing was begun, and nothing has failed."""
    with suppress(LeaseLost, JobCancelled):  # cancelled by the very script that meant to park it
        own.park()


def _give_back(client: redis.Redis, job_id: str, own: Claim, reason: str | None) -> None:
    if reason is not None:
        log.error("job %s, epoch %d: %s", job_id, own.epoch, reason)
        lease.release(client, job_id, own, reason)


def _drive(run: Callable[[str, Claim, Path], int], job_id: str, own: Claim, log_file: Path) -> str | None:
    """Why the job is to be given back, if it is."""
    try:
        exit_code = run(job_id, own, log_file)
    except OSError as error:
        return f"no training process could be started: {error}"
    return None if exit_code == 0 else f"training process ended with {exit_code}\n{tail(log_file)}"


def run_job_process(job_id: str, own: Claim, log_file: Path) -> int:
    """Train in a session of its own that never outlives this process; its exit code. Raises JobParked where this
    process was asked to stop, and the other one before it could hear of it and give the job back itself."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "worker.job_process", job_id, own.token, str(os.getpid())]
    asked: list[int] = []
    # A worker that is to stop says so to its child (`shutdown`), and the child to who trains.
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    try:
        with log_file.open("ab") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        exit_code = _waited_for(process, asked)
    finally:
        signal.signal(signal.SIGTERM, before)
    if asked and exit_code == -signal.SIGTERM:
        raise JobParked(job_id)
    return exit_code


def _waited_for(process: subprocess.Popen[bytes], asked: list[int]) -> int:
    """asked: the signals that came before it could be told of them; those that come now are added."""

    def pass_on(number: int) -> None:
        asked.append(number)
        process.terminate()

    signal.signal(signal.SIGTERM, lambda number, _: pass_on(number))
    try:
        if asked:
            process.terminate()
        return process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def tail(log_file: Path) -> str:
    with log_file.open("rb") as lines:
        lines.seek(max(0, log_file.stat().st_size - LOG_TAIL_BYTES))
        return lines.read().decode(errors="replace")
