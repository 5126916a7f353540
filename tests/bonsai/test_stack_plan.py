"""From a user's options to processes: what each is told, where secrets travel, who sees what."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bon_algos.contracts import HttpMember, RewardConfig, VllmMember
from bonsai import probes, up
from bonsai.function_call import FunctionError
from bonsai.model_directory import BadModel
from bonsai.processes import Hopeless, ProcessSpec
from bonsai.reward_function import RewardFunction
from bonsai.runtime_directory import StateDirectory
from bonsai.secrets import make_secrets
from bonsai.stack_plan import Options, Plan, prepare, url_host
from service.known_pairs import general_pairs, read_pairs
from service.settings import GatewaySettings
from tests.bonsai.test_model_directory import LLAMA, REWARD, write_model
from worker.settings import CompactorSettings, WorkerSettings

MakePlan = Callable[..., Plan]
SECRET = "hunter2"


@pytest.fixture
def make_plan(tmp_path: Path) -> MakePlan:
    def make(**options: Any) -> Plan:
        settings: dict[str, Any] = {
            "directory": tmp_path / "state",
            "policy": str(write_model(tmp_path / "policy", LLAMA)),
            "reward": str(write_model(tmp_path / "reward", REWARD)),
            "environment": {
                "PATH": "/usr/bin",
                "HF_TOKEN": SECRET,
                "BONSAI_API_KEY": SECRET,
                "BONSAI_LEASE_SECONDS": "2",
            },
        }
        return prepare(Options(**(settings | options)))

    return make


def specs_of(plan: Plan, tmp_path: Path) -> dict[str, ProcessSpec]:
    state = StateDirectory(tmp_path / "state", tmp_path / "run")
    return {spec.name: spec for tier in up.tiers(plan, state, 8123) for spec in tier}


def test_a_stack_is_these_six(make_plan: MakePlan, tmp_path: Path) -> None:
    assert list(specs_of(make_plan(), tmp_path)) == ["redis", "policy", "reward", "gateway", "worker", "compactor"]


def test_gateway_and_worker_accept_their_settings(
    make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two settings classes are read from exactly the variables that the processes are started with."""
    plan = make_plan()
    specs = specs_of(plan, tmp_path)
    make_secrets(StateDirectory(tmp_path / "state", tmp_path / "run"))
    for name, value in specs["gateway"].environment.items():
        monkeypatch.setenv(name, value)
    gateway = GatewaySettings()
    for name, value in specs["worker"].environment.items():
        monkeypatch.setenv(name, value)
    worker, compactor = WorkerSettings(), CompactorSettings()
    assert gateway.port == 8123
    assert gateway.base_policy_id == worker.base_policy_id == plan.policy_id
    assert gateway.reward_model == worker.reward_model
    assert gateway.redis_url == worker.redis_url == f"unix://{tmp_path}/run/redis.sock"
    assert worker.lease_seconds == 2
    assert gateway.archive == worker.archive == compactor.archive
    assert gateway.artefacts == worker.artefacts == compactor.artefacts


def test_engine_and_settings_agree_on_names_and_windows(make_plan: MakePlan, tmp_path: Path) -> None:
    specs = specs_of(make_plan(max_model_len=256), tmp_path)
    variables = specs["gateway"].environment
    policy, reward = specs["policy"].argv, specs["reward"].argv
    assert policy[policy.index("--served-model-name") + 1] == variables["BONSAI_BASE_POLICY_ID"]
    [told] = RewardConfig.model_validate_json(variables["BONSAI_REWARD_MODEL"]).members
    assert reward[reward.index("--served-model-name") + 1] == told.model == told.id
    assert told.url == f"unix://{reward[reward.index('--uds') + 1]}"
    assert isinstance(told, VllmMember)
    assert reward[reward.index("--max-model-len") + 1] == str(told.window) == "256"
    assert policy[policy.index("--max-model-len") + 1] == variables["BONSAI_MAX_MODEL_LEN"] == "256"
    assert json.loads(variables["BONSAI_POLICY_ENGINE_URLS"]) == [f"unix://{policy[policy.index('--uds') + 1]}"]


