"""BOND token by token: a policy drawn, at every prefix, to what best-of-n says next over the whole vocabulary.

Owns the passes of policy, reference and critic over candidates, the divergence at every prefix and the critic's loss.
Does not own the law of best-of-n at a prefix nor the network that tells it (`prefix_values`).

A loss on whole completions (`bond`, `offline_bond`) says of each only how likely it should be, and leaves a policy to
find out which token earned that: what it finds first is which words are good, whatever was said before them. Here every
prefix says it of every word. The divergence is 0 for best-of-n alone wherever a prefix is looked at, so how prefixes
are weighed moves no optimum.

What best-of-n says next depends on what was said, of which a language model's state keeps only what bears on the next
word. So that the policy learns to keep it, a linear probe reads the prefix's value off its last state: without that it
stays for hundreds of steps where every word has its odds whatever was said before. The probe is the critic's, and no
part of the policy.

As in `logprobs`, no tensor of all tokens × V exists, forward or backward.

Dimension key:  N completions of a prompt · L tokens, padded · V vocabulary · T tokens of a call · D hidden size · S of
the critic's state · C tokens of a chunk · K next tokens that are valued · U different ones
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Final, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from bon_algos.checks import check_finite, check_one_shape
from bon_algos.head import Head
from bon_algos.logprobs import CausalLanguageModel, CompletionStates, TokenGroup, completion_states
from bon_algos.prefix_values import PrefixCritic, RankLaw, guided_logprobs, log_mean_tilt

VALUED_TOKENS: Final = 64
"""Of the vocabulary, the likeliest at each prefix; the rest counts as worth what these are worth together."""
LEAST_LOG_VALUE: Final = -12.0
"""Nats: what is worth less is next to never drawn by best-of-n, and a target of −∞ would be no number."""

LEAST_PROBED_VALUE: Final = -6.0
"""Nats: how hopeless a prefix is beyond that, no policy need remember."""

AsReference = Callable[[], AbstractContextManager[None]]
"""Turns a model into its reference for the length of a `with` block."""


class GuidedTerms(NamedTuple):
    """Of every token of one prompt's completions; nats, 0 behind a completion's end."""

    forward_kl_NL: Tensor
    """KL(π_BoN ‖ π) of the next token, given what precedes; differentiable."""
    backward_kl_NL: Tensor
    """KL(π ‖ π_BoN) of the same; differentiable."""
    log_value_NL: Tensor
    """log V of what precedes."""
    guided_kl_NL: Tensor
    """KL(π_BoN ‖ π_ref) of the next token: what is to be learned."""
    value_error_NL: Tensor
    """Huber distance of log V as the probe reads it off the policy's state; differentiable in policy and probe."""


def said_laws(
    model: CausalLanguageModel, groups: Sequence[TokenGroup], as_reference: AsReference, critic: PrefixCritic
) -> list[RankLaw]:
    """The critic's law after every token that is said; two tensors (number of the group's tokens,) for each group, in
    the order of its completions. Differentiable in the critic. ValueError as `logprobs.token_logprobs`."""
    with torch.no_grad(), as_reference():
        reference = completion_states(model, groups)
        row_TD = reference.head.weight_VD[reference.token_T]
    law = critic.law(_critic_states(critic, reference, groups), critic.codes(row_TD)[:, None])
    sizes = [sum(map(len, group.completion_ids)) for group in groups]
    split = (torch.split(one[:, 0], sizes) for one in law)
    return [RankLaw(*parts) for parts in zip(*split, strict=True)]


def guided_terms(
    model: CausalLanguageModel,
    groups: Sequence[TokenGroup],
    as_reference: AsReference,
    critic: PrefixCritic,
    n: int,
    *,
    chunk_size: int = 256,
) -> list[GuidedTerms]:
    """The terms of each group, at temperature 1 and at least in float32; no gradient for the critic but its probe.

    `chunk_size` is the number of tokens projected to the vocabulary at once; results do not depend on it.

    ValueError as `logprobs.token_logprobs`.
    """
    with torch.no_grad(), as_reference():
        reference = completion_states(model, groups)
        reference_head, state_TS = reference.head.detached(), _critic_states(critic, reference, groups)
        told_C = zip(torch.split(reference.hidden_TD, chunk_size), torch.split(state_TS, chunk_size), strict=True)
        valued_C = [_valued(reference_head, critic, n, *of_C) for of_C in told_C]
    head, hidden_TD, _ = completion_states(model, groups)
    hidden_C = zip(torch.split(hidden_TD, chunk_size), torch.split(reference.hidden_TD, chunk_size), strict=True)
    chunk_terms = partial(checkpoint, _chunk_terms, head, reference_head, use_reentrant=False)
    terms_T4 = torch.cat([chunk_terms(*of_C, *values) for of_C, values in zip(hidden_C, valued_C, strict=True)])
    value_T = terms_T4[:, 2].clamp(min=LEAST_PROBED_VALUE)
    error_T = functional.smooth_l1_loss(critic.probed(hidden_TD), value_T, reduction="none")
    terms_T5 = torch.cat([terms_T4, error_T[:, None]], dim=-1)
    rows = iter(torch.split(terms_T5, [len(completion) for group in groups for completion in group.completion_ids]))
    padded = [pad_sequence([next(rows) for _ in group.completion_ids], batch_first=True) for group in groups]
    return [GuidedTerms(*terms_NL5.unbind(dim=-1)) for terms_NL5 in padded]


