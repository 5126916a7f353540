"""Log-probs of completions under a causal language model of transformers, at temperature 1.

Owns rows, positions and masks. Does not own the vocabulary projection (`head`), nor which policy is asked: for the
reference the caller switches the adapter off around the call, and gradients or eval mode are the caller's as well.

The vocabulary is only ever projected to at positions that predict a completion's token, a chunk of them at a
time: no tensor of all tokens × V exists, forward or backward.

Dimension key:  N candidates per prompt · L tokens · V vocabulary · R rows · T completion tokens of a call
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bon_algos.head import HasHead, Head, head_logprobs, head_of
from bon_algos.shared_prompt import ATTENTION_NAME, forward_shared, shared_row

SHARING_FAMILIES = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""Whose layers look at other tokens through attention alone, at positions that are given: seen in the tests."""
SHARE_OF_TOKENS = 0.95
"""Sharing a prompt pays below this share of the tokens of rows of their own: its attention costs a little."""


class CausalLanguageModel(HasHead, Protocol):
    """What is used of a transformers model; a PEFT model answers these as well."""

    def get_decoder(self) -> Any: ...


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

    -> for each group (N,), nats; differentiable. ValueError as `token_logprobs`.
    """
    by_group = token_logprobs(model, groups, batch_chunk_size=batch_chunk_size)
    return [torch.stack([logprob_L.sum() for logprob_L in group]) for group in by_group]


def token_logprobs(
    model: CausalLanguageModel, groups: Sequence[TokenGroup], *, batch_chunk_size: int = 256
) -> list[list[Tensor]]:
    """log π(token given what precedes it), for every token of every completion.

    -> for each group, for each completion (L,), nats; differentiable. ValueError for an empty prompt, an
    empty group, or a head that `head.head_of` refuses.
    """
    head, hidden_TD, token_T = completion_states(model, groups)
    logprob_T = head_logprobs(head, hidden_TD, token_T, batch_chunk_size)
    lengths = [len(completion) for group in groups for completion in group.completion_ids]
    rows = iter(torch.split(logprob_T, lengths))
    return [[next(rows) for _ in group.completion_ids] for group in groups]


class CompletionStates(NamedTuple):
    """What stands before the head at every position that predicts a completion's token, row after row."""

    head: Head
    hidden_TD: Tensor
    """D is the hidden size."""
    token_T: Tensor
    """The completions' tokens, one after the other."""


def completion_states(model: CausalLanguageModel, groups: Sequence[TokenGroup]) -> CompletionStates:
    """One forward pass, up to the head; differentiable. ValueError as `token_logprobs`."""
    for group in groups:
        if not group.prompt_ids or not group.completion_ids:
            raise ValueError("a group needs a prompt of at least one token, and at least one completion")
    head, decoder = head_of(model), model.get_decoder()
    device = head.weight_VD.device
    tokens = [token for _, completions in groups for completion in completions for token in completion]
    if sharing_pays(model.config.get_text_config(), groups):
        row = shared_row(groups, device)
        hidden_TD = forward_shared(decoder, row)[row.predicting_U]
    else:
        # A completion never looks to the right, where the padding is: an attention mask would change nothing but speed.
        rows = [[*prompt, *completion[:-1]] for prompt, completions in groups for completion in completions]
        hidden_RLD = decoder(input_ids=_right_padded(rows, device), use_cache=False).last_hidden_state
        hidden_TD = torch.cat([hidden_RLD[row, part] for row, part in enumerate(_predicting(groups))])
    return CompletionStates(head, hidden_TD, torch.tensor(tokens, dtype=torch.long, device=device))


def _predicting(groups: Sequence[TokenGroup]) -> Iterator[slice]:
    """Of each completion's own row, the places that predict its tokens."""
    for prompt, completions in groups:
        for completion in completions:
            yield slice(len(prompt) - 1, len(prompt) - 1 + len(completion))


def _right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(R, L); padded with 0, which nothing reads."""
    longest = max(len(row) for row in rows)
    padded = [[*row, *[0] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.long, device=device)


def sharing_pays(config: Any, groups: Sequence[TokenGroup]) -> bool:
    """Whether one row in which completions share their prompts is right for this model, and cheaper than rows of
    their own: fewer tokens, and no padding."""
    is_right = config.model_type in SHARING_FAMILIES and config._attn_implementation in ("sdpa", ATTENTION_NAME)
    completions = [(len(prompt), len(completion)) for prompt, own in groups for completion in own]
    longest = max(prompt + completion for prompt, completion in completions)
    num_shared = sum(len(group.prompt_ids) for group in groups) + sum(length for _, length in completions)
    return is_right and num_shared < SHARE_OF_TOKENS * longest * len(completions)
