"""What two policies say of every token, against all logits of plain transformers."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from bon_algos.token_kl import token_terms
from tests.bon_algos.test_logprobs import GROUPS, MODELS, llama

COEFFICIENTS = (1.0, -0.7)
"""Of log-probs and of KLs in the scalar whose gradient is compared."""


@contextmanager
def shifted(model):
    """The reference: the same model with other weights, the head's as well, for the length of a block."""
    layers = list({id(parameter): parameter for parameter in model.parameters()}.values())
    before = [parameter.data for parameter in layers]
    for parameter in layers:
        parameter.data = parameter.data * 0.9
    try:
        yield
    finally:
        for parameter, own in zip(layers, before, strict=True):
            parameter.data = own


def by_all_logits(model):
    """For each group (N, L) of log-probs, of the reference's, and of KLs, summed over the whole vocabulary."""
    found = []
    for prompt_ids, completions in GROUPS:
        rows = []
        for completion in completions:
            token_1L = torch.tensor([[*prompt_ids, *completion]])
            here = slice(len(prompt_ids) - 1, -1)
            with torch.no_grad(), shifted(model):
                reference_LV = model(input_ids=token_1L).logits[0].log_softmax(-1)[here]
            logprob_LV = model(input_ids=token_1L).logits[0].log_softmax(-1)[here]
            token_L1 = torch.tensor(completion)[:, None]
            kl_L = (logprob_LV.exp() * (logprob_LV - reference_LV)).sum(-1)
            rows.append(
                torch.stack([logprob_LV.gather(1, token_L1)[:, 0], reference_LV.gather(1, token_L1)[:, 0], kl_L])
            )
        found.append(rows)
    return found


@MODELS
def test_terms_and_gradients_are_those_of_all_logits(build):
    model = build()
    actual = token_terms(model, GROUPS, lambda: shifted(model))
    scalar = torch.stack(
        [COEFFICIENTS[0] * terms.logprob_NL.sum() + COEFFICIENTS[1] * terms.kl_NL.sum() for terms in actual]
    ).sum()
    gradients = torch.autograd.grad(scalar, list(model.parameters()))
    expected = by_all_logits(model)
    for terms, rows in zip(actual, expected, strict=True):
        for place, row_3L in enumerate(rows):
            length = row_3L.shape[1]
            here = torch.stack([table[place] for table in terms])
            torch.testing.assert_close(here[:, :length], row_3L, atol=1e-5, rtol=1e-5)
            assert not here[:, length:].any()  # behind its end
    of_rows = [COEFFICIENTS[0] * row[0].sum() + COEFFICIENTS[1] * row[2].sum() for rows in expected for row in rows]
    wanted = torch.autograd.grad(torch.stack(of_rows).sum(), list(model.parameters()))
    for own, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(own, other, atol=2e-4, rtol=1e-4)


def test_the_reference_carries_no_gradient_and_the_policy_is_itself_again():
    model = llama()
    before = [parameter.clone() for parameter in model.parameters()]
    (terms, *_) = token_terms(model, GROUPS, lambda: shifted(model))
    assert all(torch.equal(own, other) for own, other in zip(model.parameters(), before, strict=True))
    grads = torch.autograd.grad(
        terms.reference_logprob_NL.sum(), list(model.parameters()), allow_unused=True, materialize_grads=True
    )
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("chunk_size", [1, 5, 1000])
@torch.no_grad()
def test_chunks_change_nothing(chunk_size):
    model = llama()
    whole = token_terms(model, GROUPS, lambda: shifted(model))
    for terms, expected in zip(
        token_terms(model, GROUPS, lambda: shifted(model), chunk_size=chunk_size), whole, strict=True
    ):
        torch.testing.assert_close(torch.stack(list(terms)), torch.stack(list(expected)), atol=1e-6, rtol=0)
