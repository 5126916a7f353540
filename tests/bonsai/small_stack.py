"""A stack of two processes under the real supervisor: Redis, and one whose own child sits in another session.

    python -m tests.bonsai.small_stack DIRECTORY

Prints `ready`, then keeps both until SIGTERM. What the tests do to it, they do from outside.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from bonsai import probes, redis_server
from bonsai.processes import LogTail, ProcessSpec
from bonsai.runtime_directory import StateDirectory, locked, open_state
from bonsai.supervisor import kept

# The shape of a worker that trains: the child has a session of its own and does not die with its parent.
# Both wait for the signal by which they are ended.
FAMILY = """
import signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", "import signal; signal.pause()"], start_new_session=True)
print("child", child.pid, flush=True)
signal.pause()
"""


def redis_spec(state: StateDirectory) -> ProcessSpec:
    server = redis_server.system_server()
    return ProcessSpec(
        name="redis",
        argv=redis_server.server_argv(server.executable, state.redis_socket, state.redis),
        environment={"PATH": os.environ["PATH"]},
        directory=state.redis,
        log=state.log("redis"),
        probe=probes.redis(f"unix://{state.redis_socket}"),
        socket=state.redis_socket,
        grace_seconds=2.0,
    )


def family_spec(state: StateDirectory) -> ProcessSpec:
    return ProcessSpec(
        name="family",
        argv=(sys.executable, "-S", "-c", FAMILY),
        environment={},
        directory=state.root,
        log=state.log("family"),
        probe=_has_a_child,
    )


async def _has_a_child(log: LogTail) -> str | None:
    return None if log().startswith("child ") else "giving birth"


async def _keep(directory: Path) -> None:
    state = open_state(directory, os.environ)
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    with locked(state):
        async with kept(state, "", ((redis_spec(state),), (family_spec(state),)), lambda statuses: None):
            print("ready", flush=True)
            await asked.wait()


if __name__ == "__main__":
    asyncio.run(_keep(Path(sys.argv[1])))
