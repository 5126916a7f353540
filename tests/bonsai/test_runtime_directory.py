"""Private directories, short socket paths, one supervisor at a time."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from bonsai.runtime_directory import (
    LONGEST_SOCKET_PATH,
    StackRunsAlready,
    UnsafeDirectory,
    clear_runtime,
    locked,
    open_state,
    remove_runtime,
    runtime_directory,
)


def test_everything_is_private(tmp_path: Path) -> None:
    state = open_state(tmp_path / "state", {"XDG_RUNTIME_DIR": str(tmp_path)})
    for path in (state.root, state.runtime, state.redis, state.spool, state.artefacts):
        assert path.stat().st_mode & 0o777 == 0o700, path


def test_a_state_directory_that_others_could_read_is_closed(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    state = open_state(tmp_path / "state", {"XDG_RUNTIME_DIR": str(tmp_path)})
    assert state.root.stat().st_mode & 0o777 == 0o700


def test_a_link_in_place_of_our_directory_is_refused(tmp_path: Path) -> None:
    environment = {"XDG_RUNTIME_DIR": str(tmp_path)}
    runtime_directory((tmp_path / "state").absolute(), environment).symlink_to(tmp_path)
    with pytest.raises(UnsafeDirectory):
        open_state(tmp_path / "state", environment)


def test_two_state_directories_have_two_runtime_directories() -> None:
    assert runtime_directory(Path("/a"), {}) != runtime_directory(Path("/b"), {})


def test_a_deep_runtime_directory_is_not_used(tmp_path: Path) -> None:
    """A socket's path has 107 bytes; a longer one fails only when the engine binds, half a minute later."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    found = runtime_directory(Path("/state"), {"XDG_RUNTIME_DIR": str(deep)})
    assert deep not in found.parents
    assert len(os.fsencode(found / "policy.sock")) <= LONGEST_SOCKET_PATH


def test_the_second_holder_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    state = open_state(tmp_path / "state", {"XDG_RUNTIME_DIR": str(tmp_path)})
    with locked(state), pytest.raises(StackRunsAlready), locked(state):
        pass
    with locked(state):
        pass


def test_stale_sockets_are_removed_and_nothing_else(tmp_path: Path) -> None:
    state = open_state(tmp_path / "state", {"XDG_RUNTIME_DIR": str(tmp_path)})
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(state.policy_socket))
    (state.runtime / "note").write_text("kept")
    clear_runtime(state)
    assert [path.name for path in state.runtime.iterdir()] == ["note"]


def test_a_runtime_directory_goes_with_its_stack(tmp_path: Path) -> None:
    state = open_state(tmp_path / "state", {"XDG_RUNTIME_DIR": str(tmp_path)})
    remove_runtime(state)
    assert not state.runtime.exists()
