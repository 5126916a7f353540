"""From a finished policy to a name in the registry: write aside, sync, rename, propose.

Owns the policy's directory and manifest. Does not own the registry's write, which is the lease's last script:
until that has run, the directory is an orphan that the next attempt finds and adopts.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from bon_algos.contracts import ADAPTER_FILES, Fingerprint, Manifest, PolicyRecord, adapter_digest
from worker.durable import sha256_file, staged


def publish(
    artefacts: Path, adapter: Path, fingerprint: Fingerprint, manifest_of: Callable[[str, dict[str, str]], Manifest]
) -> PolicyRecord:
    """Put the adapter under its digest and describe it as a candidate.

    `manifest_of` makes the manifest from the digest and the files' own digests. A directory that exists already
    holds the same weights, from an attempt that died before it was registered or from another job: it stays, and
    its manifest is the policy's.
    """
    scratch = adapter.parent / f"publish-{secrets.token_hex(4)}"
    shutil.copytree(adapter, scratch)
    (scratch / "fingerprint.json").write_text(fingerprint.model_dump_json())
    files = {name: sha256_file(scratch / name) for name in ADAPTER_FILES}
    digest = adapter_digest(files)
    home = artefacts / "policies" / digest
    with staged(home) as aside:
        for name in ADAPTER_FILES:
            shutil.copyfile(scratch / name, aside / name)
        (aside / "manifest.json").write_text(manifest_of(digest, files).model_dump_json(indent=2))
    shutil.rmtree(scratch)
    manifest = Manifest.model_validate_json((home / "manifest.json").read_text())
    return PolicyRecord(
        id=manifest.policy_id,
        tenant=manifest.tenant,
        kind="lora",
        state="candidate",
        created_at=manifest.created_at,
        n_equivalent=manifest.spec.n,
        manifest=manifest,
        directory=f"policies/{digest}",
    )
