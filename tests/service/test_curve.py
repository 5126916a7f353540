"""The n-curve of a route: against every subset of the draws, from real requests, and what cannot tell of it."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from zlib import compress

import numpy as np
import pytest
import redis

from archive.reading import Archive
from archive.storage import archive_url
from bon_algos.contracts import LEDGER_STREAM, Interval, Sampling
from service.curve import Curve, Curves
from service.ledger_reading import PAGE_ENTRIES
from service.store import open_redis
from tests.service.records import BASE, REWARD_MODEL, STUDENT, group, route
from worker.compaction import Compaction, Limits

CURVE = "/routes/default/curve"
ALL_TRIMMED = Limits(entries=10_000, bytes=2**30, seconds=0.0, hot_groups=0, hot_seconds=0.0)
ALL_HOT = Limits(entries=10_000, bytes=2**30, seconds=0.0, hot_groups=1000, hot_seconds=0.0)


def logged(world, *groups) -> None:
    with redis.Redis.from_url(world.redis_url) as store:
        for one in groups:
            data = compress(one.model_dump_json().encode())
            store.xadd(LEDGER_STREAM, {"kind": one.kind, "id": one.id, "data": data})


def archived(url: str, archive: Archive, limits: Limits) -> int:
    """Entries that the stream still has when all are in the archive."""
    with redis.Redis.from_url(url) as store:
        compaction = Compaction(store, archive, limits)
        compaction.open()
        while compaction.step(wait_seconds=0.01) is not None:
            pass
        return int(store.xlen(LEDGER_STREAM))


def drawn(identity: str, prompt: int, rewards, **changes):
    """A group of the base policy, of one token each."""
    fields = {"id": identity, "prompt_token_ids": (1, prompt), **changes}
    return group([(reward, 1) for reward in rewards]).model_copy(update=fields)


def test_the_curve_is_the_mean_over_all_subsets(world):
    """Two groups of one prompt and one of another: the two are averaged first. The mean over all k-subsets of what
    best-of-k would serve from them is the estimate, by definition."""
    rows = {1: [[3.0, 1.0, 2.0, 5.0], [0.0, 0.0, 4.0, 1.0]], 2: [[7.0, 7.0, 6.0, 9.0]]}
    logged(world, *(drawn(f"g{p}{i}", p, row) for p, own in rows.items() for i, row in enumerate(own)))
    reply = world.client.get(CURVE)
    assert reply.status == 200
    body = reply.json
    assert (body["n"], body["groups"], body["prompts"], body["skipped"]) == (4, 3, 2, {})
    for k, point in enumerate(body["points"], start=1):
        of_prompt = [
            np.mean([np.mean([max(subset) for subset in combinations(row, k)]) for row in own]) for own in rows.values()
        ]
        assert point["k"] == k
        assert point["reward"]["mean"] == pytest.approx(np.mean(of_prompt))
        # Student's t of one degree, of two prompts: 12.706
        reach = 12.706 * abs(of_prompt[0] - of_prompt[1]) / 2
        assert point["reward"]["high"] - point["reward"]["mean"] == pytest.approx(reach, rel=1e-4)


def test_a_truncated_candidate_counts_only_where_there_is_nothing_else(world):
    cut = drawn("a", 1, [9.0, 1.0])
    shortened = cut.candidates[0].model_copy(update={"finish_reason": "length"})
    cut = cut.model_copy(update={"candidates": (shortened, cut.candidates[1])})
    logged(world, cut, drawn("b", 2, [0.0, 0.0]))
    means = [point["reward"]["mean"] for point in world.client.get(CURVE).json["points"]]
    assert means == [(5.0 + 0.0) / 2, (1.0 + 0.0) / 2]


def test_what_was_served_is_what_the_curve_tells_of(world):
    world.engine.script.completions = ["a", "bbb", "cc", "dddd"]
    for prompt in ("hi", "ho"):
        assert world.client.post("/generate?n=4", {"prompt": prompt}).status == 200
    world.client.post("/generate?n=2", {"prompt": "hi"})
    world.groups(3)
    body = world.client.get(CURVE).json
    assert (body["policy"], body["reward_model"], body["n"], body["skipped"]) == (BASE, REWARD_MODEL, 4, {"other_n": 1})
    # The stub's reward is 8 more than the length. Of 1, 2, 3, 4: 2.5 in the mean, 4 at best.
    assert [body["points"][k]["reward"]["mean"] for k in (0, 3)] == [10.5, 12.0]
    assert [point["candidate_tokens"] for point in body["points"]] == [2.5, 5.0, 7.5, 10.0]


def test_groups_that_cannot_tell_are_counted_by_reason(world):
    logged(
        world,
        drawn("a", 1, [1.0, 2.0]),
        drawn("b", 2, [1.0, 2.0]),
        drawn("c", 3, [1.0, 2.0], policy_id=STUDENT),
        drawn("d", 3, [1.0, 2.0], reward_model_id="rm-" + "9" * 16),
        drawn("e", 3, [1.0, 2.0], sampling=Sampling(max_tokens=9, temperature=0.5)),
        drawn("f", 3, [1.0, None]),
        drawn("g", 3, [1.0, 2.0, 3.0]),
        drawn("h", 3, [1.0, 2.0], store=False),
        drawn("i", 3, [1.0, 2.0], route="another"),
    )
    body = world.client.get(CURVE).json
    reasons = ("other_policy", "other_reward_model", "changed_law", "incomplete", "other_n", "not_stored")
    assert body["skipped"] == dict.fromkeys(reasons, 1)
    assert body["groups"] == 2
    assert world.client.get(f"{CURVE}?groups=1").status == 409
    assert world.client.get(f"{CURVE}?n=3").json["error"]["code"] == "too_few_groups"


def test_a_record_of_another_version_is_counted_and_takes_the_curve_from_nobody(world):
    logged(world, drawn("a", 1, [9.0, 1.0]), drawn("b", 2, [0.0, 0.0]))
    with redis.Redis.from_url(world.redis_url) as store:
        for data in (b"not even compressed", compress(b'{"kind": "group", "schema_version": 99}')):
            store.xadd(LEDGER_STREAM, {"kind": "group", "id": "x", "data": data})
    body = world.client.get(CURVE).json
    assert (body["groups"], body["skipped"]) == (2, {"unreadable": 2})


def test_groups_that_the_stream_has_no_more_are_found_in_the_archive(world, tmp_path: Path):
    logged(world, *(drawn(f"g{i}", i % 5, [float(i), 1.0, 2.0]) for i in range(30)))
    before = world.client.get(CURVE).json
    archive = Archive.at(archive_url("", tmp_path / "artefacts"))
    assert archived(world.redis_url, archive, ALL_TRIMMED) == 0
    assert world.client.get(CURVE).json == before
    logged(world, *(drawn(f"h{i}", i % 5, [0.0, 0.0, 0.0]) for i in range(3)))
    body = world.client.get(f"{CURVE}?groups=32").json
    assert (body["groups"], before["groups"]) == (32, 30)


def test_an_archive_that_does_not_answer_is_503(world, tmp_path: Path):
    logged(world, drawn("a", 1, [9.0, 1.0]), drawn("b", 2, [0.0, 0.0]))
    root = tmp_path / "artefacts" / "ledger" / "_manifest"
    root.mkdir(parents=True, exist_ok=True)
    (root / "root.e1.json").write_text("damaged")
    reply = world.client.get(CURVE)
    assert (reply.status, reply.json["error"]["code"]) == (503, "archive_unavailable")


def test_groups_of_another_n_do_not_take_the_place_of_those_of_the_most_frequent_one(world):
    """Every other group is of 2: a page has fewer of 3 than are wanted, and more of both."""
    logged(world, *(drawn(f"g{i}", i, [1.0, 2.0, 3.0] if i % 2 else [1.0, 2.0]) for i in range(2 * PAGE_ENTRIES)))
    body = world.client.get(f"{CURVE}?groups={PAGE_ENTRIES * 3 // 4}").json
    assert (body["n"], body["groups"]) == (3, PAGE_ENTRIES * 3 // 4)


@pytest.mark.anyio
async def test_a_flood_of_another_route_hides_nothing_and_is_not_read(redis_url: str, tmp_path: Path):
    """All of it is hot, and archived: what is archived is read from there, route by route."""
    own = [drawn(f"g{i}", i, [1.0, float(i)]) for i in range(4)]
    flood = [drawn(f"f{i}", 1, [1.0], route="another") for i in range(3 * PAGE_ENTRIES)]
    archive = Archive.at(str(tmp_path / "archive"))
    with redis.Redis.from_url(redis_url) as store:
        for one in (*own, *flood):
            store.xadd(LEDGER_STREAM, {"kind": "group", "id": one.id, "data": compress(one.model_dump_json().encode())})
        assert archived(redis_url, archive, ALL_HOT) == len(own) + len(flood)
        before = pages_read(store)
        async with open_redis(redis_url, in_bytes=True) as of_bytes:
            curve = await Curves(of_bytes, archive).of(route(), num_groups=4, n=None)
        assert (curve.groups, pages_read(store) - before) == (4, 1)


def pages_read(store: redis.Redis) -> int:
    """Of the stream, by anybody."""
    told = store.info("commandstats")
    return int(told["cmdstat_xrevrange"]["calls"]) if "cmdstat_xrevrange" in told else 0


def test_the_smallest_n_within_a_loss():
    """Of a gain of 10: best-of-2 misses 4, best-of-3 misses 1 and perhaps 3."""
    missing = tuple(Interval(mean=mean, low=mean, high=high) for mean, high in ((10, 12), (4, 5), (1, 3), (0, 0)))
    curve = Curve(4, 2, 2, {}, missing, missing, 1.0)
    assert [curve.smallest(loss, is_sure=False) for loss in (1.0, 0.4, 0.39, 0.1, 0.05, 0.0)] == [1, 2, 3, 3, 4, 4]
    assert [curve.smallest(loss, is_sure=True) for loss in (1.0, 0.5, 0.3, 0.1)] == [2, 2, 3, 4]


def test_without_a_gain_one_sample_is_enough():
    worse = tuple(Interval(mean=mean, low=mean, high=mean) for mean in (-1.0, 0.0))
    assert Curve(2, 2, 2, {}, worse, worse, 1.0).smallest(0.05, is_sure=False) == 1


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ("groups=0", 422, "groups"),
        ("groups=5001", 422, "groups"),
        ("n=1", 422, "n"),
        ("n=65", 422, "n"),
        ("loss=1.1", 422, "loss"),
        ("loss=-0.1", 422, "loss"),
        ("loss=nan", 422, "loss"),
        ("k=3", 422, "k"),
        ("", 409, None),
    ],
)
def test_a_curve_that_cannot_be_drawn_says_why(world, query, status, param):
    reply = world.client.get(f"{CURVE}?{query}")
    assert (reply.status, reply.json["error"]["param"]) == (status, param)


def test_an_unknown_route_has_no_curve(world):
    assert world.client.get("/routes/nobody/curve").json["error"]["code"] == "route_not_found"
