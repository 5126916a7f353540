"""Keeps one replica serving what the catalogue says: look, plan, carry out, once a second.

Owns: what is wanted of an engine, and that no policy is served there before the engine proved it with the trainer's
log-probs in this life. Does not own: the plan (residency.py), what is known of the engine (observed.py), its protocol
(vllm.py), the files' checks (artefacts.py), what the registry and the catalogue hear of several replicas
(publishers.py), promotion (policies.py). Never base weights under a policy's name: that is what the probe would see.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Final, Literal, Protocol, assert_never

from bon_algos.contracts import Fingerprint, FingerprintResult, PolicyRecord
from service.artefacts import ArtefactRefused, ArtefactUnreadable, checked_adapter, directory_of
from service.catalogue import Catalogue, Snapshot
from service.errors import EngineBroken, GatewayError, PolicyNotServed, Unavailable
from service.fingerprint import compare_fingerprint, is_the_base
from service.observed import Observed, Verdict
from service.residency import DRAIN_SECONDS, Action, Holding, chosen, plan, servable
from service.vllm import AdapterRefused, EngineState

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

    def in_flight(self, policy: str) -> int:
        """Calls under way that draw from the policy."""

    def last_used_at(self, policy: str) -> float:
        """Of the monotonic clock; 0 for never."""

    def forget(self, policy: str) -> None:
        """It is not there any more."""

    async def observe(self) -> EngineState:
        """What it says of itself now. Raises EngineUnavailable, EngineBroken."""

    async def load_adapter(self, policy: str, directory: str) -> None:
        """Raises AdapterRefused, EngineUnavailable."""

    async def unload_adapter(self, policy: str) -> None:
        """Forget an adapter; one that is not there is no error."""

    def distrust(self, *, has_other_base: bool) -> None:
        """Whether it was found to serve other weights than the others under the base's name."""

    async def logprobs(
        self, policy: str, prompt_token_ids: Sequence[int], completion_token_ids: Sequence[int]
    ) -> list[float]:
        """Log-prob of each completion token; nats."""


def wanted_policies(snapshot: Snapshot) -> list[str]:
    """The adapters to keep loaded, most needed first, as many as there are: what is live, what a running experiment
    shows, what a roll-back would need, then candidates, the newest first."""
    policies = (snapshot.policies.get(policy_id) for policy_id in _by_need(snapshot))
    return list(dict.fromkeys(policy.id for policy in policies if policy is not None and _is_usable(policy)))


