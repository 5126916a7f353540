"""Whether each kind of process can do its work: the question asked, and the answer in words.

Each probe returns None when it can, else what it waits for, within seconds. A probe never raises for a process
that is not up yet; the gateway's raises Hopeless for a reward model that was refused, which is for this life.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from bonsai import redis_server
from bonsai.engines import engine_phase
from bonsai.processes import Hopeless, LogTail, Probe
from service.reward_test import MAY_CHOOSE, WAITING

_COMPACTOR_READY = re.compile(r"the compactor (works|waits)")
_CELERY_READY = re.compile(r"celery@\S+ ready\.")


def redis(url: str) -> Probe:
    async def probe(_log: LogTail) -> str | None:
        return await redis_server.ask(url)

    return probe


def engine(socket: Path) -> Probe:
    """vLLM opens its socket last, so `/health` answers when the model is loaded."""

    async def probe(log: LogTail) -> str | None:
        answer = await _get("http://engine/health", socket)
        return None if answer is not None and answer[0] == 200 else engine_phase(log())

    return probe


def reward_function(socket: Path, model: str) -> Probe:
    """Its socket is opened last; a function that was changed since the stack started is another reward model."""

    async def probe(_log: LogTail) -> str | None:
        answer = await _get("http://engine/v1/models", socket)
        if answer is None or answer[0] != 200:
            return "importing the function"
        return None if model.encode() in answer[1] else "its source has changed: start the stack again"

    return probe


def gateway(url: str, admin_key: Path) -> Probe:
    """admin_key: its file. Only who has a key is told what is missing."""

    async def probe(_log: LogTail) -> str | None:
        answer = await _get(f"{url}/ready", None, {"Authorization": f"Bearer {admin_key.read_text().strip()}"})
        if answer is None:
            return "starting"
        return None if answer[0] == 200 else what_is_missing(answer[1])

    return probe


async def worker(log: LogTail) -> str | None:
    """Celery says so once its consumer is set up; a question through the broker would wait behind a running job."""
    return None if _CELERY_READY.search(log()) else "connecting to the broker"


async def compactor(log: LogTail) -> str | None:
    """It says so once it holds the archive's lease, or has found that another one does."""
    return None if _COMPACTOR_READY.search(log()) else "waiting for Redis and the archive"


def what_is_missing(body: bytes) -> str:
    """The parts whose state the gateway's `/ready` does not call good, in words. Raises Hopeless when the reward model
    did not pass its test."""
    try:
        parts = json.loads(body)
    except ValueError:
        return "not ready"
    if not isinstance(parts, dict):
        return "not ready"
    states = {name: value for name, value in parts.items() if isinstance(value, str) and name != "status"}
    test = states.get("reward_test", WAITING)
    if test not in (WAITING, *MAY_CHOOSE):
        raise Hopeless(test)
    return (
        "; ".join(f"{name}: {value}" for name, value in states.items() if value not in ("ok", *MAY_CHOOSE))
        or "not ready"
    )


async def _get(url: str, socket: Path | None, headers: Mapping[str, str] | None = None) -> tuple[int, bytes] | None:
    """Status and body; None when nobody answers."""
    import aiohttp

    connector = aiohttp.UnixConnector(str(socket)) if socket is not None else aiohttp.TCPConnector()
    timeout = aiohttp.ClientTimeout(total=3)
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session,
            session.get(url, headers=headers) as response,
        ):
            return response.status, await response.read()
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None