def test_a_password_is_in_no_command_line_and_reaches_no_engine(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan(redis_url=f"redis://:{SECRET}@127.0.0.1:6379/0")
    specs = specs_of(plan, tmp_path)
    assert "redis" not in specs
    assert not any(SECRET in part for spec in specs.values() for part in spec.argv)
    sees = {name for name, spec in specs.items() if f":{SECRET}@" in spec.environment.get("BONSAI_REDIS_URL", "")}
    assert sees == {"gateway", "worker", "compactor"}
    assert SECRET not in " ".join([*specs["policy"].environment.values(), *specs["reward"].environment.values()])


@pytest.mark.parametrize("secret", ["HF_TOKEN", "BONSAI_API_KEY"])
def test_a_users_token_reaches_nobody(make_plan: MakePlan, tmp_path: Path, secret: str) -> None:
    specs = specs_of(make_plan(), tmp_path)
    assert {name for name, spec in specs.items() if secret in spec.environment} == set()


def test_the_gateway_alone_is_told_where_its_secrets_are(make_plan: MakePlan, tmp_path: Path) -> None:
    for variable in ("BONSAI_ADMIN_KEY_FILE", "BONSAI_KEY_PEPPER_FILE"):
        told = {name for name, spec in specs_of(make_plan(), tmp_path).items() if variable in spec.environment}
        assert told == {"gateway"}


@pytest.mark.parametrize(("host", "asked"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("a", "a")])
def test_what_listens_everywhere_is_reached_on_loopback(host: str, asked: str) -> None:
    assert url_host(host) == asked


def test_a_module_in_the_working_directory_is_not_ours(make_plan: MakePlan, tmp_path: Path) -> None:
    for name in ("gateway", "worker", "compactor"):
        spec = specs_of(make_plan(), tmp_path)[name]
        assert spec.environment["PYTHONSAFEPATH"] == "1"
        assert spec.directory == tmp_path / "state"


def test_taking_it_down_fits_in_ten_seconds(make_plan: MakePlan, tmp_path: Path) -> None:
    """Tiers end one after the other, each within its longest grace."""
    state = StateDirectory(tmp_path / "state", tmp_path / "run")
    graces = [max(spec.grace_seconds for spec in tier) for tier in up.tiers(make_plan(), state, 8123)]
    assert sum(graces) <= 9


def test_a_taken_port_is_said_before_anything_starts() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(up.PortTaken, match=f"127.0.0.1:{port} cannot be used"):
            up.free_port("127.0.0.1", port)


def test_port_0_is_a_free_one() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", up.free_port("127.0.0.1", 0)))


def test_what_the_gateway_waits_for() -> None:
    body = b'{"status":"starting","engine":"unreachable","reward_model":"ok","redis":"ok","routes":1,"spool":{}}'
    assert probes.what_is_missing(body) == "engine: unreachable"
    assert probes.what_is_missing(b"<html>") == "not ready"
    assert probes.what_is_missing(b'{"engine":"unreachable","reward_test":"untested"}') == "engine: unreachable"
    assert probes.what_is_missing(b'{"engine":"ok","reward_test":"waiting"}') == "reward_test: waiting"


def test_for_a_reward_model_that_was_refused_it_does_not_wait() -> None:
    with pytest.raises(Hopeless, match="ranks 12 of 12 built-in pairs wrongly"):
        probes.what_is_missing(
            b'{"engine":"ok","reward_test":"the reward model ranks 12 of 12 built-in pairs wrongly"}'
        )


@pytest.mark.parametrize(("asked", "told"), [(None, "8"), (64, "64")])
def test_engine_and_gateway_agree_on_the_largest_rank(
    make_plan: MakePlan, tmp_path: Path, asked: int, told: str
) -> None:
    """8 on CPUs unless it is asked for: what the gateway accepts for a job is what the engine can load."""
    specs = specs_of(make_plan(max_lora_rank=asked), tmp_path)
    argv = specs["policy"].argv
    assert argv[argv.index("--max-lora-rank") + 1] == told
    assert specs["gateway"].environment["BONSAI_MAX_LORA_RANK"] == told


# --- other reward models ----------------------------------------------------------------------------------


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's directory, with a reward function in it."""
    directory = tmp_path / "here"
    directory.mkdir()
    (directory / "rewards.py").write_text("def reward(prompt, completions): return [0.0 for _ in completions]\n")
    monkeypatch.chdir(directory)
    return directory


def test_a_function_stands_in_the_reward_engines_place(make_plan: MakePlan, tmp_path: Path, rewards: Path) -> None:
    specs = specs_of(make_plan(reward="", reward_function="rewards:reward", reward_seconds=2.5), tmp_path)
    assert list(specs) == ["redis", "policy", "reward", "gateway", "worker", "compactor"]
    [told] = RewardConfig.model_validate_json(specs["gateway"].environment["BONSAI_REWARD_MODEL"]).members
    assert isinstance(told, HttpMember)
    assert told.id == told.model
    argv = specs["reward"].argv
    assert argv[1:4] == ("-m", "bonsai.function_reward", "rewards:reward")
    assert argv[argv.index("--seconds") + 1] == "2.5"
    assert told.url == f"unix://{argv[argv.index('--uds') + 1]}"
    # It is imported from where the user is; ours are not.
    assert (specs["reward"].directory, specs["gateway"].directory) == (rewards, tmp_path / "state")
    assert SECRET not in " ".join(specs["reward"].environment.values())


def test_reward_models_of_somebody_else_are_told_and_not_started(
    make_plan: MakePlan, tmp_path: Path, rewards: Path
) -> None:
    file = rewards / "reward.json"
    file.write_text(
        '{"caution": 0.5, "members": [{"kind": "http", "url": "http://127.0.0.1:9", "model": "a"},'
        '{"kind": "vllm", "url": "unix:///b", "model": "b", "directory": "models/b", "window": 64}]}'
    )
    specs = specs_of(make_plan(reward="", reward_config=file), tmp_path)
    assert list(specs) == ["redis", "policy", "gateway", "worker", "compactor"]
    told = RewardConfig.model_validate_json(specs["worker"].environment["BONSAI_REWARD_MODEL"])
    assert told.caution == 0.5
    assert isinstance(told.members[1], VllmMember)
    assert told.members[1].directory == rewards / "models" / "b"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reward_function": "rewards:reward"}, "a stack has one of them"),
        ({"reward": "", "reward_function": "rewards:absent"}, "the module rewards has no absent"),
    ],
)
def test_a_reward_model_that_cannot_be_is_refused(
    make_plan: MakePlan, rewards: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises((BadModel, FunctionError), match=words):
        make_plan(**options)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "Invalid JSON"),
        ('{"members": []}', "members: .*at least 1"),
        ('{"members": [{"kind": "http", "url": "http://judge:80", "model": "a"}]}', "url: .*never over a network"),
    ],
)
def test_a_file_that_describes_no_reward_model_is_refused_in_words(
    make_plan: MakePlan, rewards: Path, content: str, words: str
) -> None:
    (rewards / "reward.json").write_text(content)
    with pytest.raises(BadModel, match=f"--reward-config: .*{words}"):
        make_plan(reward="", reward_config=rewards / "reward.json")


