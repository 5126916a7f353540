"""The administrator's key and the pepper: made once, for this user alone, kept over restarts."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from bonsai.runtime_directory import StateDirectory, UnsafeDirectory
from bonsai.secrets import make_secrets
from service.api_key import read_admin_key, read_pepper


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    return StateDirectory(tmp_path, tmp_path / "run")


def test_both_are_made_private_and_kept(state: StateDirectory) -> None:
    make_secrets(state)
    made = read_admin_key(state.admin_key), read_pepper(state.key_pepper)
    make_secrets(state)
    assert (read_admin_key(state.admin_key), read_pepper(state.key_pepper)) == made
    for file in (state.admin_key, state.key_pepper):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_start_that_died_while_it_wrote_leaves_no_half_key(state: StateDirectory) -> None:
    aside = state.admin_key.with_name("admin.key.new")
    aside.write_text("sk-bonsai-half")
    make_secrets(state)
    assert read_admin_key(state.admin_key)
    assert not aside.exists()


def test_a_key_that_others_can_read_is_not_used(state: StateDirectory) -> None:
    make_secrets(state)
    state.admin_key.chmod(0o640)
    with pytest.raises(UnsafeDirectory, match="mode 0640; it must be 0600"):
        make_secrets(state)


def test_a_link_in_its_place_is_not_followed(state: StateDirectory, tmp_path: Path) -> None:
    state.admin_key.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeDirectory, match="cannot be read"):
        make_secrets(state)
    assert not (tmp_path / "elsewhere").exists()
