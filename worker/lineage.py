"""What a policy's ancestors were trained on: read from the frozen windows that their manifests name.

Owns the walk from a policy to its ancestors and the set of prompts that any of them learned from, so that none of these
is ever held out. Does not own the split (`dataset`). A prompt is its tokens.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import redis

from bon_algos.contracts import POLICIES_DELETED, Manifest, PolicyId, PolicyRecord, policy_key
from worker.dataset import read_content
from worker.errors import JobFailed

Prompt = tuple[int, ...]


class Lineage(NamedTuple):
    """Where a policy comes from."""

    ancestors: tuple[PolicyId, ...]
    """Distilled ones, each once, nearest first."""
    trained: frozenset[Prompt]
    """Prompts that one of them, or one it learned from, was trained on."""
    unknown: tuple[PolicyId, ...] = ()
    """Ancestors of whose training nobody here knows anything: they were imported, or deleted."""


def lineage(client: redis.Redis, artefacts: Path, parents: Sequence[PolicyId]) -> Lineage:
    """Of a policy that is made from these, or learns from what they drew; base policies have no ancestors.

    Raises JobFailed (`lineage_unknown`) where the window of an ancestor is gone or is not the one of its manifest: then
    nobody can tell which prompts are still unseen.
    """
    found: list[PolicyId] = []
    unknown: list[PolicyId] = []
    trained: set[Prompt] = set()
    waiting = list(parents)
    while waiting:
        policy_id = waiting.pop(0)
        record = _record(client, policy_id)
        is_ancestor = _was_deleted(client, policy_id) if record is None else record.manifest is not None
        if not is_ancestor or policy_id in found:
            continue
        found.append(policy_id)
        learned_from = None if record is None else _trained(artefacts, record.manifest)
        if learned_from is None:
            unknown.append(policy_id)
        else:
            trained |= learned_from
        waiting += [] if record is None else sorted(record.parents)
    return Lineage(tuple(found), frozenset(trained), tuple(unknown))


def _record(client: redis.Redis, policy_id: PolicyId) -> PolicyRecord | None:
    """None for one that nobody knows: whoever needs that one refuses it."""
    row = client.hget(policy_key(policy_id), "record")
    return None if row is None else PolicyRecord.model_validate_json(row)


def _was_deleted(client: redis.Redis, policy_id: PolicyId) -> bool:
    return client.zscore(POLICIES_DELETED, policy_id) is not None


def _trained(artefacts: Path, manifest: Manifest | None) -> set[Prompt] | None:
    """None where no job here made it."""
    if manifest is None or manifest.job_id is None or manifest.data is None:
        return None
    directory = artefacts / "jobs" / manifest.job_id / "window"
    try:
        data, content = read_content(directory)
    except (OSError, ValueError, zlib.error, JobFailed) as error:
        raise _unknown(manifest, f"cannot be read ({type(error).__name__})") from error
    if data.digest != manifest.data.digest:
        raise _unknown(manifest, "is not the one that its manifest names")
    # Not as records: of the candidates, which are nearly all of it, nothing is needed.
    rows = (json.loads(line) for line in content.splitlines())
    return {tuple(row["prompt_ids"]) for row in rows if row["side"] == "train"}


def _unknown(manifest: Manifest, why: str) -> JobFailed:
    return JobFailed(
        "lineage_unknown",
        f"the window that {manifest.policy_id} was trained on {why}, so no prompt is known to be unseen: "
        f"restore jobs/{manifest.job_id}/window among the artefacts, or distil without this policy",
    )
