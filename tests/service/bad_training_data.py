"""Lines L31 to L38 of reliability.md 8.7, and what else is no file to learn from, no window and no training file.

Owns: the rows. Does not own: sending them (test_bad_training_data.py). What is the format's fault is 422; what is a
row's is told with its line, the file being kept with the status `error`: so OpenAI's clients expect it.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
from collections.abc import Callable, Mapping
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from tests.service.bad_input import CANARY
from tests.service.records import manifest
from tests.service.training_files import line

COMPLETIONS: Final = [{"text": "aa", "token_ids": [97, 97]}]
GOOD: Final = {"prompt": "p", "completions": COMPLETIONS, "rewards": [1.0]}


def parquet(columns: Mapping[str, Any], **more: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), stream, **more)
    return stream.getvalue()


def rows_as_parquet(*rows: Mapping[str, Any], **more: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), stream, **more)
    return stream.getvalue()


def nested(depth: int) -> pa.Array:
    kind: pa.DataType = pa.int64()
    for _ in range(depth):
        kind = pa.list_(kind)
    return pa.array([None], type=kind)


def bomb() -> bytes:
    """One text of 64 MB, 64 times; stored once, and compressed to nothing."""
    text = "a" * 64_000_000
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 64), pa.array([text]))
    return parquet({"prompt": column, "completions": pa.array([COMPLETIONS] * 64)}, compression="zstd")


NO_FORMAT: Final[Mapping[str, Callable[[], bytes]]] = {
    "L31 an encrypted footer": lambda: b"PARE" + bytes(64) + b"PARE",
    "L38 gzip": lambda: gzip.compress(line() * 1000),
    "L38 a gzip bomb": lambda: gzip.compress(bytes(10_000_000)),
    "a pickle": lambda: pickle.dumps({"prompt": CANARY}),
    "an empty file": lambda: b"",
    "blank lines": lambda: b"\r\n \r\n",
    "UTF-16": lambda: line().decode().encode("utf-16"),
    "CSV": lambda: b"prompt,completion\np,c\n",
    "a JSON list": lambda: json.dumps([GOOD]).encode(),
}
"""422 before a row is looked at: `param` is file."""

FAULTY: Final[Mapping[str, tuple[Callable[[], bytes], int | None, str]]] = {
    "L31 a foreign schema": (lambda: parquet({"question": ["q"], "answer": ["a"]}), 1, "completions is required"),
    "L31 10^5 columns": (
        lambda: parquet({f"c{i}": [1] for i in range(100_000)}, write_statistics=False, store_schema=False),
        None,
        "columns",
    ),
    "L31 dates": (
        lambda: parquet({"prompt": pa.array([0], pa.timestamp("ns"))}, use_deprecated_int96_timestamps=True),
        None,
        "neither texts, numbers nor lists",
    ),
    "L31 no footer": (lambda: rows_as_parquet(GOOD)[:-9], None, "cut off"),
    "L31 a footer of 4 GB": (lambda: rows_as_parquet(GOOD)[:-8] + b"\xff\xff\xff\xffPAR1", None, "cut off"),
    "L31 a damaged page": (lambda: damaged(rows_as_parquet(*[GOOD] * 100)), 1, "damaged"),
    "L31 100 deep": (lambda: parquet({"prompt": nested(100)}), None, "nested too deeply"),
    "L31 10 deep": (lambda: parquet({"prompt": nested(10)}), None, "nested more than 6 deep"),
    "L31 NaN rewards": (lambda: rows_as_parquet(GOOD, {**GOOD, "rewards": [float("nan")]}), 2, "NaN"),
    "L32 another tenant's": (lambda: line(tenant="acme"), 1, "tenant is not a field known here"),
    "L33 an id twice": (lambda: line(id="a") + line(id="b") + line(id="a"), 3, "id is that of an earlier row"),
    "L34 NaN": (lambda: line(rewards=[1.0, float("nan")]), 1, "NaN and Infinity are not JSON"),
    "L34 1e400": (lambda: line().replace(b"1.0", b"1e400"), 1, "rewards[0] must be"),
    "rewards beyond 10^8": (lambda: line(rewards=[1e9, 0.0]), 1, "rewards[0] must be at most 100000000"),
    "L34 n mismatch": (lambda: line(rewards=[1.0]), 1, "has 1 rewards for 2 completions"),
    "L34 0 candidates": (lambda: line(completions=[], rewards=[]), 1, "completions must have at least 1"),
    "L34 rewards in some rows alone": (lambda: line() + line(rewards=None), 2, "rewards are given by some rows"),
    "L35 tokens above the vocabulary": (
        lambda: line(completions=[{"token_ids": [256]}], rewards=[1.0]),
        1,
        "completions[0].token_ids must be below 256",
    ),
    "L35 a prompt above the vocabulary": (
        lambda: line(prompt=None, prompt_token_ids=[10**9]),
        1,
        "prompt_token_ids must be below 256",
    ),
    "L35 negative tokens": (lambda: line(completions=[{"token_ids": [-1]}], rewards=[1.0]), 1, "must be at least 0"),
    "L36 a line above 8 MiB": (lambda: line(prompt="x" * (8 * 2**20 + 1)), 1, "is longer than 8388608 bytes"),
    "log-probs of fewer tokens": (
        lambda: line(completions=[{"token_ids": [1, 2], "logprobs": [-1.0]}], rewards=[1.0]),
        1,
        "logprobs, and not one for each",
    ),
    "a log-prob above 0": (
        lambda: line(completions=[{"token_ids": [1], "logprobs": [0.1]}], rewards=[1.0]),
        1,
        "logprobs[0] must be at most 0",
    ),
    "log-probs of a text": (
        lambda: line(completions=[{"text": CANARY, "logprobs": [-1.0]}], rewards=[1.0]),
        1,
        "logprobs, and not one for each",
    ),
    "neither text nor tokens": (lambda: line(completions=[{}], rewards=[1.0]), 1, "has neither text nor token_ids"),
    "no prompt": (lambda: line(prompt=None), 1, "has 0 of prompt, messages and prompt_token_ids"),
    "two prompts": (lambda: line(prompt_token_ids=[1]), 1, "has 2 of prompt, messages and prompt_token_ids"),
    "longer than the window": (lambda: line(prompt="x" * 256), 1, "the policy's window is 256"),
    "an unknown policy's name": (lambda: line(policy=CANARY), 1, "policy must be one of 'base'"),
    "D46 a text of no known end": (
        lambda: line(completions=["a", "b"]),
        1,
        "completions[0] needs token_ids: the tokenizer does not say how a completion ends",
    ),
    "half a surrogate pair": (lambda: line(prompt="a\ud800"), 1, "half a surrogate pair"),
    "invalid UTF-8": (lambda: b'{"prompt":"\xff"}\n', 1, "not valid UTF-8"),
    "two documents in a line": (lambda: line()[:-1] + line(), 1, "not JSON"),
    "a name twice": (lambda: b'{"prompt":"a","prompt":"b"}\n', 1, "the same name twice"),
    "100,000 arrays": (lambda: b'{"prompt":' + b"[" * 100_000 + b"\n", 1, ""),
}
"""(content, the line that is named, words of its fault)."""

SERVED: Final[Mapping[str, Callable[[], bytes]]] = {
    "L37 CRLF": lambda: line(id="a")[:-1] + b"\r\n" + line(id="b")[:-1] + b"\r\n",
    "L37 a byte order mark": lambda: b"\xef\xbb\xbf" + line() + line(),
    "no line end at the end": lambda: line() + line()[:-1],
    "blank lines between": lambda: line() + b"\n\r\n" + line(),
    "Parquet": lambda: rows_as_parquet(GOOD, GOOD, compression="zstd"),
    "Parquet, in groups of a row": lambda: rows_as_parquet(GOOD, GOOD, row_group_size=1),
    "Parquet, texts by dictionary": lambda: rows_as_parquet(GOOD, GOOD, use_dictionary=True),
}
"""Two rows each."""


def damaged(content: bytes) -> bytes:
    """What stands in the first pages is something else."""
    return content[:4] + bytes(60) + content[64:]


STUDENT: Final = "pol-" + "1" * 16
OTHER_BASE: Final = "pol-" + "8" * 16
NO_FILE: Final = "file-" + "0" * 32
FORWARD: Final = {"type": "bon_forward_kl"}
NO_JOB: Final[Mapping[str, tuple[Mapping[str, object], int, str | None]]] = {
    "D12 an end before the start": ({"window": {"since": 2.0, "until": 1.0}}, 422, "window.until"),
    "D13 a window in the future": ({"window": {"since": 1e12}}, 422, "window.since"),
    "D14 a date": ({"window": {"since": "2026-01-01"}}, 422, "window.since"),
    "D16 an expression": ({"window": {"filter": "__import__('os')"}}, 422, "window.filter"),
    "D16 an expression for a tag": ({"window": {"tags": ["'; drop"]}}, 422, "window.tags[0]"),
    "a tag of 10 KB": ({"window": {"tags": [CANARY * 1000]}}, 422, "window.tags[0]"),
    "nine tags": ({"window": {"tags": [f"t{i}" for i in range(9)]}}, 422, "window.tags"),
    "no such route": ({"window": {"routes": ["nowhere"]}}, 404, "route"),
    "a route's name that is none": ({"window": {"routes": ["../x"]}}, 422, "window.routes[0]"),
    "100 policies": ({"window": {"policies": [STUDENT] * 100}}, 422, "window.policies"),
    "an unknown policy": ({"window": {"policies": [STUDENT]}}, 404, "window.policies[0]"),
    "policies for a method that cannot weigh": (
        {"window": {"policies": [STUDENT]}, "method": {"type": "bond"}},
        422,
        "window.policies",
    ),
    "feedback that is none": ({"window": {"feedback": {"name": "Ü"}}}, 422, "window.feedback.name"),
    "feedback of at least NaN": ({"window": {"feedback": {"at_least": "NaN"}}}, 422, "window.feedback.at_least"),
    "D17 a path": ({"training_file": "file:///etc/passwd"}, 422, "training_file"),
    "D17 a link": ({"training_file": "http://169.254.169.254/"}, 422, "training_file"),
    "D17 no such file": ({"training_file": NO_FILE}, 404, "training_file"),
    "D18 an unknown policy to begin with": ({"training": {"start_from": STUDENT}}, 404, "training.start_from"),
    "tags of a file": ({"training_file": NO_FILE, "window": {"tags": ["a"]}}, 422, "window.tags"),
    "D18 an unknown parent": ({"training": {"start_from": STUDENT}}, 404, "training.start_from"),
    "D48 a boolean as a text": ({"dry_run": "yes"}, 422, "dry_run"),
}
"""(members beside the method, status, `error.param`), refused with and without `dry_run`."""

NO_PARENT: Final[Mapping[str, tuple[Mapping[str, object], str]]] = {
    "D18 retired": ({"state": "retired"}, "policy_retired"),
    "failed": ({"state": "failed"}, "policy_unusable"),
    "tainted": ({"tainted": True}, "policy_unusable"),
    "D18 of another base": ({"manifest": manifest().model_copy(update={"base_policy_id": OTHER_BASE})}, "other_base"),
}
"""(what is otherwise about a policy that is good, `error.code`): nothing is made from it. That a policy is its own
parent cannot be said: it has no name before it is there."""
NO_TEACHER: Final = ("failed", "tainted")
"""Of these; the logged draws of a retired one are as good as they were."""
