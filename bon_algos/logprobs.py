"""Log-probs of completions under a causal language model of transformers, at temperature 1.

Owns rows, positions and the vocabulary projection. Does not own which policy is asked: for the reference the
caller switches the adapter off around the call, and gradients or eval mode are the caller's as well.

The vocabulary is only ever projected to at positions that predict a completion's token, a chunk of them at a
time: no tensor of all tokens × V exists, forward or backward.

Dimension key:  N candidates per prompt · L tokens · V vocabulary · R rows · T completion tokens of a call
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

HEAD_SCALINGS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)
"""What some families do to logits after the head, by the name it has in their configurations."""


class CausalLanguageModel(Protocol):
    """What is used of a transformers model; a PEFT model answers these as well."""

    @property
    def config(self) -> Any: ...
    def get_decoder(self) -> Any: ...
    def get_output_embeddings(self) -> Any: ...


class TokenGroup(NamedTuple):
    """One prompt and completions of it, as token ids of the policy."""

    prompt_ids: Sequence[int]
    """At least one token: the first token of a completion needs something to follow."""
    completion_ids: Sequence[Sequence[int]]
    """Each with its end-of-sequence token when it stopped there."""


def sequence_logprobs(
    model: CausalLanguageModel, groups: Sequence[TokenGroup], *, batch_chunk_size: int = 256
) -> list[Tensor]:
    """log π(completion given prompt): the sum over its tokens, end-of-sequence included, in float32.

    Float64 models are summed in float64. `batch_chunk_size` is the number of tokens projected to the
    vocabulary at once: memory V × that many, results equal.

    -> for each group (N,), nats; differentiable. ValueError for an empty prompt, or a head that is not one
    plain linear map (see `token_logprobs`).
    """
    by_group = token_logprobs(model, groups, batch_chunk_size=batch_chunk_size)
    return [torch.stack([logprob_L.sum() for logprob_L in group]) for group in by_group]


def token_logprobs(
    model: CausalLanguageModel, groups: Sequence[TokenGroup], *, batch_chunk_size: int = 256
) -> list[list[Tensor]]:
    """log π(token given what precedes it), for every token of every completion.

    -> for each group, for each completion (L,), nats; differentiable. ValueError for an empty prompt, an
    empty group, a head with its own adapter, or logits that are scaled or capped after the head.
    """
    for group in groups:
        if not group.prompt_ids or not group.completion_ids:
            raise ValueError("a group needs a prompt of at least one token, and at least one completion")
    logprob_T = _completion_logprobs(model, groups, batch_chunk_size)
    lengths = [len(completion) for group in groups for completion in group.completion_ids]
    rows = iter(torch.split(logprob_T, lengths))
    return [[next(rows) for _ in group.completion_ids] for group in groups]


def _completion_logprobs(model: CausalLanguageModel, groups: Sequence[TokenGroup], batch_chunk_size: int) -> Tensor:
    """Log-probs of all completion tokens, row after row. (T,)."""
    head = _plain_head(model)
    rows = [(group.prompt_ids, completion) for group in groups for completion in group.completion_ids]
    token_RL = _right_padded([[*prompt, *completion] for prompt, completion in rows], head.weight.device)
    # A causal model never looks to the right, where the padding is: an attention mask would change
    # nothing but the speed.
    hidden_RLD = model.get_decoder()(input_ids=token_RL, use_cache=False).last_hidden_state
    row_T = _flat([[row] * len(completion) for row, (_, completion) in enumerate(rows)], token_RL)
    position_T = _flat([range(len(prompt), len(prompt) + len(completion)) for prompt, completion in rows], token_RL)
    return _head_logprobs(head, hidden_RLD[row_T, position_T - 1], token_RL[row_T, position_T], batch_chunk_size)


def _head_logprobs(head: nn.Linear, hidden_TD: Tensor, token_T: Tensor, batch_chunk_size: int) -> Tensor:
    """log softmax(head(hidden))[token], at least in float32: a bf16 log-prob is off by up to 0.1 nats. (T,)."""
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    return -functional.linear_cross_entropy(
        hidden_TD.to(dtype),
        head.weight.to(dtype),
        token_T,
        linear_bias=None if head.bias is None else head.bias.to(dtype),
        reduction="none",
        # The default chunking is five to eight times slower at the vocabularies of language models.
        options=nn.LinearCrossEntropyOptions(batch_chunk_size=batch_chunk_size),
    )


def _plain_head(model: CausalLanguageModel) -> nn.Linear:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(f"the head must be a plain linear map without an adapter, not {type(head).__name__}")
    for name in HEAD_SCALINGS:
        if getattr(model.config.get_text_config(), name, None) not in (None, 1, 1.0):
            raise ValueError(f"{name} changes the logits after the head; log-probs would be wrong")
    return head


def _right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(R, L); padded with token 0, which nothing reads."""
    longest = max(len(row) for row in rows)
    padded = [[*row, *[0] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.long, device=device)


def _flat(rows: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    return torch.tensor([index for row in rows for index in row], dtype=torch.long, device=like.device)
