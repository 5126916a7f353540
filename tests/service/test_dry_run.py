"""A dry run tells of the data what the worker would find, submits nothing and asks no engine."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis as blocking_redis

from archive.reading import Archive
from archive.storage import archive_url
from bon_algos.acceptance import Requirements, choose
from bon_algos.contracts import LEDGER_STREAM, CandidateGroup, DataReport, JobSpec, job_key, jobs_index, policy_key
from bon_algos.ledger_entries import record_of
from service.dry_run import DryRuns
from service.errors import Overloaded
from tests.fixtures.gateway import World
from tests.fixtures.waiting import wait_until
from tests.service.records import BASE, REWARD_MODEL, STUDENT, group, manifest, policy
from tests.service.training_files import line, uploaded
from tests.worker.world import deliver
from worker.compaction import Compaction, Limits
from worker.dataset import FrozenWindow, freeze
from worker.lineage import lineage

PROMPTS = 40
BATCHES_OF_TEN = Limits(entries=10, bytes=2**20, seconds=600.0, hot_groups=2, hot_seconds=0.0)


def logged(world: World, **changes: object) -> None:
    """Groups of four of 40 prompts, rewards 0, 1, 2, 3, as the gateway's reward model scored them."""
    digest = template_digest(world)
    with blocking_redis.Redis.from_url(world.redis_url) as client:
        for i in range(PROMPTS):
            fields = {
                "id": f"resp_{i}", "created_at": 1000.0 + i, "prompt_token_ids": (1, i), "prompt": f"tell me about {i}",
                "reward_template_digest": digest, **changes,
            }  # fmt: skip
            deliver(client, group([(float(k), 30) for k in range(4)]).model_copy(update=fields))


def template_digest(world: World) -> str:
    """What the gateway itself writes into a group."""
    assert world.client.post("/generate", {"prompt": "hi", "n": 2}).status == 200
    found = world.groups(1)[-1].reward_template_digest
    with blocking_redis.Redis.from_url(world.redis_url) as client:
        client.delete(LEDGER_STREAM)
    return found


def spec(**members: object) -> dict[str, object]:
    return {"n": 4, "method": {"type": "bon_forward_kl", "bon_forward_kl": {"n": 4}}, **members}


def dry(world: World, **members: object) -> dict[str, Any]:
    asked = len(world.engine.requests)
    reply = world.client.post("/distill?dry_run=true", spec(**members))
    assert reply.status == 200, reply.body
    assert len(world.engine.requests) == asked
    assert world.client.get("/distill").json["data"] == []
    DataReport.model_validate(reply.json["data"])
    return dict(reply.json["data"])


def test_what_would_be_learned_from(world):
    logged(world)
    told = dry(world)
    assert (told["groups_read"], told["accepted"], told["rejected"], told["is_whole"]) == (PROMPTS, PROMPTS, {}, True)
    assert told["train_prompts"] + told["held_out_prompts"] == PROMPTS
    assert told["policies"] == {BASE: 4 * PROMPTS}
    assert told["rewards"]["quantiles"] == {"0": 0, "5": 0, "25": 0.75, "50": 1.5, "75": 2.25, "95": 3, "100": 3}
    assert sum(told["rewards"]["counts"]) == 4 * PROMPTS
    assert (told["tied_pairs"], told["prompts_all_tied"], told["effective_n"]) == (0, 0, 4)
    # Of {0, 1, 2, 3} one sample is worth 1.5, the best of two (3·3 + 2·2 + 1)/6 = 7/3, the best of four 3.
    assert [point["k"] for point in told["curve"]] == [1, 2, 4]
    assert [point["reward"] for point in told["curve"]] == pytest.approx([1.5, 7 / 3, 3])
    assert told["is_there_gain"]
    assert told["would_fail"] == []


def test_it_chooses_as_the_worker_does(world):
    logged(world)
    groups = world.groups(PROMPTS)
    odd = [one.model_copy(update={"id": f"odd_{i}", "store": i % 2 == 0}) for i, one in enumerate(groups[:6])]
    with blocking_redis.Redis.from_url(world.redis_url) as client:
        deliver(client, *odd, odd[0].model_copy(update={"id": "late", "created_at": 5000.0}))
    asked = spec(window={"until": 4000.0})
    wanted = Requirements.of(
        JobSpec.model_validate(asked), base_policy=BASE, reward_model=REWARD_MODEL,
        reward_template_digest=groups[0].reward_template_digest,
    )  # fmt: skip
    workers = choose((one for one in world.records() if isinstance(one, CandidateGroup)), wanted, 20_000)
    told = dry(world, window={"until": 4000.0})
    assert (told["accepted"], told["rejected"]) == (len(workers.chosen), workers.rejected)
    assert told["rejected"] == {"not_stored": 3, "too_new": 1}


