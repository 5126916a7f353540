"""A process that calls a reward function: `python -m bonsai.function_call MODULE:FUNCTION PARENT`.

Owns importing the function, its id, and turning whatever it gives or raises into rewards and reasons. Does not own
how long a call may take, nor HTTP (`function_reward`): this process may hang and be killed.

One JSON document a line: first this process says {"model": ID} or {"error": WORDS}; then for each
{"prompt", "messages", "completions"} that it reads it says {"rewards", "reasons"}. It ends with its input, and with
its parent. The function's own prints go to standard error.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import json
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TextIO

PR_SET_PDEATHSIG: Final = 1
_NAME: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
Function = Callable[[Any, list[str]], Iterable[Any]]


class FunctionError(Exception):
    """The function cannot be used; the message says what to change."""


def load(name: str) -> tuple[Function, str]:
    """The function `module:function` and its id. Raises FunctionError."""
    if not _NAME.fullmatch(name):
        raise FunctionError("a reward function is named module:function")
    module_name, _, attribute = name.partition(":")
    module = _imported(module_name)
    function = getattr(module, attribute, None)
    if function is None:
        raise FunctionError(f"the module {module_name} has no {attribute}")
    if not callable(function) or inspect.iscoroutinefunction(function) or inspect.isclass(function):
        raise FunctionError(f"{name} is no ordinary function: it is called as function(prompt, completions)")
    return function, function_id(name, module, function)


def function_id(name: str, module: ModuleType, function: Function) -> str:
    """Of its name, the source of its module and of where its code stands, and of its own `identity` if it has one:
    changed, it is another reward model. What these files import is not looked at."""
    code = getattr(inspect.unwrap(function), "__code__", None) or getattr(type(function).__call__, "__code__", None)
    files = {module.__file__, getattr(code, "co_filename", None)}
    digest = sha256(name.encode())
    for file in sorted(Path(file) for file in files if file and Path(file).is_file()):
        digest.update(sha256(file.read_bytes()).digest())
    digest.update(str(getattr(function, "identity", "")).encode())
    return f"rm-{digest.hexdigest()[:16]}"


def _imported(name: str) -> ModuleType:
    here = Path.cwd()
    # After our own imports: a file of the user's called `json.py` is theirs and not ours.
    sys.path.insert(0, str(here))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise FunctionError(f"there is no module {error.name} in {here} or on PYTHONPATH") from None
        raise FunctionError(f"the module {name} imports {error.name}, which is not installed") from error
    except (Exception, SystemExit) as error:  # somebody else's code: it may raise anything
        traceback.print_exc()
        raise FunctionError(f"the module {name} cannot be imported: {type(error).__name__}: {error}") from error


def answer(function: Function, request: dict[str, Any]) -> dict[str, Any]:
    """Rewards and reasons, whatever the function does: what it raises is a reason, and its traceback is logged."""
    completions = request["completions"]
    prompt = request["prompt"] if request["messages"] is None else request["messages"]
    try:
        given = list(function(prompt, list(completions)))
    except (Exception, SystemExit) as error:  # somebody else's code: it may raise anything
        traceback.print_exc()
        return _none(len(completions), f"the function raised {type(error).__name__}")
    if len(given) != len(completions):
        return _none(len(completions), f"the function gave {len(given)} rewards for {len(completions)} completions")
    rewards, reasons = zip(*map(_reward, given), strict=True) if given else ((), ())
    return {"rewards": rewards, "reasons": reasons}


def _none(count: int, reason: str) -> dict[str, Any]:
    return {"rewards": [None] * count, "reasons": [reason] * count}


def _reward(value: Any) -> tuple[float | None, str | None]:
    """A number of any library, or None and why."""
    if value is None:
        return None, "the function gave None"
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    return (number, None) if math.isfinite(number) else (None, "the function gave no finite number")


def die_with(parent: int) -> None:
    """Be killed when the parent dies, however it dies; at once when it already has."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(f"the parent {parent} is gone")


def main(name: str, parent: int) -> int:
    die_with(parent)
    with _own_output() as output:
        try:
            function, model = load(name)
        except FunctionError as error:
            _say(output, {"error": str(error)})
            return 1
        _say(output, {"model": model})
        for line in sys.stdin:
            _say(output, answer(function, json.loads(line)))
    return 0


def _own_output() -> TextIO:
    """Standard output for this module alone: for anybody else it is standard error from here on."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return output


def _say(output: TextIO, document: dict[str, Any]) -> None:
    output.write(json.dumps(document) + "\n")
    output.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
