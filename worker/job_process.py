"""The process that trains one job: `python -m worker.job_process JOB CLAIM PARENT`.

Owns how the process lives and ends: it dies with its parent, keeps the lease, and turns every reason to stop
into the job's state. Does not own the training (`distillation`), whose libraries it loads only once the
heartbeat runs.

Exit 0: the job's state is settled, or is somebody else's to settle. Anything else: the parent gives it back.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

import redis
from pydantic import ValidationError

from bon_algos.chat import ChatTokenizer
from bon_algos.contracts import DEFAULT_TENANT, JobSpec, RewardConfig, job_key
from bon_algos.scoring import open_readers
from worker import lease as leases
from worker.connection import open_redis
from worker.durable import full_disk_told
from worker.errors import DiskFull, EngineUnavailable, JobCancelled, JobFailed, JobParked, LeaseLost
from worker.job_record import keep
from worker.lease import Claim, Lease
from worker.lifeline import die_with
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from worker.engine import Engines
    from worker.workplace import Workplace

log = logging.getLogger(__name__)


def main(job_id: str, own: Claim, parent: int) -> int:
    die_with(parent)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = WorkerSettings()
    # Read by libraries when they are loaded, which happens below.
    os.environ |= {"OMP_NUM_THREADS": str(settings.torch_threads), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    client = open_redis(settings.redis_url, settings.lease_seconds, tries_again=True)
    held_by = open_redis(settings.redis_url, settings.lease_seconds)
    lease = Lease(
        held_by,
        job_id,
        own,
        lease_seconds=settings.lease_seconds,
        heartbeat_seconds=settings.heartbeat_seconds,
    )
    signal.signal(signal.SIGTERM, lambda *_: lease.leave())
    with client, held_by, lease:
        settle(client, lease, settings)
    return 0


def settle(client: redis.Redis, lease: Lease, settings: WorkerSettings) -> None:
    """Run the job and write down how it ended. What is no reason of ours to stop goes on to the parent."""
    keep(client, settings.artefacts, lease.job_id)
    try:
        with full_disk_told():
            run(client, lease, settings)
    except JobFailed as failure:
        log.error("job failed: %s", failure)
        lease.finish_failed(failure.code, failure.message)
    except JobCancelled:
        with suppress(LeaseLost):  # the very script that meant to finish it may have cancelled it
            lease.finish_cancelled()
    except JobParked:
        with suppress(LeaseLost, JobCancelled):  # cancelled by the very script that meant to park it
            lease.park()
    except LeaseLost as loss:
        log.warning("stopped, nothing more is written: %s", loss)
    except (DiskFull, EngineUnavailable) as hindrance:
        leases.release(client, lease.job_id, lease.claim, str(hindrance))
    keep(client, settings.artefacts, lease.job_id)


def run(client: redis.Redis, lease: Lease, settings: WorkerSettings) -> None:
    from worker.device import locks_of, sole_use
    from worker.distillation import Distillation
    from worker.engine import Engines

    asked, tenant = cast("list[bytes | None]", client.hmget(job_key(lease.job_id), ["spec", "tenant"]))
    spec = read_spec(asked or b"")
    owner = DEFAULT_TENANT if tenant is None else tenant.decode()

    def engines_with(reward_model: RewardConfig) -> Engines:
        readers = open_readers(reward_model, lambda member: read_tokenizer(member.directory))
        return Engines(settings.policy_engine_urls[0], reward_model, readers, lease.check)

    with ExitStack() as opened:
        engines = opened.enter_context(engines_with(settings.reward_model))
        second = settings.judge_reward_model
        judge = None if second is None else opened.enter_context(engines_with(second))
        place = workplace(client, engines, judge, settings)
        for lock in locks_of(place.artefacts, place.device, place.processes):
            opened.enter_context(sole_use(lock, lease.wait))
        Distillation(spec, lease, place, owner).run()


def read_spec(asked: bytes) -> JobSpec:
    """Raises JobFailed for a spec of another version: a field that this worker does not know may change what is wanted,
    so it is not passed over."""
    try:
        return JobSpec.model_validate_json(asked)
    except ValidationError as error:
        where = ", ".join(".".join(map(str, one["loc"])) or "the whole" for one in error.errors())
        message = f"this worker does not understand {where} of the job's spec: run the version the gateway has"
        raise JobFailed("spec_not_understood", message) from error


def workplace(client: redis.Redis, engines: Engines, judge: Engines | None, settings: WorkerSettings) -> Workplace:
    import torch

    from archive.reading import Archive
    from archive.storage import archive_url
    from worker.workplace import Workplace

    return Workplace(
        client=client,
        engines=engines,
        judge=judge,
        artefacts=settings.artefacts,
        policy_directory=settings.policy_directory,
        base_policy_id=settings.base_policy_id,
        device=torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu")),
        torch_threads=settings.torch_threads,
        checkpoint_steps=settings.checkpoint_steps,
        checkpoint_seconds=settings.checkpoint_seconds,
        engine_patience_seconds=settings.engine_patience_seconds,
        archive=Archive.at(archive_url(settings.archive, settings.artefacts)),
        processes=settings.train_processes,
        parallelism=settings.train_parallelism,
    )


def read_tokenizer(directory: Path) -> ChatTokenizer:
    template = directory / "chat_template.jinja"
    return ChatTokenizer(
        (directory / "tokenizer.json").read_text(),
        json.loads((directory / "tokenizer_config.json").read_text()),
        template.read_text() if template.exists() else None,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Claim.of(sys.argv[2]), int(sys.argv[3])))
