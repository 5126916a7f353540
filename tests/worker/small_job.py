"""A job small enough to be killed dozens of times, and what must be true of it in the end, whatever happened.

Owns: its ledger, its spec, its deliveries, the claims about its end. Does not own: who does what to it.
"""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import cast

import redis

from bon_algos.contracts import (
    ADAPTER_FILES,
    FINAL_JOB_STATES,
    OPEN_JOBS,
    POLICIES_INDEX,
    CandidateGroup,
    JobSpec,
    Manifest,
    Method,
    PolicyRecord,
    adapter_digest,
    job_events_key,
    job_key,
    policy_key,
)
from bon_algos.crash_points import FREEZE_AT
from tests.worker import world
from tests.worker.forks import deliver, is_frozen, training_of, until
from worker.attempts import sweep
from worker.durable import sha256_file
from worker.job_process import read_tokenizer

STEPS = 4
LEASE_SECONDS = 5.0
"""Long enough that a busy machine does not lose it by itself."""
SPEC = JobSpec(
    method=Method(
        type="bon_forward_kl",
        bon_forward_kl={"steps": STEPS, "prompts_per_step": 2, "n": 16, "lora_rank": 8, "learning_rate": 1e-2},
    ),
    n=16,
    held_out_fraction=0.45,
    seed=4,
)


def small_groups(policy_directory: Path) -> list[CandidateGroup]:
    """Eight prompts with sixteen candidates each: as few as a fingerprint of half of them needs."""
    groups: list[CandidateGroup] = world.sampled_groups(world.save_tiny_policy(policy_directory), num_prompts=8, n=16)
    return groups


