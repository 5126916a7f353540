"""All replicas' publishers together: what the registry hears of a policy, and what the catalogue calls served.

Owns: the one verdict from those of several replicas. Does not own: reaching them (publishing.py), the registry
(policies.py).

A policy has passed as soon as one replica proved it, and is served while one that proved it is in rotation, or none
is. It has failed when its files are refused, or when every replica has refused it: one broken engine fails nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from bon_algos.contracts import FingerprintResult
from service.catalogue import Catalogue
from service.policies import Policies
from service.publishing import AdapterEngine, Publisher


class Publishers:
    """One publisher for each replica."""

    def __init__(
        self,
        engines: Sequence[AdapterEngine],
        catalogue: Catalogue,
        policies: Policies,
        *,
        artefacts: Path,
        slots: int,
        max_lora_rank: int,
        tolerance: float,
    ) -> None:
        self._catalogue = catalogue
        self._policies = policies
        self._recording = asyncio.Lock()
        self.each = tuple(
            Publisher(
                engine,
                catalogue,
                record=self._record,
                tell=self._tell,
                artefacts=artefacts,
                slots=slots,
                max_lora_rank=max_lora_rank,
                tolerance=tolerance,
            )
            for engine in engines
        )

    def _tell(self) -> None:
        engines = [publisher.engine for publisher in self.each]
        # With none in rotation nobody is answered. To refuse some by their policy then, and others by their engine,
        # would count only one arm of an experiment as exposed.
        able = [engine for engine in engines if engine.is_in_rotation] or engines
        self._catalogue.set_served(frozenset().union(*(engine.served for engine in able)))

    async def _record(self) -> None:
        """What was proven or refused goes to the registry once; again after Redis was away."""
        async with self._recording:
            for policy_id in {name: None for publisher in self.each for name in publisher.verdicts}:
                policy = self._catalogue.snapshot.policies.get(policy_id)
                result = self._result(policy_id)
                if policy is None or policy.state == "failed" or result is None:
                    continue
                if not result.passed or policy.fingerprint is None or not policy.fingerprint.passed:
                    await self._policies.record_fingerprint(policy_id, result)
                    await self._catalogue.refresh()

    def _result(self, policy_id: str) -> FingerprintResult | None:
        """None while a replica's verdict is missing that could make a difference."""
        found = [publisher.verdicts.get(policy_id) for publisher in self.each]
        verdicts = [verdict for verdict in found if verdict is not None]
        for verdict in verdicts:
            if verdict.result.passed:
                return verdict.result
        for verdict in verdicts:
            if verdict.is_of_files or len(verdicts) == len(found):
                return verdict.result
        return None
