"""BOND from the log alone, on policies of two tokens out of three whose laws can be enumerated."""

from __future__ import annotations

from itertools import product
from math import inf, log

import numpy as np
import pytest
import torch
from torch import Tensor

from bon_algos import order
from bon_algos.bond import compressed_below
from bon_algos.logged_steps import choose_weighed
from bon_algos.offline_bond import offline_bond_loss
from bon_algos.quantiles import log_tilt_tie_aware, standing_among_others
from bon_algos.steps import WeighedGroup
from bon_algos.token_kl import TokenTerms
from tests.bon_algos.tables import logged, table_terms

PAIRS = list(product(range(3), repeat=2))
REWARD_9 = [float((3 * a + 5 * b) % 7) for a, b in PAIRS]
FREE = {"max_importance": inf, "return_floor": -inf}


def logits(seed: int) -> Tensor:
    """Of the first token, and of the second after each first. (4, 3)."""
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def terms_of(logit_43: Tensor, reference_43: Tensor, pairs=PAIRS) -> TokenTerms:
    """Of completions of two tokens; (N, 2) each."""
    policy_43, reference_43 = logit_43.log_softmax(-1), reference_43.log_softmax(-1)
    kl_4 = (policy_43.exp() * (policy_43 - reference_43)).sum(-1)
    rows = [[(0, a), (1 + a, b)] for a, b in pairs]
    return TokenTerms(
        torch.stack([torch.stack([policy_43[at] for at in row]) for row in rows]),
        torch.stack([torch.stack([reference_43[at] for at in row]) for row in rows]),
        torch.stack([torch.stack([kl_4[place] for place, _ in row]) for row in rows]),
    )


