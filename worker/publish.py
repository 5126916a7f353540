"""From a finished policy to a name in the registry and back: write aside, sync, rename, propose; read what was proven.

Owns the policy's directory and manifest. Does not own the registry's write, which is the lease's last script:
until that has run, the directory is an orphan that the next attempt finds and adopts, or that is swept (`attempts`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import redis

from bon_algos.contracts import (
    DEFAULT_TENANT,
    Fingerprint,
    Manifest,
    PolicyRecord,
    adapter_digest,
    policy_key,
)
from worker.durable import sha256_file, staged
from worker.errors import JobFailed


def publish(
    artefacts: Path,
    adapter: Path,
    fingerprint: Fingerprint | None,
    manifest_of: Callable[[str, dict[str, str]], Manifest],
    confirm: Callable[[], None],
) -> PolicyRecord:
    """Put the adapter, or the model directory, from the attempt's own one, under its digest and describe it as a
    candidate.

    fingerprint: None for full weights, which no engine has to prove. `manifest_of` makes the manifest from the digest
    and the files' own digests. A directory that exists already holds the same weights, from an attempt that died before
    it was registered or from another job: it stays, and its manifest is the policy's. `confirm` raises when the attempt
    no longer owns the job; nothing has the policy's name then.
    """
    if fingerprint is not None:
        (adapter / "fingerprint.json").write_text(fingerprint.model_dump_json())
    files = {path.name: sha256_file(path) for path in sorted(adapter.iterdir())}
    digest = adapter_digest(files)
    home = artefacts / "policies" / digest
    # Filled where the attempt's leftovers are: beside the policies nobody would know whose it was.
    with staged(home, within=adapter.parent, confirm=confirm, points=("policy.written", "policy.renamed")) as aside:
        for name in files:
            shutil.copyfile(adapter / name, aside / name)
        (aside / "manifest.json").write_text(manifest_of(digest, files).model_dump_json(indent=2))
    os.utime(home)  # one that lay there as an orphan is no longer
    manifest = Manifest.model_validate_json((home / "manifest.json").read_text())
    return manifest.as_candidate()


class Published(NamedTuple):
    """An adapter that was published, whose files are what its manifest says."""

    directory: Path
    rank: int
    alpha: float


def read_published(
    client: redis.Redis, artefacts: Path, policy_id: str, base_policy_id: str, tenant: str = DEFAULT_TENANT
) -> Published:
    """Raises JobFailed for a policy that is none of the tenant's, failed, is tainted, is no adapter, stands on another
    base, or whose files are not its own."""
    row = client.hget(policy_key(policy_id), "record")
    record = None if row is None else PolicyRecord.model_validate_json(row)
    if record is None or record.manifest is None or record.state == "failed" or record.tenant != tenant:
        raise JobFailed("policy_unusable", f"{policy_id} is no distilled policy that passed")
    if record.tainted:
        raise JobFailed("policy_unusable", f"{policy_id} had learned from rows that were erased since")
    if record.kind != "lora":
        raise JobFailed("policy_unusable", f"{policy_id} has full weights, which are for export: name a LoRA policy")
    if record.manifest.base_policy_id != base_policy_id:
        raise JobFailed(
            "policy_unusable", f"{policy_id} stands on {record.manifest.base_policy_id}, not {base_policy_id}"
        )
    directory = artefacts / "policies" / record.manifest.digest
    for name, digest in record.manifest.files.items():
        if not (directory / name).is_file() or sha256_file(directory / name) != digest:
            raise JobFailed("policy_unusable", f"{name} of {policy_id} is not the file of its manifest")
    config = json.loads((directory / "adapter_config.json").read_text())
    return Published(directory, record.manifest.lora_rank, float(config["lora_alpha"]))
