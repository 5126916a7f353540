"""A circle with real Redis, whose worker's part is played through its own lease, as a worker would; and a gateway that
dies after whatever it does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis as blocking_redis
from redis.asyncio import Redis

from archive.reading import Archive
from bon_algos.contracts import (
    Arm,
    Circle,
    CircleSpec,
    Interval,
    PolicyRecord,
    Turn,
    circle_key,
    experiment_stats_key,
    policy_key,
    report_digest,
)
from service.audit import Audit
from service.catalogue import Catalogue
from service.circle_driver import CircleDriver, Means
from service.circles import Circles
from service.curve import Curves
from service.dispatch import Dispatcher
from service.jobs import Jobs
from service.policies import Policies
from service.store import open_redis
from service.trials import Trials
from tests.service.records import BASE, PASSED, group, job_spec, manifest, numbered, policy, route
from tests.service.records import report as summary_report
from tests.service.test_redis_model import deliver
from tests.service.test_reports import a_report
from worker.lease import Lease, claim

FIRST, SECOND = numbered(11), numbered(12)
SPEC = CircleSpec.model_validate(
    {
        "n": 4, "min_groups": 8, "shadow": {"share": 0.5, "answers": 5}, "canary": {"share": 0.5, "answers": 5},
    }
)  # fmt: skip


@dataclass
class Turning:
    """A gateway's part of a circle, and a worker's."""

    redis: Redis
    store: blocking_redis.Redis
    circles: Circles
    driver: CircleDriver
    means: Means
    directory: Path

    async def circle(self) -> Circle:
        return await self.circles.get("default", "default")

    async def look(self, times: int = 1) -> Circle:
        """Each look is taken twice: the second time by a gateway that finds the circle as it was before the first, for
        whoever did the first died before it wrote down what it had done."""
        for _ in range(times):
            before = await self.circle()
            await self.driver.step(before)
            after = await self.circle()
            if after.version > before.version:
                await self.redis.set(circle_key("default"), before.model_dump_json())
                await self.driver.step(before)
        return await self.circle()

    async def groups(self, drawn_by: str, count: int = 8, best: float = 4.0) -> None:
        arm = Arm(policy=drawn_by, n=4)
        rows = [group([(float(i % 3), 2), (best, 2), (0.0, 2), (float(i % 2), 2)], arm) for i in range(count)]
        before = await self.redis.xlen("bonsai:ledger")
        later = {"created_at": 4e9}
        numbered_rows = [
            row.model_copy(update={"id": f"resp_{before + i}", "prompt_token_ids": (i,), **later})
            for i, row in enumerate(rows)
        ]
        await deliver(self.redis, self.directory, numbered_rows)

    async def work(self, policy_id: str, **report: object) -> None:
        """What a worker does with the job of the turn under way."""
        turn = (await self.circle()).turn
        assert turn is not None
        assert turn.job_id is not None
        own = claim(self.store, turn.job_id, lease_seconds=60, worker="here:1")
        assert not isinstance(own, str)
        lease = Lease(self.store, turn.job_id, own, lease_seconds=60, heartbeat_seconds=60)
        lease.finish_succeeded(self.made(policy_id, turn, **report), "")

    def made(self, policy_id: str, turn: Turn, **report: Any) -> PolicyRecord:
        content = as_reported(policy_id, turn.parent, **report)
        files = {name: hashlib.sha256(content).hexdigest() for name in ("README.md", "report.json", "report.png")}
        place = self.directory / "reports" / report_digest(files)
        place.mkdir(parents=True)
        for name in files:
            (place / name).write_bytes(content)
        start = "base" if turn.parent == BASE else turn.parent
        asked = {"type": "offline_bond", "offline_bond": {}}
        spec = job_spec(training={"start_from": start, "reference": "start"}, method=asked)
        drift = Interval.model_validate(json.loads(content)["kl_policy_base"])
        told = {
            "report": summary_report().model_copy(update={"kl_policy_base": drift}),
            "report_files": files,
            "parent_policy_id": turn.parent,
            "job_id": turn.job_id,
            "spec": spec,
            "lora_rank": spec.method.algorithm.lora_rank,
        }
        plain = manifest(policy_id, digest=hashlib.sha256(policy_id.encode()).hexdigest())
        return policy(policy_id, written=plain.model_copy(update=told))

    async def prove(self, policy_id: str) -> None:
        """An engine serves it."""
        row = await self.redis.hget(policy_key(policy_id), "record")
        assert row is not None
        proven = PolicyRecord.model_validate_json(row).model_copy(update={"fingerprint": PASSED})
        await self.redis.hset(policy_key(policy_id), "record", proven.model_dump_json())
        self.means.catalogue.set_served(frozenset({BASE, FIRST, policy_id}))

    async def answers(self, policy_id: str, count: int = 5) -> None:
        """Of the trial that the policy is in."""
        found = (await self.means.catalogue.refresh()).route("default")
        trial = found.canary or found.shadow
        assert trial is not None
        sums = {
            "exposures": count,
            "answers": count,
            "scored": count,
            "reward_sum": 4.0 * count,
            "reward_sq": 16.0 * count,
        }
        await self.redis.hset(
            experiment_stats_key(trial.id), mapping={f"{policy_id}:1|{k}": v for k, v in sums.items()}
        )

    async def jobs(self) -> int:
        return len((await self.means.jobs.list(20))[0])

    async def promotions(self) -> int:
        return sum(entry["event"] == "promote" for entry in await self.audit())

    async def audit(self) -> Sequence[dict[str, Any]]:
        return (await Audit(self.redis).page("default", 100, None))[0]


def as_reported(
    policy_id: str, parent: str, gain: float = 1.0, judge: float | None = 0.5, kl: float = 0.6, **newer: object
) -> bytes:
    """newer: members that only another version of a report has."""
    found, reach = a_report(), 0.1
    rewards = found.reward.model_copy(update={"gain": Interval(mean=gain, low=gain - reach, high=gain + reach)})
    second = None if judge is None else Interval(mean=judge, low=judge - reach, high=judge + reach)
    told = found.model_copy(
        update={
            "policy_id": policy_id,
            "parent_policy_id": parent,
            "reward": rewards,
            "judge": None if second is None else found.reward.model_copy(update={"gain": second}),
            "kl_policy_base": Interval(mean=kl, low=kl, high=kl),
        }
    )
    return json.dumps({**told.model_dump(mode="json"), **newer}).encode()


@pytest.fixture
async def turning(redis_url: str, tmp_path: Path) -> AsyncIterator[Turning]:
    async with open_redis(redis_url) as redis, open_redis(redis_url, in_bytes=True) as of_bytes:
        catalogue = Catalogue(redis, policy(BASE), route())
        await catalogue.refresh()
        jobs = Jobs(redis, n_cap=64, max_lora_rank=64)
        woken = Dispatcher(redis, lambda *sent: None, seconds=5)
        curves = Curves(of_bytes, Archive.at(str(tmp_path / "archive")))
        means = Means(catalogue, jobs, woken, Policies(redis), Trials(redis), curves, tmp_path)
        driver = CircleDriver(redis, means, seconds=5)
        with blocking_redis.Redis.from_url(redis_url) as store:
            world = Turning(redis, store, driver.circles, driver, means, tmp_path)
            yield world


async def turned(world: Turning, policy_id: str, **report: object) -> Circle:
    """From enough groups to the end of the turn, as far as it comes."""
    await world.groups((await world.circle()).live_policy or BASE)
    await world.look(2)
    await world.work(policy_id, **report)
    await world.prove(policy_id)
    await world.look(2)
    for _ in range(2):
        if (await world.circle()).turn is None:
            break
        await world.answers(policy_id)
        await world.look(1)
    return await world.circle()
