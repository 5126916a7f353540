"""The anchor of J-BOND: a moving average of the policy, exact for LoRA.

Owns the average and its tensors. Does not own the model: the caller puts the anchor's tensors into a second
adapter, or on an engine, when it needs the anchor's samples or log-probs.

For LoRA the update of a layer is B·A. With A frozen it is linear in B, so averaging B *is* averaging the
update. Averaging both factors is not: after 20 steps at J-BOND's rate the product carries a third of the
update it should. Hence a trained A is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


class EmaAnchor:
    """θ_anchor ← (1 − η)·θ_anchor + η·θ, in float32, of the tensors that are trained (BOND eq. 18).

    Begins as the tensors it is given: at step 0 the anchor is the reference, since LoRA's B starts at zero.
    """

    def __init__(self, trained: Mapping[str, Tensor]) -> None:
        """Copies `trained`, by name. ValueError when it is empty, contains a LoRA factor A or is not finite."""
        for name in trained:
            if "lora_A" in name or "lora_embedding_A" in name:
                raise ValueError(f"{name} is trained: the average of B·A needs A frozen")
        if not trained:
            raise ValueError("nothing is trained, so there is nothing to average")
        _check_finite(trained)
        self._tensors = {name: _shadow(tensor) for name, tensor in trained.items()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The anchor by name, float32: its checkpoint. `EmaAnchor(tensors)` takes up where it left off."""
        return {name: tensor.clone() for name, tensor in self._tensors.items()}

    @torch.no_grad()
    def update(self, trained: Mapping[str, Tensor], rate: float) -> None:
        """Moves the anchor towards the policy; call after every optimiser step.

        rate: η in [0, 1], weight of the policy; 1 makes the anchor the policy.
        ValueError when names or shapes are not those the anchor began with, or something is not finite; the anchor is
        then as it was.
        """
        if not 0 <= rate <= 1:
            raise ValueError(f"the rate must lie in [0, 1], got {rate}")
        if trained.keys() != self._tensors.keys():
            raise ValueError(f"other tensors than the anchor's: {sorted(trained.keys() ^ self._tensors.keys())}")
        for name, anchor in self._tensors.items():
            if trained[name].shape != anchor.shape:
                raise ValueError(f"{name} changed its shape to {tuple(trained[name].shape)}")
        _check_finite(trained)
        for name, anchor in self._tensors.items():
            anchor.lerp_(trained[name].to(anchor), rate)

    @torch.no_grad()
    def copy_to(self, parameters: Mapping[str, Tensor]) -> None:
        """Writes the anchor into a model's own tensors, in their precision. KeyError when one is missing."""
        for name, anchor in self._tensors.items():
            parameters[name].copy_(anchor)


def _shadow(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True)


def _check_finite(trained: Mapping[str, Tensor]) -> None:
    """By the norm of all of them, so that an accelerator is waited for once."""
    if not get_total_norm([tensor.detach() for tensor in trained.values()]).isfinite():
        raise ValueError("an average of tensors that are not finite would never recover")
