"""Workers, their broker and their jobs, and what can befall them.

Owns: starting and ending them, each fault, and seeing what became of the jobs. Does not own when which fault comes, nor
what is claimed (`benchmarks.chaos`). The parts are those of the fault tests.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import cast

import redis

from bon_algos.contracts import (
    FINAL_JOB_STATES,
    OPEN_JOBS,
    POLICIES_INDEX,
    CandidateGroup,
    Method,
    job_key,
)
from service.dispatch import open_producer, send_job
from tests.fixtures.fault_proxy import FaultProxy
from tests.fixtures.redis import RedisServer
from tests.worker import small_job
from tests.worker.celery_worker import CeleryWorker, reconciling
from tests.worker.forks import until
from tests.worker.small_job import SPEC, SmallJob
from tests.worker.stub_engine import StubEngine, save_tokenizer

STEPS = 60
DEATHS_BORNE = 2
UNWANTED = "job_unwanted"
PATIENCE_SECONDS = 300.0
METHOD = {"steps": STEPS, "prompts_per_step": 2, "n": 16, "lora_rank": 8, "learning_rate": 1e-2}


class ChaosWorld:
    def __init__(
        self,
        seed: int,
        first: SmallJob,
        groups: Sequence[CandidateGroup],
        server: RedisServer,
        proxy: FaultProxy,
        num_workers: int,
    ) -> None:
        """first: the job that is left in peace."""
        self.faults: list[str] = []
        self.recoveries: list[float] = []
        self._random = random.Random(seed)
        self._first, self._groups = first, groups
        self._server, self._proxy = server, proxy
        self._jobs: list[SmallJob] = []
        self._frozen: dict[int, float] = {}
        self._killed: dict[str, tuple[int, float]] = {}
        self._right = ""
        self._num_started = 0
        self.workers = [self._start() for _ in range(num_workers)]

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()

    # --- jobs ------------------------------------------------------------------------------------------

    def learn_the_right_policy(self) -> None:
        self._first.submit(self._groups)
        until(lambda: self._first.state == "succeeded", "the undisturbed job ends", seconds=PATIENCE_SECONDS)
        self._right = self._first.the_policy().id

    def submit(self, num_jobs: int) -> None:
        first = self._first
        for number in range(num_jobs):
            where = (first.artefacts, first.engine_url, first.policy_directory, first.reward_directory)
            self._jobs.append(SmallJob(first.client, first.redis_url, *where, job_id=f"job_{number}", spec=first.spec))
            self._jobs[-1].submit([])

    def open_jobs(self) -> list[SmallJob]:
        return [job for job in self._jobs if job.state not in FINAL_JOB_STATES]

    def right_jobs(self) -> int:
        """Those that ended once, with the policy of the undisturbed one, and left nothing behind."""
        return sum(
            (job.ends(), job.value("policy_id"), job.leftovers()) == (["succeeded"], self._right, [])
            for job in self._jobs
        )

    def strangers(self) -> int:
        """Policies in the registry, or directories of policies, that are not the right one's."""
        registered = {name.decode() for name in cast("list[bytes]", self._first.client.zrange(POLICIES_INDEX, 0, -1))}
        return len(registered ^ {self._right}) + abs(len(self._first.published()) - 1)

    # --- time ------------------------------------------------------------------------------------------

    def watch(self, seconds: float) -> None:
        """Let time pass; see who is back, wake who has slept long enough, replace workers that are gone."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._thaw(time.monotonic())
            for job_id, (attempts, killed_at) in list(self._killed.items()):
                self._look_at(next(job for job in self._jobs if job.job_id == job_id), attempts, killed_at)
            self.workers = [worker if worker.is_alive else self._start() for worker in self.workers]
            time.sleep(0.05)

    def _look_at(self, job: SmallJob, attempts: int, killed_at: float) -> None:
        """Training goes on when the new attempt has told of its window and of what comes after."""
        if job.attempts > attempts and job.reports() >= 2:
            self.recoveries.append(time.monotonic() - killed_at)
        elif job.state not in FINAL_JOB_STATES:
            return
        del self._killed[job.job_id]

    def half_open_seconds(self) -> float:
        """From the moment all links are silent to a message that has arrived."""
        until(lambda: not any(worker.training for worker in self.workers), "idle workers", seconds=PATIENCE_SECONDS)
        client = self._first.client
        self._proxy.go_silent()
        began = time.monotonic()
        client.hset(job_key(UNWANTED), mapping={"state": "queued", "epoch": 0, "attempts": 0, "cancel": 1})
        client.sadd(OPEN_JOBS, UNWANTED)
        until(lambda: client.hget(job_key(UNWANTED), "state") == b"cancelled", "consuming again", seconds=120)
        return time.monotonic() - began

    # --- faults ----------------------------------------------------------------------------------------

    def let_something_happen(self) -> None:
        faults: dict[str, Callable[[CeleryWorker], None]] = {
            "kill worker": self._kill_worker,
            "kill child": self._kill_child,
            "kill training": self._kill_training,
            "freeze training": self._freeze_training,
            "freeze worker": self._freeze_worker,
            "reset connections": lambda _: self._proxy.reset(),
            "silence connections": lambda _: self._proxy.go_silent(),
            "kill Redis": self._kill_redis,
            "deliver again": self._deliver_again,
        }
        name = self._random.choice(list(faults))
        worker = self._random.choice(self.workers)
        if name.startswith(("kill ", "freeze t")) and name != "kill Redis" and not self._may_lose(worker):
            return
        faults[name](worker)
        self.faults.append(name)

    def _may_lose(self, worker: CeleryWorker) -> bool:
        """Whether the worker has come up since it was last killed, and the job that it has, if any, may die once more;
        that is timed until it is back."""
        job = self._job_of(worker)
        if not worker.is_ready:
            return False
        if job is None:
            return True
        if job.attempts > DEATHS_BORNE or job.job_id in self._killed:
            return False
        self._killed[job.job_id] = (job.attempts, time.monotonic())
        return True

    def _job_of(self, worker: CeleryWorker) -> SmallJob | None:
        children = {str(pid) for pid in worker.children}
        held = [job for job in self._jobs if job.state == "running"]
        return next((job for job in held if (job.value("worker") or "").rpartition(":")[2] in children), None)

    def _kill_worker(self, worker: CeleryWorker) -> None:
        worker.kill()

    def _kill_child(self, worker: CeleryWorker) -> None:
        for pid in worker.children:
            _send(pid, signal.SIGKILL)

    def _kill_training(self, worker: CeleryWorker) -> None:
        _send(worker.training, signal.SIGKILL)

    def _freeze_training(self, worker: CeleryWorker) -> None:
        self._freeze(worker.training)

    def _freeze_worker(self, worker: CeleryWorker) -> None:
        self._freeze(worker.pid)

    def _freeze(self, pid: int | None) -> None:
        if pid is not None and _send(pid, signal.SIGSTOP):
            self._frozen[pid] = time.monotonic() + 1.5 * small_job.LEASE_SECONDS

    def thaw(self) -> None:
        self._thaw(float("inf"))

    def _thaw(self, now: float) -> None:
        for pid in [pid for pid, until_then in self._frozen.items() if until_then <= now]:
            _send(pid, signal.SIGCONT)
            del self._frozen[pid]

    def _kill_redis(self, worker: CeleryWorker) -> None:
        self._server.kill()
        self._server.start()

    def _deliver_again(self, worker: CeleryWorker) -> None:
        send_job(open_producer(self._server.url), self._random.choice(self._jobs).job_id, "normal")

    def _start(self) -> CeleryWorker:
        self._num_started += 1
        name = f"worker-{self._num_started}"
        environment = self._first.environment | {"BONSAI_REDIS_URL": self._proxy.url, "BONSAI_CHECKPOINT_STEPS": "5"}
        return CeleryWorker(environment, self._first.artefacts / f"{name}.txt", name=name)


def _send(pid: int | None, number: signal.Signals) -> bool:
    if pid is None:
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


@contextmanager
def chaos_world(seed: int, num_workers: int) -> Iterator[ChaosWorld]:
    """Everything that a worker needs, and workers; all of it gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="bonsai-chaos-") as name, ExitStack() as stack:
        directory = Path(name)
        server = RedisServer(directory)
        server.start()
        stack.callback(server.kill)
        policy, reward, artefacts = (directory / part for part in ("policy", "reward", "artefacts"))
        artefacts.mkdir()
        groups = small_job.small_groups(policy)
        save_tokenizer(reward)
        engine = stack.enter_context(StubEngine(policy, directory / "engine.sock"))
        proxy = stack.enter_context(FaultProxy(server.socket))
        client = stack.enter_context(redis.Redis.from_url(server.url))
        spec = SPEC.model_copy(update={"method": Method(type="bon_forward_kl", bon_forward_kl=METHOD)})
        first = SmallJob(client, server.url, artefacts, engine.url, policy, reward, job_id="job_first", spec=spec)
        stack.enter_context(reconciling(server.url))
        chaos = ChaosWorld(seed, first, groups, server, proxy, num_workers)
        stack.callback(chaos.close)
        yield chaos