def window_of(world: World, directory: Path, asked: dict[str, object], *, of: int = PROMPTS) -> FrozenWindow:
    """What the worker freezes of the oldest groups for this job."""
    groups, wanted = world.groups(PROMPTS)[:of], JobSpec.model_validate(asked)
    with blocking_redis.Redis.from_url(world.redis_url) as client:
        trained = lineage(client, directory.parents[2], wanted.policies).trained
    return freeze(
        directory, groups, Requirements.of(wanted, base_policy=BASE, reward_model=REWARD_MODEL,
                                           reward_template_digest=groups[0].reward_template_digest),
        max_groups=PROMPTS, held_out_fraction=wanted.held_out_fraction, trained_before=trained,
    )  # fmt: skip


def published(world: World, learned: FrozenWindow) -> None:
    """STUDENT, which job_1 made from this window."""
    record = policy(STUDENT, written=manifest().model_copy(update={"data": learned.data}))
    with blocking_redis.Redis.from_url(world.redis_url) as client:
        client.hset(policy_key(STUDENT), mapping={"record": record.model_dump_json(), "version": 1})


@pytest.mark.parametrize("members", [{"training": {"start_from": STUDENT}}, {"window": {"policies": [STUDENT]}}])
def test_what_an_ancestor_was_trained_on_is_not_held_out_as_in_the_worker(world, tmp_path, members):
    logged(world)
    jobs, asked = tmp_path / "artefacts" / "jobs", spec(held_out_fraction=0.5, **members)
    learned = window_of(world, jobs / "job_1" / "window", spec(held_out_fraction=0.1), of=PROMPTS // 2)
    without = window_of(world, jobs / "job_2" / "window", spec(held_out_fraction=0.5))
    published(world, learned)
    child = window_of(world, jobs / "job_3" / "window", asked)
    told = dry(world, held_out_fraction=0.5, **members)
    assert (told["train_prompts"], told["held_out_prompts"]) == (len(child.train), len(child.held_out))
    assert len(child.held_out) < len(without.held_out)


def test_where_too_little_is_left_that_no_ancestor_knows_it_is_told(world, tmp_path):
    logged(world)
    published(world, window_of(world, tmp_path / "artefacts" / "jobs" / "job_1" / "window", spec()))
    with blocking_redis.Redis.from_url(world.redis_url) as client:
        known = lineage(client, tmp_path / "artefacts", (STUDENT,)).trained
        for name, fields in client.xrange(LEDGER_STREAM):
            record = record_of(fields)
            if isinstance(record, CandidateGroup) and record.prompt_token_ids not in known:
                client.xdel(LEDGER_STREAM, name)
    assert codes(dry(world, held_out_fraction=0.5)) == []
    assert codes(dry(world, held_out_fraction=0.5, window={"policies": [STUDENT]})) == ["too_few_prompts"]


def test_an_ancestor_whose_window_is_gone_is_told_of(world, tmp_path):
    logged(world)
    window = tmp_path / "artefacts" / "jobs" / "job_1" / "window"
    published(world, window_of(world, window, spec()))
    (window / "pools.jsonl.z").unlink()
    told = dry(world, window={"policies": [STUDENT]})
    assert (codes(told), told["accepted"]) == (["lineage_unknown"], PROMPTS)


def codes(told: dict[str, Any]) -> list[str]:
    return [trouble["code"] for trouble in told["would_fail"]]


def test_why_a_job_would_fail_is_told_and_is_no_error(world):
    assert codes(dry(world)) == ["empty_window"]
    logged(world)
    assert codes(dry(world, window={"until": 1001.0})) == ["too_few_prompts"]
    assert codes(dry(world, method={"type": "bon_sft", "bon_sft": {"n": 16}})) == ["too_few_candidates"]
    assert codes(dry(world, window={"max_groups": 5})) == ["window_too_small"]


def test_rewards_that_are_all_alike_would_fail(world):
    logged(world, candidates=group([(1.0, 30)] * 4).candidates)
    told = dry(world)
    assert codes(told) == ["rewards_all_equal"]
    assert (told["tied_pairs"], told["prompts_all_tied"]) == (1, 1)
    assert told["effective_n"] == pytest.approx(1)
    assert told["is_there_gain"] is False


def is_said(world: World, response: str, value: float) -> bool:
    """Once the ledger has the reply."""
    return world.client.post("/v1/feedback", {"response": response, "value": value}).status == 201


def test_windows_by_tag_and_feedback(world):
    asked = {"prompt": "hi", "n": 2}
    said = [world.client.post("/generate", {**asked, "metadata": {"tags": tags}}).json["id"] for tags in ("a,b", "a")]
    bare = world.client.post("/generate", asked).json["id"]
    world.groups(3)
    for response, value in ((said[0], 5), (said[1], 1), (bare, 5)):
        wait_until(partial(is_said, world, response, value))
    wait_until(lambda: world.client.get(f"/v1/feedback?response={bare}").json["data"] != [])
    assert dry(world, window={"tags": ["a"]})["rejected"] == {"other_tags": 1}
    told = dry(world, window={"tags": ["a"], "feedback": {"name": "quality", "at_least": 3}})
    assert (told["accepted"], told["rejected"]) == (1, {"other_tags": 1, "feedback_below": 1})
    assert dry(world, window={"feedback": {"name": "tone"}})["rejected"] == {"no_feedback": 3}


def test_nothing_of_what_is_not_to_be_stored_is_tagged(world):
    world.client.post("/generate", {"prompt": "hi", "n": 2, "store": False, "metadata": {"tags": "a"}})
    assert world.groups(1)[0].tags == ()


def test_of_a_file(world):
    rows = b"".join(line(prompt=f"what is {i}", policy=None if i % 2 else "base") for i in range(20))
    file = uploaded(world.client, rows).json["id"]
    told = dry(world, training_file=file, n=2, method={"type": "bon_sft", "bon_sft": {"n": 2}})
    assert (told["accepted"], told["rejected"], told["is_whole"]) == (20, {}, True)
    estimating = dry(world, training_file=file, n=2, method={"type": "bon_forward_kl", "bon_forward_kl": {"n": 2}})
    assert (estimating["accepted"], estimating["rejected"]) == (10, {"other_policy": 10})


def test_of_a_file_whose_rewards_are_still_to_be_measured(world):
    rows = b"".join(line(prompt=f"what is {i}", rewards=None) for i in range(20))
    file = uploaded(world.client, rows).json["id"]
    told = dry(world, training_file=file, n=2, method={"type": "bon_sft", "bon_sft": {"n": 2}})
    assert (told["accepted"], told["rewards"], told["is_there_gain"]) == (20, None, None)
    assert codes(told) == ["window_too_small"]  # 2 tokens of two completions each


def test_how_long_it_takes_is_known_of_jobs_like_it(world):
    logged(world)
    asked = spec()
    unknown = world.client.post("/distill?dry_run=true", asked).json
    assert (unknown["expected_seconds"], unknown["expected_from_jobs"]) == (None, 0)
    with blocking_redis.Redis.from_url(world.redis_url) as client:
        made = {"spec": JobSpec.model_validate(asked).model_dump_json(), "tenant": "default"}
        newer = {"spec": json.dumps({**JobSpec.model_validate(asked).model_dump(mode="json"), "colour": "green"})}
        for i, (seconds, state, told) in enumerate(
            [(100, "succeeded", {}), (1, "failed", {}), (1, "succeeded", newer)]
        ):
            row = {**made, **told, "spent_ms": seconds * 1000, "state": state, "created_at": i}
            client.hset(job_key(f"job_{i:032}"), mapping=row)
            client.zadd(jobs_index(), {f"job_{i:032}": i})
    twice = {"type": "bon_forward_kl", "bon_forward_kl": {"n": 4, "steps": 400}}
    told = world.client.post("/distill?dry_run=true", {**asked, "method": twice}).json
    # The one that succeeded took 100 s for 200 steps, in however many attempts.
    assert (told["expected_seconds"], told["expected_from_jobs"]) == (200, 1)


@pytest.mark.anyio
async def test_a_second_one_at_a_time_is_told_to_come_back():
    nothing: Any = None
    runs = DryRuns(nothing, nothing, nothing, Path(), base_policy_id=BASE, reward_model_id=REWARD_MODEL,
                   reward_template_digest="", tokenizer=nothing)  # fmt: skip
    async with runs._busy:
        with pytest.raises(Overloaded):
            await asyncio.wait_for(runs.of(JobSpec.model_validate(spec()), "default"), 1)


def test_another_tenants_groups_are_not_read(world):
    logged(world, tenant="acme")
    assert dry(world)["groups_read"] == 0


def test_what_the_stream_has_no_more_is_read_from_the_archive(world, tmp_path):
    logged(world)
    before = dry(world)
    with blocking_redis.Redis.from_url(world.redis_url) as client:
        archive = Archive.at(archive_url("", tmp_path / "artefacts"))
        compaction = Compaction(client, archive, BATCHES_OF_TEN)
        compaction.open()
        while compaction.step(wait_seconds=0.01) is not None:
            pass
        assert client.xlen(LEDGER_STREAM) == 10  # The newest batch is hot.
    assert dry(world) == before
