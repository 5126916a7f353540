"""Why a process of the stack ended, in one line a reader can act on.

Owns the signs by which a known cause is found in a log's tail. Pure: reads no file.
"""

from __future__ import annotations

import re

KILLED = 128 + 9
COMMAND_NOT_FOUND = 127

_PORT = re.compile(r"address already in use|errno 98", re.IGNORECASE)
_MEMORY = re.compile(
    r"MemoryError|out of memory|cannot allocate memory|not enough memory|can't allocate memory"
    r"|larger than the available KV cache memory|No available memory for the cache blocks"
    r"|DefaultCPUAllocator|Free memory on device",
    re.IGNORECASE,
)
_NO_SPACE = re.compile(r"no space left on device", re.IGNORECASE)
_SETTING = re.compile(r"^BONSAI_\w+: .*$", re.MULTILINE)
_MODULE = re.compile(r"No module named '?([\w.]+)'?")
_ERROR_LINE = re.compile(r"^(?:\(\w+ pid=\d+\)\s+)?(?:ERROR\s.*?\]\s+)?(?:[\w.]+\.)?((?:\w+Error|\w+Exception)\b.*)$")
_WRAPPERS = ("RuntimeError: Engine core initialization failed", "EngineDeadError:")
_CORE_DIED = re.compile(r"engine core exited unexpectedly|EngineDeadError")


def failure_reason(exit_status: int, log_tail: str) -> str:
    """The cause of an exit as far as the status (a shell's: 128 + signal) and the last lines tell.

    Causes a user can remove come first; else the last error the log names; else the bare status.
    """
    if _PORT.search(log_tail):
        return "its port or socket is taken by another program"
    if exit_status == KILLED or _MEMORY.search(log_tail):
        return _memory_reason(exit_status, log_tail)
    if _NO_SPACE.search(log_tail):
        return "the disk is full"
    if setting := _SETTING.search(log_tail):
        return setting.group()
    if module := _MODULE.search(log_tail):
        return f"Python cannot find the package {module.group(1)!r}: is everything installed?"
    error = last_error(log_tail)
    if error is not None:
        return error
    if _CORE_DIED.search(log_tail):
        return "its model runner was killed from outside; most often the machine ran out of memory"
    if exit_status == COMMAND_NOT_FOUND:
        return "its program could not be started"
    return "it ended by itself" if exit_status == 0 else f"it ended with status {exit_status}"


def _memory_reason(exit_status: int, log_tail: str) -> str:
    named = last_error(log_tail)
    if named is not None and _MEMORY.search(named):
        return f"not enough memory: {named}"
    if exit_status == KILLED:
        return "it was killed from outside; most often the machine ran out of memory"
    return "not enough memory"


def last_error(log_tail: str) -> str | None:
    """The text of the last exception a traceback in the log ends with; what only repeats another is passed over."""
    for line in reversed(log_tail.splitlines()):
        found = _ERROR_LINE.match(line.strip())
        if found and not found.group(1).startswith(_WRAPPERS):
            return found.group(1)
    return None
