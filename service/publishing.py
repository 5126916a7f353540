"""Keeps the engine serving what the catalogue says: load, fingerprint probe, served; unload the rest.

Owns: which policies are loaded, and that none is called served before the engine proved it with the trainer's
log-probs since its last start. Does not own: the engine's protocol (vllm.py), the files' checks (artefacts.py),
promotion (policies.py). Never base weights under a policy's name: that is what the probe would see.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from bon_algos.contracts import Fingerprint, FingerprintResult, PolicyRecord
from service.artefacts import ArtefactRefused, checked_adapter
from service.catalogue import Catalogue, Snapshot
from service.errors import EngineBroken, GatewayError, PolicyNotServed, Unavailable
from service.policies import Policies
from service.vllm import AdapterRefused

POLL_SECONDS: Final = 1.0
MIN_FINGERPRINT_TOKENS: Final = 256
MAX_SHARE_OF_BASE_DISTANCE: Final = 0.1
FLOAT32_TOLERANCE: Final = 1e-3
BFLOAT16_TOLERANCE: Final = 2e-2
"""Largest mean absolute log-prob difference between engine and trainer; nats."""
log = logging.getLogger("bonsai.publishing")


class AdapterEngine(Protocol):
    """What publishing asks of an engine; `service.vllm.PolicyEngine` is one."""

    async def models(self) -> list[str]:
        """Names served now. Raises EngineUnavailable."""

    async def load_adapter(self, policy: str, directory: str) -> None:
        """Raises AdapterRefused, EngineUnavailable."""

    async def unload_adapter(self, policy: str) -> None:
        """Forget an adapter; one that is not there is no error."""

    async def logprobs(
        self, policy: str, prompt_token_ids: Sequence[int], completion_token_ids: Sequence[int]
    ) -> list[float]:
        """Log-prob of each completion token; nats."""


def compare_fingerprint(
    fingerprint: Fingerprint, engine_logprobs: Sequence[Sequence[float]], tolerance: float
) -> FingerprintResult:
    """Whether the engine's log-probs of the fixed completions are the policy's.

    Passed: at least MIN_FINGERPRINT_TOKENS, mean |engine − trainer| at most `tolerance` nats and at most a tenth
    of mean |policy − base|, the distance a missing adapter would show. ValueError when lengths do not agree.
    """
    trainer = _flat(fingerprint.policy_logprobs)
    engine = _flat(engine_logprobs)
    base = _flat(fingerprint.base_logprobs)
    for mine, theirs in zip(fingerprint.completion_token_ids, engine_logprobs, strict=True):
        if len(mine) != len(theirs):
            raise ValueError("the engine did not score every token of a completion")
    if not len(trainer) == len(base) == len(engine):
        raise ValueError("the fingerprint's log-probs do not match its tokens")
    difference = float(np.abs(engine - trainer).mean()) if len(trainer) else 0.0
    distance = float(np.abs(trainer - base).mean()) if len(trainer) else 0.0
    reason = ""
    if len(trainer) < MIN_FINGERPRINT_TOKENS:
        reason = f"the fingerprint has {len(trainer)} tokens, {MIN_FINGERPRINT_TOKENS} are needed"
    elif not difference <= tolerance:
        reason = f"the engine is {difference:.2g} nats from the trainer, {tolerance:.2g} are allowed"
    elif not difference <= MAX_SHARE_OF_BASE_DISTANCE * distance:
        reason = f"the engine is {difference:.2g} nats from the trainer and the base is only {distance:.2g} away"
    return FingerprintResult(
        passed=not reason,
        tokens=len(trainer),
        mean_abs_difference=difference,
        mean_abs_base_distance=distance,
        reason=reason,
    )


def wanted_policies(snapshot: Snapshot, slots: int) -> list[str]:
    """The adapters to keep loaded, most needed first, at most `slots`: what is live, what a running experiment
    shows, what a roll-back would need, then candidates, the newest first."""
    wanted: list[str] = []
    for policy_id in _by_need(snapshot):
        policy = snapshot.policies.get(policy_id)
        usable = policy is not None and policy.manifest is not None and policy.state != "failed" and not policy.tainted
        if usable and policy_id not in wanted:
            wanted.append(policy_id)
    return wanted[:slots]


def _by_need(snapshot: Snapshot) -> Iterator[str]:
    names = sorted(snapshot.routes)
    routes = [snapshot.routes[name] for name in names]
    yield from (route.live_policy for route in routes if route.live_policy is not None)
    for name in names:
        experiment = snapshot.running(name)
        yield from (entry.arm.policy for entry in experiment.arms) if experiment is not None else ()
    yield from (previous for route in routes if (previous := next(iter(route.previous_policies[-1:]), None)))
    candidates = [policy for policy in snapshot.policies.values() if policy.state == "candidate"]
    yield from (policy.id for policy in sorted(candidates, key=lambda policy: policy.created_at, reverse=True))


class Publisher:
    """Brings one engine to what the catalogue says, and the catalogue to what the engine proved."""

    def __init__(
        self,
        engine: AdapterEngine,
        catalogue: Catalogue,
        policies: Policies,
        *,
        artefacts: Path,
        slots: int,
        max_lora_rank: int,
        tolerance: float,
    ) -> None:
        """slots: adapters the engine may hold for us. tolerance: FLOAT32_TOLERANCE or BFLOAT16_TOLERANCE, nats."""
        self._engine = engine
        self._catalogue = catalogue
        self._policies = policies
        self._artefacts = artefacts
        self._slots = slots
        self._max_lora_rank = max_lora_rank
        self._tolerance = tolerance
        self._proven: dict[str, FingerprintResult] = {}
        self._refused: dict[str, FingerprintResult] = {}
        self._unconfirmed: set[str] = set()
        self._was_away = False

    async def run(self) -> None:
        """Reconcile until cancelled."""
        while True:
            try:
                await self.reconcile()
            except Unavailable as error:
                log.warning("publishing waits: %s", error.message)
            except GatewayError as error:
                log.error("publishing: %s", error.message)
            await asyncio.sleep(POLL_SECONDS)

    async def reconcile(self) -> None:
        """One pass. Raises Unavailable while the engine or Redis is away; what was proven before stays served."""
        try:
            loaded = set(await self._engine.models())
        except Unavailable:
            self._was_away = True
            raise
        forgotten = self._proven.keys() - loaded
        for policy_id in forgotten:
            del self._proven[policy_id]
        if forgotten or self._was_away:
            # A name that is gone means a restart. An engine that was out of reach may have restarted too and been
            # loaded by another gateway: what it still lists answers on, and proves itself once more.
            self._unconfirmed = set(self._proven)
            self._was_away = False
        self._tell(loaded)
        snapshot = self._catalogue.snapshot
        wanted = wanted_policies(snapshot, self._slots)
        for policy_id in sorted(loaded & snapshot.policies.keys() - set(wanted) - {self._catalogue.base_policy}):
            await self._drop(policy_id)
        for policy_id in wanted:
            is_settled = policy_id in self._proven or policy_id in self._refused
            if not is_settled or policy_id in self._unconfirmed:
                await self._bring_up(snapshot.policies[policy_id], is_loaded=policy_id in loaded)
                try:
                    # First: who reads that a policy is served reads its fingerprint too. Without Redis it serves.
                    await self._record()
                finally:
                    self._tell(loaded)
        await self._record()

    def _tell(self, loaded: set[str]) -> None:
        self._catalogue.set_served(self._proven.keys() | ({self._catalogue.base_policy} & loaded))

    async def _bring_up(self, policy: PolicyRecord, *, is_loaded: bool) -> None:
        try:
            result = await self._probe(policy, is_loaded=is_loaded)
        except (EngineBroken, PolicyNotServed, TimeoutError) as error:
            log.warning("%s could not be probed yet: %s", policy.id, error)
            return
        except (ArtefactRefused, AdapterRefused, ValueError) as error:
            result = _refusal(str(error))
        self._unconfirmed.discard(policy.id)
        if result.passed:
            self._proven[policy.id] = result
            log.info("%s is served: %.2g nats from the trainer", policy.id, result.mean_abs_difference)
        else:
            log.error("ALERT %s is refused and will not be served: %s", policy.id, result.reason)
            self._refused[policy.id] = result
            await self._drop(policy.id)

    async def _probe(self, policy: PolicyRecord, *, is_loaded: bool) -> FingerprintResult:
        if policy.manifest is None:
            raise ArtefactRefused("the policy has no manifest")
        directory, fingerprint = await asyncio.to_thread(
            checked_adapter, self._artefacts, policy.manifest, max_rank=self._max_lora_rank
        )
        if not is_loaded:
            await self._engine.load_adapter(policy.id, str(directory))
        answers = [
            await self._engine.logprobs(policy.id, prompt, completion)
            for prompt, completion in zip(fingerprint.prompt_token_ids, fingerprint.completion_token_ids, strict=True)
        ]
        return compare_fingerprint(fingerprint, answers, self._tolerance)

    async def _drop(self, policy_id: str) -> None:
        """No request is sent to it any more before the engine forgets it."""
        self._proven.pop(policy_id, None)
        self._catalogue.set_served(self._catalogue.snapshot.served - {policy_id})
        await self._unload(policy_id)

    async def _unload(self, policy_id: str) -> None:
        try:
            await self._engine.unload_adapter(policy_id)
        except AdapterRefused as error:
            log.error("%s could not be unloaded: %s", policy_id, error)

    async def _record(self) -> None:
        """What was proven or refused goes to the registry once; again after Redis was away."""
        for policy_id, result in [*self._proven.items(), *self._refused.items()]:
            policy = self._catalogue.snapshot.policies.get(policy_id)
            if policy is None or policy.state == "failed":
                continue
            if not result.passed or policy.fingerprint is None or not policy.fingerprint.passed:
                await self._policies.record_fingerprint(policy_id, result)
                await self._catalogue.refresh()


def _refusal(reason: str) -> FingerprintResult:
    return FingerprintResult(
        passed=False, tokens=0, mean_abs_difference=0.0, mean_abs_base_distance=0.0, reason=reason[:500]
    )


def _flat(rows: Sequence[Sequence[float]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([value for row in rows for value in row], dtype=np.float64)
