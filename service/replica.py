"""One engine of the pool: what it carries, what it proved to serve, whether it is alive.

Owns: its outstanding tokens, what counts as a failure, draining, the state an operator sees. Does not own: which
replica a request goes to (pool.py), the protocol (vllm.py), proving policies (publishing.py).

What opens the breaker: an engine that cannot be reached, has no room or breaks off. What does not: a client that
leaves, a request that the engine refuses, an answer longer than we read (the limit is ours, and whoever finds out how
to cross it must not close the engine to all others), a policy it forgot, and a deadline, for it is the caller's and may
be a millisecond. An engine that never says a word is found out by the canary, whose deadline is our own; `/health` and
`/v1/models` answer while the part of vLLM that samples hangs.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from time import monotonic, time
from typing import Final, Literal, Protocol

from bon_algos.contracts import Candidate, Sampling
from bon_algos.vllm_protocol import Listener
from service.best_of_n import Policy
from service.breaker import Breaker
from service.canary import Canary
from service.errors import AnswerTooLong, EngineBroken, EngineRefused, EngineUnavailable, GatewayError, PolicyNotServed
from service.vllm import DrawingWindow, EngineState

ReplicaState = Literal["ok", "open", "hung", "other_base", "draining"]
OTHER_BASE: Final = "it serves other weights under the base policy's name"
log = logging.getLogger("bonsai.engines")


class Engine(Policy, Protocol):
    """What a replica asks of its engine; `service.vllm.PolicyEngine` is one."""

    async def sample(
        self,
        policy: str,
        prompt_token_ids: Sequence[int],
        n: int,
        sampling: Sampling,
        window: DrawingWindow,
        hear: Listener | None,
        came: Callable[[], None] = ...,
    ) -> list[Candidate]: ...

    async def give_a_token(self, policy: str) -> None: ...

    async def models(self) -> list[str]: ...

    async def observe(self) -> EngineState: ...

    async def load_adapter(self, policy: str, directory: str) -> None: ...

    async def unload_adapter(self, policy: str) -> None: ...

    async def logprobs(
        self, policy: str, prompt_token_ids: Sequence[int], completion_token_ids: Sequence[int]
    ) -> list[float]: ...


class Replica:
    """One engine. In rotation while its breaker is closed and nobody drains it."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        base_policy: str,
        *,
        canary_after: float,
        hung_after: float,
    ) -> None:
        """canary_after: seconds without a token until one is asked for. hung_after: seconds without a token until it
        leaves the rotation; larger. Whoever makes a replica runs its `canary`."""
        self.name = name
        self._engine = engine
        self._base_policy = base_policy
        self._breaker = Breaker(monotonic)
        self.canary = Canary(
            lambda: engine.give_a_token(base_policy),
            self._breaker,
            self._judge,
            after=canary_after,
            hung_after=hung_after,
        )
        self._served: frozenset[str] = frozenset()
        self._outstanding = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._in_flight: Counter[str] = Counter()
        self._last_used_at: dict[str, float] = {}
        self._is_draining = False
        self._is_hung = False
        self._has_other_base = False
        self._is_reachable = True
        self._reason = ""
        self._state: ReplicaState = "ok"
        self._since = time()

    # --- what others may know ------------------------------------------------------------------------------

    @property
    def is_in_rotation(self) -> bool:
        return self._state == "ok"

    @property
    def state(self) -> ReplicaState:
        return self._state

    @property
    def since(self) -> float:
        """When the state began; Unix seconds."""
        return self._since

    @property
    def reason(self) -> str:
        """Why it is out of rotation, in words; "" while it is not."""
        if self._state in ("ok", "draining"):
            return "it is drained" if self._is_draining else ""
        return OTHER_BASE if self._state == "other_base" else self._reason

    @property
    def outstanding_tokens(self) -> int:
        """n · max_tokens and the prompt of every call under way."""
        return self._outstanding

    def in_flight(self, policy: str) -> int:
        """Calls under way that draw from the policy."""
        return self._in_flight[policy]

    def last_used_at(self, policy: str) -> float:
        """When it last gave a token of the policy, by the monotonic clock; 0 for never."""
        return self._last_used_at.get(policy, 0.0)

    @property
    def served(self) -> frozenset[str]:
        """Policies it proved to serve since its last start; the base by its name in the engine's list."""
        return self._served

    def may_serve(self, policy: str) -> bool:
        """The base is what the engine was started with: whether it answers, the call itself says."""
        return policy == self._base_policy or policy in self._served

    async def readiness(self) -> str:
        """ok, or in a few words why not. Asks an engine that is in rotation; no other."""
        if not self.is_in_rotation:
            return self.reason
        try:
            return "ok" if self._base_policy in await self._engine.models() else "serves another model"
        except GatewayError as error:
            return error.message

    # --- drawing -------------------------------------------------------------------------------------------

    async def sample(
        self,
        policy: str,
        prompt_token_ids: Sequence[int],
        n: int,
        sampling: Sampling,
        window: DrawingWindow,
        hear: Listener | None,
    ) -> list[Candidate]:
        """As PolicyEngine.sample, which says what it raises; how it ended is counted."""
        cost = cost_of(prompt_token_ids, n, sampling)
        epoch, heard = self._breaker.epoch, False

        def came() -> None:
            nonlocal heard
            heard = True
            self._last_used_at[policy] = monotonic()
            self.canary.token_came()

        self._begin(policy, cost)
        try:
            drawn = await self._engine.sample(policy, prompt_token_ids, n, sampling, window, hear, came)
        except PolicyNotServed:
            self._served -= {policy}
            raise
        except (EngineRefused, AnswerTooLong):
            raise
        except (EngineUnavailable, EngineBroken) as error:
            self._count(epoch, error)
            raise
        finally:
            self._end(policy, cost)
        if heard:
            self._breaker.count(epoch, failed=False)
        return drawn

    def _begin(self, policy: str, cost: int) -> None:
        self._outstanding += cost
        self._idle.clear()
        self._in_flight[policy] += 1

    def _end(self, policy: str, cost: int) -> None:
        self._outstanding -= cost
        if not self._outstanding:
            self._idle.set()
        self._in_flight[policy] -= 1

    def _count(self, epoch: int, error: GatewayError) -> None:
        if self._breaker.state == "closed":
            self._reason = error.message
        self._breaker.count(epoch, failed=True)
        self._settle()

    def _judge(self, failure: str, is_hung: bool) -> None:
        """By what became of a canary."""
        self._is_hung = is_hung
        if failure or self._breaker.state == "closed":
            self._reason = failure
        self._settle()

    async def idle(self, seconds: float) -> None:
        """Returns when no call is under way, or after so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()

    # --- draining and serving ------------------------------------------------------------------------------

    def drain(self) -> None:
        """Requests under way finish, no other comes."""
        self._is_draining = True
        self._settle()

    def undrain(self) -> None:
        self._is_draining = False
        self._settle()

    def serve(self, policies: Iterable[str]) -> None:
        """What it has proved to serve; nothing else is asked of it."""
        self._served = frozenset(policies)

    def distrust(self, *, has_other_base: bool) -> None:
        """Whether it was found to serve other weights than the others under the base's name: then it serves nothing."""
        if has_other_base != self._has_other_base:
            self._has_other_base = has_other_base
            self._settle()

    def forget(self, policy: str) -> None:
        """The engine has it no longer: when it was used is of no interest."""
        self._last_used_at.pop(policy, None)
        if not self._in_flight[policy]:
            del self._in_flight[policy]

    async def observe(self) -> EngineState:
        """As PolicyEngine.observe. An engine that can be reached again is probed at once."""
        was_reachable, self._is_reachable = self._is_reachable, False
        seen = await self._engine.observe()
        self._is_reachable = True
        if not was_reachable:
            self._breaker.hasten()
            self.canary.look_again()
        return seen

    async def load_adapter(self, policy: str, directory: str) -> None:
        await self._engine.load_adapter(policy, directory)

    async def unload_adapter(self, policy: str) -> None:
        await self._engine.unload_adapter(policy)

    async def logprobs(
        self, policy: str, prompt_token_ids: Sequence[int], completion_token_ids: Sequence[int]
    ) -> list[float]:
        return await self._engine.logprobs(policy, prompt_token_ids, completion_token_ids)

    def _settle(self) -> None:
        """Find the state from what it is made of, and say so when it changed."""
        state: ReplicaState = "ok" if self._breaker.state == "closed" else "hung" if self._is_hung else "open"
        if state == "ok" and self._has_other_base:
            state = "other_base"
        if self._is_draining:
            state = "draining"
        if state != self._state:
            self._state, self._since = state, time()
            level = logging.INFO if state in ("ok", "draining") else logging.ERROR
            log.log(level, "%s: %s", self.name, self.reason or "in rotation")
        self.canary.look_again()


def cost_of(prompt_token_ids: Sequence[int], n: int, sampling: Sampling) -> int:
    """Tokens that a call may make an engine compute."""
    return n * sampling.max_tokens + len(prompt_token_ids)