def _is_usable(policy: PolicyRecord) -> bool:
    return policy.kind == "lora" and policy.state != "failed" and not policy.tainted


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
        *,
        catalogue: Catalogue,
        record: Callable[[], Awaitable[None]],
        tell: Callable[[], None],
        artefacts: Path,
        slots: int,
        max_lora_rank: int,
        tolerance: float,
        prove_every: float,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """record: called after each verdict, before the policy is served. tell: called whenever what the replica
        serves may have changed. slots: adapters the engine may hold for us. tolerance: FLOAT32_TOLERANCE or
        BFLOAT16_TOLERANCE, nats. prove_every: seconds from one proof of a policy to the next."""
        self.engine = engine
        self.slots = slots
        self.observed = Observed()
        self.has_other_base = False
        """It failed a policy's proof, and its base is not the one that policy was trained on."""
        self._catalogue = catalogue
        self._record = record
        self._tell = tell
        self._artefacts = artefacts
        self._max_lora_rank = max_lora_rank
        self._tolerance = tolerance
        self._prove_every = prove_every
        self._clock = clock
        self._fingerprints: dict[str, Fingerprint] = {}
        self._told: frozenset[str] = frozenset()

    @property
    def wanted(self) -> list[str]:
        """What this replica is to hold."""
        return chosen(wanted_policies(self._catalogue.snapshot), self._holdings(), self.slots)

    @property
    def proved(self) -> frozenset[str]:
        """Policies that it proved in this life of the engine."""
        return frozenset(name for name, one in self.observed.adapters.items() if one.proven_at is not None)

    async def run(self) -> None:
        """Reconcile until cancelled."""
        while True:
            try:
                await self.reconcile()
            except Unavailable as error:
                log.warning("publishing on %s waits: %s", self.engine.name, error.message)
            except GatewayError as error:
                log.error("publishing on %s: %s", self.engine.name, error.message)
            self._serve()
            await asyncio.sleep(POLL_SECONDS)

    async def reconcile(self) -> None:
        """One pass. Raises Unavailable while the engine or Redis is away; what was proven before stays served."""
        await self._look()
        wanted = wanted_policies(self._catalogue.snapshot)
        held = self._holdings()
        for action in plan(wanted, held, slots=self.slots, prove_every=self._prove_every, now=self._clock()):
            await self._carry_out(action)
        await self._record()

    async def _look(self) -> None:
        try:
            state = await self.engine.observe()
        except GatewayError:
            self.observed.lost_sight()
            raise
        for policy_id in (self._told - self.engine.served) & self.observed.adapters.keys():
            # Requests were told 404 for what the engine listed.
            self.observed[policy_id].proven_at = None
        snapshot = self._catalogue.snapshot
        self.observed.see(state, self._directories(state.models), wanted_policies(snapshot))
        self._fingerprints = {name: one for name, one in self._fingerprints.items() if name in self.observed.models}
        self._serve()

    def _directories(self, names: Iterable[str]) -> dict[str, str]:
        """Where the files of those that are policies are."""
        root, policies = self._artefacts.resolve(), self._catalogue.snapshot.policies
        found = ((name, policies.get(name)) for name in names)
        return {
            name: str(directory_of(root, one.manifest))
            for name, one in found
            if one is not None and one.manifest is not None
        }

    def _holdings(self) -> dict[str, Holding]:
        names = self.observed.adapters
        held = self.observed.holdings(
            {name: self.engine.in_flight(name) for name in names},
            {name: self.engine.last_used_at(name) for name in names},
        )
        policies = self._catalogue.snapshot.policies
        unusable = [name for name in held if (one := policies.get(name)) is None or not _is_usable(one)]
        return held | {name: replace(held[name], is_barred=True) for name in unusable}

    def _serve(self) -> None:
        proven = servable(self._holdings().values(), self._prove_every, self._clock())
        self._told = proven | ({self._catalogue.base_policy} & self.observed.models)
        self.engine.serve(self._told)
        self._tell()

    async def _carry_out(self, action: Action) -> None:
        adapter = self.observed[action.policy]
        match action.deed:
            case "drain" | "keep":
                adapter.leaves_at = self._clock() + DRAIN_SECONDS if action.deed == "drain" else None
                self._serve()
            case "unload":
                await self._unload(action.policy)
            case "load" | "prove":
                policy = self._catalogue.snapshot.policies.get(action.policy)
                if policy is not None:  # The registry may have changed since the plan was made.
                    await self._bring_up(policy, action.deed)
            case _:
                assert_never(action.deed)

    async def _bring_up(self, policy: PolicyRecord, deed: Literal["load", "prove"]) -> None:
        adapter = self.observed[policy.id]
        if deed == "prove" and not adapter.is_loaded:
            return
        try:
            await (self._load(policy) if deed == "load" else self._prove(policy))
        except (ArtefactUnreadable, EngineBroken, PolicyNotServed, TimeoutError) as error:
            log.warning("%s: no %s of %s yet: %s", self.engine.name, deed, policy.id, error)
            adapter.could_not(str(error), self._clock())
            if isinstance(error, PolicyNotServed):
                # It lists what it does not serve: perhaps it does when it has loaded it once more.
                await self._unload(policy.id)
        except ArtefactRefused as error:
            self._refuse(policy.id, Verdict(_refusal(str(error)), is_of_files=True), for_life=True)
        except (AdapterRefused, ValueError) as error:
            self._refuse(policy.id, Verdict(_refusal(str(error))), for_life=False)
        try:
            # First: who reads that a policy is served reads its fingerprint too. Without Redis it serves.
            await self._record()
        finally:
            self._serve()

    async def _load(self, policy: PolicyRecord) -> None:
        directory = await self._checked(policy)
        await self.engine.load_adapter(policy.id, str(directory))
        self.observed[policy.id].is_loaded = True

    async def _checked(self, policy: PolicyRecord) -> Path:
        """Its directory, every file looked at, its fingerprint kept for this load."""
        if policy.manifest is None:
            raise ArtefactRefused("the policy has no manifest")
        directory, self._fingerprints[policy.id] = await asyncio.to_thread(
            checked_adapter, self._artefacts, policy.manifest, max_rank=self._max_lora_rank
        )
        return directory

    async def _prove(self, policy: PolicyRecord) -> None:
        if policy.id not in self._fingerprints:
            await self._checked(policy)
        fingerprint = self._fingerprints[policy.id]
        result = compare_fingerprint(fingerprint, await self._answers(policy.id, fingerprint), self._tolerance)
        if result.passed:
            self._pass(policy.id, Verdict(result))
            return
        self._refuse(policy.id, Verdict(result), for_life=True)
        base = await self._answers(self._catalogue.base_policy, fingerprint)
        self.has_other_base = not is_the_base(fingerprint, base, self._tolerance)
        if not self.engine.in_flight(policy.id):
            await self._unload(policy.id)

    async def _answers(self, policy_id: str, fingerprint: Fingerprint) -> list[list[float]]:
        rows = zip(fingerprint.prompt_token_ids, fingerprint.completion_token_ids, strict=True)
        return [await self.engine.logprobs(policy_id, prompt, completion) for prompt, completion in rows]

    def _pass(self, policy_id: str, verdict: Verdict) -> None:
        adapter, self.has_other_base = self.observed[policy_id], False
        if adapter.proven_at is None:
            difference = verdict.result.mean_abs_difference
            log.info("%s is served by %s: %.2g nats from the trainer", policy_id, self.engine.name, difference)
        adapter.passed(verdict, self._clock())

    def _refuse(self, policy_id: str, verdict: Verdict, *, for_life: bool) -> None:
        reason = verdict.result.reason
        log.error("ALERT %s is refused and will not be served by %s: %s", policy_id, self.engine.name, reason)
        self.observed[policy_id].refused(verdict, self._clock(), for_life=for_life)
        self._serve()

    async def _unload(self, policy_id: str) -> None:
        """No request is sent to it any more before the engine forgets it."""
        self.observed[policy_id].proven_at = None
        self._serve()
        try:
            await self.engine.unload_adapter(policy_id)
        except AdapterRefused as error:
            log.error("%s could not be unloaded from %s: %s", policy_id, self.engine.name, error)
            return
        self.observed[policy_id].left()
        self.engine.forget(policy_id)
        self._serve()


def _refusal(reason: str) -> FingerprintResult:
    return FingerprintResult(
        passed=False, tokens=0, mean_abs_difference=0.0, mean_abs_base_distance=0.0, reason=reason[:500]
    )
