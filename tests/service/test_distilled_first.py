"""One sample of the live policy first: when it is the answer, and when best-of-n is drawn beside it."""

from __future__ import annotations

from pathlib import Path
from zlib import compress

import pytest
import redis

from bon_algos.contracts import LEDGER_STREAM
from service.strategies import share_of
from tests.fixtures.gateway import World
from tests.fixtures.waiting import wait_until
from tests.service.records import BASE, group
from tests.service.strategy_world import HI, ROUTE, N, chunks_of, from_the_second_wave, gateway, known
from tests.service.test_admin_routes import proven_candidate, send

__all__ = ["gateway"]


def distilled(world: World, root: Path, **changes: object) -> str:
    """A student is live on the default route, whose strategy asks it first."""
    world.engine.script.logprob = -0.5
    student = proven_candidate(world, root)
    send(world, "POST", f"/policies/{student}/promote", {"override_reason": "by hand"})
    settled = {**ROUTE, "strategy": "distilled_first", **changes}
    assert send(world, "PUT", "/routes/default", settled).status == 200
    return student


def log_probes(world: World, student: str, samples: list[float], bests: list[float]) -> None:
    with redis.Redis.from_url(world.redis_url) as store, store.pipeline() as pipe:
        for i, (sample, best) in enumerate(zip(samples, bests, strict=True)):
            one = group([(sample, 4), *[(best - 1.0, 4)] * (N - 1), (best, 4)])
            marked = one.candidates[0].model_copy(update={"policy_id": student})
            one = one.model_copy(
                update={"id": f"p{i}", "stop_reason": "probe", "candidates": (marked, *one.candidates[1:])}
            )
            data = compress(one.model_dump_json().encode())
            pipe.xadd(LEDGER_STREAM, {"kind": "group", "id": one.id, "data": data})
        pipe.execute()


def test_until_the_threshold_is_known_every_request_is_a_probe(gateway, tmp_path):
    world = gateway()
    student = distilled(world, tmp_path)
    world.engine.script.completions = ["1.0", "3.0"]
    asked_before = len(world.engine.requests)
    body = world.client.post("/generate", {**HI, "return_candidates": True}).json
    requests = world.engine.requests[asked_before:]
    assert [(request["model"], request["n"]) for request in requests] == [(student, 1), (BASE, N)]
    assert (body["completion"], body["policy"]) == ("3.0", BASE)
    assert (body["selection"]["strategy"], body["selection"]["stop_reason"]) == ("distilled_first", "probe")
    assert [choice["policy"] for choice in body["choices"]] == [student, *[BASE] * N]
    # One more candidate than fixed best-of-n draws, of three tokens.
    assert body["selection"]["tokens_saved"] == -3
    [logged] = world.groups()
    assert [one.policy_id for one in logged.candidates] == [student, *[None] * N]
    assert not logged.is_unbiased


def test_above_the_threshold_the_sample_is_the_answer(gateway, tmp_path):
    """Samples of 1, 2, …, 120 with a best of 100 beside each. In all the bests are 12,000 − 7,260 = 4,740 above the
    samples, half of it is 2,370. Escalating the lowest 27 gains 2,700 − 378 = 2,322, the lowest 28 gains 2,394."""
    world = gateway()
    student = distilled(world, tmp_path, kept_gain=0.5)
    log_probes(world, student, [float(i) for i in range(1, 121)], [100.0] * 120)
    # Learned when the route is read anew.
    wait_until(lambda: known(world)["distilled_first"] is not None)
    wait_until(lambda: known(world)["probes"] == 120)
    assert known(world)["distilled_first"] == {"threshold": 29.0, "escalated_share": 28 / 120}
    world.engine.script.completions = ["29.0", "50.0"]
    reply = world.client.post("/generate", HI)
    body = reply.json
    assert (body["completion"], body["policy"], body["arm"]) == ("29.0", student, f"{BASE}:{N}")
    assert reply.headers["x-bonsai-policy"] == student
    assert (body["reward"], body["selection"]["status"]) == (29.0, "single")
    assert body["selection"]["stop_reason"] == "above_threshold"
    assert body["selection"]["tokens_saved"] == 4 * (N - 1)
    # Of the fifth of the pairs nearest to 29, 24 of them, 18 to 40 or 41 say what was missed: about 71.
    assert body["selection"]["given_up"] == pytest.approx(71, abs=1)
    world.engine.script.completions = ["28.9", "50.0"]
    body = world.client.post("/generate", HI).json
    assert (body["completion"], body["policy"], body["selection"]["stop_reason"]) == ("50.0", BASE, "below_threshold")
    world.engine.script.completions = ["28.9", "1.0"]
    body = world.client.post("/generate", HI).json
    assert (body["completion"], body["policy"]) == ("28.9", student)  # the sample counts as candidate 0


