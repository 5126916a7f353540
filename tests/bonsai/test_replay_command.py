"""`bonsai replay` from outside: a ledger in a real Redis, reward models over real HTTP, and what is printed."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from time import time
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result

from archive.reading import Archive
from bon_algos.contracts import LEDGER_STREAM, Candidate, CandidateGroup, Message
from bonsai.cli import main
from bonsai.guard import descendants
from bonsai.replay.scores import AT_ONCE
from bonsai.runtime_directory import StateDirectory
from service.ledger_reading import PAGE_ENTRIES
from tests.service.records import BASE, REWARD_MODEL, STUDENT, group
from tests.stubs.reward import BROKEN_SCORES, StubReward, StubScore
from tests.stubs.server import running
from tests.stubs.tokenizer import write_model_directory
from worker.compaction import Compaction, Limits


def logged(number: int, old: Mapping[str, float | None], **changes: Any) -> CandidateGroup:
    """A group of these completions and their old rewards; each has a prompt of its own."""
    drawn = tuple(
        Candidate(text=text, token_ids=(1,), logprobs=(-1.0,), finish_reason="stop", reward=reward)
        for text, reward in old.items()
    )
    own = {"id": f"g{number}", "created_at": time(), "prompt": f"p{number}", "prompt_token_ids": (number,)}
    update = own | {"candidates": drawn, "requested": len(drawn)} | changes
    return group([(0.0, 1)]).model_copy(update=update)


def deliver(url: str, *groups: CandidateGroup) -> None:
    """As the drainer does, in the order given."""
    with redis.Redis.from_url(url) as client, client.pipeline(transaction=False) as pipe:
        for one in groups:
            data = zlib.compress(one.model_dump_json().encode())
            pipe.xadd(LEDGER_STREAM, {"kind": one.kind, "id": one.id, "data": data})
        pipe.execute()


def replay(redis_url: str, *arguments: object) -> Result:
    command = ["replay", "--redis-url", redis_url, *map(str, arguments)]
    return CliRunner().invoke(main, command, env={"COLUMNS": "120"}, catch_exceptions=False)


def reported(redis_url: str, tmp_path: Path, *arguments: object) -> dict[str, Any]:
    file = tmp_path / "report.json"
    done = replay(redis_url, "--json", file, *arguments)
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads(file.read_text())
    return report


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Where no stack has an archive."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def judge() -> StubScore:
    """Its reward is the length."""
    return StubScore("judge")


SHORT_FIRST = {"a": 3.0, "bb": 2.0, "ccc": 1.0}
LONG_FIRST = {"a": 1.0, "bb": 2.0, "ccc": 3.0}


def test_flips_regret_and_rank_correlation_by_hand(redis_url, judge, tmp_path):
    """By length the first group's winner changes from `a` to `ccc`: 3 − 1 = 2 of the new reward were lost, and as much
    of the old one would be. The second group's stays."""
    deliver(redis_url, logged(1, SHORT_FIRST), logged(2, LONG_FIRST))
    with running(judge.app()) as url:
        report = reported(redis_url, tmp_path, "--reward-url", url)
        printed = replay(redis_url, "--reward-url", url).output
    found = report["comparison"]
    assert (found["groups"], found["prompts"], report["skipped"]) == (2, 2, {})
    means = {name: found[name]["mean"] for name in ("flips", "regret_new", "regret_old", "rank_correlation")}
    assert means == pytest.approx({"flips": 0.5, "regret_new": 1.0, "regret_old": 1.0, "rank_correlation": 0.0})
    assert (report["old_reward_model"], report["route"]) == (REWARD_MODEL, "default")
    assert report["new_reward_model"].startswith("rm-")
    # Best-of-1 is a mean sample, best-of-3 the winner: 2 and 3 for either model; the old choices are worth 1 and 3.
    assert [point["k"] for point in found["curve"]] == [1, 2, 3]
    curve = [found["curve"][k][name]["mean"] for k in (0, 2) for name in ("old", "new", "new_by_old")]
    assert curve == pytest.approx([2.0, 2.0, 2.0, 3.0, 3.0, 2.0])
    assert "winners that change, %" in printed
    assert "50 (" in printed
    asked = sorted((one["prompt"], one["completions"]) for one in judge.requests)[:2]
    assert asked == [("p1", ["a", "bb", "ccc"]), ("p1", ["a", "bb", "ccc"])]


