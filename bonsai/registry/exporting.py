"""Between the command and the running gateway: an archive becomes a directory, files become a candidate.

Owns the order of these. Does not own what is in an archive (service/export.py) nor merging.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from bonsai.registry.stack import client_of
from service.export import is_adapter, unpack


async def exported(directory: Path, policy_id: str, target: Path, base: Path, *, merged: bool) -> None:
    """Write a policy of the stack in `directory` to `target`: as an adapter, or as a whole model, which one of full
    weights always is. Raises NoStack, BonsaiError, OSError, ValueError."""
    async with client_of(directory) as client:
        archive = await client.export_policy(policy_id, str(base))
    if not (merged and is_adapter(archive)):
        unpack(archive, target)
        return
    from bonsai.registry.merging import merge

    with tempfile.TemporaryDirectory(prefix="bonsai-export-") as name:
        unpack(archive, Path(name) / "adapter")
        merge(base, Path(name) / "adapter", target)


async def registered(directory: Path, digest: str) -> None:
    """Have the gateway register what was put below its artefact root. Raises NoStack, BonsaiError."""
    async with client_of(directory) as client:
        await client.register_policy(digest)
