"""The policy engines as one: which replica draws, and who is asked next when it could not begin.

Owns: the choice by load and by the prompt's beginning, the one round over replicas. Does not own: a replica's health
and what it serves (replica.py, publishing.py), the protocol (vllm.py).

A request moves on only where nothing was spent: the engine could not be reached, had no room, or did not know the
policy. What an engine accepted is never drawn again, whatever became of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

from bon_algos.contracts import Candidate, Sampling
from bon_algos.vllm_protocol import Listener
from service.errors import EngineUnavailable, PolicyNotServed, Unavailable
from service.replica import Replica, cost_of
from service.vllm import DrawingWindow

PREFIX_TOKENS: Final = 64
"""Prompts that agree so far prefer one replica: its engine has computed their beginning already."""
MOST_OF_MEAN: Final = 1.25
"""A preferred replica carries at most this times the mean, and one request."""


def choose(names: Sequence[str], loads: Sequence[int], prompt_token_ids: Sequence[int], cost: int) -> int:
    """Which of the replicas draws; pure. loads: outstanding tokens of each. cost: the request's own.

    The one that the prompt's beginning prefers (rendezvous hashing: a replica that comes or goes moves only its own
    prompts) while it carries at most 1.25 times the mean and one such request, else the one that carries least.
    """
    if len(names) == 1:
        return 0
    begins = b"".join(token.to_bytes(8, "big") for token in prompt_token_ids[:PREFIX_TOKENS])
    preferred = max(range(len(names)), key=lambda i: blake2b(begins, key=names[i].encode()).digest())
    if loads[preferred] <= MOST_OF_MEAN * sum(loads) / len(loads) + cost:
        return preferred
    return min(range(len(loads)), key=loads.__getitem__)


class EnginePool:
    """The replicas of the policy engine; they may come and go."""

    def __init__(self, replicas: Sequence[Replica] = ()) -> None:
        self.replicas = tuple(replicas)

    def join(self, replica: Replica) -> None:
        self.replicas = (*self.replicas, replica)

    def leave(self, replica: Replica) -> None:
        """Requests under way finish, no other comes."""
        self.replicas = tuple(one for one in self.replicas if one is not replica)

    def replica(self, name: str) -> Replica | None:
        return next((replica for replica in self.replicas if replica.name == name), None)

    async def sample(
        self,
        policy: str,
        prompt_token_ids: Sequence[int],
        n: int,
        sampling: Sampling,
        window: DrawingWindow,
        hear: Listener | None = None,
    ) -> list[Candidate]:
        """As PolicyEngine.sample, by a replica that proved the policy; each is tried at most once."""
        cost, clock = cost_of(prompt_token_ids, n, sampling), asyncio.get_running_loop().time
        tried: list[Replica] = []
        failure: Unavailable | None = None
        while able := [one for one in self._able(policy) if one not in tried]:
            if failure is not None and clock() >= window.hard:
                break
            names, loads = [one.name for one in able], [one.outstanding_tokens for one in able]
            replica = able[choose(names, loads, prompt_token_ids, cost)]
            tried.append(replica)
            try:
                return await replica.sample(policy, prompt_token_ids, n, sampling, window, hear)
            except (EngineUnavailable, PolicyNotServed) as error:
                failure = error
        raise failure or self._refusal(policy)

    async def readiness(self) -> list[str]:
        """Of each replica: ok, or in a few words why not."""
        return await asyncio.gather(*(replica.readiness() for replica in self.replicas))

    def _able(self, policy: str) -> list[Replica]:
        return [one for one in self.replicas if one.is_in_rotation and one.may_serve(policy)]

    def _refusal(self, policy: str) -> Unavailable:
        if any(one.may_serve(policy) for one in self.replicas):
            return EngineUnavailable("no policy engine that serves this policy is in rotation")
        return PolicyNotServed("no policy engine serves this policy at the moment")
