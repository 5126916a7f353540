"""Nothing of a stack outlives it: not after SIGTERM, not after `kill -9` of the supervisor, not in a session of
its own. Real processes, real Redis, no engines."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from redis import Redis

from bonsai.leftovers import ProcessRow, belonging, read_record, read_row, read_rows
from bonsai.runtime_directory import StateDirectory, runtime_directory
from tests.fixtures.waiting import wait_until

pytestmark = pytest.mark.slow

DEADLINE = 20.0
Supervisor = subprocess.Popen[str]


@pytest.fixture
def state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> StateDirectory:
    """Sockets go where pytest cleans up; the name is short because their paths must be."""
    directory = tmp_path_factory.mktemp("up")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    return StateDirectory(directory / "state", runtime_directory(directory / "state", os.environ))


@contextmanager
def supervisor(state: StateDirectory) -> Iterator[Supervisor]:
    command = [sys.executable, "-m", "tests.bonsai.small_stack", str(state.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            readable, _, _ = select.select([process.stdout], [], [], DEADLINE)
            assert readable
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def of_stack(state: StateDirectory) -> set[tuple[int, int]]:
    """Pid and start time of every process of the running stack, the supervisor not counted."""
    record = read_record(state.record)
    assert record is not None
    pids = belonging(record.guards, read_rows())
    return {(row.pid, row.start_ticks) for pid in pids if (row := read_row(pid)) is not None}


def are_gone(processes: set[tuple[int, int]]) -> bool:
    """A zombie computes nothing: it is gone, and waits to be counted."""
    return not any(row is not None and _is_same(row, ticks) for pid, ticks in processes if (row := read_row(pid)))


def _is_same(row: ProcessRow, ticks: int) -> bool:
    return row.start_ticks == ticks and row.state not in "ZX"


def redis_of(state: StateDirectory) -> Redis:
    return Redis.from_url(f"unix://{state.redis_socket}", decode_responses=True, single_connection_client=True)


def test_a_stack_counts_every_descendant(state: StateDirectory) -> None:
    """Two guards, Redis, a parent and its child in a session of its own: five processes in three sessions."""
    with supervisor(state):
        processes = of_stack(state)
        rows = [row for pid, _ in processes if (row := read_row(pid)) is not None]
        assert (len(processes), len({row.session for row in rows})) == (5, 3)


def test_sigterm_takes_everything_down_within_ten_seconds(state: StateDirectory) -> None:
    with supervisor(state) as process:
        processes = of_stack(state)
        process.terminate()
        assert process.wait(timeout=10) == 0
        assert are_gone(processes)
        assert not state.runtime.exists()
        assert not state.record.exists()


def test_without_its_supervisor_everything_dies_by_itself(state: StateDirectory) -> None:
    with supervisor(state) as process:
        processes = of_stack(state)
        process.kill()
        wait_until(lambda: are_gone(processes), "all are gone", seconds=5)


def test_what_was_acknowledged_survives_the_kill(state: StateDirectory) -> None:
    with supervisor(state) as process:
        with redis_of(state) as redis:
            redis.set("bonsai:test", "acknowledged")
        processes = of_stack(state)
        process.kill()
        wait_until(lambda: are_gone(processes), seconds=DEADLINE)
    with supervisor(state), redis_of(state) as redis:
        assert redis.get("bonsai:test") == "acknowledged"


def test_a_new_stack_kills_what_even_the_guards_could_not(state: StateDirectory) -> None:
    """Frozen guards cannot react to their supervisor's death; the successor finds all of it by the record."""
    with supervisor(state) as process:
        processes = of_stack(state)
        record = read_record(state.record)
        assert record is not None
        for guard in record.guards:
            os.kill(guard.pid, signal.SIGSTOP)
        process.kill()
        process.wait()
        assert not are_gone(processes)
    with supervisor(state):
        assert are_gone(processes)
        assert len(of_stack(state)) == 5


def test_a_process_dies_with_its_guard(state: StateDirectory) -> None:
    """Also while the supervisor is frozen and cannot do it."""
    with supervisor(state) as process:
        record = read_record(state.record)
        assert record is not None
        redis = next(guard for guard in record.guards if guard.name == "redis")
        both = {(row.pid, row.start_ticks) for row in read_rows() if row.session == redis.pid}
        process.send_signal(signal.SIGSTOP)
        os.kill(redis.pid, signal.SIGKILL)
        assert len(both) == 2
        wait_until(lambda: are_gone(both), seconds=DEADLINE)


def test_a_second_supervisor_is_refused(state: StateDirectory) -> None:
    with supervisor(state):
        command = [sys.executable, "-m", "tests.bonsai.small_stack", str(state.root)]
        second = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
        assert second.returncode == 1
        assert "a stack already runs" in second.stderr


def test_redis_is_private_durable_and_never_evicts(state: StateDirectory) -> None:
    with supervisor(state), redis_of(state) as redis:
        settings = redis.config_get("port", "appendonly", "appendfsync", "maxmemory-policy")
    assert settings == {
        "port": "0",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
    }
    assert state.redis_socket.parent.stat().st_mode & 0o777 == 0o700


def test_a_killed_redis_is_started_again(state: StateDirectory) -> None:
    """The supervisor keeps the stack: what dies after it was ready comes back with its data."""
    with supervisor(state):
        with redis_of(state) as redis:
            redis.set("bonsai:test", "kept")
            server = redis.info("server")["process_id"]
        os.kill(server, signal.SIGKILL)
        wait_until(lambda: _value(state) == "kept", seconds=DEADLINE)


def _value(state: StateDirectory) -> str | None:
    from redis.exceptions import RedisError

    try:
        with redis_of(state) as redis:
            value = redis.get("bonsai:test")
            return value if isinstance(value, str) else None
    except RedisError:
        return None
