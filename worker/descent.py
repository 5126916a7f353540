"""What moves in a step: parameters by name, with their optimiser and their rate.

Owns the clip of the gradient, over all ranks, and the optimiser's state. Does not own what the gradient is of, nor when
a step is made (`train`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from worker.ranks import Ranks
from worker.sharding import clip_to_norm, is_sharded, like, whole

MUON_RATE: Final = 3.0
"""Muon's rate in units of AdamW's, to move matrices as far where it does best (docs/log.md); both count in elements'
mean square, of which AdamW moves .2 to .4 of its rate (arXiv 2502.16982)."""


class _Part(NamedTuple):
    """What one optimiser moves."""

    names: list[str]
    optimiser: torch.optim.Optimizer
    rate: float
    """In units of the learning rate."""


class Descent:
    """AdamW over some parameters, or Muon over those that are matrices, for a part of a training's steps."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        ranks: Ranks,
        last: int,
        learning_rate: float,
        warmup_steps: int,
        max_grad_norm: float,
        first: int = 0,
        by_muon: Collection[str] = (),
    ) -> None:
        """first, last: of the training's steps: from the one until before the other they move. by_muon: names of
        matrices that move as far in every direction (Muon), `MUON_RATE` times as fast."""
        self.parameters = parameters
        self._ranks = ranks
        self._first, self._last, self._warmup_steps = first, last, warmup_steps
        self._learning_rate, self._max_grad_norm = learning_rate, max_grad_norm
        self._is_sharded = is_sharded(parameters.values())
        parts = (
            ([name for name in parameters if name not in by_muon], self._adamw, 1.0),
            ([name for name in parameters if name in by_muon], _muon, MUON_RATE),
        )
        self._parts = [
            _Part(names, opened([parameters[name] for name in names]), rate) for names, opened, rate in parts if names
        ]

    def _adamw(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        # Parameters that are spread over ranks and others do not mix in one kernel.
        return torch.optim.AdamW(parameters, weight_decay=0.0, foreach=False if self._is_sharded else None)

    def clipped_norm(self) -> float:
        """Of the gradient of all ranks, before it is clipped. What is spread was summed on its way back."""
        parameters = self.parameters.values()
        if self._ranks.size > 1:
            self._ranks.add_up([_gradient(parameter) for parameter in parameters if not is_sharded([parameter])])
        clip = clip_to_norm if self._is_sharded else torch.nn.utils.clip_grad_norm_
        return float(clip(parameters, self._max_grad_norm))

    def step(self, done: int) -> None:
        """done: of the training's steps."""
        share = rate_share(done - self._first, self._last - self._first, self._warmup_steps)
        for _, optimiser, rate in self._parts:
            for group in optimiser.param_groups:
                group["lr"] = self._learning_rate * share * rate
            optimiser.step()
            optimiser.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """The optimiser's, by parameter and field; every rank asks."""
        return {
            f"{name}/{field}": whole(value)
            for names, optimiser, _ in self._parts
            for name in names
            for field, value in optimiser.state.get(self.parameters[name], {}).items()
        }

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """KeyError for a parameter that is not here."""
        optimiser_of = {name: optimiser for names, optimiser, _ in self._parts for name in names}
        for place, tensor in state.items():
            name, _, field = place.rpartition("/")
            parameter = self.parameters[name]
            # The number of steps stays on the CPU, where the optimiser keeps it.
            optimiser_of[name].state[parameter][field] = tensor if field == "step" else like(parameter, tensor)


def _muon(matrices: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


def rate_share(done: int, steps: int, warmup_steps: int) -> float:
    """The learning rate after `done` of `steps` steps, as a share of the greatest: rises over the first steps, and
    falls in a straight line towards a tenth, so that the last steps average a small batch's noise away."""
    return min(1.0, (done + 1) / max(1, warmup_steps)) * (1 - 0.9 * done / steps)


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Zero for what no pass of this rank reached."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
