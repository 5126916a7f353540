"""Keeps one replica serving what the catalogue says: load, fingerprint probe, served; unload the rest.

Owns: which policies are loaded there, and that none is served there before the engine proved it with the trainer's
log-probs since its last start. Does not own: the engine's protocol (vllm.py), the files' checks (artefacts.py), what
the registry and the catalogue hear of several replicas (publishers.py), promotion (policies.py). Never base weights
under a policy's name: that is what the probe would see.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from bon_algos.contracts import FingerprintResult, PolicyRecord
from service.artefacts import ArtefactRefused, checked_adapter
from service.catalogue import Catalogue, Snapshot
from service.errors import EngineBroken, GatewayError, PolicyNotServed, Unavailable
from service.fingerprint import compare_fingerprint
from service.vllm import AdapterRefused

POLL_SECONDS: Final = 1.0
log = logging.getLogger("bonsai.publishing")


class AdapterEngine(Protocol):
    """What publishing asks of an engine; `service.replica.Replica` is one."""

    name: str

    @property
    def is_in_rotation(self) -> bool:
        """Whether requests are sent to it."""

    @property
    def served(self) -> frozenset[str]:
        """What `serve` said last, without what the engine was found to have forgotten."""

    def serve(self, policies: Iterable[str]) -> None:
        """These and no others may be asked of it from here on."""

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


class Verdict(NamedTuple):
    """What a replica found out about a policy."""

    result: FingerprintResult
    is_of_files: bool = False
    """The files themselves were refused: no other replica will see others."""


def wanted_policies(snapshot: Snapshot, slots: int) -> list[str]:
    """The adapters to keep loaded, most needed first, at most `slots`: what is live, what a running experiment
    shows, what a roll-back would need, then candidates, the newest first."""
    wanted: list[str] = []
    for policy_id in _by_need(snapshot):
        policy = snapshot.policies.get(policy_id)
        usable = policy is not None and policy.kind == "lora" and policy.state != "failed" and not policy.tainted
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
    """Brings one replica to what the catalogue says."""

    def __init__(
        self,
        engine: AdapterEngine,
        catalogue: Catalogue,
        *,
        record: Callable[[], Awaitable[None]],
        tell: Callable[[], None],
        artefacts: Path,
        slots: int,
        max_lora_rank: int,
        tolerance: float,
    ) -> None:
        """record: called after each verdict, before the policy is served. tell: called whenever what the replica
        serves may have changed. slots: adapters the engine may hold for us. tolerance: FLOAT32_TOLERANCE or
        BFLOAT16_TOLERANCE, nats."""
        self.engine = engine
        self._catalogue = catalogue
        self._record = record
        self._tell = tell
        self._artefacts = artefacts
        self._slots = slots
        self._max_lora_rank = max_lora_rank
        self._tolerance = tolerance
        self._proven: dict[str, Verdict] = {}
        self._refused: dict[str, Verdict] = {}
        self._unconfirmed: set[str] = set()
        self._was_away = False

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """By policy; without those that it has found out nothing about since its engine's last start."""
        return self._proven | self._refused

    async def run(self) -> None:
        """Reconcile until cancelled."""
        while True:
            try:
                await self.reconcile()
            except Unavailable as error:
                log.warning("publishing on %s waits: %s", self.engine.name, error.message)
            except GatewayError as error:
                log.error("publishing on %s: %s", self.engine.name, error.message)
            self._tell()
            await asyncio.sleep(POLL_SECONDS)

    async def reconcile(self) -> None:
        """One pass. Raises Unavailable while the engine or Redis is away; what was proven before stays served."""
        try:
            loaded = set(await self.engine.models())
        except Unavailable:
            self._was_away = True
            raise
        self._forget(loaded)
        self._serve(loaded)
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
                    self._serve(loaded)
        await self._record()

    def _forget(self, loaded: set[str]) -> None:
        """What an engine that may have restarted is known for no longer.

        A name that is gone means a restart. An engine that was out of reach may have restarted too and been loaded
        by another gateway: what it still lists answers on, and proves itself once more. What it refused it may take.
        """
        forgotten = self._proven.keys() - loaded
        for policy_id in forgotten:
            del self._proven[policy_id]
        if forgotten or self._was_away:
            self._unconfirmed = set(self._proven)
            self._refused = {name: verdict for name, verdict in self._refused.items() if verdict.is_of_files}
            self._was_away = False

    def _serve(self, loaded: set[str]) -> None:
        self.engine.serve(self._proven.keys() | ({self._catalogue.base_policy} & loaded))
        self._tell()

    async def _bring_up(self, policy: PolicyRecord, *, is_loaded: bool) -> None:
        try:
            verdict = Verdict(await self._probe(policy, is_loaded=is_loaded))
        except (EngineBroken, PolicyNotServed, TimeoutError) as error:
            log.warning("%s could not be probed on %s yet: %s", policy.id, self.engine.name, error)
            return
        except ArtefactRefused as error:
            verdict = Verdict(_refusal(str(error)), is_of_files=True)
        except (AdapterRefused, ValueError) as error:
            verdict = Verdict(_refusal(str(error)))
        self._unconfirmed.discard(policy.id)
        result = verdict.result
        if result.passed:
            self._proven[policy.id] = verdict
            log.info(
                "%s is served by %s: %.2g nats from the trainer",
                policy.id,
                self.engine.name,
                result.mean_abs_difference,
            )
        else:
            log.error(
                "ALERT %s is refused and will not be served by %s: %s", policy.id, self.engine.name, result.reason
            )
            self._refused[policy.id] = verdict
            await self._drop(policy.id)

    async def _probe(self, policy: PolicyRecord, *, is_loaded: bool) -> FingerprintResult:
        if policy.manifest is None:
            raise ArtefactRefused("the policy has no manifest")
        directory, fingerprint = await asyncio.to_thread(
            checked_adapter, self._artefacts, policy.manifest, max_rank=self._max_lora_rank
        )
        if not is_loaded:
            await self.engine.load_adapter(policy.id, str(directory))
        answers = [
            await self.engine.logprobs(policy.id, prompt, completion)
            for prompt, completion in zip(fingerprint.prompt_token_ids, fingerprint.completion_token_ids, strict=True)
        ]
        return compare_fingerprint(fingerprint, answers, self._tolerance)

    async def _drop(self, policy_id: str) -> None:
        """No request is sent to it any more before the engine forgets it."""
        self._proven.pop(policy_id, None)
        self.engine.serve(self.engine.served - {policy_id})
        self._tell()
        await self._unload(policy_id)

    async def _unload(self, policy_id: str) -> None:
        try:
            await self.engine.unload_adapter(policy_id)
        except AdapterRefused as error:
            log.error("%s could not be unloaded from %s: %s", policy_id, self.engine.name, error)


def _refusal(reason: str) -> FingerprintResult:
    return FingerprintResult(
        passed=False, tokens=0, mean_abs_difference=0.0, mean_abs_base_distance=0.0, reason=reason[:500]
    )
