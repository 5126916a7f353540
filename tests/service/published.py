"""A policy's directory as the worker leaves it, and the fingerprint in it."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

from bon_algos.contracts import (
    Fingerprint,
    Manifest,
    adapter_digest,
)
from tests.service.records import manifest

COMPLETIONS = tuple(tuple(range(row, row + 32)) for row in range(10))
"""320 tokens."""


def base_logprob(token: int) -> float:
    return -1.0 - 0.01 * token


def fingerprint(distance: float = 0.5) -> Fingerprint:
    """Of a policy that is `distance` nats from the base at every token."""
    return Fingerprint(
        prompt_token_ids=((1, 2, 3),) * len(COMPLETIONS),
        completion_token_ids=COMPLETIONS,
        policy_logprobs=tuple(tuple(base_logprob(token) - distance for token in row) for row in COMPLETIONS),
        base_logprobs=tuple(tuple(base_logprob(token) for token in row) for row in COMPLETIONS),
    )


def safetensors(
    values: bytes = struct.pack("<4f", 1, 2, 3, 4), header: dict[str, object] | None = None, length: int | None = None
) -> bytes:
    text = json.dumps(header or {"lora_A": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + values


def write_policy(root: Path, files: dict[str, bytes] | None = None) -> Manifest:
    """A policy's directory as the worker leaves it; `files` replaces some of them, and the digests follow."""
    contents = {
        "adapter_config.json": json.dumps({"peft_type": "LORA", "r": 8}).encode(),
        "adapter_model.safetensors": safetensors(),
        "fingerprint.json": fingerprint().model_dump_json().encode(),
        **(files or {}),
    }
    return _written(root, contents, {})


def write_full_policy(root: Path) -> Manifest:
    """One of full weights: a model directory, without a fingerprint."""
    contents = {"config.json": b"{}", "model.safetensors": safetensors(), "tokenizer.json": b"{}"}
    return _written(root, contents, {"kind": "full", "lora_rank": 0})


def _written(root: Path, contents: dict[str, bytes], fields: dict[str, object]) -> Manifest:
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    digest = adapter_digest(digests)
    written = manifest(f"pol-{digest[:16]}", files=digests).model_copy(update=fields)
    directory = root / "policies" / digest
    directory.mkdir(parents=True)
    for name, content in {**contents, "manifest.json": written.model_dump_json().encode()}.items():
        (directory / name).write_bytes(content)
    return written
