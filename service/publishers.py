"""All replicas' publishers together: what the registry hears of a policy, and what the catalogue calls served.

Owns: the one verdict from those of several replicas. Does not own: reaching them (publishing.py), the registry
(policies.py).

A policy has passed as soon as one replica proved it, and is served while one that proved it is in rotation, or none
is. It has failed when its files are refused, or when every replica has refused it: one broken engine fails nobody.
A replica that failed a policy's proof, and whose base is not the one that policy was trained on, serves nothing while
another replica has proved a policy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic

from bon_algos.contracts import FingerprintResult
from service.catalogue import Catalogue
from service.policies import Policies
from service.publishing import AdapterEngine, Publisher


class Publishers:
    """One publisher for each replica; they come and go with it."""

    def __init__(
        self,
        catalogue: Catalogue,
        policies: Policies,
        *,
        artefacts: Path,
        slots: int,
        max_lora_rank: int,
        tolerance: float,
        prove_every: float,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.each: tuple[Publisher, ...] = ()
        self._catalogue = catalogue
        self._policies = policies
        self._recording = asyncio.Lock()
        self._open = partial(
            Publisher,
            catalogue=catalogue,
            record=self._record,
            tell=self._tell,
            artefacts=artefacts,
            slots=slots,
            max_lora_rank=max_lora_rank,
            tolerance=tolerance,
            prove_every=prove_every,
            clock=clock,
        )

    def join(self, engine: AdapterEngine) -> Publisher:
        """The replica's publisher; whoever asked for it runs it."""
        publisher = self._open(engine)
        self.each = (*self.each, publisher)
        return publisher

    def leave(self, publisher: Publisher) -> None:
        self.each = tuple(one for one in self.each if one is not publisher)
        self._tell()

    def of(self, name: str) -> Publisher | None:
        return next((publisher for publisher in self.each if publisher.engine.name == name), None)

    def _tell(self) -> None:
        some_proved = {publisher for publisher in self.each if publisher.proved}
        for publisher in self.each:
            # Whose base is the wrong one is only known where another engine agrees with the trainer.
            publisher.engine.distrust(has_other_base=publisher.has_other_base and bool(some_proved - {publisher}))
        engines = [publisher.engine for publisher in self.each]
        # With none in rotation nobody is answered. To refuse some by their policy then, and others by their engine,
        # would count only one arm of an experiment as exposed.
        able = [engine for engine in engines if engine.is_in_rotation] or engines
        self._catalogue.set_served(frozenset().union(*(engine.served for engine in able)))

    async def _record(self) -> None:
        """What was proven or refused goes to the registry once; again after Redis was away."""
        async with self._recording:
            for policy_id in {name: None for publisher in self.each for name in publisher.observed.verdicts}:
                policy = self._catalogue.snapshot.policies.get(policy_id)
                result = self._result(policy_id)
                if policy is None or policy.state == "failed" or result is None:
                    continue
                if not result.passed or policy.fingerprint is None or not policy.fingerprint.passed:
                    await self._policies.record_fingerprint(policy_id, result)
                    await self._catalogue.refresh()

    def _result(self, policy_id: str) -> FingerprintResult | None:
        """None while a replica's verdict is missing that could make a difference."""
        found = [publisher.observed.verdicts.get(policy_id) for publisher in self.each]
        verdicts = [verdict for verdict in found if verdict is not None]
        for verdict in verdicts:
            if verdict.result.passed:
                return verdict.result
        for verdict in verdicts:
            if verdict.is_of_files or len(verdicts) == len(found):
                return verdict.result
        return None