def test_a_ledger_of_many_pages_is_read_newest_first_and_no_further_than_asked(redis_url, judge, tmp_path):
    deliver(redis_url, *(logged(number, SHORT_FIRST) for number in range(2 * PAGE_ENTRIES + 50)))
    wanted = PAGE_ENTRIES + AT_ONCE + 3
    with running(judge.app()) as url:
        assert reported(redis_url, tmp_path, "--reward-url", url, "--groups", wanted)["comparison"]["groups"] == wanted
        newest = {f"p{number}" for number in range(2 * PAGE_ENTRIES + 50 - wanted, 2 * PAGE_ENTRIES + 50)}
        assert {one["prompt"] for one in judge.requests} == newest
        everything = reported(redis_url, tmp_path, "--reward-url", url, "--groups", 10_000)
        assert everything["comparison"]["groups"] == 2 * PAGE_ENTRIES + 50


def archived(url: str, directory: Path) -> None:
    """What stands before the newest group of any route leaves the stream for the archive."""
    limits = Limits(entries=2, bytes=2**20, seconds=600.0, hot_groups=1, hot_seconds=0.0)
    with redis.Redis.from_url(url) as client:
        compaction = Compaction(client, Archive.at(str(directory)), limits)
        compaction.open()
        while compaction.step(wait_seconds=0.01) is not None:
            pass


@pytest.mark.parametrize("place", ["named", "the stack's own"])
def test_what_the_stream_has_no_more_is_replayed_from_the_archive_each_group_once(redis_url, judge, tmp_path, place):
    deliver(redis_url, logged(1, SHORT_FIRST), logged(2, LONG_FIRST, created_at=time() - 7200))
    deliver(redis_url, logged(3, SHORT_FIRST, route="other"), logged(4, LONG_FIRST), logged(5, SHORT_FIRST))
    stack = StateDirectory(tmp_path / "stack", tmp_path)
    directory = tmp_path / "archive" if place == "named" else stack.artefacts / "ledger"
    archived(redis_url, directory)
    with redis.Redis.from_url(redis_url) as store:
        assert store.xlen(LEDGER_STREAM) == 3
    asked = ("--archive", directory) if place == "named" else ("--dir", stack.root)
    with running(judge.app()) as url:
        report = reported(redis_url, tmp_path, "--reward-url", url, *asked)
        assert (report["comparison"]["groups"], report["skipped"]) == (4, {})
        assert sorted(one["prompt"] for one in judge.requests) == ["p1", "p2", "p4", "p5"]
        report = reported(redis_url, tmp_path, "--reward-url", url, *asked, "--since", "1h")
        assert (report["comparison"]["groups"], report["skipped"]) == (3, {})


def test_an_archive_that_is_none_is_said_in_words(redis_url):
    asked = ("--reward-url", "unix:///a", "--archive", "ftp://there/ledger")
    assert "the archive is a directory or s3://" in failed(redis_url, *asked)


def test_what_cannot_be_replayed_is_counted_by_reason(redis_url, judge, tmp_path):
    two = {"a": 1.0, "bb": 2.0}
    deliver(
        redis_url,
        logged(1, two, created_at=time() - 7200),
        logged(2, two, reward_model_id="rm-" + "9" * 16),
        logged(3, two, store=False, prompt=""),
        logged(4, {"a": 1.0, "bb": None}),
        logged(5, two, route="another"),
        logged(9, two, tenant="acme"),
        logged(6, {"a": 1.0, "unreadable": 2.0}),
        logged(7, two),
        logged(8, two, messages=(Message(role="user", content="hi"),)),
    )
    with redis.Redis.from_url(redis_url) as store:
        store.xadd(LEDGER_STREAM, {"kind": "group", "id": "x", "data": b"not even compressed"})
    judge.script.score = lambda text: None if text == "unreadable" else 1.0
    with running(judge.app()) as url:
        report = reported(redis_url, tmp_path, "--reward-url", url, "--since", "1h")
    reasons = ("unreadable", "too_old", "other_reward_model", "not_stored", "fewer_than_two_rewards", "reward_error")
    assert report["skipped"] == dict.fromkeys(reasons, 1)
    assert report["comparison"]["groups"] == 2
    assert {"role": "user", "content": "hi"} in [turn for one in judge.requests for turn in one["messages"] or ()]


def test_a_curve_is_of_whole_groups_of_one_policy(redis_url, judge, tmp_path):
    two = {"a": 1.0, "bb": 2.0}
    cut = {"requested": 3}  # one candidate was lost
    deliver(redis_url, logged(1, two, policy_id=STUDENT), logged(2, two, **cut), logged(3, two), logged(4, two))
    with running(judge.app()) as url:
        found = reported(redis_url, tmp_path, "--reward-url", url)["comparison"]
    assert (found["groups"], found["n"], found["curve_groups"]) == (4, 2, 2)
    assert BASE != STUDENT


