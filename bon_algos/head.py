"""The last linear map, from hidden states to logits, with the low-rank adapter it may have.

Owns what a head is taken to be, and log-probs of tokens from hidden states. Does not own rows and positions
(`logprobs`), nor whose weights these are.

The adapter's product is never formed: beside a vocabulary it would be as large as the head. No tensor of all tokens × V
exists, forward or backward.

Dimension key:  T tokens of a call · C tokens of a chunk · D hidden size · V vocabulary · R rank
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

LOGIT_SCALINGS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)
"""What some families do to logits after the head, by the name it has in their configurations."""


class HasHead(Protocol):
    """What is used of a transformers model; a PEFT model answers these as well."""

    @property
    def config(self) -> Any: ...
    def get_output_embeddings(self) -> Any: ...


class Adapter(NamedTuple):
    """What LoRA adds to the head: scaling · B · A."""

    factor_a_RD: Tensor
    factor_b_VR: Tensor
    scaling: float


class Head(NamedTuple):
    """The weights as they are now: a policy that is worn for the length of a call must be asked within it."""

    weight_VD: Tensor
    bias_V: Tensor | None
    adapter: Adapter | None

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """At least in float32: a bf16 log-prob is off by up to 0.1 nats. (T, V)."""
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        hidden_TD = hidden_TD.to(dtype)
        logit_TV = functional.linear(hidden_TD, self.weight_VD.to(dtype), _cast(self.bias_V, dtype))
        if self.adapter is None:
            return logit_TV
        narrow_TR = functional.linear(hidden_TD, self.adapter.factor_a_RD.to(dtype)) * self.adapter.scaling
        return logit_TV + functional.linear(narrow_TR, self.adapter.factor_b_VR.to(dtype))

    def detached(self) -> Head:
        """The same weights without gradients, kept when the model's own change places."""
        adapter = self.adapter
        if adapter is not None:
            adapter = Adapter(adapter.factor_a_RD.detach(), adapter.factor_b_VR.detach(), adapter.scaling)
        return Head(self.weight_VD.detach(), None if self.bias_V is None else self.bias_V.detach(), adapter)


def head_of(model: HasHead) -> Head:
    """ValueError where logits are more than one linear map of hidden states, or an adapter is not plain LoRA."""
    for name in LOGIT_SCALINGS:
        if getattr(model.config.get_text_config(), name, None) not in (None, 1, 1.0):
            raise ValueError(f"{name} changes the logits after the head; log-probs would be wrong")
    layer = model.get_output_embeddings()
    linear, adapter = (layer.base_layer, _adapter_of(layer)) if hasattr(layer, "base_layer") else (layer, None)
    if type(linear) is not nn.Linear:
        raise ValueError(f"the head must be one linear map, with LoRA or without, not {type(linear).__name__}")
    return Head(linear.weight, linear.bias, adapter)


def _adapter_of(layer: Any) -> Adapter | None:
    """Of PEFT's LoRA layer, the adapter that is switched on."""
    if layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return None
    is_plain = len(names) == 1 and isinstance(layer.lora_dropout[names[0]], nn.Identity)
    if not is_plain or names[0] in layer.lora_variant or layer.lora_B[names[0]].bias is not None:
        raise ValueError("the head's adapter must be one plain LoRA, without dropout and bias")
    (name,) = names
    return Adapter(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


def head_logprobs(head: Head, hidden_TD: Tensor, token_T: Tensor, chunk_size: int) -> Tensor:
    """log softmax(logits)[token]; nats, differentiable. (T,)."""
    if head.adapter is None:
        return _fused_logprobs(head, hidden_TD, token_T, chunk_size)
    # The fused loss knows one weight and would compute a gradient for all of it.
    chunks = zip(torch.split(hidden_TD, chunk_size), torch.split(token_T, chunk_size), strict=True)
    return torch.cat([checkpoint(_chunk_logprobs, head, *chunk, use_reentrant=False) for chunk in chunks])


def _chunk_logprobs(head: Head, hidden_CD: Tensor, token_C: Tensor) -> Tensor:
    return -functional.cross_entropy(head.logits(hidden_CD), token_C, reduction="none")


def _fused_logprobs(head: Head, hidden_TD: Tensor, token_T: Tensor, chunk_size: int) -> Tensor:
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    return -functional.linear_cross_entropy(
        hidden_TD.to(dtype),
        head.weight_VD.to(dtype),
        token_T,
        linear_bias=_cast(head.bias_V, dtype),
        reduction="none",
        # The default chunking is five to eight times slower at the vocabularies of language models.
        options=nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_size),
    )


def _cast(bias_V: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias_V is None else bias_V.to(dtype)
