"""What a policy and its reference say of every token of some completions: log-probs, and their KL there.

Owns the KL over the whole vocabulary at each position, which sees what a policy might say instead of the token that
stands there. Does not own rows and positions (`logprobs`), nor which weights make the reference: the caller's.

As in `logprobs`, no tensor of all tokens × V exists, forward or backward.

Dimension key:  N completions of a prompt · L tokens, padded · V vocabulary · T tokens of a call · C of a chunk
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from bon_algos.head import Head
from bon_algos.logprobs import CausalLanguageModel, TokenGroup, completion_states


class TokenTerms(NamedTuple):
    """Of every token of one prompt's completions; nats, 0 behind a completion's end."""

    logprob_NL: Tensor
    """log π(token given what precedes it); differentiable."""
    reference_logprob_NL: Tensor
    """log π_ref of the same; no gradient."""
    kl_NL: Tensor
    """KL(π ‖ π_ref) of the next token, whichever it is, given what precedes; at least 0, differentiable."""


def token_terms(
    model: CausalLanguageModel,
    groups: Sequence[TokenGroup],
    as_reference: Callable[[], AbstractContextManager[None]],
    *,
    chunk_size: int = 256,
) -> list[TokenTerms]:
    """The terms of each group, at temperature 1 and at least in float32.

    `as_reference` turns the model into its reference for the length of a `with` block: one model, two policies.
    `chunk_size` is the number of tokens projected to the vocabulary at once; results do not depend on it.

    ValueError as `logprobs.token_logprobs`.
    """
    with torch.no_grad(), as_reference():
        of_reference = completion_states(model, groups)
        reference_head = of_reference.head.detached()
    head, hidden_TD, token_T = completion_states(model, groups)
    chunks = zip(*(torch.split(of_T, chunk_size) for of_T in (hidden_TD, of_reference.hidden_TD, token_T)), strict=True)
    chunk_terms = partial(_chunk_terms, head, reference_head)
    terms_T3 = torch.cat([checkpoint(chunk_terms, *chunk, use_reentrant=False) for chunk in chunks])
    rows = iter(torch.split(terms_T3, [len(completion) for group in groups for completion in group.completion_ids]))
    padded = [pad_sequence([next(rows) for _ in group.completion_ids], batch_first=True) for group in groups]
    return [TokenTerms(*terms_NL3.unbind(dim=-1)) for terms_NL3 in padded]


def _chunk_terms(head: Head, reference_head: Head, hidden_CD: Tensor, reference_CD: Tensor, token_C: Tensor) -> Tensor:
    """Log-prob, reference log-prob and KL, side by side. (C, 3)."""
    logprob_CV = head.logits(hidden_CD).log_softmax(dim=-1)
    with torch.no_grad():
        reference_CV = reference_head.logits(reference_CD).log_softmax(dim=-1)
    kl_C = (logprob_CV.exp() * (logprob_CV - reference_CV)).sum(dim=-1)
    of_token = [table_CV.gather(1, token_C[:, None])[:, 0] for table_CV in (logprob_CV, reference_CV)]
    return torch.stack([*of_token, kl_C], dim=-1)
