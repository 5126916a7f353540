"""The one state machine: whatever is called in whatever situation, by whom and however late, a job stays inside the
table of contracts/job_states.py.

Exhaustive: from every situation that can be reached, every call is made once, of the gateway's and the worker's own
code, against a real Redis; what it must come to is written beside it. A worker's death is its lease running out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast, get_args

import pytest
import redis as blocking_redis
from redis.asyncio import Redis

from bon_algos.contracts import (
    FINAL_JOB_STATES,
    JOB_LUA,
    JOB_MOVES,
    LEDGER_COUNTS,
    OPEN_JOBS,
    JobPriority,
    JobState,
    job_events_key,
    job_key,
)
from service.dispatch import MAX_ATTEMPTS, Dispatcher
from service.errors import Conflict
from service.job_scripts import Wish
from service.jobs import Jobs
from service.store import open_redis
from tests.service.records import STUDENT, job_spec, policy
from worker import lease as leases
from worker.errors import JobCancelled, LeaseLost, Stopped
from worker.lease import Claim, Lease, claim

pytestmark = pytest.mark.anyio


def test_the_table_knows_every_state_and_what_is_final_is_followed_by_nothing():
    assert set(JOB_MOVES) == set(get_args(JobState)) == {after for moves in JOB_MOVES.values() for after in moves}
    assert set(FINAL_JOB_STATES) == {"succeeded", "failed", "cancelled"}


def test_a_move_that_is_not_in_the_table_is_refused_by_redis_itself(redis_url: str):
    """Whatever a script means to do: the function that writes states is the only one, and it looks the move up."""
    job, events = job_key("job_1"), job_events_key("job_1")
    with blocking_redis.Redis.from_url(redis_url, decode_responses=True) as client:
        for before, after in ((before, after) for before in JOB_MOVES for after in JOB_MOVES):
            client.hset(job, "state", before)
            ask = (f"{JOB_LUA}\nmove(KEYS[1], KEYS[2], ARGV[1])", 2, job, events, after)
            if after in JOB_MOVES[before]:
                client.eval(*ask)
                assert client.hget(job, "state") == after
            else:
                with pytest.raises(blocking_redis.ResponseError, match=f"is {before} cannot become {after}"):
                    client.eval(*ask)
                assert client.hget(job, "state") == before


@dataclass(frozen=True)
class Situation:
    """What the model knows."""

    state: JobState = "queued"
    asked: frozenset[str] = frozenset()
    is_alive: bool = False
    """The newest claim's lease."""
    is_given_back: bool = False
    """By the newest claim's worker, which may be heard of once more."""
    epoch: int = 0
    deaths: int = 0
    """Claims that did not end in a pause."""

    @property
    def kind(self) -> tuple[object, ...]:
        """Situations of one kind behave alike: two more deaths than it takes are no further ones."""
        if self.state in FINAL_JOB_STATES:
            return (self.state,)
        held = (self.is_alive, self.is_given_back)
        return (self.state, self.asked, *held, min(self.epoch, 2), min(self.deaths, MAX_ATTEMPTS))

    def become(self, state: JobState) -> Situation:
        asked = self.asked if state == "running" else self.asked - {"pause"}
        return replace(self, state=state, asked=asked, is_alive=state == "running", is_given_back=False)


Call = tuple[str, Wish | int | None]


