"""Deliveries of a job's message in processes of their own, without the seconds that loading torch takes each time.

Owns: one server that has the training libraries loaded and nothing else, off which a delivery is forked; the delivery
forks the process that trains. They are as real as a worker's child and its training process: they have a process id,
die of SIGKILL, and the second dies with the first. Does not own: Celery (tests/worker/test_celery_worker.py has it).
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.fixtures.waiting import Seen, wait_until
from worker import tasks
from worker.lease import Claim
from worker.settings import BrokerSettings

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["tests.worker.forks", "worker.distillation", "worker.engine", "worker.job_process", "worker.tasks"]
)


def deliver(
    job_id: str, environment: Mapping[str, str], log: Path, largest_file: int = resource.RLIM_INFINITY
) -> BaseProcess:
    """What a Celery child does with a message for the job; started. largest_file: bytes; what is longer cannot be
    written, as on a disk that is full."""
    process = SERVER.Process(target=_deliver, args=(job_id, dict(environment), log, largest_file))
    process.start()
    return process


def train(job_id: str, own: Claim, environment: Mapping[str, str], log: Path) -> BaseProcess:
    """What `python -m worker.job_process` does for a job that is claimed; started."""
    process = SERVER.Process(target=_train_alone, args=(job_id, own, dict(environment), log))
    process.start()
    return process


def training_of(delivery: BaseProcess) -> int | None:
    """The process that trains below a delivery, if there is one."""
    try:
        children = Path(f"/proc/{delivery.pid}/task/{delivery.pid}/children").read_text().split()
    except OSError:
        return None
    return int(children[0]) if children else None


def is_alive(pid: int | None) -> bool:
    """Running or waiting; a zombie that nobody has buried yet is dead."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def is_frozen(pid: int | None) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def until(condition: Callable[[], Seen], what: str, seconds: float = 60.0) -> Seen:
    """As `wait_until`, with the patience that a worker's start needs."""
    return wait_until(condition, what, seconds=seconds)


def _deliver(job_id: str, environment: dict[str, str], log: Path, largest_file: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    os.environ.update(environment)
    _write_into(log)
    settings = BrokerSettings()
    tasks.distill(
        job_id,
        redis_url=settings.redis_url,
        artefacts=settings.artefacts,
        lease_seconds=settings.lease_seconds,
        processes=settings.train_processes,
        run=_train,
    )


def _train(job_id: str, own: Claim, log_file: Path) -> int:
    """`tasks.run_job_process`, forked instead of started."""
    from worker import job_process

    log_file.parent.mkdir(parents=True, exist_ok=True)
    parent, pid = os.getpid(), os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        os.setsid()
        _write_into(log_file)
        code = job_process.main(job_id, own, parent)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _train_alone(job_id: str, own: Claim, environment: dict[str, str], log: Path) -> None:
    from worker import job_process

    os.setsid()
    os.environ.update(environment)
    _write_into(log)
    sys.exit(job_process.main(job_id, own, os.getppid()))


def _write_into(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
