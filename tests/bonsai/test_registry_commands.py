"""`bonsai policies`, `bonsai audit`: from a user's words to a running gateway and back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis as blocking_redis
from click.testing import CliRunner, Result

from bon_algos.contracts import AUDIT_STREAM, POLICIES_INDEX, policy_key
from bonsai.cli import main
from bonsai.leftovers import RunRecord
from bonsai.model_directory import model_digest, policy_id
from bonsai.stack_plan import SHIPPED_MODELS
from tests.bonsai.test_registry_files import made_elsewhere
from tests.fixtures.gateway import World, gateway_settings, reward, running_gateway
from tests.fixtures.waiting import wait_until
from tests.service.published import write_full_policy
from tests.stubs.engine import StubEngine
from tests.stubs.reward import StubReward
from tests.stubs.server import running

__all__ = ["made_elsewhere", "reward"]
pytestmark = pytest.mark.slow


@pytest.fixture
def stack(tmp_path: Path, reward: StubReward, redis_url: str) -> Iterator[World]:
    """A gateway that says of itself what `bonsai up` would; its engine speaks for the demo's model."""
    base = policy_id(model_digest(SHIPPED_MODELS / "policy", tmp_path / "model-digests.json"))
    engine = StubEngine(base)
    with running(engine.app()) as engine_url, running(reward.app()) as reward_url:
        settings = gateway_settings(tmp_path, engine_url, reward_url, redis_url, base_policy_id=base)
        with running_gateway(settings) as client:
            url = f"http://{client.address[0]}:{client.address[1]}"
            record = RunRecord(boot_id="", supervisor=0, url=url, guards=())
            (tmp_path / "up.json").write_text(record.model_dump_json())
            yield World(client, engine, reward, redis_url)


def bonsai(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_an_adapter_comes_in_and_goes_out_by_command(stack: World, made_elsewhere, tmp_path: Path):
    taken = bonsai("policies", "import", str(made_elsewhere), "--n", "16", "--dir", str(tmp_path))
    assert taken.exit_code == 0, taken.output
    name = taken.stdout.split()[0]
    found = stack.client.get(f"/policies/{name}").json
    assert (found["n_equivalent"], found["job"], len(found["manifest"]["imported"]["source_digest"])) == (16, None, 64)
    out = tmp_path / "out"
    given = bonsai("policies", "export", name, str(out), "--dir", str(tmp_path))
    assert given.exit_code == 0, given.output
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (made_elsewhere / weights).read_bytes()
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(SHIPPED_MODELS / "policy")
    again = bonsai("policies", "export", name, str(out), "--dir", str(tmp_path))
    assert (again.exit_code, "exists already" in again.output) == (1, True)
    twice = bonsai("policies", "import", str(made_elsewhere), "--n", "16", "--dir", str(tmp_path))
    assert (twice.exit_code, "known already" in twice.output) == (1, True)


@pytest.mark.parametrize("flags", [(), ("--merged",)])
def test_a_policy_of_full_weights_goes_out_as_the_model_that_it_is(stack: World, tmp_path: Path, flags: tuple[str]):
    written = write_full_policy(tmp_path / "artefacts")
    with blocking_redis.Redis.from_url(stack.redis_url) as store:
        store.hset(policy_key(written.policy_id), "record", written.as_candidate().model_dump_json())
        store.zadd(POLICIES_INDEX, {written.policy_id: written.created_at})
    wait_until(lambda: stack.client.get(f"/policies/{written.policy_id}").status == 200)
    out = tmp_path / "out"
    given = bonsai("policies", "export", written.policy_id, str(out), *flags, "--dir", str(tmp_path))
    assert given.exit_code == 0, given.output
    assert {file.name for file in out.iterdir()} == {"README.md", *written.files}
    beside = sorted(tmp_path.iterdir())
    (tmp_path / "artefacts" / "policies" / written.digest / "model.safetensors").write_bytes(b"other")
    harmed = bonsai("policies", "export", written.policy_id, str(tmp_path / "out2"), *flags, "--dir", str(tmp_path))
    assert (harmed.exit_code, "files_damaged" in harmed.output) == (1, True)
    assert sorted(tmp_path.iterdir()) == beside


def test_the_audit_is_verified_by_command(stack: World, tmp_path: Path):
    assert stack.client.post("/keys", {"name": "a", "role": "viewer"}).status == 201
    checking = ("audit", "verify", "--dir", str(tmp_path), "--redis-url", stack.redis_url)
    whole = bonsai(*checking)
    assert (whole.exit_code, whole.output.startswith("1 entries are whole")) == (0, True)
    with blocking_redis.Redis.from_url(stack.redis_url) as store:
        store.xadd(AUDIT_STREAM, {"event": "nothing to see"})
    broken = bonsai(*checking)
    assert (broken.exit_code, "does not follow" in broken.output) == (1, True)


def test_without_a_stack_the_command_says_what_to_do(tmp_path: Path):
    for words in (("audit", "verify"), ("rebuild",), ("policies", "export", "prod", str(tmp_path / "out"))):
        refused = bonsai(*words, "--dir", str(tmp_path))
        assert (refused.exit_code, "no stack runs in" in refused.output) == (1, True)
