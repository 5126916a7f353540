"""Policies that are tables, as steps ask for them: a row for each prompt, a column for each outcome."""

from __future__ import annotations

import torch
from torch import Tensor

from bon_algos.logprobs import TokenGroup
from bon_algos.steps import (
    LoggedGroup,
)
from bon_algos.token_kl import TokenTerms


def table(logprob_PK: Tensor):
    """A policy whose prompt is its row and whose completion is one outcome."""

    def logprobs(groups):
        return [
            torch.stack([logprob_PK[group.prompt_ids[0], outcome] for (outcome,) in group.completion_ids])
            for group in groups
        ]

    return logprobs


def table_terms(logprob_PK: Tensor, reference_PK: Tensor):
    """The same policy, and what it and its reference say of the completions' only token."""
    kl_P = (logprob_PK.exp() * (logprob_PK - reference_PK)).sum(-1)

    def terms(groups):
        return [
            TokenTerms(logprob_N[:, None], reference_N[:, None], kl_P[group.prompt_ids[0]].expand(len(logprob_N), 1))
            for group, logprob_N, reference_N in zip(
                groups, table(logprob_PK)(groups), table(reference_PK)(groups), strict=True
            )
        ]

    return terms


def logged(prompt: int, outcomes, rewards, logprob_K: Tensor) -> LoggedGroup:
    tokens = TokenGroup([prompt], [[outcome] for outcome in outcomes])
    return LoggedGroup(tokens, rewards, [logprob_K[outcome].item() for outcome in outcomes])