# --- known pairs ------------------------------------------------------------------------------------------

PAIRS = '[{"prompt": "hi", "better": "a", "worse": "b"}]'


def told_pairs(plan: Plan, tmp_path: Path) -> str | None:
    return specs_of(plan, tmp_path)["gateway"].environment.get("BONSAI_REWARD_PAIRS")


def test_the_demos_reward_model_is_asked_about_the_demos_grammar(make_plan: MakePlan, tmp_path: Path) -> None:
    told = told_pairs(make_plan(policy="", reward=""), tmp_path)
    assert told is not None
    assert read_pairs(Path(told))[0] not in general_pairs()


def test_another_one_is_asked_about_what_the_gateway_has_built_in(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    assert told_pairs(plan, tmp_path) is None
    assert not any("untested" in warning for warning in plan.warnings)


def test_who_wants_no_test_is_warned(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan(reward_pairs="none")
    assert told_pairs(plan, tmp_path) == "none"
    assert any("untested" in warning for warning in plan.warnings)


def test_who_brings_a_function_is_warned_until_pairs_come_with_it(
    make_plan: MakePlan, tmp_path: Path, rewards: Path
) -> None:
    plan = make_plan(reward="", reward_function="rewards:reward")
    assert told_pairs(plan, tmp_path) is None
    assert any("untested" in warning for warning in plan.warnings)
    (rewards / "pairs.json").write_text(PAIRS)
    plan = make_plan(reward="", reward_function="rewards:reward", reward_pairs="pairs.json")
    assert told_pairs(plan, tmp_path) == str(rewards / "pairs.json")
    assert not any("untested" in warning for warning in plan.warnings)


@pytest.mark.parametrize("content", [None, "[]"])
def test_pairs_that_are_none_are_refused_before_anything_starts(
    make_plan: MakePlan, rewards: Path, content: str | None
) -> None:
    if content is not None:
        (rewards / "pairs.json").write_text(content)
    with pytest.raises(BadModel, match=r"--reward-pairs: pairs\.json"):
        make_plan(reward_pairs="pairs.json")


# --- a second reward model --------------------------------------------------------------------------------


def test_a_second_reward_model_is_a_process_of_its_own_that_the_worker_is_told(
    make_plan: MakePlan, tmp_path: Path, rewards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = specs_of(make_plan(judge_function="rewards:reward"), tmp_path)
    assert list(specs) == ["redis", "policy", "reward", "judge", "gateway", "worker", "compactor"]
    argv = specs["judge"].argv
    assert argv[1:4] == ("-m", "bonsai.function_reward", "rewards:reward")
    for name, value in specs["worker"].environment.items():
        monkeypatch.setenv(name, value)
    judge = WorkerSettings().judge_reward_model
    assert judge is not None
    assert judge.members[0].url == f"unix://{argv[argv.index('--uds') + 1]}"
    assert judge.id != WorkerSettings().reward_model.id
    assert "reward.sock" not in judge.members[0].url


def test_one_of_somebody_else_is_told_and_not_started(make_plan: MakePlan, tmp_path: Path, rewards: Path) -> None:
    file = rewards / "judge.json"
    file.write_text('{"members": [{"kind": "http", "url": "http://127.0.0.1:9", "model": "a"}]}')
    specs = specs_of(make_plan(judge_config=file), tmp_path)
    assert "judge" not in specs
    assert (
        RewardConfig.model_validate_json(specs["worker"].environment["BONSAI_JUDGE_REWARD_MODEL"]).members[0].model
        == "a"
    )


def test_without_one_nobody_is_told_of_any(make_plan: MakePlan, tmp_path: Path) -> None:
    assert "BONSAI_JUDGE_REWARD_MODEL" not in specs_of(make_plan(), tmp_path)["worker"].environment


def test_the_demos_models_are_judged_by_the_gold_reward(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan(policy="", reward="")
    assert isinstance(plan.judge, RewardFunction)
    assert plan.judge.name == "bonsai.demo.gold:reward"
    assert make_plan(reward="").judge is None  # another policy: the demo's grammar says nothing of it


def test_what_chooses_and_trains_gives_no_second_opinion(make_plan: MakePlan, rewards: Path) -> None:
    with pytest.raises(BadModel, match="it would say nothing new"):
        make_plan(reward="", reward_function="rewards:reward", judge_function="rewards:reward")
    (rewards / "judge.json").write_text("{}")
    with pytest.raises(BadModel, match="--judge-config: members"):
        make_plan(judge_config=rewards / "judge.json")
    with pytest.raises(BadModel, match="a stack has one of them"):
        make_plan(judge_config=rewards / "judge.json", judge_function="rewards:reward")
