"""A step's groups in passes: forward and backward over a few of them at a time, on the rank whose they are.

Owns which groups make a pass, and a loss over all groups whose log-probs come from several passes or ranks. Does not
own the losses (`bon_algos`), the policy, nor the optimiser (`train`).

Passes are equally many on every rank, since a spread model (`sharding`) gathers its weights anew in each: a rank that
has fewer groups repeats one for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from bon_algos.logprobs import TokenGroup
from bon_algos.steps import SequenceLogprobs
from worker.models import parts_by_tokens
from worker.ranks import Ranks

TRAINING_ROWS_TOKENS = 8_192
"""Tokens, padding included, of one forward and backward pass over a step's groups."""


class Pass(NamedTuple):
    part: slice
    """Of the step's groups."""
    share: float
    """Of all groups; 0 for one that is repeated."""


@dataclass(frozen=True)
class Plan:
    """How a step's groups are divided."""

    ranks: Ranks
    accumulation: int
    """At least so many passes, as far as there are groups."""
    rows_tokens: int = TRAINING_ROWS_TOKENS

    def passes(self, groups: Sequence[TokenGroup]) -> list[Pass]:
        """This rank's, at least one. `groups` are those of all ranks."""
        of_ranks = [self._parts(groups, rank) for rank in range(self.ranks.size)]
        own = [Pass(part, (part.stop - part.start) / len(groups)) for part in of_ranks[self.ranks.rank]]
        return own + [Pass(slice(0, 1), 0.0)] * (max(map(len, of_ranks)) - len(own))

    def _parts(self, groups: Sequence[TokenGroup], rank: int) -> list[slice]:
        own = self.ranks.share(len(groups), rank)
        cuts = [own.start + (own.stop - own.start) * i // self.accumulation for i in range(self.accumulation + 1)]
        return [
            slice(start + part.start, start + part.stop)
            for start, stop in pairwise(cuts)
            if stop > start
            for part in parts_by_tokens(groups[start:stop], self.rows_tokens)
        ]

    def logprobs(self, asked: SequenceLogprobs, groups: Sequence[TokenGroup]) -> list[Tensor]:
        """Of all groups, from every rank its own; no gradient. For each group (N,), nats."""
        with torch.no_grad():
            rows = [asked(groups[part]) for part, _ in self.passes(groups)]
        return self.gathered(groups, rows)

    def gathered(self, groups: Sequence[TokenGroup], rows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Of all groups, from `rows` of log-probs of this rank's passes and everybody else's; no gradient."""
        lengths = [len(group.completion_ids) for group in groups]
        found = torch.split(rows[0][0].new_zeros(sum(lengths)), lengths)
        for (part, share), own in zip(self.passes(groups), rows, strict=True):
            for place, logprob_N in zip(found[part], own, strict=True):
                if share:
                    place.copy_(logprob_N.detach())
        self.ranks.add_up(found)
        return list(found)


class Rehearsal:
    """Log-probs of a policy for a loss that looks at all groups at once, but whose passes are made one at a time.

    The loss is taken of their values; then each pass is made again, and its share of the loss's gradient goes back
    through it (GradCache, arXiv 2101.06983). A single pass is kept, and not made again.
    """

    def __init__(self, plan: Plan, policy: SequenceLogprobs) -> None:
        self._plan, self._policy = plan, policy
        self._groups: Sequence[TokenGroup] = ()
        self._leaves: list[Tensor] = []
        self._kept: Sequence[Tensor] | None = None

    def __call__(self, groups: Sequence[TokenGroup]) -> list[Tensor]:
        """For each group (N,), nats; what the loss takes its gradient to. Once."""
        assert not self._leaves, "a loss asks for its policy's log-probs once"
        self._groups, passes = groups, self._plan.passes(groups)
        if len(passes) == 1:
            self._kept = self._policy(groups[passes[0].part])
            self._leaves = self._plan.gathered(groups, [self._kept])
        else:
            self._leaves = self._plan.logprobs(self._policy, groups)
        for leaf in self._leaves:
            leaf.requires_grad_()
        return self._leaves

    def backward(self) -> None:
        """From the leaves, which have their gradient, to the policy's weights."""
        for part, share in self._plan.passes(self._groups):
            logprobs = self._policy(self._groups[part]) if self._kept is None else self._kept
            gradients = [leaf.grad if share else torch.zeros_like(leaf) for leaf in self._leaves[part]]
            torch.autograd.backward(list(logprobs), gradients)
