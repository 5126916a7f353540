"""Attention for completions that share their prompt: each prompt is computed once, and only attention is padded.

Owns the row in which groups stand one after the other, and the attention function by which a completion sees its prompt
and itself. Does not own log-probs, nor when sharing is right and cheaper (`logprobs`).

The function is installed once and takes its layout from the call: without one it is transformers' own, so a model that
has met a group still answers anything else. (An implementation that is switched for the length of a forward pass would
be gone when checkpointing computes that pass again.)

Dimension key:  G groups · P prompt tokens, padded · S completions of all groups · C tokens of a completion, padded ·
                T tokens of the row · U tokens to predict · H heads
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME: Final = "bonsai_shared_prompt"
"""The attention implementation's name in a model's configuration."""


@dataclass(frozen=True)
class SharedRow:
    """Each group's prompt and then its completions, in one row. The last token of a completion predicts nothing and
    stands nowhere."""

    token_T: Tensor
    position_T: Tensor
    """In the sequence of prompt and completion that the token belongs to."""
    predicting_U: Tensor
    """The place in the row that predicts each token of each completion."""
    prompt_GP: Tensor
    """Places in the row of the prompts' tokens."""
    completion_SC: Tensor
    """Places in the row of the completions' tokens; C may be 0."""
    group_S: Tensor
    num_prompt_G: Tensor
    output_T: Tensor
    """Where each token of the row stands among prompts and completions laid out flat, one after the other."""
    num_completions: int | None
    """Of every group; None where groups differ."""
    masks: dict[int | None, tuple[Tensor | None, Tensor]] = field(default_factory=dict)
    """By attention window: whom a prompt's token sees (None: all before), and whom a completion's; filled in use."""

    def to_completions(self, of_G: Tensor) -> Tensor:
        """What belongs to a prompt, once for each of its completions. (G, …) -> (S, …)."""
        if self.num_completions is None:
            return of_G[self.group_S]
        return of_G[:, None].expand(-1, self.num_completions, *of_G.shape[1:]).flatten(0, 1)


def shared_row(groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], device: torch.device) -> SharedRow:
    """Prompts, none of them empty, with their completions -> their row."""
    tokens: list[int] = []
    positions: list[Tensor] = []

    def stand(part: Sequence[int], first_position: int) -> Tensor:
        tokens.extend(part)
        positions.append(torch.arange(first_position, first_position + len(part)))
        return torch.arange(len(tokens) - len(part), len(tokens))

    prompts, completions, predicting, group_of = [], [], [], []
    for number, (prompt, own) in enumerate(groups):
        prompts.append(stand(prompt, 0))
        for completion in own:
            completions.append(stand(completion[:-1], len(prompt)))
            predicting.append(torch.cat([prompts[-1][-1:], completions[-1]])[: len(completion)])
            group_of.append(number)
    prompt_GP, completion_SC = pad_sequence(prompts, batch_first=True), pad_sequence(completions, batch_first=True)
    output_T = torch.empty(len(tokens), dtype=torch.long)
    for padded, rows, offset in ((prompt_GP, prompts, 0), (completion_SC, completions, prompt_GP.numel())):
        for number, row in enumerate(rows):
            first = offset + number * padded.shape[1]
            output_T[row] = torch.arange(first, first + len(row))
    counts = {len(own) for _, own in groups}
    return SharedRow(
        token_T=torch.tensor(tokens, device=device),
        position_T=torch.cat(positions).to(device),
        predicting_U=torch.cat(predicting).to(device),
        prompt_GP=prompt_GP.to(device),
        completion_SC=completion_SC.to(device),
        group_S=torch.tensor(group_of, device=device),
        num_prompt_G=torch.tensor([len(prompt) for prompt in prompts], device=device),
        output_T=output_T.to(device),
        num_completions=counts.pop() if len(counts) == 1 else None,
    )


