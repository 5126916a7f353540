"""Several policy engines behind one gateway: who draws, what is tried again, who is left out (F1, F3, F4, F7, F9)."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from service.breaker import FAILED_CALLS
from tests.fixtures.gateway import Reply, World, gateway_settings, running_gateway
from tests.fixtures.waiting import wait_until
from tests.service.records import BASE, REWARD_MODEL
from tests.service.test_admin_routes import proven_candidate
from tests.stubs.engine import StubEngine
from tests.stubs.reward import StubReward
from tests.stubs.server import running

HI = {"prompt": "hi", "n": 2}
QUICK = {"canary_after_seconds": 0.5, "hung_after_seconds": 1.0}
PROMPTS = [f"{i} is where this prompt begins" for i in range(40)]
"""Some prefer each replica."""


@dataclass
class Pool:
    """A gateway and its engines, each of which can be stopped and started again."""

    world: World
    engines: list[StubEngine]
    running: list[ExitStack] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)

    def start(self, i: int, port: int = 0) -> None:
        self.urls[i] = self.running[i].enter_context(running(self.engines[i].app(), port))

    def start_again(self, i: int) -> None:
        self.start(i, urlsplit(self.urls[i]).port or 0)

    def stop(self, i: int) -> None:
        self.running[i].close()

    def post(self, path: str, body: object, **headers: str) -> Reply:
        return self.world.client.post(path, body, headers)

    def generate(self, prompt: str = "hi", **headers: str) -> Reply:
        return self.post("/generate", {"prompt": prompt, "n": 2}, **headers)

    def listed(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.world.client.get("/engines").json["data"]
        return rows

    def states(self) -> list[str]:
        return [row["state"] for row in self.listed()]

    def drawn(self, policy: str | None = None) -> list[int]:
        """Calls for candidates that each engine saw; of one policy."""
        return [
            sum(bool(body["stream"]) and policy in (None, body["model"]) for body in engine.requests)
            for engine in self.engines
        ]


@contextmanager
def running_pool(directory: Path, redis_url: str, count: int, **settings: Any) -> Iterator[Pool]:
    engines, reward = [StubEngine(BASE) for _ in range(count)], StubReward(REWARD_MODEL)
    with ExitStack() as stack:
        reward_url = stack.enter_context(running(reward.app()))
        each = [stack.enter_context(ExitStack()) for _ in engines]
        urls = [one.enter_context(running(engine.app())) for one, engine in zip(each, engines, strict=True)]
        told = gateway_settings(directory, urls[0], reward_url, redis_url, policy_engine_urls=urls, **settings)
        client = stack.enter_context(running_gateway(told))
        yield Pool(World(client, engines[0], reward, redis_url), engines, each, urls)


@pytest.fixture
def open_pool(tmp_path: Path, redis_url: str) -> Iterator[Callable[..., Pool]]:
    with ExitStack() as stack:
        yield lambda count, **settings: stack.enter_context(running_pool(tmp_path, redis_url, count, **settings))


def test_requests_go_where_their_prompt_belongs_and_all_engines_have_some(open_pool):
    pool = open_pool(2)
    for _ in range(2):
        for prompt in PROMPTS[:10]:
            assert pool.generate(prompt).status == 200
    seen = [{tuple(body["prompt"]) for body in engine.requests} for engine in pool.engines]
    assert seen[0] & seen[1] == set()
    assert all(seen)
    assert sum(pool.drawn()) == 20
    assert [row["outstanding_tokens"] for row in pool.listed()] == [0, 0]


@pytest.mark.slow
def test_one_prompt_of_everybody_is_spread_by_outstanding_tokens(open_pool):
    """12 requests of one prompt on 3 engines: the preferred one is given at most 1.25 · 4 and two more."""
    pool = open_pool(3)
    for engine in pool.engines:
        engine.script.delays = [3.0]
    with ThreadPoolExecutor(12) as threads:
        replies = [threads.submit(pool.generate) for _ in range(12)]
        wait_until(lambda: sum(engine.active for engine in pool.engines) == 12)
        active = [engine.active for engine in pool.engines]
        # 2 candidates of the route's 64 tokens behind a prompt of 2.
        assert [row["outstanding_tokens"] for row in pool.listed()] == [(2 * 64 + 2) * count for count in active]
        assert [reply.result().status for reply in replies] == [200] * 12
    assert max(active) <= 7
    assert min(active) >= 1


# --- what is tried again ---------------------------------------------------------------------------------


def test_an_engine_that_is_not_there_costs_nobody_an_answer(open_pool):
    """F1 with a second engine: refused, drawn by the other; after five the breaker keeps the rest away."""
    pool = open_pool(2)
    pool.stop(0)
    for prompt in PROMPTS:
        assert pool.generate(prompt).status == 200
    assert pool.drawn()[1] == len(PROMPTS)
    assert pool.states() == ["open", "ok"]
    assert pool.listed()[0]["reason"] == "the policy engine cannot be reached"
    assert [group.requested for group in pool.world.groups(len(PROMPTS))] == [2] * len(PROMPTS)


def test_a_full_engine_is_passed_over_and_not_stormed(open_pool):
    """F7: 40 requests, of which the full engine saw five: no more than 1.125 requests for one."""
    pool = open_pool(2)
    pool.engines[0].script.fault = "busy"
    for prompt in PROMPTS:
        assert pool.generate(prompt).status == 200
    assert pool.drawn() == [FAILED_CALLS, len(PROMPTS)]


def test_when_all_are_full_each_was_asked_once_and_the_answer_is_503(open_pool):
    pool = open_pool(3)
    for engine in pool.engines:
        engine.script.fault = "busy"
    reply = pool.generate()
    assert (reply.status, reply.json["error"]["code"]) == (503, "engine_unavailable")
    assert reply.headers["retry-after"] == "1"
    assert pool.drawn() == [1, 1, 1]


def test_an_engine_that_does_not_know_the_model_is_passed_over_and_is_no_broken_one(open_pool):
    pool = open_pool(2)
    pool.engines[0].script.models = []
    for prompt in PROMPTS[:20]:
        assert pool.generate(prompt).status == 200
    assert pool.states() == ["ok", "ok"]
    assert pool.drawn()[1] == 20


@pytest.mark.parametrize("fault", ["error", "cut", "no_end", "garbage", "one_missing"])
def test_what_an_engine_accepted_is_never_drawn_again(open_pool, fault):
    """F4: 502, though the other engine is idle and well."""
    pool = open_pool(2)
    for engine in pool.engines:
        engine.script.fault = fault
    reply = pool.generate()
    assert (reply.status, reply.json["error"]["code"]) == (502, "engine_broken")
    assert sorted(pool.drawn()) == [0, 1]


# --- the breaker -----------------------------------------------------------------------------------------


def test_five_failures_open_it_and_then_nothing_is_sent(open_pool):
    """F1 with one engine: 503 at once, and no connection spent on it."""
    pool = open_pool(1)
    pool.engines[0].script.fault = "busy"
    replies = [pool.generate() for _ in range(20)]
    assert {(reply.status, reply.json["error"]["code"]) for reply in replies} == {(503, "engine_unavailable")}
    assert pool.drawn() == [FAILED_CALLS]
    assert pool.states() == ["open"]
    ready = pool.world.client.get("/ready")
    assert (ready.status, ready.json["engines"]) == (503, {"in_rotation": 0, "of": 1})
    assert ready.json["engine"] == "the policy engine has no room for this request now"
    assert pool.world.records() == []


@pytest.mark.slow
def test_a_refused_connection_is_answered_in_a_tenth_of_a_second(open_pool):
    """By the quickest of three: the machine may be busy."""
    pool = open_pool(1)
    pool.stop(0)
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        reply = pool.generate()
        seconds.append(time.monotonic() - started)
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    assert min(seconds) < 0.1


def test_a_canary_finds_out_that_it_is_well_again(open_pool):
    pool = open_pool(1)
    pool.engines[0].script.fault = "error"
    for _ in range(FAILED_CALLS):
        assert pool.generate().status == 502
    assert pool.generate().status == 503
    pool.engines[0].script.fault = "none"
    wait_until(lambda: pool.states() == ["ok"])
    assert pool.engines[0].num_canaries >= 1
    assert pool.generate().status == 200


@pytest.mark.parametrize(("fault", "timeout_ms", "status"), [("refused", 10_000, 502), ("silent", 20, 504)])
def test_a_refused_request_and_a_short_deadline_do_not_take_the_engine_from_others(
    open_pool, fault, timeout_ms, status
):
    pool = open_pool(1)
    pool.engines[0].script.fault = fault
    for _ in range(2 * FAILED_CALLS):
        assert pool.post("/generate", {**HI, "timeout_ms": timeout_ms}).status == status
    assert pool.states() == ["ok"]
    pool.engines[0].script.fault = "none"
    assert pool.generate().status == 200


def test_clients_that_leave_do_not_open_it(open_pool):
    pool = open_pool(1)
    engine = pool.engines[0]
    engine.script.delays = [30.0]
    for _ in range(2 * FAILED_CALLS):
        connection = socket.create_connection(pool.world.client.address, timeout=10)
        connection.sendall(pool.world.client.written("POST", "/generate", b'{"prompt": "hi", "n": 2}'))
        wait_until(lambda: engine.active == 1)
        connection.close()
        wait_until(lambda: engine.active == 0)
    assert pool.states() == ["ok"]
    assert pool.drawn() == [2 * FAILED_CALLS]


# --- a hung engine ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hung_engine_leaves_the_rotation_in_time_and_returns_when_it_gives_a_token(open_pool):
    """F3: it lists its models and never samples. No request is sent to it once it is known."""
    pool = open_pool(2, **QUICK)
    wait_until(lambda: pool.engines[0].num_canaries >= 2)
    assert pool.states() == ["ok", "ok"]
    pool.engines[0].script.fault = "silent"
    last_token = time.monotonic()
    wait_until(lambda: pool.states() == ["hung", "ok"])
    assert time.monotonic() - last_token < QUICK["hung_after_seconds"] + 0.4
    for prompt in PROMPTS[:20]:
        assert pool.generate(prompt).status == 200
    assert pool.drawn() == [0, 20]
    ready = pool.world.client.get("/ready")
    assert (ready.status, ready.json["status"]) == (200, "degraded")
    assert ready.json["engines"] == {"in_rotation": 1, "of": 2}
    pool.engines[0].script.fault = "none"
    wait_until(lambda: pool.states() == ["ok", "ok"])


def test_canaries_are_no_traffic(open_pool):
    pool = open_pool(1, **QUICK)
    wait_until(lambda: pool.engines[0].num_canaries >= 3)
    assert pool.generate().status == 200
    assert [group.prompt for group in pool.world.groups()] == ["hi"]
    assert len(pool.world.records()) == 1
    assert pool.drawn() == [1]


# --- draining --------------------------------------------------------------------------------------------


def test_a_drained_engine_finishes_what_it_has_and_gets_nothing_more(open_pool):
    pool = open_pool(2)
    pool.engines[0].script.delays = pool.engines[1].script.delays = [0.5]
    with ThreadPoolExecutor(1) as thread:
        running_one = thread.submit(pool.generate)
        wait_until(lambda: sum(engine.active for engine in pool.engines) == 1)
        at_work = [engine.active for engine in pool.engines].index(1)
        drained = pool.post(f"/engines/policy-{at_work}/drain", {})
        assert (drained.status, drained.json["state"], drained.json["reason"]) == (200, "draining", "it is drained")
        assert drained.json["outstanding_tokens"] > 0
        before = pool.drawn()[at_work]
        for engine in pool.engines:
            engine.script.delays = [0.0]
        for prompt in PROMPTS[:10]:
            assert pool.generate(prompt).status == 200
        assert running_one.result().status == 200
    assert pool.drawn()[at_work] == before
    assert pool.listed()[at_work]["outstanding_tokens"] == 0
    assert pool.post(f"/engines/policy-{at_work}/undrain", {}).json["state"] == "ok"
    assert pool.generate().status == 200
    assert pool.drawn()[at_work] == before + 1


def test_with_every_engine_drained_the_gateway_is_not_ready(open_pool):
    pool = open_pool(1)
    pool.post("/engines/policy-0/drain", {})
    assert pool.generate().json["error"]["code"] == "engine_unavailable"
    ready = pool.world.client.get("/ready")
    assert (ready.status, ready.json["engine"]) == (503, "it is drained")


def test_an_engine_nobody_knows_is_404(open_pool):
    pool = open_pool(1)
    for action in ("drain", "undrain"):
        reply = pool.post(f"/engines/policy-7/{action}", {})
        assert (reply.status, reply.json["error"]["code"]) == (404, "engine_not_found")


def test_the_list_says_how_each_engine_does(open_pool):
    pool = open_pool(2)
    wait_until(lambda: [row["policies"] for row in pool.listed()] == [[BASE], [BASE]])
    assert [row["id"] for row in pool.world.client.get("/engines?after=policy-0").json["data"]] == ["policy-1"]
    assert pool.world.client.get("/engines?limit=0").status == 422
    first = pool.listed()[0]
    assert (first["object"], first["id"], first["state"], first["reason"]) == ("engine", "policy-0", "ok", None)
    assert 0 <= time.time() - first["since"] < 60


# --- policies over replicas ------------------------------------------------------------------------------


def forced(pool: Pool, policy: str, prompt: str = "hi") -> Reply:
    return pool.post("/generate", {"prompt": prompt, "n": 1}, **{"x-bonsai-arm": f"{policy}:1"})


def test_a_policy_is_drawn_only_where_it_was_proved(open_pool, tmp_path):
    """The second engine loads the adapter and answers with other weights under its name."""
    pool = open_pool(2)
    pool.engines[1].script.logprob = -1.5
    student = proven_candidate(pool.world, tmp_path)
    wait_until(lambda: pool.engines[1].script.models == [BASE] and len(pool.engines[1].requests) > 0)
    for prompt in PROMPTS[:20]:
        assert forced(pool, student, prompt).json["policy"] == student
    assert pool.drawn(student) == [20, 0]
    assert [student in row["policies"] for row in pool.listed()] == [True, False]
    assert pool.world.client.get(f"/policies/{student}").json["state"] == "candidate"


def test_a_restart_that_forgets_costs_no_answer_and_the_policy_comes_back_by_itself(open_pool, tmp_path):
    """F9: one of two engines dies, and its next life knows only the base."""
    pool = open_pool(2)
    student = proven_candidate(pool.world, tmp_path)
    wait_until(lambda: all(student in row["policies"] for row in pool.listed()))
    pool.stop(0)
    pool.engines[0].script.models = [BASE]
    assert all(forced(pool, student, prompt).status == 200 for prompt in PROMPTS[:5])
    pool.start_again(0)
    assert all(forced(pool, student, prompt).status == 200 for prompt in PROMPTS[5:20])
    assert pool.world.client.get(f"/policies/{student}").json["served"]
    wait_until(lambda: student in pool.listed()[0]["policies"])
    assert pool.engines[0].script.models == [BASE, student]


def test_adapters_forgotten_without_a_word_are_not_answered_for_by_the_base(open_pool, tmp_path):
    """F9 with one engine: from the first request on it is refused, until it was proved again."""
    pool = open_pool(1)
    student = proven_candidate(pool.world, tmp_path)
    pool.engines[0].script.models.remove(student)
    reply = forced(pool, student)
    assert (reply.status, reply.json["error"]["code"]) == (503, "policy_not_served")
    wait_until(partial(is_served, pool, student))
    assert pool.drawn(BASE) == [0]


def is_served(pool: Pool, policy: str) -> bool:
    return forced(pool, policy).status == 200