@dataclass(frozen=True)
class SmallJob:
    """One job of one Redis and one artefact directory."""

    client: redis.Redis
    redis_url: str
    artefacts: Path
    engine_url: str
    policy_directory: Path
    reward_directory: Path
    job_id: str = "job_1"
    spec: JobSpec = SPEC
    settings: Mapping[str, object] = field(default_factory=dict)
    """Besides, or instead of, the usual ones."""

    def submit(self, groups: Sequence[CandidateGroup]) -> None:
        """The ledger and the job's record, as the gateway leaves them."""
        digest = read_tokenizer(self.reward_directory).template_digest
        world.deliver(self.client, *(one.model_copy(update={"reward_template_digest": digest}) for one in groups))
        spec = self.spec.model_dump_json()
        self.client.hset(
            job_key(self.job_id),
            mapping={
                "state": "queued",
                "epoch": 0,
                "attempts": 0,
                "spec": spec,
                "tenant": "default",
                "created_at": 1e3,
            },
        )
        self.client.sadd(OPEN_JOBS, self.job_id)

    @cached_property
    def environment(self) -> dict[str, str]:
        reward_model = world.reward_model(self.engine_url, self.reward_directory)
        settings = {
            "REDIS_URL": self.redis_url,
            "ARTEFACTS": self.artefacts,
            "LEASE_SECONDS": LEASE_SECONDS,
            "HEARTBEAT_SECONDS": 0.5,
            "POLICY_ENGINE_URLS": json.dumps([self.engine_url]),
            "REWARD_MODEL": reward_model.model_dump_json(),
            "POLICY_DIRECTORY": self.policy_directory,
            "BASE_POLICY_ID": world.BASE,
            "MAX_MODEL_LEN": 64,
            "CHECKPOINT_STEPS": 1,
            "TORCH_THREADS": 1,
            "DEVICE": "cpu",
            **self.settings,
        }
        return {f"BONSAI_{name}": str(value) for name, value in settings.items()} | {"OMP_NUM_THREADS": "1"}

    def deliver(self, largest_file: int = resource.RLIM_INFINITY, **environment: str):
        """A message for the job reaches a worker; the process that handles it."""
        log = self.artefacts / "deliveries.log"
        return deliver(self.job_id, self.environment | environment, log, largest_file)

    def frozen_at(self, point: str, **environment: str):
        """A delivery whose training has stopped at this place, and the training's process."""
        delivery = self.deliver(resource.RLIM_INFINITY, **{FREEZE_AT: point}, **environment)
        training = until(lambda: training_of(delivery), "a training process")
        until(lambda: is_frozen(training) or not delivery.is_alive(), f"frozen at {point}")
        assert is_frozen(training), f"{point} was never passed\n{self.told()}"
        return delivery, training

    def run(self, largest_file: int = resource.RLIM_INFINITY, **environment: str) -> int:
        """Deliver and wait; the exit code of whoever handled the message."""
        delivery = self.deliver(largest_file, **environment)
        delivery.join(60)
        code: int | None = delivery.exitcode
        assert code is not None, "the delivery hangs"
        return code

    def run_to_its_end(self, deliveries: int = 3) -> None:
        """Deliver as the reconciler does, whenever the job is open and nobody holds it."""
        for _ in range(deliveries):
            if self.state not in FINAL_JOB_STATES:
                until(lambda: not self.is_held, "the lease runs out")
                self.run()
        assert self.state in FINAL_JOB_STATES, self.told()

    def value(self, name: str) -> str | None:
        found = self.client.hget(job_key(self.job_id), name)
        return found.decode() if isinstance(found, bytes) else found

    @property
    def state(self) -> str | None:
        return self.value("state")

    @property
    def step(self) -> int:
        return int(self.value("step") or 0)

    @property
    def attempts(self) -> int:
        """Those that did not end in the job being given back with its state."""
        return int(self.value("attempts") or 0) - int(self.value("parked") or 0)

    @property
    def is_held(self) -> bool:
        seconds, microseconds = self.client.time()
        return int(self.value("lease_until") or 0) > seconds * 1000 + microseconds // 1000

    @property
    def directory(self) -> Path:
        return self.artefacts / "jobs" / self.job_id

    def told(self) -> str:
        """What a failed assertion should show."""
        logs = sorted(self.directory.glob("*.log")) + sorted(self.artefacts.glob("*.log"))
        return f"{self.state}\n" + "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in logs)

    def published(self) -> list[str]:
        """Every name in the directory of policies."""
        home = self.artefacts / "policies"
        return sorted(os.listdir(home)) if home.exists() else []

    def the_policy(self) -> PolicyRecord:
        """The one policy that the job made, after a look at everything that could be wrong with it."""
        assert self.state == "succeeded", self.told()
        registered = [_text(name) for name in cast("list[bytes]", self.client.zrange(POLICIES_INDEX, 0, -1))]
        assert registered == [self.value("policy_id")]
        record = PolicyRecord.model_validate_json(self.client.hget(policy_key(registered[0]), "record") or "")
        assert self.published() == [Path(record.directory or "").name]
        home = self.artefacts / (record.directory or "")
        assert sorted(os.listdir(home)) == sorted([*ADAPTER_FILES, "manifest.json"])
        files = {name: sha256_file(home / name) for name in ADAPTER_FILES}
        manifest = Manifest.model_validate_json((home / "manifest.json").read_text())
        assert manifest == record.manifest
        assert (manifest.files, manifest.digest, home.name) == (files, adapter_digest(files), adapter_digest(files))
        return record

    def ends(self) -> list[str]:
        """The final states that the job's events tell of."""
        told = [{_text(k): _text(v) for k, v in entry.items()} for _, entry in self._events()]
        return [entry["state"] for entry in told if entry.get("state") in FINAL_JOB_STATES]

    def reports(self) -> int:
        """How often the newest attempt has told where it is."""
        newest_first = (entry for _, entry in reversed(self._events()))
        own = takewhile(lambda entry: b"attempt" not in entry, newest_first)
        return sum(b"step" in entry for entry in own)

    def leftovers(self) -> list[str]:
        """What lies in the job's directory beside its window, its record and its logs, once the next worker came by."""
        sweep(self.client, self.artefacts)
        kept = ("window", "job.json")
        return [name for name in os.listdir(self.directory) if name not in kept and not name.endswith(".log")]

    def _events(self):
        return self.client.xrange(job_events_key(self.job_id))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