def test_a_classifier_behind_vllm_may_be_asked(redis_url, tmp_path):
    """The stub's reward is the length of what it reads: its template adds the same to every completion."""
    directory = write_model_directory(tmp_path / "model")
    deliver(redis_url, logged(1, SHORT_FIRST), logged(2, LONG_FIRST), logged(3, {"a": 1.0, "x" * 100: 0.0}))
    stub = StubReward("rm-" + "7" * 16)
    with running(stub.app()) as url:
        asked = ("--reward-url", url, "--reward-kind", "vllm", "--reward-directory", directory, "--reward-window", 64)
        report = reported(redis_url, tmp_path, *asked)
    assert report["new_reward_model"] == stub.model
    assert report["skipped"] == {"too_long": 1}
    assert report["comparison"]["flips"]["mean"] == 0.5


def test_a_function_runs_for_the_replay_and_is_gone_after_it(redis_url, tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text("def reward(prompt, completions): return map(len, completions)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp")
    deliver(redis_url, logged(1, SHORT_FIRST), logged(2, LONG_FIRST))
    before = set(descendants(os.getpid()))
    report = reported(redis_url, tmp_path, "--reward-function", "rewards:reward")
    assert report["comparison"]["flips"]["mean"] == 0.5
    assert set(descendants(os.getpid())) == before


def test_a_reward_model_without_room_is_asked_again(redis_url, judge, tmp_path):
    deliver(redis_url, logged(1, SHORT_FIRST), logged(2, LONG_FIRST))
    judge.script.fault = "busy"

    class Recovering(list[Any]):
        def append(self, body: Any) -> None:
            super().append(body)
            if len(self) > 3:
                judge.script.fault = "none"

    judge.requests = Recovering()
    with running(judge.app()) as url:
        assert reported(redis_url, tmp_path, "--reward-url", url)["comparison"]["groups"] == 2
    assert len(judge.requests) > 3


def failed(redis_url: str, *arguments: object) -> str:
    done = replay(redis_url, *arguments)
    assert done.exit_code == 1
    return done.output


@pytest.mark.parametrize("fault", BROKEN_SCORES)
def test_a_reward_model_that_breaks_the_schema_replays_nothing(redis_url, judge, fault):
    deliver(redis_url, logged(1, SHORT_FIRST), logged(2, LONG_FIRST))
    judge.script.fault = fault
    with running(judge.app()) as url:
        words = "no group of route default can be replayed: 2 reward_model_broken"
        assert words in failed(redis_url, "--reward-url", url)


def test_there_must_be_something_to_replay(redis_url, judge):
    with running(judge.app()) as url:
        assert "no group of route default can be replayed: the ledger holds none" in failed(
            redis_url, "--reward-url", url
        )
        deliver(redis_url, logged(1, SHORT_FIRST), logged(1, SHORT_FIRST))
        assert "groups of two prompts are needed, and 2 of one can be replayed" in failed(
            redis_url, "--reward-url", url
        )
        assert "no group of route other can" in failed(redis_url, "--reward-url", url, "--route", "other")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "exactly one of --reward-url, --reward-config and --reward-function"),
        (("--reward-url", "unix:///a", "--reward-function", "a:b"), "exactly one of"),
        (("--reward-url", "http://judge:80"), "never over a network"),
        (("--reward-url", "unix:///not/there.sock"), "the reward model cannot be reached"),
        (("--reward-url", "unix:///a", "--reward-kind", "vllm"), "needs --reward-directory and --reward-window"),
        (("--reward-function", "no_such_module:reward"), "there is no module no_such_module"),
    ],
)
def test_a_reward_model_that_is_none_or_away_is_said_in_words(redis_url, arguments, words):
    assert words in failed(redis_url, *arguments)


def test_a_reward_model_of_another_name_is_not_asked(redis_url, judge):
    deliver(redis_url, logged(1, SHORT_FIRST), logged(2, LONG_FIRST))
    with running(judge.app()) as url:
        assert "serves another model" in failed(redis_url, "--reward-url", url, "--reward-name", "another")
    assert judge.requests == []


def test_a_redis_that_is_away_and_a_stack_that_does_not_run(tmp_path):
    away = f"unix://{tmp_path}/away.sock"
    assert "does not answer" in failed(away, "--reward-url", "unix:///a")
    done = CliRunner().invoke(
        main, ["replay", "--dir", str(tmp_path), "--reward-url", "unix:///a"], env={"BONSAI_REDIS_URL": ""}
    )
    assert done.exit_code == 1
    assert "no stack runs in" in done.output


@pytest.mark.parametrize("ago", ["7", "d", "-1d", "7w", "1e3s"])
def test_a_time_that_is_none_is_refused(ago):
    done = CliRunner().invoke(main, ["replay", "--since", ago])
    assert done.exit_code == 2
    assert "a number with s, m, h or d" in done.output