class World:
    """One job in a Redis that can be put back into any situation met before."""

    def __init__(self, client: blocking_redis.Redis, redis: Redis, job_id: str, jobs: Jobs) -> None:
        self.client, self.jobs, self.job_id = client, jobs, job_id
        self.sent: list[tuple[str, JobPriority, bool]] = []
        self.dispatcher = Dispatcher(redis, lambda *sent: self.sent.append(sent), seconds=5)
        self.keys = (job_key(job_id), job_events_key(job_id), OPEN_JOBS)

    def saved(self) -> list[bytes | None]:
        return [self.client.dump(key) for key in self.keys]

    def restore(self, saved: list[bytes | None]) -> None:
        self.client.delete(*self.keys)
        for key, value in zip(self.keys, saved, strict=True):
            if value is not None:
                self.client.restore(key, 0, value)

    def calls(self, now: Situation) -> list[Call]:
        """All that anybody could do. Workers: that of the newest epoch, and one whose epoch is over."""
        epochs = sorted({now.epoch, 1} - {0})
        done_by_workers = ("beat", "progress", "checkpoint", "succeed", "fail", "cancelled", "park", "release")
        by_workers: list[Call] = [(how, epoch) for how in done_by_workers for epoch in epochs]
        wishes: list[Call] = [("wish", wish) for wish in get_args(Wish)]
        death: list[Call] = [("death", None)] if now.is_alive else []
        return [("reconcile", None), ("claim", None), *wishes, *death, *by_workers]

    async def made(self, call: Call, now: Situation) -> Situation:
        """Make the call, hold what it answers against the model; the situation after it."""
        match call:
            case ("wish", str(wish)):
                return await self._wish(wish, now)
            case ("reconcile", _):
                return await self._reconciled(now)
            case ("claim", _):
                return self._claimed(now)
            case ("death", _):
                self.client.hset(job_key(self.job_id), "lease_until", "1")
                return replace(now, is_alive=False)
            case (how, int(epoch)):
                return self._worked(how, epoch, now)
        raise AssertionError(call)

    async def _wish(self, wish: Wish, now: Situation) -> Situation:
        after: Situation | None = None
        match wish, now.state:
            case ("pause", "queued"):
                after = now.become("paused")
            case ("resume", "paused"):
                after = now.become("queued")
            case ("cancel", "queued" | "paused"):
                after = replace(now.become("cancelled"), asked=frozenset({"cancel"}))
            case ("cancel", "running"):
                after = replace(now, asked=now.asked | {"cancel"})
            case ("pause", "running") if "cancel" not in now.asked:
                after = replace(now, asked=frozenset({"pause"}))
            case ("resume", "running") if now.asked == {"pause"}:
                after = replace(now, asked=frozenset())
        if after is None:
            with pytest.raises(Conflict):
                await self.jobs.grant(wish, self.job_id)
            return now
        assert (await self.jobs.grant(wish, self.job_id))["status"] == after.state
        return after

    async def _reconciled(self, now: Situation) -> Situation:
        """So long after the last message that it may be sent again."""
        self.client.hdel(job_key(self.job_id), "dispatched_at")
        self.sent.clear()
        await self.dispatcher.reconcile()
        after = now
        if now.state == "running" and not now.is_alive:
            if "cancel" in now.asked:
                after = now.become("cancelled")
            elif "pause" in now.asked:
                after = now.become("paused")
            elif now.deaths >= MAX_ATTEMPTS:
                after = now.become("failed")
        is_wanted = after.state == "queued" or (after.state == "running" and not after.is_alive)
        assert self.sent == [(self.job_id, "low", after.epoch > 0)] * is_wanted
        return after

    def _claimed(self, now: Situation) -> Situation:
        answer = claim(self.client, self.job_id, lease_seconds=60, worker="w:1")
        if now.state in FINAL_JOB_STATES:
            assert answer == "final"
        elif now.state == "paused":
            assert answer == "paused"
        elif now.is_alive:
            assert answer == "held"
        elif "cancel" in now.asked:
            assert answer == "cancelled"
            return now.become("cancelled")
        elif "pause" in now.asked:
            assert answer == "paused"
            return now.become("paused")
        else:
            assert not isinstance(answer, str)
            assert answer.epoch == now.epoch + 1
            return replace(now.become("running"), epoch=now.epoch + 1, deaths=now.deaths + 1)
        return now

    def _worked(self, how: str, epoch: int, now: Situation) -> Situation:
        may_write = now.state == "running" and epoch == now.epoch and not now.is_given_back
        own = Claim(epoch, cast("bytes", self.client.hget(job_key(self.job_id), "claim") or b"whose").decode())
        if how == "release":
            assert leases.release(self.client, self.job_id, own, "the engine is away") == may_write
            return replace(now, is_alive=False, is_given_back=True) if may_write else now
        worker = Lease(self.client, self.job_id, own, lease_seconds=60, heartbeat_seconds=60)
        calls: dict[str, Callable[[], None]] = {
            "beat": worker.beat,
            "progress": lambda: worker.progress("training", 1, 2, {}, None),
            "checkpoint": lambda: worker.tell_checkpoint(1, {}, kept=2),
            "succeed": lambda: worker.finish_succeeded(policy(STUDENT), "{}"),
            "fail": lambda: worker.finish_failed("code", "message"),
            "cancelled": worker.finish_cancelled,
            "park": worker.park,
        }
        if not may_write and how != "checkpoint":
            with pytest.raises(LeaseLost):
                calls[how]()
            return now
        try:
            calls[how]()
        except JobCancelled:
            assert "cancel" in now.asked
        except Stopped:
            assert "pause" in now.asked
        return _after_work(how, now)

    async def check(self, now: Situation) -> None:
        job = await self.jobs.get(self.job_id)
        assert (job["status"], job["bonsai"]["attempts"]) == (now.state, now.epoch)
        asked = "cancel" if "cancel" in now.asked else "pause" if "pause" in now.asked else None
        assert job["bonsai"]["stopping"] == (asked if now.state == "running" else None)
        assert (job["finished_at"] is not None) == (now.state in FINAL_JOB_STATES)
        if now.state in ("queued", "running"):  # or nobody would ever wake it again
            assert self.client.sismember(OPEN_JOBS, self.job_id)
        rows = cast("list[Any]", self.client.xrange(job_events_key(self.job_id)))
        states = [fields[b"state"].decode() for _, fields in rows if b"state" in fields]
        assert (states[0], states[-1]) == ("queued", now.state)
        assert all(after in JOB_MOVES[cast(JobState, before)] for before, after in pairwise(states))


