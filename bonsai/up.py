"""The stack: Redis, two engines, the gateway, a worker and the ledger's compactor, running as long as a block is.

    async with running_stack(prepare(Options(directory=path, port=0))) as stack:
        ...  # stack.url answers

Owns the way from a plan to a running stack. What each process is, is `stack_plan`; keeping them is `supervisor`.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from bonsai import redis_server, stack_plan
from bonsai.leftovers import kill_leftovers
from bonsai.processes import ProcessFailed, ProcessSpec, ProcessStatus, SupervisedProcess
from bonsai.runtime_directory import StateDirectory, locked, open_state
from bonsai.secrets import make_secrets
from bonsai.stack_plan import Options, Plan, prepare
from bonsai.supervisor import Supervisor, Watch, kept
from service.api_key import read_admin_key

__all__ = ["Options", "Plan", "PortTaken", "Stack", "Watch", "blocking_stack", "prepare", "running_stack"]


class PortTaken(Exception):
    """Something else listens where the gateway should."""


@dataclass(frozen=True)
class Stack:
    """A stack that is ready."""

    plan: Plan
    state: StateDirectory
    url: str
    """Of the gateway."""
    redis_url: str
    """May hold a password."""
    environment: dict[str, str]
    """The `BONSAI_…` variables of gateway and worker. Holds `redis_url`."""
    supervisor: Supervisor

    @property
    def api_key(self) -> str:
        """The administrator's, of the gateway; for clients of this process. Never printed."""
        return read_admin_key(self.state.admin_key)

    @property
    def statuses(self) -> tuple[ProcessStatus, ...]:
        return self.supervisor.statuses

    def process(self, name: str) -> SupervisedProcess:
        """`redis`, `policy`, `reward`, `gateway`, `worker` or `compactor`. KeyError for a Redis that somebody else
        runs."""
        return self.supervisor.processes[name]

    async def failure(self) -> ProcessFailed:
        """Waits until the stack cannot be kept any longer."""
        return await self.supervisor.failure()


def _unwatched(statuses: Sequence[ProcessStatus]) -> None:
    """Nobody looks."""


@asynccontextmanager
async def running_stack(plan: Plan, watch: Watch = _unwatched) -> AsyncIterator[Stack]:
    """A stack that is ready; gone, with everything it started, when the block is left.

    `watch` is called at every change of a process's status, also while the stack starts.
    Raises ProcessFailed, PortTaken, StackRunsAlready, UnsafeDirectory, UnusableRedis or TimeoutError (something
    of an earlier run cannot be killed).
    """
    state = open_state(plan.options.directory, plan.options.environment)
    with locked(state):
        make_secrets(state)
        # What an earlier run left may still hold the port.
        kill_leftovers(state.record)
        port = free_port(plan.options.host, plan.options.port)
        redis_url = stack_plan.redis_url(plan, state)
        if plan.redis is None:
            await redis_server.check_foreign(redis_url)
        url = f"http://{stack_plan.url_host(plan.options.host)}:{port}"
        async with kept(state, url, tiers(plan, state, port), watch) as supervisor:
            variables = stack_plan.bonsai_variables(plan, state, port)
            yield Stack(plan, state, url, redis_url, variables, supervisor)


@contextmanager
def blocking_stack(plan: Plan) -> Iterator[Stack]:
    """`running_stack` for callers without an event loop: it runs in a thread of its own.

    The stack's properties may be read from outside that thread; its coroutines may not be awaited there.
    """
    from anyio.from_thread import start_blocking_portal

    with start_blocking_portal() as portal, portal.wrap_async_context_manager(running_stack(plan)) as stack:
        yield stack


def tiers(plan: Plan, state: StateDirectory, port: int) -> tuple[tuple[ProcessSpec, ...], ...]:
    """Redis first, since gateway and worker ask it for everything; a foreign one leaves its tier empty."""
    redis = stack_plan.redis_spec(plan, state)
    return (
        (redis,) if redis is not None else (),
        stack_plan.engine_specs(plan, state),
        (
            stack_plan.gateway_spec(plan, state, port),
            stack_plan.worker_spec(plan, state, port),
            stack_plan.compactor_spec(plan, state, port),
        ),
    )


def free_port(host: str, port: int) -> int:
    """`port` when nothing listens there, a free one for 0. Raises PortTaken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortTaken(f"{host}:{port} cannot be used ({error.strerror}); choose another --port, or 0") from error
        return int(probe.getsockname()[1])