def laws(logit_43: Tensor, reference_43: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log π, log π_ref and log π_BoN (n = 3) of the nine completions."""
    terms = terms_of(logit_43, reference_43)
    logprob_9, reference_9 = terms.logprob_NL.sum(-1), terms.reference_logprob_NL.sum(-1)
    best_9 = torch.tensor(order.best_of_n_law(reference_9.detach().exp().numpy(), REWARD_9, 3)).log()
    return logprob_9, reference_9, best_9


def loss_over_all(logit_43: Tensor, reference_43: Tensor, **settings) -> Tensor:
    """The loss's expectation: every completion stands for its share of the reference's law."""
    _, reference_9, best_9 = laws(logit_43, reference_43)
    return offline_bond_loss(
        terms_of(logit_43, reference_43),
        best_9.exp(),
        best_9 - reference_9,
        reference_9.exp(),
        **{**FREE, **settings},
    ).loss


@pytest.mark.parametrize(("beta", "kappa"), [(0.0, 0.0), (1.0, 0.0), (0.7, 0.0), (0.7, 0.4)])
def test_its_expected_gradient_is_that_of_the_divergences(beta, kappa):
    """(1 − β)·KL(BoN ‖ π) + β·KL(π ‖ BoN) + κ·Σ KL of the tokens, prefixes held fixed; by autograd through all nine."""
    logit_43, reference_43 = logits(1).requires_grad_(), logits(2)
    logprob_9, _, best_9 = laws(logit_43, reference_43)
    jeffreys = (1 - beta) * -(best_9.exp() @ logprob_9) + beta * (logprob_9.exp() @ (logprob_9 - best_9))
    policy_43 = logit_43.log_softmax(-1)
    kl_4 = (policy_43.exp() * (policy_43 - reference_43.log_softmax(-1))).sum(-1)
    of_tokens = kl_4[0] + policy_43[0].exp().detach() @ kl_4[1:]
    (expected,) = torch.autograd.grad(jeffreys + kappa * of_tokens, logit_43)
    loss = loss_over_all(logit_43, reference_43, jeffreys_weight=beta, token_kl_weight=kappa)
    (actual,) = torch.autograd.grad(loss, logit_43)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_baseline_of_eight_chosen_draws_takes_up_to_an_eighth_of_the_backward_gradient(beta):
    """All sixteen outcomes are logged, and 8 of them chosen 1,000 times. Imitation (β = 0) has no baseline: nothing is
    missing. The backward part would fall short by 1/8 were its draws independent and alike; they are spread, which
    spares some of that."""
    generator = torch.Generator().manual_seed(4)
    reward_K, drift_K = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    reference_1K = torch.zeros(1, 16, dtype=torch.float64).log_softmax(-1)
    group = logged(0, range(16), reward_K.tolist(), reference_1K[0])
    logit_1K = (reference_1K + 0.3 * drift_K).requires_grad_()

    def gradient(weighed: WeighedGroup) -> Tensor:
        (terms,) = table_terms(logit_1K.log_softmax(-1), reference_1K)([weighed.tokens])
        given = [torch.tensor(row) for row in (weighed.imitation_weights, weighed.log_tilts, weighed.shares)]
        loss = offline_bond_loss(terms, *given, jeffreys_weight=beta, token_kl_weight=0.0).loss
        gradient_1K: Tensor = torch.autograd.grad(loss, logit_1K)[0]
        return gradient_1K[0]

    chosen = [choose_weighed(group, (k + 0.5) / 1000, n=4, backward_n=4, count=8) for k in range(1000)]
    mean_K = torch.stack([gradient(one) for one in chosen]).mean(dim=0)
    tilts = log_tilt_tie_aware(standing_among_others(reward_K[None]), 4)[0].tolist()
    weights = order.best_of_n_weights(reward_K.numpy(), 4).tolist()
    whole_K = gradient(WeighedGroup(group.tokens, weights, tilts, [1 / 16] * 16))
    shortfall = 1 - float(mean_K.norm() / whole_K.norm())
    assert shortfall == pytest.approx(0, abs=0.01) if beta == 0 else 1 / 32 < shortfall < 5 / 32
    assert torch.cosine_similarity(mean_K, whole_K, dim=0) > (0.999 if beta == 0 else 0.95)


def minimised(beta: float, kappa: float, reference_43: Tensor) -> Tensor:
    logit_43 = reference_43.clone().requires_grad_()
    for _ in range(3000):
        loss = loss_over_all(logit_43, reference_43, jeffreys_weight=beta, token_kl_weight=kappa)
        (gradient,) = torch.autograd.grad(loss, logit_43)
        with torch.no_grad():
            logit_43 -= gradient
    return logit_43.detach()


@pytest.mark.slow
def test_without_the_token_kl_it_ends_at_best_of_n():
    reference_43 = logits(3)
    logprob_9, _, best_9 = laws(minimised(0.6, 0.0, reference_43), reference_43)
    torch.testing.assert_close(logprob_9.exp(), best_9.exp(), atol=2e-4, rtol=0)


def test_completions_of_one_token_end_at_the_tilt_less_the_token_kl():
    """β = 1: π ∝ π_ref · exp(t/(1 + κ)), by descent on four outcomes."""
    kappa, reference_4 = 0.5, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    best_4 = torch.tensor(order.best_of_n_law(reference_4.exp().numpy(), [2.0, 1.0, 0.0, 3.0], 3)).log()
    logit_4 = reference_4.clone().requires_grad_()
    for _ in range(2000):
        logprob_4 = logit_4.log_softmax(-1)
        kl = logprob_4.exp() @ (logprob_4 - reference_4)
        terms = TokenTerms(logprob_4[:, None], reference_4[:, None], kl.expand(4, 1))
        loss = offline_bond_loss(
            terms,
            best_4.exp(),
            best_4 - reference_4,
            reference_4.exp(),
            jeffreys_weight=1.0,
            token_kl_weight=kappa,
            **FREE,
        ).loss
        (gradient,) = torch.autograd.grad(loss, logit_4)
        with torch.no_grad():
            logit_4 -= 0.5 * gradient
    expected = (reference_4 + (best_4 - reference_4) / (1 + kappa)).log_softmax(-1)
    torch.testing.assert_close(logit_4.detach().softmax(-1), expected.exp(), atol=1e-6, rtol=0)


def test_it_sees_mass_that_leaks_to_what_no_candidate_says():
    """The log holds two completions that begin with token 0. Log-probs alone do not tell where else mass goes; the
    token-wise KL rises when it goes where the reference has none."""
    reference_43 = torch.tensor([[2.0, 1.0, -6.0]] + [[0.0, 0.0, 0.0]] * 3, dtype=torch.float64)
    kept = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    to_likely = torch.stack([kept[[0, 1, 2]], *logits(0)[1:]])
    to_unheard_of = torch.stack([kept[[0, 2, 1]], *logits(0)[1:]])
    losses = {}
    for kappa in (0.0, 1.0):
        losses[kappa] = [
            offline_bond_loss(
                terms_of(logit_43, reference_43, [(0, 0), (0, 2)]),
                torch.tensor([0.5, 0.5]),
                torch.tensor([0.4, -0.2]),
                torch.tensor([0.5, 0.5]),
                jeffreys_weight=0.8,
                token_kl_weight=kappa,
                **FREE,
            ).loss.item()
            for logit_43 in (to_likely, to_unheard_of)
        ]
    assert losses[0.0][0] == pytest.approx(losses[0.0][1])
    assert losses[1.0][1] > losses[1.0][0] + 0.5


def test_weights_are_capped_and_hopeless_returns_count_by_their_logarithm():
    """By hand. log ρ = log 8 and 0, shares ½: capped at 2, weights 1 and ½, their law ⅔ and ⅓. t = 0 and −20, so the
    second return, −20, is −10 − log 11 and the first −log 8."""
    logprob_N = torch.tensor([-1.0, -2.0]).requires_grad_()
    reference_N = torch.tensor([-1.0 - log(8), -2.0])
    terms = TokenTerms(logprob_N[:, None], reference_N[:, None], torch.zeros(2, 1))
    loss, metrics = offline_bond_loss(
        terms,
        torch.tensor([1.0, 0.0]),
        torch.tensor([0.0, -20.0]),
        torch.tensor([0.5, 0.5]),
        jeffreys_weight=1.0,
        token_kl_weight=0.0,
        max_importance=2.0,
        return_floor=-10.0,
    )
    first, second = -log(8), -10 - log(11)
    assert compressed_below(torch.tensor(-20.0), -10.0).item() == pytest.approx(second)
    mean = 2 / 3 * first + 1 / 3 * second
    (gradient,) = torch.autograd.grad(loss, logprob_N)
    assert gradient.tolist() == pytest.approx([-1.0 * (first - mean), -0.5 * (second - mean)])
    assert metrics.covered.item() == pytest.approx(1.5)
    assert metrics.log_tilt.item() == pytest.approx(-20 / 3)


def test_a_policy_that_has_left_the_log_gives_numbers_still():
    logprob_N = torch.full((3, 2), -200.0).requires_grad_()
    terms = TokenTerms(logprob_N, torch.full((3, 2), -1.0), torch.ones(3, 2))
    loss = offline_bond_loss(
        terms, torch.ones(3) / 3, torch.zeros(3), torch.ones(3) / 3, jeffreys_weight=0.9, token_kl_weight=0.1
    ).loss
    (gradient,) = torch.autograd.grad(loss, logprob_N)
    assert np.isfinite(loss.item())
    assert gradient.isfinite().all()


@pytest.mark.parametrize("wrong", [{"jeffreys_weight": 1.1}, {"token_kl_weight": -0.1}, {"max_importance": 0.5}])
def test_weights_out_of_range_are_refused(wrong):
    given = {"jeffreys_weight": 0.5, "token_kl_weight": 0.1, **wrong}
    with pytest.raises(ValueError, match="need 0 ≤ β ≤ 1"):
        loss_over_all(logits(1), logits(2), **given)
