"""One owner per job: a lease on Redis' clock with a fencing token, the claim.

Owns how a job is claimed, kept, reported on, given back, paused and ended, and the thread that keeps it.
Does not own re-tries or dispatch, which are the service's reconciler, nor which state may follow on which
(`contracts.job_states`).

A process that was frozen past its lease and wakes is stopped by two things: its own monotonic clock (a beat
older than one lease counts for nothing) and the claim (whatever it still sends is refused).
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Self, TypeVar, cast

import redis

from bon_algos.audit_entries import MOST_TRIES, chained, newest_digest, script_values
from bon_algos.contracts import (
    AUDIT_STREAM,
    JOB_EVENTS_KEPT,
    POLICIES_DELETED,
    POLICIES_INDEX,
    JobPhase,
    PolicyRecord,
    job_checkpoints_key,
    job_events_key,
    job_key,
    policy_key,
)
from bon_algos.crash_points import crash_point
from worker.errors import JobCancelled, JobFailed, JobParked, LeaseLost
from worker.lease_scripts import BEAT, CHECKPOINT, CLAIM, FINISH, PARK, PROGRESS, RELEASE

log = logging.getLogger(__name__)

REASON_KEPT: Final = 2000
"""Characters, from the end: of a log the tail says what happened."""

REDIS_RETRY_SECONDS: Final = 0.5
LEAVING_SECONDS: Final = 0.5

Answer = TypeVar("Answer")
ClaimRefusal = Literal["final", "held", "cancelled", "paused"]
_REFUSALS: Final[dict[int, ClaimRefusal]] = {-1: "final", -2: "held", -3: "cancelled", -4: "paused"}


class Claim(NamedTuple):
    """Who owns a job: nobody else's has both."""

    epoch: int
    """One more than the claim before. A Redis that lost its last second gives it twice."""
    name: str
    """Random."""

    @property
    def token(self) -> str:
        """What every write is compared by."""
        return f"{self.epoch}:{self.name}"

    @classmethod
    def of(cls, token: str) -> Self:
        epoch, _, name = token.partition(":")
        return cls(int(epoch), name)


def claim(
    client: redis.Redis, job_id: str, *, lease_seconds: float, worker: str, processes: int = 1
) -> Claim | ClaimRefusal:
    """Take the job for one lease, or why not. processes: that train it, one per device. A client that
    tries again where a reply was lost takes it once."""
    keys = (job_key(job_id), job_events_key(job_id))
    crash_point("claim.asked")
    name = secrets.token_hex(8)
    answer = _run(client, CLAIM, keys, (_ms(lease_seconds), worker, processes, name))
    crash_point("claim.granted")
    return _REFUSALS.get(answer) or Claim(answer, name)


def release(client: redis.Redis, job_id: str, own: Claim, reason: str) -> bool:
    """Give a job back unfinished, with the reason for a person to read; False when another claim holds it."""
    keys = (job_key(job_id), job_events_key(job_id))
    crash_point("release.asked")
    given_back = _run(client, RELEASE, keys, (own.token, reason[-REASON_KEPT:])) == 1
    crash_point("release.recorded")
    return given_back


