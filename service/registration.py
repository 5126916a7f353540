"""Policies that no job here made: files that were put below the artefact root become a candidate.

Owns: what must be true of them before the registry knows them. Does not own: putting them there (`bonsai policies
import`), the checks of the files (artefacts.py), the engine's proof (publishing.py).
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import cast

from pydantic import Field
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from bon_algos.contracts import POLICIES_DELETED, POLICIES_INDEX, Manifest, PolicyRecord, Record, policy_key
from service.access import Caller
from service.artefacts import ArtefactRefused, checked_adapter, checked_files, read_manifest
from service.audit import AuditChain
from service.errors import Conflict, InvalidField
from service.idempotency import Idempotency, once
from service.store import transact


class RegistrationRequest(Record):
    """Body of `POST /policies`."""

    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    """The name of the directory below `policies/` of the artefact directory."""


class Registration:
    """Registers in one Redis what stands in one artefact directory."""

    def __init__(self, redis: Redis, artefacts: Path, *, base_policy_id: str, max_lora_rank: int) -> None:
        self._redis = redis
        self._artefacts = artefacts
        self._base_policy_id = base_policy_id
        self._max_lora_rank = max_lora_rank

    async def register(self, digest: str, by: Caller, *, idempotency: Idempotency | None = None) -> PolicyRecord:
        """The new candidate. Raises InvalidField where its files are not what they must be, and Conflict where the
        policy is known already or was deleted."""
        try:
            manifest = await asyncio.to_thread(self._checked, digest, by)
        except ArtefactRefused as error:
            raise InvalidField(f"the adapter is refused: {error}", param="digest", code="adapter_refused") from error
        return await self._write(manifest, by, idempotency)

    async def checked(self, policy: PolicyRecord) -> tuple[Manifest, Path]:
        """The manifest of a registered policy, and where its files stand, whole. Raises Conflict."""
        manifest = policy.manifest
        if manifest is None:
            raise Conflict("a base policy has no files here", code="policy_is_base")
        try:
            directory = await asyncio.to_thread(_checked_files, self._artefacts, manifest)
        except ArtefactRefused as error:
            raise Conflict(f"the policy's files are not its own: {error}", code="files_damaged") from error
        return manifest, directory

    def _checked(self, digest: str, by: Caller) -> Manifest:
        manifest = read_manifest(self._artefacts, digest)
        if manifest.imported is None:
            raise ArtefactRefused("a job made it, and registers it itself")
        if manifest.tenant != by.tenant:
            raise ArtefactRefused("it is not the caller's tenant's")
        if manifest.base_policy_id != self._base_policy_id:
            raise ArtefactRefused("it stands on another base than the engine's")
        checked_adapter(self._artefacts, manifest, max_rank=self._max_lora_rank)
        return manifest

    async def _write(self, manifest: Manifest, by: Caller, idempotency: Idempotency | None) -> PolicyRecord:
        policy = manifest.as_candidate()

        async def change(pipe: Pipeline) -> PolicyRecord:
            if await pipe.zscore(POLICIES_DELETED, policy.id) is not None:
                raise Conflict("this policy was deleted, and its name is never used again", code="policy_deleted")
            if cast("str | None", await pipe.hget(policy_key(policy.id), "record")) is not None:
                raise Conflict("this policy is known already", code="policy_exists", facts={"policy": policy.id})
            audit = await AuditChain.open(pipe)
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.hset(policy_key(policy.id), "record", policy.model_dump_json())
            pipe.hset(policy_key(policy.id), "version", str(policy.version))
            pipe.zadd(POLICIES_INDEX, {policy.id: policy.created_at})
            told = {"before": None, "after": policy.state, "digest": manifest.digest}
            imported = {} if manifest.imported is None else manifest.imported.model_dump()
            audit.append(pipe, "policy_import", by, policy=policy.id, data=json.dumps({**told, **imported}))
            return policy

        keys = [POLICIES_DELETED, POLICIES_INDEX, policy_key(policy.id)]
        return await transact(self._redis, keys, once(idempotency, PolicyRecord, change))


def _checked_files(root: Path, manifest: Manifest) -> Path:
    if manifest.kind == "full":
        return checked_files(root, manifest)
    directory, _ = checked_adapter(root, manifest, max_rank=manifest.lora_rank)
    return directory