def _critic_states(critic: PrefixCritic, reference: CompletionStates, groups: Sequence[TokenGroup]) -> Tensor:
    """Before every token, row after row. (T, S)."""
    lengths = [len(completion) for group in groups for completion in group.completion_ids]
    hidden_NLD = pad_sequence(list(torch.split(reference.hidden_TD, lengths)), batch_first=True)
    rows = torch.split(reference.head.weight_VD[reference.token_T].detach(), lengths)
    said_NLD = pad_sequence(
        [torch.cat([torch.zeros_like(row_LD[:1]), row_LD[:-1]]) for row_LD in rows], batch_first=True
    )
    state_NLS = critic.states(hidden_NLD, said_NLD)
    return torch.cat([state_LS[:length] for state_LS, length in zip(state_NLS, lengths, strict=True)])


def _valued(
    reference_head: Head, critic: PrefixCritic, n: int, reference_CD: Tensor, state_CS: Tensor
) -> tuple[Tensor, Tensor]:
    """The likeliest tokens after each prefix, and log V after each of them; (C, K). Kept for the backward pass, where
    the vocabulary is projected to again: the integral costs more than that."""
    logit_CV = reference_head.logits(reference_CD)
    token_CK = logit_CV.topk(min(VALUED_TOKENS, logit_CV.shape[1])).indices
    token_U, place_CK = cast("tuple[Tensor, Tensor]", torch.unique(token_CK, return_inverse=True))
    code_CKS = critic.codes(reference_head.weight_VD[token_U])[place_CK]
    return token_CK, log_mean_tilt(critic.law(state_CS, code_CKS), n).clamp(min=LEAST_LOG_VALUE)


def _chunk_terms(
    head: Head,
    reference_head: Head,
    hidden_CD: Tensor,
    reference_CD: Tensor,
    token_CK: Tensor,
    log_value_CK: Tensor,
) -> Tensor:
    """Both divergences, the prefix's value and how far best-of-n is from the reference, side by side. (C, 4)."""
    logprob_CV = head.logits(hidden_CD).log_softmax(dim=-1)
    with torch.no_grad():
        reference_CV = reference_head.logits(reference_CD).log_softmax(dim=-1)
        guided_CV, log_value_C = guided_logprobs(reference_CV, log_value_CK, token_CK)
    forward_C = _divergence(guided_CV, logprob_CV)
    backward_C = _divergence(logprob_CV, guided_CV)
    return torch.stack([forward_C, backward_C, log_value_C, _divergence(guided_CV, reference_CV)], dim=-1)


def _divergence(logprob_CV: Tensor, other_CV: Tensor) -> Tensor:
    return (logprob_CV.exp() * (logprob_CV - other_CV)).sum(dim=-1)


class TokenBondMetrics(NamedTuple):
    """Of one prompt, along prefixes weighed as in the loss; π_BoN as the critic has it. Scalars, detached; nats."""

    forward_kl: Tensor
    """KL(π_BoN ‖ π)."""
    backward_kl: Tensor
    """KL(π ‖ π_BoN)."""
    guided_kl: Tensor
    """KL(π_BoN ‖ π_ref): where the first began."""
    value_error: Tensor
    """Of the probe, by shares alone."""


class TokenBondLoss(NamedTuple):
    loss: Tensor
    metrics: TokenBondMetrics


def token_bond_loss(
    terms: GuidedTerms,
    best_share_N: Tensor,
    even_share_N: Tensor,
    *,
    jeffreys_weight: float,
    value_weight: float = 0.0,
) -> TokenBondLoss:
    """Σ_j Σ_t (b_j + e_j·min(1, V_jt))·((1 − β)·KL(π_BoN ‖ π) + β·KL(π ‖ π_BoN)), each of the token after a prefix,
    + λ·Σ_j Σ_t (b_j + e_j)·error of the probe.

    Completions stand for best-of-n's prefixes by b and for the reference's by e, of which those count less that
    best-of-n hardly comes by. The forward part over b alone is KL(π_BoN ‖ π) of whole completions: the chain rule.

    terms            of the N completions
    best_share_N     (N,)  b: in expectation proportional to best-of-n's weights
    even_share_N     (N,)  e: in expectation proportional to the reference's
    jeffreys_weight  β in [0, 1]
    value_weight     λ, not negative

    ValueError when shapes differ, nothing is given, a share is negative or not finite, or β or λ is out of range.
    """
    if not value_weight >= 0:
        raise ValueError(f"need λ ≥ 0, got {value_weight}")
    if not 0 <= jeffreys_weight <= 1:
        raise ValueError(f"need 0 ≤ β ≤ 1, got {jeffreys_weight}")
    check_one_shape("NL", *terms)
    check_one_shape("N", terms.log_value_NL[:, 0], best_share_N, even_share_N)
    check_finite("shares", best_share_N, even_share_N)
    check_finite("values", terms.log_value_NL, terms.guided_kl_NL)
    if min(best_share_N.min(), even_share_N.min()) < 0:
        raise ValueError("shares must not be negative")
    best_N1, even_N1 = (share_N.to(terms.log_value_NL)[:, None] for share_N in (best_share_N, even_share_N))
    share_NL = best_N1 + even_N1 * terms.log_value_NL.clamp(max=0).exp()
    forward = (share_NL * terms.forward_kl_NL).sum()
    backward = (share_NL * terms.backward_kl_NL).sum()
    error = ((best_N1 + even_N1) * terms.value_error_NL).sum()
    loss = (1 - jeffreys_weight) * forward + jeffreys_weight * backward + value_weight * error
    guided = (share_NL * terms.guided_kl_NL).sum()
    return TokenBondLoss(loss, TokenBondMetrics(*(one.detach() for one in (forward, backward, guided, error))))
