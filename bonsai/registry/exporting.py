"""Between the command and the running gateway: an archive becomes a directory, files become a candidate.

Owns the order of these. Does not own what is in an archive (service/export.py) nor merging.
"""

from __future__ import annotations

import tempfile
from contextlib import aclosing
from pathlib import Path

from bonsai.registry.stack import client_of
from service.export import is_adapter, unpack
from worker.durable import staged


async def exported(directory: Path, policy_id: str, target: Path, base: Path, *, merged: bool) -> None:
    """Write a policy of the stack in `directory` to `target`: as an adapter, or as a whole model, which one of full
    weights always is. What is under way lies beside it, whatever that takes. Raises NoStack, BonsaiError, OSError,
    ValueError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
        archive = Path(name) / "policy.tar"
        await _fetch(directory, policy_id, base, archive)
        if not (merged and is_adapter(archive)):
            with staged(target) as aside:
                unpack(archive, aside)
            return
        from bonsai.registry.merging import merge

        adapter = Path(name) / "adapter"
        unpack(archive, adapter)
        merge(base, adapter, target)


async def _fetch(directory: Path, policy_id: str, base: Path, archive: Path) -> None:
    async with client_of(directory) as client, aclosing(client.export_policy(policy_id, str(base))) as pieces:
        with archive.open("xb") as file:
            async for piece in pieces:
                file.write(piece)


async def registered(directory: Path, digest: str) -> None:
    """Have the gateway register what was put below its artefact root. Raises NoStack, BonsaiError."""
    async with client_of(directory) as client:
        await client.register_policy(digest)
