"""Files that nobody can learn from, windows that are none: refused by line or field, in bounded memory."""

from __future__ import annotations

import asyncio
import io
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import redis as blocking_redis

from bon_algos.chat import ChatTokenizer
from bon_algos.contracts import policy_key
from bon_algos.row_files import MAX_LINE_BYTES
from service.errors import InvalidField
from service.file_check import MAX_FAULTS, MEMORY_BYTES, check, check_apart
from service.tokenizer_files import read_tokenizer
from tests.fixtures.gateway import WINDOW
from tests.service.bad_input import CANARY
from tests.service.bad_training_data import (
    FAULTY,
    FORWARD,
    NO_FORMAT,
    NO_JOB,
    NO_PARENT,
    NO_TEACHER,
    SERVED,
    STUDENT,
    bomb,
)
from tests.service.records import policy
from tests.service.training_files import line
from tests.stubs.tokenizer import write_model_directory

COUNTS_THREADS = """
import os, sys
import pyarrow.parquet
from bon_algos.row_files import parquet_rows_of
def threads():
    return len(os.listdir("/proc/self/task"))
before = threads()
with open(sys.argv[1], "rb") as stream:
    print(len(list(parquet_rows_of(stream))), before, threads())
"""
INTERPOLATION = {"method": {"type": "interpolation", "interpolation": {"policy": STUDENT}}}


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model_directory: Path) -> ChatTokenizer:
    return read_tokenizer(model_directory)


@pytest.mark.parametrize("content", NO_FORMAT.values(), ids=NO_FORMAT.keys())
def test_what_is_no_format_of_ours_is_refused(tokenizer, content):
    with pytest.raises(InvalidField) as refused:
        check(io.BytesIO(content()), tokenizer, WINDOW)
    assert refused.value.param == "file"
    assert CANARY not in refused.value.message


@pytest.mark.parametrize(("content", "place", "words"), FAULTY.values(), ids=FAULTY.keys())
def test_the_line_at_fault_is_named_and_not_repeated(tokenizer, content, place, words):
    found = check(io.BytesIO(content()), tokenizer, WINDOW)
    assert found.faults[0].line == place
    assert words in found.faults[0].message
    assert not any(CANARY in fault.message for fault in found.faults)


@pytest.mark.parametrize("content", SERVED.values(), ids=SERVED.keys())
def test_forms_of_writing_that_are_read(tokenizer, content):
    found = check(io.BytesIO(content()), tokenizer, WINDOW)
    assert (found.faults, found.rows, found.longest_completion) == ((), 2, 2)


def test_the_first_faults_are_told_and_the_good_rows_counted(tokenizer):
    content = b"".join(line() if i % 2 else line(rewards=[1.0]) for i in range(100))
    found = check(io.BytesIO(content), tokenizer, WINDOW)
    assert [fault.line for fault in found.faults] == list(range(1, 2 * MAX_FAULTS, 2))
    assert found.rows == MAX_FAULTS - 1


def test_L36_a_line_of_100_MB_takes_no_more_memory_than_the_longest_that_is_read(tokenizer):
    class Endless(io.RawIOBase):
        """One line, made as it is read."""

        def __init__(self) -> None:
            self.left = 100 * 2**20

        def readable(self) -> bool:
            return True

        def seekable(self) -> bool:
            return True

        def seek(self, offset: int, whence: int = 0) -> int:
            return 0

        def readinto(self, buffer) -> int:
            count = min(len(buffer), self.left)
            buffer[:count] = (b"{" + b"a" * (count - 1))[:count]
            self.left -= count
            return count

    endless = Endless()
    found = check(io.BufferedReader(endless), tokenizer, WINDOW)
    assert found.faults[0].message == f"is longer than {MAX_LINE_BYTES} bytes"
    assert endless.left > 100 * 2**20 - 2 * MAX_LINE_BYTES


@pytest.mark.slow
def test_L31_a_parquet_bomb_ends_in_a_process_of_its_own(tmp_path, tokenizer, model_directory):
    """64 texts of 64 MB from a file of a few kB: 4 GB, which that process may not have."""
    assert MEMORY_BYTES < 64 * 64_000_000
    path = tmp_path / "bomb"
    path.write_bytes(bomb())
    assert path.stat().st_size < 100_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = asyncio.run(check_apart(path, tokenizer, WINDOW, model_directory))
    assert "memory" in found.faults[0].message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 200_000


