"""What a policy's ancestors were trained on: read from the frozen windows that their manifests name.

Owns the walk from a policy to its ancestors and the set of prompts that any of them learned from, so that none of these
is ever held out. Does not own the split (`acceptance`), nor reading records and windows, which whoever asks brings: the
worker that freezes a window and the gateway that tells beforehand what it would freeze. A prompt is its tokens.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from bon_algos.acceptance import Prompt, Unusable
from bon_algos.contracts import Manifest, PolicyId, PolicyRecord

CHUNK_BYTES: Final = 2**16
OpenWindow = Callable[[str], AbstractContextManager[BinaryIO]]
"""The pools of a job's frozen window, as they lie on the disk. Raises OSError."""


def pools_path(artefacts: Path, job_id: str) -> Path:
    """Where they lie."""
    return artefacts / "jobs" / job_id / "window" / "pools.jsonl.z"


class Lineage(NamedTuple):
    """Where a policy comes from."""

    ancestors: tuple[PolicyId, ...]
    """Distilled ones, each once, nearest first."""
    trained: frozenset[Prompt]
    """Prompts that one of them, or one it learned from, was trained on."""
    unknown: tuple[PolicyId, ...] = ()
    """Ancestors of whose training nobody here knows anything: they were imported, or deleted."""


NO_ANCESTORS: Final = Lineage((), frozenset())


def lineage(
    parents: Sequence[PolicyId],
    record_of: Callable[[PolicyId], PolicyRecord | None],
    was_deleted: Callable[[PolicyId], bool],
    open_window: OpenWindow,
) -> Lineage:
    """Of a policy that is made from these, or learns from what they drew; base policies have no ancestors.

    record_of: None for one that nobody knows; whoever needs that one refuses it.
    Raises Unusable: `lineage_unknown` where the window of an ancestor is gone or not the one of its manifest, for then
    nobody can tell which prompts are still unseen; `policy_unusable` where an erasure took it.
    """
    found: list[PolicyId] = []
    unknown: list[PolicyId] = []
    trained: set[Prompt] = set()
    waiting = list(parents)
    while waiting:
        policy_id = waiting.pop(0)
        record = record_of(policy_id)
        is_ancestor = was_deleted(policy_id) if record is None else record.manifest is not None
        if not is_ancestor or policy_id in found:
            continue
        found.append(policy_id)
        if record is not None and record.tainted:
            raise Unusable("policy_unusable", f"{policy_id} had learned from rows that were erased since")
        learned_from = None if record is None else _trained(record.manifest, open_window)
        if learned_from is None:
            unknown.append(policy_id)
        else:
            trained |= learned_from
        waiting += [] if record is None else sorted(record.parents)
    return Lineage(tuple(found), frozenset(trained), tuple(unknown))


def _trained(manifest: Manifest | None, open_window: OpenWindow) -> set[Prompt] | None:
    """None where no job here made it."""
    if manifest is None or manifest.job_id is None or manifest.data is None:
        return None
    try:
        with open_window(manifest.job_id) as packed:
            digest, prompts = _train_prompts(packed)
    except (OSError, ValueError, zlib.error) as error:
        raise _unknown(manifest, f"cannot be read ({type(error).__name__})") from error
    if digest != manifest.data.digest:
        raise _unknown(manifest, "is not the one that its manifest names")
    return prompts


def _train_prompts(packed: BinaryIO) -> tuple[str, set[Prompt]]:
    """The digest of a window's pools, and the prompts of those that are trained on. A pool is a line; no more than a
    few are held at a time, for a window may have hundreds of megabytes."""
    unpacking, digest, prompts, rest = zlib.decompressobj(), hashlib.sha256(), set[Prompt](), b""
    while chunk := packed.read(CHUNK_BYTES):
        content = unpacking.decompress(chunk)
        digest.update(content)
        *lines, rest = (rest + content).split(b"\n")
        for line in lines:
            # Of the candidates, which are nearly all of it and come last, nothing is needed. In a text the quotation
            # marks would be escaped.
            pool = json.loads(line.partition(b',"candidates":')[0] + b"}")
            if pool["side"] == "train":
                prompts.add(tuple(pool["prompt_ids"]))
    return digest.hexdigest(), prompts


def _unknown(manifest: Manifest, why: str) -> Unusable:
    return Unusable(
        "lineage_unknown",
        f"the window that {manifest.policy_id} was trained on {why}, so no prompt is known to be unseen: "
        f"restore jobs/{manifest.job_id}/window among the artefacts, or distil without this policy",
    )
