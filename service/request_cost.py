"""What a request costs the engine, in tokens: at most, as expected, and as it came.

Owns: the three numbers, and the lengths of completions that the expectation is read from. Does not own: what the
numbers limit (limits.py).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from typing import Final, NamedTuple

from bon_algos.contracts import CandidateGroup, of_tenant

REMEMBERED: Final = 512
"""Candidates of each route whose length is known."""
FEWEST: Final = 64
"""With fewer nothing is expected but the most."""
QUANTILE: Final = 0.9
"""Of the lengths; n candidates together are rarely longer than n times it."""


class Cost(NamedTuple):
    """Tokens of one request. A prompt counts once: its candidates share it."""

    expected: int
    """What it takes of the engine's budget while it runs; never more than `most`."""
    most: int
    """What its key is charged with until it has ended: the prompt, and as many candidates as may be drawn, each with
    max_tokens."""


class CompletionLengths:
    """How long the candidates of each route were of late."""

    def __init__(self) -> None:
        self._routes: dict[str, _Lengths] = {}

    def note(self, group: CandidateGroup) -> None:
        """Learn from a group that was filled."""
        lengths = self._routes.setdefault(of_tenant(group.tenant, group.route), _Lengths())
        for candidate in group.candidates:
            if candidate.finish_reason is not None:
                # Cut at max_tokens: it would have been longer, nobody knows by how much.
                is_cut = candidate.finish_reason == "length"
                lengths.add(math.inf if is_cut else len(candidate.token_ids))

    def cost_of(self, group: CandidateGroup, most_candidates: int) -> Cost:
        """Of a group that has no candidates yet. most_candidates: that may be drawn, where it depends on rewards how
        many are; what is aimed at is expected."""
        lengths = self._routes.get(of_tenant(group.tenant, group.route))
        longest = group.sampling.max_tokens
        expected = longest if lengths is None else min(longest, lengths.usual)
        return Cost(
            expected=estimated_tokens(group, min(group.requested, most_candidates), math.ceil(expected)),
            most=estimated_tokens(group, most_candidates, group.sampling.max_tokens),
        )


def estimated_tokens(group: CandidateGroup, candidates: int, tokens_each: int) -> int:
    """Of a group without candidates that will have so many, of so many tokens each."""
    return len(group.prompt_token_ids) + candidates * tokens_each


def drawn_tokens(group: CandidateGroup) -> int:
    """Of a filled group. A candidate that the deadline cut counts in full: how far the engine was is not known."""
    each = (
        group.sampling.max_tokens if candidate.finish_reason is None else len(candidate.token_ids)
        for candidate in group.candidates
    )
    return len(group.prompt_token_ids) + sum(each)


class _Lengths:
    def __init__(self) -> None:
        self._in_order: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, tokens: float) -> None:
        self._in_order.append(tokens)
        insort(self._sorted, tokens)
        if len(self._in_order) > REMEMBERED:
            del self._sorted[bisect_left(self._sorted, self._in_order.popleft())]

    @property
    def usual(self) -> float:
        """Few candidates are longer; infinite while that is not known."""
        if len(self._sorted) < FEWEST:
            return math.inf
        return self._sorted[math.ceil(QUANTILE * len(self._sorted)) - 1]