def test_a_file_is_read_alike_in_a_process_of_its_own(tmp_path, tokenizer, model_directory):
    path = tmp_path / "file"
    path.write_bytes(SERVED["Parquet"]())
    with path.open("rb") as stream:
        here = check(stream, tokenizer, WINDOW)
    assert asyncio.run(check_apart(path, tokenizer, WINDOW, model_directory)) == here


def test_what_was_found_stands_however_that_process_ends(tmp_path, tokenizer, model_directory, monkeypatch):
    """A library's threads may abort it on its way out (Arrow issue 34314): a good file was refused as too large."""
    (tmp_path / "sitecustomize.py").write_text("import atexit, os; atexit.register(os.abort)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    path = tmp_path / "file"
    path.write_bytes(SERVED["Parquet"]())
    found = asyncio.run(check_apart(path, tokenizer, WINDOW, model_directory))
    assert (found.faults, found.rows) == ((), 2)


def test_a_fault_of_that_process_is_not_said_to_be_the_file_s(tmp_path, tokenizer):
    path = tmp_path / "file"
    path.write_bytes(SERVED["Parquet"]())
    with pytest.raises(RuntimeError, match="ended with 1"):
        asyncio.run(check_apart(path, tokenizer, WINDOW, tmp_path / "no-model"))


def test_a_parquet_file_is_read_without_threads(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(SERVED["Parquet"]())
    said = subprocess.run([sys.executable, "-c", COUNTS_THREADS, str(path)], capture_output=True, text=True, check=True)
    rows, before, after = said.stdout.split()
    assert (rows, after) == ("2", before)


def test_that_process_knows_no_secrets(tmp_path, tokenizer, model_directory, monkeypatch):
    """Its environment is written down by the kernel: what stands there it was given."""
    monkeypatch.setenv("BONSAI_ADMIN_KEY_FILE", "/secret")
    from service.file_check import _environment

    said = subprocess.run([sys.executable, "-c", "import os; print(dict(os.environ))"], env=_environment(),
                          capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert "BONSAI" not in said


@pytest.mark.parametrize("query", ["", "?dry_run=true"], ids=["job", "dry run"])
@pytest.mark.parametrize(("members", "status", "param"), NO_JOB.values(), ids=NO_JOB.keys())
def test_a_window_or_file_that_is_none_is_refused_by_its_field(
    still_world, groups_logged, query, members, status, param
):
    reply = still_world.client.post(f"/distill{query}", {"method": FORWARD, **members})
    assert reply.status == status, reply.body
    assert reply.json["error"]["param"] == param
    assert CANARY.encode() not in reply.body


@pytest.mark.parametrize("query", ["", "?dry_run=true"])
@pytest.mark.parametrize(("place", "asked", "names"), [
    ("training.start_from", {"training": {"start_from": STUDENT}, "method": FORWARD}, NO_PARENT),
    ("method.interpolation.policy", INTERPOLATION, NO_PARENT),
    ("window.policies[0]", {"window": {"policies": [STUDENT]}, "method": FORWARD}, NO_TEACHER),
])  # fmt: skip
def test_D18_a_policy_that_nothing_is_made_from_any_more_is_refused(
    still_world, groups_logged, query, place, asked, names
):
    with blocking_redis.Redis.from_url(still_world.redis_url) as store:
        try:
            for name in names:
                changes, code = NO_PARENT[name]
                record = policy(STUDENT).model_copy(update=changes)
                store.hset(policy_key(STUDENT), "record", record.model_dump_json())
                reply = still_world.client.post(f"/distill{query}", asked)
                assert (reply.status, reply.json["error"]["param"], reply.json["error"]["code"]) == (422, place, code)
        finally:
            store.delete(policy_key(STUDENT))


@pytest.fixture(scope="module")
def groups_logged(still_world) -> None:
    for i in range(4):
        assert still_world.client.post("/generate", {"prompt": f"p{i}", "n": 2}).status == 200
    still_world.groups(4)


def test_dry_run_is_true_or_false(still_world):
    reply = still_world.client.post("/distill?dry_run=1", {"method": FORWARD})
    assert (reply.status, reply.json["error"]["param"]) == (422, "dry_run")
