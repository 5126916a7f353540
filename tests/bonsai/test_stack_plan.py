"""From a user's options to processes: what each is told, where secrets travel, who sees what."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bonsai import probes, up
from bonsai.processes import ProcessSpec
from bonsai.runtime_directory import StateDirectory
from bonsai.secrets import make_secrets
from bonsai.stack_plan import Options, Plan, prepare, url_host
from service.settings import GatewaySettings
from tests.bonsai.test_model_directory import LLAMA, REWARD, write_model
from worker.settings import WorkerSettings

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


def test_a_stack_is_these_five(make_plan: MakePlan, tmp_path: Path) -> None:
    assert list(specs_of(make_plan(), tmp_path)) == ["redis", "policy", "reward", "gateway", "worker"]


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
    worker = WorkerSettings()
    assert gateway.port == 8123
    assert gateway.base_policy_id == worker.base_policy_id == plan.policy_id
    assert gateway.redis_url == worker.redis_url == f"unix://{tmp_path}/run/redis.sock"
    assert worker.lease_seconds == 2


def test_engine_and_settings_agree_on_names_and_windows(make_plan: MakePlan, tmp_path: Path) -> None:
    specs = specs_of(make_plan(max_model_len=256), tmp_path)
    variables = specs["gateway"].environment
    policy, reward = specs["policy"].argv, specs["reward"].argv
    assert policy[policy.index("--served-model-name") + 1] == variables["BONSAI_BASE_POLICY_ID"]
    assert reward[reward.index("--served-model-name") + 1] == variables["BONSAI_REWARD_MODEL_ID"]
    assert policy[policy.index("--max-model-len") + 1] == variables["BONSAI_MAX_MODEL_LEN"] == "256"
    assert variables["BONSAI_POLICY_ENGINE_URL"] == f"unix://{policy[policy.index('--uds') + 1]}"


def test_a_password_is_in_no_command_line_and_reaches_no_engine(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan(redis_url=f"redis://:{SECRET}@127.0.0.1:6379/0")
    specs = specs_of(plan, tmp_path)
    assert "redis" not in specs
    assert not any(SECRET in part for spec in specs.values() for part in spec.argv)
    sees = {name for name, spec in specs.items() if f":{SECRET}@" in spec.environment.get("BONSAI_REDIS_URL", "")}
    assert sees == {"gateway", "worker"}
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
    for name in ("gateway", "worker"):
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


@pytest.mark.parametrize(("asked", "told"), [(None, "8"), (64, "64")])
def test_engine_and_gateway_agree_on_the_largest_rank(
    make_plan: MakePlan, tmp_path: Path, asked: int, told: str
) -> None:
    """8 on CPUs unless it is asked for: what the gateway accepts for a job is what the engine can load."""
    specs = specs_of(make_plan(max_lora_rank=asked), tmp_path)
    argv = specs["policy"].argv
    assert argv[argv.index("--max-lora-rank") + 1] == told
    assert specs["gateway"].environment["BONSAI_MAX_LORA_RANK"] == told