def _after_work(how: str, now: Situation) -> Situation:
    """Of the worker that holds the lease, which may have been silent."""
    match how:
        case "beat":
            return replace(now, is_alive=True)
        case "succeed" | "park" if "cancel" in now.asked:
            return now.become("cancelled")
        case "park":
            return replace(now.become("paused" if "pause" in now.asked else "queued"), deaths=now.deaths - 1)
        case "succeed":
            return now.become("succeeded")
        case "fail":
            return now.become("failed")
        case "cancelled":
            return now.become("cancelled")
    return now


@contextmanager
def named(path: tuple[Call, ...]) -> Iterator[None]:
    """A failure says by which calls it came about."""
    try:
        yield
    except BaseException as failure:
        failure.add_note("after " + " → ".join(f"{call} {by or ''}".strip() for call, by in path))
        raise


async def test_every_call_in_every_situation_leads_where_the_table_says(redis_url: str):
    with blocking_redis.Redis.from_url(redis_url) as client:
        client.hset(LEDGER_COUNTS, "default", "100")
        async with open_redis(redis_url) as redis:
            jobs = Jobs(redis, n_cap=64, max_lora_rank=32)
            world = World(client, redis, (await jobs.submit(job_spec(priority="low"))).job_id, jobs)
            first = Situation()
            seen = {first.kind}
            waiting: list[tuple[Situation, list[bytes | None], tuple[Call, ...]]] = [(first, world.saved(), ())]
            while waiting:
                now, saved, path = waiting.pop(0)
                for call in world.calls(now):
                    with named((*path, call)):
                        world.restore(saved)
                        after = await world.made(call, now)
                        await world.check(after)
                    if after.kind not in seen:
                        seen.add(after.kind)
                        waiting.append((after, world.saved(), (*path, call)))
    assert {kind[0] for kind in seen} == set(get_args(JobState))
