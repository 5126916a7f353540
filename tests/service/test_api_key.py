"""What a key is as text, what is kept of it, and the private files a gateway is started with."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from service.api_key import key_digest, key_id, new_key, new_pepper, public_part, read_admin_key, read_pepper
from service.wrong_keys import MOST_KEPT, PER_ADDRESS, PER_KEY, WINDOW_SECONDS, WrongKeys
from tests.fixtures.gateway import environment_of, gateway_settings

KEY = "sk-bonsai-" + "a" * 12 + "-" + "b" * 48


def test_a_key_has_a_public_part_and_a_secret_of_more_than_256_bits():
    key = new_key()
    assert re.fullmatch(r"sk-bonsai-[0-9A-Za-z]{12}-[0-9A-Za-z]{48}", key)
    # 48 characters of 62: log2(62) · 48 = 285.8 bits.
    assert math.log2(62) * 48 > 256
    assert len({new_key() for _ in range(100)}) == 100
    assert len(set("".join(new_key()[10:] for _ in range(100)))) == 62 + 1  # all of base62, and the hyphen


def test_the_public_part_names_the_key_and_no_more():
    assert key_id(KEY) == "key_" + "a" * 12
    assert public_part("key_" + "a" * 12) == "sk-bonsai-" + "a" * 12


@pytest.mark.parametrize("text", ["", KEY[:-1], KEY + "b", KEY.replace("b", "ü"), KEY + "\n", KEY.upper(), f" {KEY}"])
def test_what_is_no_key_has_no_name(text):
    assert key_id(text) is None


def test_what_is_kept_depends_on_every_character_and_on_the_pepper():
    pepper = bytes.fromhex(new_pepper())
    digest = key_digest(KEY, pepper)
    assert digest == hmac.new(pepper, KEY.encode(), hashlib.sha256).hexdigest()
    others = {key_digest(KEY[:i] + "-" + KEY[i + 1 :], pepper) for i in range(len(KEY)) if KEY[i] != "-"}
    assert digest not in others
    assert key_digest(KEY, b"another") != digest


@pytest.mark.parametrize(
    ("content", "mode", "complaint"),
    [
        (KEY, 0o644, "has mode 0644; it must be 0600"),
        (KEY, 0o400, "has mode 0400; it must be 0600"),
        ("sk-bonsai-short", 0o600, "does not hold a key"),
        ("", 0o600, "does not hold a key"),
        (KEY + "x" * 2000, 0o600, "longer than 1024 bytes"),
    ],
)
def test_a_file_that_is_not_a_private_key_is_refused_by_what_is_wrong(tmp_path: Path, content, mode, complaint):
    file = tmp_path / "admin.key"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(ValueError, match=complaint) as refused:
        read_admin_key(file)
    assert KEY not in str(refused.value)


def test_a_directory_a_pipe_a_link_and_nothing_are_refused_without_waiting(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "target").write_text(KEY)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("", "link", "pipe", "missing"):
        with pytest.raises(ValueError, match=r"not a plain file|cannot be read"):
            read_admin_key(tmp_path / name)


def test_somebody_elses_file_is_refused(tmp_path: Path, monkeypatch):
    file = tmp_path / "admin.key"
    file.touch(mode=0o600)
    monkeypatch.setattr(os, "geteuid", lambda: file.stat().st_uid + 1)
    with pytest.raises(ValueError, match="belongs to another user"):
        read_admin_key(file)


def test_a_pepper_is_64_hexadecimal_digits(tmp_path: Path):
    file = tmp_path / "pepper"
    file.touch(mode=0o600)
    file.write_text(new_pepper() + "\n")
    assert len(read_pepper(file)) == 32
    file.write_text("short")
    with pytest.raises(ValueError, match="does not hold a pepper"):
        read_pepper(file)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BONSAI_ADMIN_KEY_FILE", "BONSAI_KEY_PEPPER_FILE"])
def test_a_gateway_without_its_secrets_does_not_start_and_says_why_in_one_line(tmp_path, redis_url, name):
    settings = gateway_settings(tmp_path, "http://127.0.0.1:1", "http://127.0.0.1:2", redis_url)
    given = environment_of(settings)
    Path(given[name]).chmod(0o644)
    for environment in (given, {key: value for key, value in given.items() if key != name}):
        started = subprocess.run(
            [sys.executable, "-m", "service"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert started.returncode == 2
        assert started.stderr.startswith(f"{name}: ")
        assert started.stderr.count("\n") == 1


# --- wrong keys ------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_first_wrong_keys_of_a_minute_are_told_what_is_wrong_and_the_rest_to_wait(clock):
    wrong = WrongKeys(clock)
    assert [wrong.note("a", None) for _ in range(PER_ADDRESS)] == [None] * PER_ADDRESS
    clock.now = 20.5
    assert wrong.note("a", None) == 40  # 60 − 20.5, whole seconds
    assert wrong.note("b", None) is None
    clock.now = WINDOW_SECONDS
    assert wrong.note("a", None) is None


def test_one_key_is_not_tried_from_many_addresses(clock):
    wrong = WrongKeys(clock)
    answers = [wrong.note(f"address {i}", "key_a") for i in range(PER_KEY + 1)]
    assert answers == [None] * PER_KEY + [60]


def test_what_is_remembered_is_bounded(clock):
    wrong = WrongKeys(clock)
    for i in range(MOST_KEPT + 500):
        wrong.note(f"address {i}", None)
    assert len(wrong._windows) == MOST_KEPT
