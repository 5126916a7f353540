"""Engines that come and go, restart, hang and lie while gateways publish to them and answer from them.

Rows of the fault matrix: F1 (an engine that is not there), F3 (hung), F9 (adapters forgotten), F10 (cannot be loaded).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from service.fleet import MOST_ENGINES, read_engines, together
from service.fleet import Fleet as Followed
from tests.fixtures.gateway import Client, Reply, World, gateway_settings, running_gateway
from tests.fixtures.waiting import wait_until
from tests.service.records import BASE, REWARD_MODEL
from tests.service.test_admin_routes import proven_candidate
from tests.stubs.engine import StubEngine
from tests.stubs.reward import StubReward
from tests.stubs.server import running

URL = "http://127.0.0.1:7001"
PROMPTS = [f"{i} is where this prompt begins" for i in range(20)]
"""Some prefer each replica."""


# --- the file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not JSON"),
        ("[]", "valid dictionary"),
        (json.dumps({"Engine": URL}), "should match pattern"),
        (json.dumps({"a": "http://10.0.0.7:8000"}), "never over a network"),
        (json.dumps({"a": "http://169.254.169.254:80"}), "never over a network"),
        (json.dumps({"a": "file:///etc/passwd"}), "never over a network"),
        (json.dumps({f"e{i}": f"http://127.0.0.1:{i}" for i in range(1, MOST_ENGINES + 2)}), "at most 64"),
        (" " * 70_000, "longer than 65536 bytes"),
    ],
)
def test_a_file_that_does_not_say_which_engines_is_refused_with_what_is_wrong(tmp_path: Path, content: str, told: str):
    file = tmp_path / "engines.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=told):
        read_engines(file)


def test_engines_of_the_file_stand_beside_those_of_the_settings(tmp_path: Path):
    file = tmp_path / "engines.json"
    file.write_text(json.dumps({"a": "unix:///run/a.sock"}))
    assert together({"policy-0": URL}, file) == {"policy-0": URL, "a": "unix:///run/a.sock"}
    for clash in ({"policy-0": "unix:///run/a.sock"}, {"a": URL}):
        file.write_text(json.dumps(clash))
        with pytest.raises(ValueError, match="there already"):
            together({"policy-0": URL}, file)


class Members:
    """Who was admitted and who has left, in that order."""

    def __init__(self) -> None:
        self.told: list[str] = []

    @asynccontextmanager
    async def admit(self, name: str, url: str) -> AsyncIterator[None]:
        self.told.append(f"+{name} {url}")
        yield
        self.told.append(f"-{name} {url}")


@pytest.mark.anyio
async def test_who_is_new_joins_who_is_gone_leaves_who_moved_does_both_and_a_broken_file_changes_nothing(
    tmp_path: Path,
):
    file, members = tmp_path / "engines.json", Members()
    file.write_text("{}")
    async with asyncio.TaskGroup() as tasks:
        fleet = Followed({"policy-0": URL}, file, members.admit, tasks)
        await fleet.follow()
        assert members.told == [f"+policy-0 {URL}"]
        for content, told in (
            ({"a": "unix:///a"}, ["+a unix:///a"]),
            ({"a": "http://10.0.0.7:80"}, []),
            ({"a": "unix:///a", "b": "unix:///b"}, ["+b unix:///b"]),
            ({"b": "unix:///c"}, ["-a unix:///a", "-b unix:///b", "+b unix:///c"]),
        ):
            members.told.clear()
            file.write_text(json.dumps(content))
            await fleet.follow()
            await asyncio.sleep(0)
            assert sorted(members.told) == sorted(told)
        file.unlink()
        members.told.clear()
        await fleet.follow()
        assert members.told == []
        fleet.dismiss()


# --- a gateway and its engines ---------------------------------------------------------------------------


@dataclass
class Fleet:
    """Engines e0, e1, …, those of them that the file names, and gateways in front of them."""

    directory: Path
    redis_url: str
    stack: ExitStack
    engines: list[StubEngine] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    running: list[ExitStack] = field(default_factory=list)
    gateways: list[Client] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.directory / "engines.json"

    @property
    def world(self) -> World:
        return World(self.gateways[0], self.engines[0], StubReward(REWARD_MODEL), self.redis_url)

    def engine(self) -> int:
        """Another engine, which runs and which nobody knows of."""
        self.engines.append(StubEngine(BASE))
        self.running.append(self.stack.enter_context(ExitStack()))
        self.urls.append("")
        self.start(len(self.engines) - 1)
        return len(self.engines) - 1

    def start(self, i: int) -> None:
        port = urlsplit(self.urls[i]).port or 0 if self.urls[i] else 0
        self.urls[i] = self.running[i].enter_context(running(self.engines[i].app(), port))

    def stop(self, i: int) -> None:
        self.running[i].close()

    def name(self, *engines: int) -> None:
        """Say in the file that these are the engines beside e0, which the settings name."""
        aside = self.file.with_suffix(".new")
        aside.write_text(json.dumps({f"e{i}": self.urls[i] for i in engines}))
        aside.rename(self.file)

    def gateway(self, **settings: Any) -> Client:
        reward_url = self.stack.enter_context(running(StubReward(REWARD_MODEL).app()))
        told = gateway_settings(
            self.directory,
            self.urls[0],
            reward_url,
            self.redis_url,
            policy_engines_file=self.file,
            spool=self.directory / f"spool-{len(self.gateways)}",
            **settings,
        )
        self.gateways.append(self.stack.enter_context(running_gateway(told)))
        return self.gateways[-1]

    def student(self) -> str:
        return proven_candidate(self.world, self.directory)

    def listed(self, gateway: int = 0) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in self.gateways[gateway].get("/engines").json["data"]}

    def holders(self, policy: str, gateway: int = 0) -> set[str]:
        return {name for name, row in self.listed(gateway).items() if policy in row["policies"]}

    def adapter(self, engine: str, policy: str) -> dict[str, Any]:
        return next(row for row in self.listed()[engine]["adapters"] if row["policy"] == policy)

    def ask(self, policy: str, prompt: str = "hi", gateway: int = 0) -> Reply:
        headers = {"x-bonsai-arm": f"{policy}:1"}
        return self.gateways[gateway].post("/generate", {"prompt": prompt, "n": 1}, headers)

    def drawn(self, i: int, policy: str) -> int:
        return sum(bool(body["stream"]) and body["model"] == policy for body in self.engines[i].requests)


@pytest.fixture
def fleet(tmp_path: Path, redis_url: str) -> Iterator[Fleet]:
    with ExitStack() as stack:
        found = Fleet(tmp_path, redis_url, stack)
        found.engine()
        found.name()
        yield found


def test_an_engine_joins_proves_itself_serves_leaves_and_finishes_what_it_has(fleet: Fleet):
    fleet.gateway()
    student = fleet.student()
    new = fleet.engine()
    fleet.name(new)
    wait_until(lambda: fleet.holders(student) == {"policy-0", "e1"})
    row = fleet.adapter("e1", student)
    assert (row["wanted"], row["resident"], row["served"], row["failures"]) == (True, True, True, 0)
    assert abs(row["proven_at"] - time.time()) < 60
    assert all(fleet.ask(student, prompt).status == 200 for prompt in PROMPTS)
    assert fleet.drawn(new, student) > 0

    fleet.engines[0].script.fault = "busy"  # So that the next request is the new engine's.
    fleet.engines[new].script.delays = [0.7]
    with ThreadPoolExecutor(1) as thread:
        last = thread.submit(fleet.ask, student)
        wait_until(lambda: fleet.engines[new].active == 1)
        fleet.name()
        wait_until(lambda: set(fleet.listed()) == {"policy-0"})
        fleet.engines[0].script.fault = "none"
        before = fleet.drawn(new, student)
        assert all(fleet.ask(student, prompt).status == 200 for prompt in PROMPTS)
        assert last.result().json["policy"] == student
    assert fleet.drawn(new, student) == before


def test_f9_one_engine_is_killed_and_traffic_goes_on_until_it_has_proved_itself_again(fleet: Fleet):
    fleet.name(fleet.engine())
    fleet.gateway()
    student = fleet.student()
    wait_until(lambda: fleet.holders(student) == {"policy-0", "e1"})
    fleet.stop(1)
    assert all(fleet.ask(student, prompt).status == 200 for prompt in PROMPTS)
    fleet.engines[1].restart()
    fleet.engines[1].script.own_logprobs = {BASE: -1.5, student: -1.5}  # It comes back and lies.
    before = fleet.drawn(1, student)
    fleet.start(1)
    wait_until(lambda: fleet.adapter("e1", student)["failures"] == 1)
    wait_until(lambda: fleet.engines[1].script.models == [BASE])
    assert all(fleet.ask(student, prompt).status == 200 for prompt in PROMPTS)
    assert fleet.drawn(1, student) == before
    fleet.engines[1].restart()
    fleet.engines[1].script.own_logprobs = {}
    wait_until(lambda: fleet.holders(student) == {"policy-0", "e1"})


def test_an_engine_with_another_base_gets_no_request_at_all(fleet: Fleet):
    fleet.name(fleet.engine())
    fleet.engines[1].script.logprob = -3.0  # The trainer saw −0.5 of the policy and −1.5 of the base.
    fleet.gateway()
    fleet.student()
    wait_until(lambda: fleet.listed()["e1"]["state"] == "other_base")
    before = fleet.drawn(1, BASE)
    body = {"n": 2}
    assert all(fleet.gateways[0].post("/generate", {**body, "prompt": prompt}).status == 200 for prompt in PROMPTS)
    assert fleet.drawn(1, BASE) == before
    assert fleet.world.client.get("/ready").json["engines"] == {"in_rotation": 1, "of": 2}


@pytest.mark.slow
def test_f3_an_engine_that_hangs_holds_up_no_publishing_elsewhere(fleet: Fleet):
    fleet.name(fleet.engine())
    fleet.engines[1].script.fault = "silent"
    fleet.gateway(canary_after_seconds=0.3, hung_after_seconds=0.6)
    student = fleet.student()
    wait_until(lambda: fleet.listed()["e1"]["state"] == "hung")
    assert fleet.holders(student) == {"policy-0"}
    assert all(fleet.ask(student, prompt).status == 200 for prompt in PROMPTS[:5])


def test_f10_an_adapter_that_one_engine_cannot_load_is_served_by_the_other(fleet: Fleet):
    fleet.name(fleet.engine())
    fleet.engines[1].script.load_fault = "CUDA out of memory"
    fleet.gateway()
    student = fleet.student()
    wait_until(lambda: "CUDA out of memory" in (fleet.adapter("e1", student)["reason"] or ""))
    assert all(fleet.ask(student, prompt).status == 200 for prompt in PROMPTS)
    assert fleet.drawn(1, student) == 0
    assert fleet.gateways[0].get(f"/policies/{student}").json["state"] == "candidate"


def test_what_nobody_can_serve_now_is_an_error_and_never_the_base(fleet: Fleet):
    fleet.name(fleet.engine())
    fleet.gateway()
    student = fleet.student()
    wait_until(lambda: fleet.holders(student) == {"policy-0", "e1"})
    for engine in fleet.engines:
        engine.script.load_fault = "no room"
        engine.restart()
    wait_until(lambda: fleet.holders(student) == set())
    reply = fleet.ask(student)
    # 410 as soon as both have refused it, which says that it has failed.
    told = (reply.status, reply.json["error"]["code"])
    assert told in ((503, "policy_not_served"), (410, "policy_retired"))
    assert sum(fleet.drawn(i, BASE) for i in range(2)) == 0


# --- two gateways ----------------------------------------------------------------------------------------


def test_two_gateways_keep_one_fleet_each_proves_for_itself_and_neither_undoes_the_other(fleet: Fleet):
    fleet.name(fleet.engine())
    for _ in range(2):
        fleet.gateway()
    student = fleet.student()
    wait_until(lambda: all(fleet.holders(student, gateway) == {"policy-0", "e1"} for gateway in range(2)))
    for gateway in range(2):
        assert fleet.ask(student, gateway=gateway).json["policy"] == student
    fleet.engines[1].restart()
    fleet.engines[1].changes.clear()
    wait_until(lambda: ("load", student) in fleet.engines[1].changes)
    wait_until(lambda: all(fleet.holders(student, gateway) == {"policy-0", "e1"} for gateway in range(2)))
    for engine in fleet.engines:
        assert ("unload", student) not in engine.changes
        assert engine.script.models == [BASE, student]


def test_two_gateways_with_more_policies_than_slots_come_to_the_same_rest(fleet: Fleet):
    for _ in range(2):
        fleet.gateway(max_loras=1)
    old, newest = (proven_candidate(fleet.world, fleet.directory, number=number) for number in range(2))
    wait_until(lambda: all(fleet.holders(newest, gateway) == {"policy-0"} for gateway in range(2)))
    at_rest = list(fleet.engines[0].changes)
    both_looked_again(fleet)
    assert fleet.engines[0].changes == at_rest
    assert fleet.engines[0].script.models == [BASE, newest]
    assert fleet.ask(old).status == 503


def both_looked_again(fleet: Fleet) -> None:
    """Each gateway has reconciled once more, whole."""
    seen = fleet.engines[0].num_lists
    wait_until(lambda: fleet.engines[0].num_lists >= seen + 2 * len(fleet.gateways))