class Lease:
    """A claimed job, kept by a thread that beats until the block is left.

    `check` is for the training loop, once a step: it raises as soon as the job must stop.
    """

    def __init__(
        self, client: redis.Redis, job_id: str, own: Claim, *, lease_seconds: float, heartbeat_seconds: float
    ) -> None:
        self.job_id = job_id
        self.claim = own
        self._client = client
        self._lease_seconds = lease_seconds
        self._heartbeat_seconds = min(heartbeat_seconds, lease_seconds / 3)
        self._valid_until = time.monotonic() + lease_seconds
        self._fenced = False
        self._cancelled = False
        self._paused = False
        self._leaving = False
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"heartbeat-{job_id}", daemon=True)

    @property
    def epoch(self) -> int:
        return self.claim.epoch

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def leave(self) -> None:
        """Have the next `check` raise JobParked. For a signal's handler: it may have interrupted `wait`, whose
        event it must therefore not touch."""
        self._leaving = True

    def check(self) -> None:
        """Raises LeaseLost, JobCancelled or JobParked when the job must stop here."""
        self._check_ours()
        if self._paused or self._leaving:
            raise JobParked(self.job_id)

    def _check_ours(self) -> None:
        if self._fenced or time.monotonic() > self._valid_until:
            raise LeaseLost(f"{self.job_id}: epoch {self.epoch} no longer holds the lease")
        if self._cancelled:
            raise JobCancelled(self.job_id)

    def wait(self, seconds: float) -> None:
        """Let time pass; raises like `check`, as soon as there is a reason to, or half a second after a `leave`."""
        wait_until = time.monotonic() + seconds
        while (left := wait_until - time.monotonic()) > 0:
            self._wake.wait(min(left, LEAVING_SECONDS))
            self.check()

    def beat(self) -> None:
        """Extend the lease now and learn of what is asked. Raises LeaseLost, JobCancelled or RedisError, and never
        JobParked: a job that is parked keeps its state first, and for that it must hold the lease."""
        asked_at = time.monotonic()
        crash_point("beat.asked")
        answer = _run(self._client, BEAT, (job_key(self.job_id),), (self.claim.token, _ms(self._lease_seconds)))
        crash_point("beat.kept")
        self._note(answer, asked_at)
        self._check_ours()

    def confirm(self) -> None:
        """Have Redis say that this claim still holds the job; raises like `beat`, at the latest when the lease
        runs out while Redis is away. Asked before an effect that outlives the process: a rename of a checkpoint
        or a policy, which then has a whole lease left to happen in."""
        self._until_redis_answers(self.beat)

    def progress(
        self,
        phase: JobPhase,
        step: int,
        steps: int,
        metrics: Mapping[str, float],
        seconds_left: float | None,
        *,
        trained_tokens: int = 0,
        sampled_tokens: int = 0,
    ) -> None:
        """Report where the job is, and what this attempt has used; raises like `check`. Redis being away is no reason
        to stop: the lease is."""
        left = "" if seconds_left is None else f"{seconds_left:.1f}"
        told = (phase, step, steps, json.dumps(dict(metrics)), left, trained_tokens, sampled_tokens)
        values = (self.claim.token, JOB_EVENTS_KEPT, *told)
        crash_point("progress.asked")
        try:
            answer = _run(self._client, PROGRESS, (job_key(self.job_id), job_events_key(self.job_id)), values)
        except redis.RedisError as error:
            log.warning("progress of %s was not recorded: %s", self.job_id, type(error).__name__)
        else:
            crash_point("progress.recorded")
            self._note(answer, None)
        self.check()

    def tell_checkpoint(self, step: int, metrics: Mapping[str, float], kept: int) -> None:
        """Say that the state after `step` is kept, beside the `kept` - 1 before it. Redis being away costs the job's
        owner the news alone."""
        keys = (job_key(self.job_id), job_events_key(self.job_id), job_checkpoints_key(self.job_id))
        try:
            crash_point("tell.asked")
            _run(self._client, CHECKPOINT, keys, (self.claim.token, step, json.dumps(dict(metrics)), kept))
            crash_point("tell.recorded")
        except redis.RedisError as error:
            log.warning("a checkpoint of %s was not recorded: %s", self.job_id, type(error).__name__)

    def park(self) -> None:
        """Give the job back, its state kept: paused where its owner wants that, else queued for the next worker. Raises
        LeaseLost, or JobCancelled where that was asked for too."""
        crash_point("park.asked")
        answer = self._settled(PARK, (job_key(self.job_id), job_events_key(self.job_id)), ())
        crash_point("park.recorded")
        if answer == 2:
            raise JobCancelled(self.job_id)

    def finish_succeeded(self, policy: PolicyRecord, report_json: str) -> None:
        """End the job, register its policy and tell the audit, in one script. Raises LeaseLost, JobCancelled or
        RedisError, and JobFailed where the same weights were deleted before, or what it was made from is tainted."""
        keys = (
            *(job_key(self.job_id), job_events_key(self.job_id)),
            *(policy_key(policy.id), POLICIES_INDEX, POLICIES_DELETED),
            *(policy_key(parent) for parent in sorted(policy.parents)),
        )
        values = ("succeeded", JOB_EVENTS_KEPT, policy.model_dump_json(), policy.created_at, policy.id, report_json)
        answer = self._register(policy, keys, values)
        if answer == 2:
            raise JobCancelled(self.job_id)
        if answer == 3:
            raise JobFailed("policy_deleted", f"{policy.id} was deleted, and its name is never used again")
        if answer == 4:
            raise JobFailed("policy_unusable", "what it was made from had learned from rows that were erased since")

    def finish_failed(self, code: str, message: str) -> None:
        keys = (job_key(self.job_id), job_events_key(self.job_id))
        self._finish(keys, ("failed", JOB_EVENTS_KEPT, code, message))

    def finish_cancelled(self) -> None:
        self._finish((job_key(self.job_id), job_events_key(self.job_id)), ("cancelled", JOB_EVENTS_KEPT))

    def _register(self, policy: PolicyRecord, keys: tuple[str, ...], values: tuple[str | int | float, ...]) -> int:
        """Again with another entry of the audit where somebody else's was written first. Raises RedisError where it
        always was."""
        digest = {} if policy.manifest is None else {"digest": policy.manifest.digest}
        told = json.dumps({"before": None, "after": policy.state, **digest})
        for _ in range(MOST_TRIES):
            previous = self._until_redis_answers(self._newest_digest)
            entry = chained(
                "policy_register",
                tenant=policy.tenant,
                by="worker",
                previous=previous,
                policy=policy.id,
                job=self.job_id,
                data=told,
            )
            if (answer := self._finish(keys, (*values, *script_values(entry)))) != 5:
                return answer
        raise redis.WatchError("others wrote to the audit all the time")

    def _newest_digest(self) -> str:
        return newest_digest(cast("list[Any]", self._client.xrevrange(AUDIT_STREAM, count=1)))

    def _finish(self, keys: tuple[str, ...], values: tuple[str | int | float, ...]) -> int:
        crash_point("finish.asked")
        answer = self._settled(FINISH, keys, values)
        crash_point("finish.recorded")
        return answer

    def _settled(self, script: str, keys: tuple[str, ...], values: tuple[str | int | float, ...]) -> int:
        answer = self._until_redis_answers(lambda: _run(self._client, script, keys, (self.claim.token, *values)))
        if answer == 0:
            self._fenced = True
            raise LeaseLost(f"{self.job_id}: epoch {self.epoch} came too late to finish")
        if answer in (1, 2):
            self._stopping.set()
        return answer

    def _until_redis_answers(self, ask: Callable[[], Answer]) -> Answer:
        while True:
            try:
                return ask()
            except redis.RedisError as error:
                log.warning("Redis is away from %s: %s", self.job_id, type(error).__name__)
                self._stopping.wait(REDIS_RETRY_SECONDS)
                if self._fenced or time.monotonic() > self._valid_until:
                    raise LeaseLost(f"{self.job_id}: Redis was away for a whole lease") from error

    def _note(self, answer: int, asked_at: float | None) -> None:
        self._fenced = self._fenced or answer == 0
        self._cancelled = self._cancelled or answer == 2
        self._paused = self._paused or answer == 3
        if answer != 0 and asked_at is not None:
            # Counted from before the question: the answer may have been a long time on its way.
            self._valid_until = max(self._valid_until, asked_at + self._lease_seconds)
        if self._fenced or self._cancelled or self._paused:
            self._wake.set()

    def _keep(self) -> None:
        while not self._fenced and not self._stopping.wait(self._heartbeat_seconds):
            try:
                self.beat()
            except redis.RedisError as error:
                log.warning("heartbeat of %s failed: %s", self.job_id, type(error).__name__)
            except (LeaseLost, JobCancelled):
                self._wake.set()


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _run(client: redis.Redis, script: str, keys: tuple[str, ...], values: tuple[str | int | float, ...]) -> int:
    return int(cast(int, client.eval(script, len(keys), *keys, *values)))