def forward_shared(decoder: Any, row: SharedRow) -> Tensor:
    """The last hidden states of the row's tokens. Installs the attention where the model still has transformers' own.
    (T, hidden size); differentiable."""
    if decoder.config._attn_implementation != ATTENTION_NAME:
        decoder.set_attn_implementation(ATTENTION_NAME)
    hidden: Tensor = decoder(
        input_ids=row.token_T[None],
        position_ids=row.position_T[None],
        # A mask of four dimensions is handed on as it is: transformers must not make one from jumping positions.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=row.token_T.device),
        use_cache=False,
        shared_row=row,
    ).last_hidden_state
    return hidden[0]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    shared_row: SharedRow | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """(1, H, T, head size) each, or fewer heads of keys and values -> (1, T, H, head size)."""
    if shared_row is None:
        given = {"scaling": scaling, "sliding_window": sliding_window, **others}
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **given)
        return output, None
    row, num_repeats = shared_row, query.shape[1] // key.shape[1]
    tables = [states[0].transpose(0, 1).flatten(1) for states in (query, key, value)]
    repeats = (1, num_repeats, num_repeats)

    def heads(places_RL: Tensor) -> list[Tensor]:
        """Query, key and value of some rows of places, all with H heads. (R, H, L, head size) each."""
        found = [functional.embedding(places_RL, table_TE) for table_TE in tables]
        split = [one.view(*places_RL.shape, -1, query.shape[-1]).transpose(1, 2) for one in found]
        return [repeat_kv(one, repeat) for one, repeat in zip(split, repeats, strict=True)]

    is_seen_PP, is_seen_SCK = _masks(row, sliding_window)
    query_G, key_G, value_G = heads(row.prompt_GP)
    attend = partial(functional.scaled_dot_product_attention, scale=scaling)
    outputs = [attend(query_G, key_G, value_G, attn_mask=is_seen_PP, is_causal=is_seen_PP is None)]
    if row.completion_SC.numel():
        query_S, key_S, value_S = heads(row.completion_SC)
        key_S = torch.cat([row.to_completions(key_G), key_S], dim=2)
        value_S = torch.cat([row.to_completions(value_G), value_S], dim=2)
        outputs.append(attend(query_S, key_S, value_S, attn_mask=is_seen_SCK))
    flat_FE = torch.cat([output.transpose(1, 2).flatten(2).flatten(0, 1) for output in outputs])
    output_TE = functional.embedding(row.output_T, flat_FE)
    return output_TE.view(1, len(row.output_T), -1, query.shape[-1]), None


def _masks(row: SharedRow, window: int | None) -> tuple[Tensor | None, Tensor]:
    """(P, P) or None, and (S, 1, C, P + C); one row for all S where their prompts are equally long."""
    if window not in row.masks:
        row.masks[window] = _made_masks(row, window)
    return row.masks[window]


def _made_masks(row: SharedRow, window: int | None) -> tuple[Tensor | None, Tensor]:
    device, num_places = row.token_T.device, row.prompt_GP.shape[1]
    num_prompt_S = row.num_prompt_G[row.group_S]
    if bool((num_prompt_S == num_prompt_S[0]).all()):
        num_prompt_S = num_prompt_S[:1]
    place_P, step_C = torch.arange(num_places, device=device), torch.arange(row.completion_SC.shape[1], device=device)
    reach = num_places + len(step_C) + 1 if window is None else window
    ago_PP = place_P[:, None] - place_P
    is_seen_PP = None if reach >= num_places else (ago_PP >= 0) & (ago_PP < reach)
    is_prompt_SCP = (place_P < num_prompt_S[:, None])[:, None, :].expand(-1, len(step_C), -1)
    ago_SCP = num_prompt_S[:, None, None] + step_C[:, None] - place_P
    ago_CC = step_C[:, None] - step_C
    is_own_CC = (ago_CC >= 0) & (ago_CC < reach)
    is_seen_SCK = torch.cat([is_prompt_SCP & (ago_SCP < reach), is_own_CC.expand(len(num_prompt_S), -1, -1)], dim=-1)
    return is_seen_PP, is_seen_SCK[:, None]


# With transformers' own masks, so that calls without a row are what they were.
AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