def test_a_truncated_sample_is_escalated_whatever_its_reward(gateway, tmp_path):
    world = gateway()
    student = distilled(world, tmp_path)
    log_probes(world, student, [float(i) for i in range(120)], [100.0] * 120)
    wait_until(lambda: known(world)["distilled_first"] is not None)
    world.engine.script.completions = ["999.0", "50.0"]
    world.engine.script.finish_reasons = ["length", "stop"]
    body = world.client.post("/generate", HI).json
    assert (body["completion"], body["selection"]["stop_reason"]) == ("50.0", "below_threshold")


def test_an_escalation_that_fails_leaves_the_sample(gateway, tmp_path):
    world = gateway()
    student = distilled(world, tmp_path)
    from_the_second_wave(world, lambda: setattr(world.engine.script, "fault", "busy"))
    body = world.client.post("/generate", HI).json
    assert (body["completion"], body["policy"]) == ("-1.5", student)
    assert (body["selection"]["status"], body["selection"]["stop_reason"]) == ("partial", "wave_failed")
    assert body["selection"]["strategy"] == "distilled_first"
    assert body["candidates"] == {"requested": 1 + N, "finished": 1, "scored": 1, "failed": {"engine_error": N}}


def test_a_policy_that_goes_live_is_learned_about_anew(gateway, tmp_path):
    """Probes of another policy tell nothing of it."""
    world = gateway()
    log_probes(world, "pol-" + "9" * 16, [float(i) for i in range(120)], [100.0] * 120)
    student = distilled(world, tmp_path)
    log_probes(world, student, [0.0] * 100, [1.0] * 100)
    wait_until(lambda: known(world)["distilled_first"] is not None)
    assert known(world)["probes"] == 100


def test_a_stream_names_the_policy_that_answered(gateway, tmp_path):
    world = gateway()
    student = distilled(world, tmp_path)
    world.engine.script.completions = ["3.0", "1.0"]
    asked = {"model": "default", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 16}
    reply = world.client.post("/v1/chat/completions", asked)
    assert "x-bonsai-policy" not in reply.headers
    chunks = chunks_of(reply)
    # 3.0 ties with the base's first: the earliest wins, which is the student's.
    assert {chunk["model"] for chunk in chunks} == {student}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks[:-1]) == "3.0"


@pytest.mark.parametrize(("best", "winner"), [("1.0", "3.0"), ("4.25", "4.25")])
def test_log_probs_are_of_whoever_answered(gateway, tmp_path, best, winner):
    world = gateway()
    distilled(world, tmp_path)
    world.engine.script.completions = ["3.0", best]
    asked = {"model": "default", "prompt": "hi", "max_tokens": 16, "logprobs": 0}
    [choice] = world.client.post("/v1/completions", asked).json["choices"]
    assert choice["text"] == winner
    assert choice["logprobs"]["tokens"] == list(winner)
    assert choice["logprobs"]["token_logprobs"] == [-0.5] * len(winner)


def test_a_reward_model_that_is_away_leaves_the_sample(gateway, tmp_path):
    world = gateway()
    student = distilled(world, tmp_path)
    world.engine.script.completions = ["3.0"]
    world.reward.script.fault = "error"
    body = world.client.post("/generate", HI).json
    assert (body["completion"], body["policy"], body["reward"]) == ("3.0", student, None)
    assert (body["selection"]["status"], body["selection"]["stop_reason"]) == ("reward_failed", "wave_failed")


def test_the_holdout_of_distilled_first_is_the_base_policys(gateway, tmp_path):
    world = gateway(holdout_share=0.5)
    distilled(world, tmp_path)
    world.engine.script.completions = ["3.0"]
    bodies = [world.client.post("/generate", HI).json for _ in range(12)]
    held_out = [body for body in bodies if share_of(body["id"]) < 0.5]
    assert 0 < len(held_out) < 12  # else: one in two thousand
    assert {(body["arm"], body["selection"]["stop_reason"]) for body in held_out} == {(f"{BASE}:{N}", "holdout")}
    assert {group.id for group in world.groups(12) if group.is_unbiased} == {body["id"] for body in held_out}


def test_without_a_live_policy_best_of_n_answers(gateway):
    world = gateway()
    world.engine.script.completions = ["3.0"]
    send(world, "PUT", "/routes/default", {**ROUTE, "strategy": "distilled_first"})
    body = world.client.post("/generate", HI).json
    assert (body["candidates"]["requested"], body["selection"]["strategy"]) == (N, "fixed")
    assert "no live policy" in body["warnings"][0]
