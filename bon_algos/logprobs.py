"""Log-probs of completions under a causal language model of transformers, at temperature 1.

Owns rows, positions, masks and the vocabulary projection. Does not own which policy is asked: for the reference the
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


PACKED_FAMILIES = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""Whose layers only look through attention, by a mask and positions that are given: seen in the tests."""
ATTENTION_WINDOWS = ("sliding_window", "attention_chunk_size")
"""A packed row's mask knows no windows: completions must fit into them, or stand in rows of their own."""
MAX_PACKED_TOKENS = 8_192
"""Of a packed row: its mask has the square of that."""


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
    head, hidden_TD, token_T = completion_states(model, groups)
    logprob_T = _head_logprobs(head, hidden_TD, token_T, batch_chunk_size)
    lengths = [len(completion) for group in groups for completion in group.completion_ids]
    rows = iter(torch.split(logprob_T, lengths))
    return [[next(rows) for _ in group.completion_ids] for group in groups]


class CompletionStates(NamedTuple):
    """What stands before the head at every position that predicts a completion's token, row after row."""

    head: nn.Linear
    hidden_TD: Tensor
    """D is the hidden size."""
    token_T: Tensor
    """The completions' tokens, one after the other."""


def completion_states(model: CausalLanguageModel, groups: Sequence[TokenGroup]) -> CompletionStates:
    """One forward pass, up to the head; differentiable. ValueError as `token_logprobs`."""
    for group in groups:
        if not group.prompt_ids or not group.completion_ids:
            raise ValueError("a group needs a prompt of at least one token, and at least one completion")
    head = _plain_head(model)
    layout = (_packed if packing_pays(model.config.get_text_config(), groups) else _one_row_each)(groups)
    device = head.weight.device
    # In a row of its own a completion never looks to the right, where the padding is: an attention mask would change
    # nothing but the speed.
    context = {} if layout.segments is None else _seen_by_segment(layout.segments, layout.positions, device)
    hidden_RLD = model.get_decoder()(
        input_ids=_right_padded(layout.tokens, device), use_cache=False, **context
    ).last_hidden_state
    row_T, column_T, token_T = torch.tensor(layout.predicted, dtype=torch.long, device=device).view(-1, 3).T
    return CompletionStates(head, hidden_RLD[row_T, column_T], token_T)


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
    """(R, L); padded with 0, which nothing reads."""
    longest = max(len(row) for row in rows)
    padded = [[*row, *[0] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.long, device=device)


# --- where tokens stand -----------------------------------------------------------------------------


class _Layout(NamedTuple):
    """Rows of tokens for one forward pass. The last token of a completion predicts nothing and stands nowhere."""

    tokens: list[list[int]]
    predicted: list[tuple[int, int, int]]
    """Row, column and what follows there, for every token of every completion."""
    positions: list[list[int]]
    segments: list[list[int]] | None
    """Of packed rows: 0 for the prompt, 1… for its completions."""


def _one_row_each(groups: Sequence[TokenGroup]) -> _Layout:
    tokens: list[list[int]] = []
    predicted: list[tuple[int, int, int]] = []
    for prompt, completions in groups:
        for completion in completions:
            predicted += [(len(tokens), len(prompt) - 1 + place, token) for place, token in enumerate(completion)]
            tokens.append([*prompt, *completion[:-1]])
    return _Layout(tokens, predicted, [], None)


def _packed(groups: Sequence[TokenGroup]) -> _Layout:
    """A row for each group: the prompt once, then completions that do not see each other."""
    layout = _Layout([], [], [], segments := [])
    for row, (prompt, completions) in enumerate(groups):
        tokens, positions, segment = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for number, completion in enumerate(completions, 1):
            columns = [len(prompt) - 1, *range(len(tokens), len(tokens) + len(completion) - 1)]
            layout.predicted.extend((row, *pair) for pair in zip(columns, completion, strict=False))
            tokens += completion[:-1]
            positions += range(len(prompt), len(prompt) + len(completion) - 1)
            segment += [number] * (len(completion) - 1)
        layout.tokens.append(tokens)
        layout.positions.append(positions)
        segments.append(segment)
    return layout


def _seen_by_segment(segments: list[list[int]], positions: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    """Positions, and a mask by which a token sees what stands before it in the prompt and in its own completion."""
    segment_RL = _right_padded(segments, device)
    length = segment_RL.shape[1]
    is_seen_RLL = (segment_RL[:, None, :] == 0) | (segment_RL[:, None, :] == segment_RL[:, :, None])
    is_before_LL = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return {
        "attention_mask": (is_seen_RLL & is_before_LL)[:, None],
        "position_ids": _right_padded(positions, device),
    }


def packing_pays(config: Any, groups: Sequence[TokenGroup]) -> bool:
    """Whether rows that share their prompt are right for this model, and cheaper: fewer tokens, but more keys each.

    A layer's matrices take about 12 D² multiplications a token, its attention 2 D a key; a causal row of its own skips
    half of its keys, a packed one none.
    """
    longest = max(len(group.prompt_ids) + max(map(len, group.completion_ids)) for group in groups)
    windows = [getattr(config, name, None) for name in ATTENTION_WINDOWS]
    is_right = (
        config.model_type in PACKED_FAMILIES
        and config._attn_implementation == "sdpa"  # the others take no mask of booleans
        and all(window is None or longest <= window for window in windows)
    )
    if not is_right:
        return False
    width, num_rows = 12 * config.hidden_size, sum(len(group.completion_ids) for group in groups)
    packed = max(len(group.prompt_ids) + sum(map(len, group.completion_ids)) for group in groups)
    cost_of_packed = len(groups) * packed * (width + 2 * packed)
    return packed <= MAX_PACKED_TOKENS and cost_of_packed < num_rows * longest * (width + longest)
