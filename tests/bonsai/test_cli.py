"""The command from outside: quick to answer, clear when it cannot."""

from __future__ import annotations

import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import cast

import pytest
from click.testing import CliRunner
from rich.console import Console

from bonsai.cli import _say_ready, main
from bonsai.runtime_directory import StateDirectory
from bonsai.secrets import make_secrets
from bonsai.stack_plan import Plan
from bonsai.supervisor import Supervisor
from bonsai.up import Stack
from tests.bonsai.test_model_directory import LLAMA, REWARD, write_model


def test_help_loads_none_of_the_heavy_libraries() -> None:
    program = (
        "import sys\nfrom click.testing import CliRunner\nfrom bonsai.cli import main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "print(sorted({'torch', 'transformers', 'vllm', 'numpy', 'redis', 'aiohttp', 'rich'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert shown.stdout == "[]\n"


def test_help_names_every_option_of_up() -> None:
    shown = CliRunner().invoke(main, ["up", "--help"]).output
    for option in (
        "--dir",
        "--policy",
        "--reward",
        "--host",
        "--port",
        "--redis-url",
        "--max-loras",
        "--cores",
        "--reward-function",
        "--reward-config",
        "--reward-pairs",
    ):
        assert option in shown


def test_what_is_said_when_ready_names_the_keys_file_and_not_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = StateDirectory(tmp_path / "my state", tmp_path / "run")
    state.root.mkdir()
    make_secrets(state)
    stack = Stack(cast(Plan, None), state, "http://127.0.0.1:8000", "", {}, cast(Supervisor, None))
    console = Console(file=StringIO(), width=60)
    _say_ready(console, stack, 1.0)
    assert isinstance(console.file, StringIO)
    said = console.file.getvalue()
    assert "The administrator's key is in my state/admin.key\n" in said
    assert """-H "Authorization: Bearer $(cat 'my state/admin.key')" """ in said
    for secret in (stack.api_key, state.key_pepper.read_text().strip()):
        assert secret not in said


def test_a_bad_model_ends_with_1_and_what_to_change(tmp_path: Path) -> None:
    policy, reward = write_model(tmp_path / "p", LLAMA), write_model(tmp_path / "r", REWARD)
    command = ["up", "--dir", str(tmp_path / "s"), "--policy", str(reward), "--reward", str(policy)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert "does not generate" in result.output


def test_a_redis_that_is_not_there_ends_with_1_and_without_its_password(tmp_path: Path) -> None:
    policy, reward = write_model(tmp_path / "p", LLAMA), write_model(tmp_path / "r", REWARD)
    command = ["up", "--dir", str(tmp_path / "s"), "--policy", str(policy), "--reward", str(reward), "--port", "0"]
    result = CliRunner().invoke(main, command, env={"BONSAI_REDIS_URL": "redis://:hunter2@127.0.0.1:1/0"})
    assert result.exit_code == 1
    assert "Redis at redis://127.0.0.1:1/0 does not answer" in result.output
    assert "hunter2" not in result.output


def test_an_engine_that_cannot_load_its_model_is_named_with_its_log(tmp_path: Path) -> None:
    """A stack without vLLM: both engines end at once, everything that had started is taken down."""
    policy, reward = write_model(tmp_path / "p", LLAMA), write_model(tmp_path / "r", REWARD)
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise MemoryError('no room for weights')")
    command = ["up", "--dir", str(tmp_path / "s"), "--policy", str(policy), "--reward", str(reward), "--port", "0"]
    result = CliRunner().invoke(main, command, env={"PYTHONPATH": str(tmp_path), "XDG_RUNTIME_DIR": "/tmp"})
    assert result.exit_code == 1
    assert "not enough memory: MemoryError: no room for weights" in result.output
    assert "The whole log: " in result.output
    assert not (tmp_path / "s" / "up.json").exists()


def test_a_reward_function_that_cannot_be_imported_ends_with_1_and_why(tmp_path: Path) -> None:
    policy = write_model(tmp_path / "p", LLAMA)
    command = ["up", "--dir", str(tmp_path / "s"), "--policy", str(policy), "--reward-function", "absent:reward"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert "there is no module absent in" in result.output
