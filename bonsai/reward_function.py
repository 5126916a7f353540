"""A stack's reward model when it is a Python function: found before anything starts, then a process like the others.

Owns its id before the start, its command line and what it sees of the environment. Does not own the process's
insides (`function_reward`).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bonsai import probes
from bonsai.engines import NOT_INHERITED
from bonsai.function_call import FunctionError
from bonsai.function_processes import START_SECONDS, call_environment, function_argv, model_of
from bonsai.processes import ProcessSpec
from bonsai.runtime_directory import StateDirectory


@dataclass(frozen=True)
class RewardFunction:
    name: str
    """module:function"""
    id: str
    directory: Path
    """From which it is imported, beside PYTHONPATH."""
    seconds: float
    """That one call may take."""


def open_function(name: str, seconds: float, inherited: Mapping[str, str]) -> RewardFunction:
    """Import it once, in a process of its own, to know its id. Raises FunctionError."""
    directory = Path.cwd()
    try:
        done = subprocess.run(
            function_argv(name),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=function_environment(inherited),
            cwd=directory,
            timeout=START_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise FunctionError(f"importing {name} took longer than {START_SECONDS:g} s") from None
    return RewardFunction(name, model_of(done.stdout, name), directory, seconds)


def function_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Nothing of Redis and no hub token; keys of other services pass, a function may want to ask one."""
    return call_environment({name: value for name, value in inherited.items() if not name.startswith(NOT_INHERITED)})


def function_spec(
    name: str, function: RewardFunction, socket: Path, state: StateDirectory, inherited: Mapping[str, str]
) -> ProcessSpec:
    """name: of the process and of its log."""
    program = (sys.executable, "-m", "bonsai.function_reward", function.name)
    return ProcessSpec(
        name=name,
        argv=(*program, "--uds", str(socket), "--seconds", f"{function.seconds:g}"),
        environment=function_environment(inherited),
        directory=function.directory,
        log=state.log(name),
        probe=probes.reward_function(socket, function.id),
        socket=socket,
    )
