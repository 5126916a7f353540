"""BOND and J-BOND: gradients against the divergence they are meant to descend, by enumeration."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from bon_algos import bond, order, quantiles
from tests.bon_algos.tabular import (
    best_of_two_law,
    central_differences,
    divergence,
    expected_quantile_reward,
    expected_surrogate,
    gradient,
)
from tests.bon_algos.vectors import REFERENCE_K, REWARDS, TIED_K, per_outcome, the_law_as_draws

K = torch.arange(20)
REFERENCE = torch.tensor(REFERENCE_K)
POLICY_LOGIT = 0.3 * torch.cos(1.7 * K.double())


def target(vector: str, n: int) -> tuple[Tensor, Tensor]:
    """Best-of-n's law and its log-ratio to the reference, both exact. (20,), (20,)."""
    standing = quantiles.standing_among_others(the_law_as_draws(REWARDS[vector]))
    tilt_K = torch.tensor(per_outcome(quantiles.log_tilt_levels(standing, n)))
    return torch.tensor(order.best_of_n_law(REFERENCE_K, REWARDS[vector], n)), tilt_K


def at_most(vector: str) -> Tensor:
    """p_≤ of every outcome. (20,)."""
    draws = the_law_as_draws(REWARDS[vector])
    log_quantile = quantiles.log_quantile_monte_carlo(quantiles.standing_against(draws, draws))
    return torch.tensor(per_outcome(log_quantile)).exp()


# --- gradients -------------------------------------------------------------------------------------------

GRADIENTS = [  # vector, n, KL(q ‖ BoN), KL(BoN ‖ q), three components of the gradient of the first
    ("U", 2, 0.55862275, 0.40198237, [0.180645, -0.006562, -0.049114]),
    ("U", 4, 1.75511820, 0.81805653, [0.242948, -0.009304, -0.076053]),
    ("T", 2, 0.55643692, 0.40422173, [0.170696, -0.015888, -0.043996]),
    ("T", 4, 1.61362830, 0.84400537, [0.214124, -0.033189, -0.057451]),
]


@pytest.mark.parametrize(("vector", "n", "backward", "forward", "components"), GRADIENTS)
def test_the_backward_gradient_is_that_of_the_divergence(vector, n, backward, forward, components):
    law_K, tilt_K = target(vector, n)
    logit_K = POLICY_LOGIT.clone().requires_grad_()
    surrogate = expected_surrogate(logit_K, REFERENCE, law_K, tilt_K, jeffreys_weight=1.0)
    expected_K = central_differences(lambda x: divergence(x.softmax(-1), law_K), POLICY_LOGIT)
    actual_K = gradient(surrogate, logit_K)
    torch.testing.assert_close(actual_K, expected_K, atol=1e-9, rtol=0)
    assert actual_K[:3].tolist() == pytest.approx(components, abs=6e-7)
    assert divergence(POLICY_LOGIT.softmax(-1), law_K).item() == pytest.approx(backward, abs=6e-9)
    assert divergence(law_K, POLICY_LOGIT.softmax(-1)).item() == pytest.approx(forward, abs=6e-9)


@pytest.mark.parametrize(("n", "highest"), [(2, 0.686227), (4, 0.455194)])
def test_the_range_of_what_is_dropped_from_the_reward(n, highest):
    """β_BOND·log (B), which practice leaves out: 0 for the worst outcome, at most log n/(n − 1)."""
    log_b_K = target("U", n)[1].numpy() - (n - 1) * at_most("U").log().numpy()
    assert log_b_K.min() / (n - 1) == pytest.approx(0, abs=1e-12)
    assert log_b_K.max() / (n - 1) == pytest.approx(highest, abs=6e-7)


OTHER_REWARDS = [  # n, which, furthest component and cosine of its gradient to the true one
    (2, "without (B)", 0.024, 0.995),
    (4, "without (B)", 0.046, 0.996),
    (2, "mid-rank", 0.0, 1.0),
    (4, "mid-rank", 0.026, None),
    (2, "no logarithm", 0.075, 0.91),
    (4, "no logarithm", 0.198, 0.86),
]


@pytest.mark.parametrize(("n", "which", "furthest", "cosine"), OTHER_REWARDS)
def test_how_far_the_gradients_of_other_rewards_are(n, which, furthest, cosine):
    """Register J1: what tells log p_≤ with (B) from what else the reward might be, p_≤ as §4.2 prints it above all."""
    law_K, tilt_K = target("U", n)
    at_most_K = at_most("U")
    other_K = {
        "without (B)": at_most_K.log(),
        "mid-rank": (at_most_K - REFERENCE / 2).log(),
        "no logarithm": at_most_K,
    }[which]
    logit_K = POLICY_LOGIT.clone().requires_grad_()
    true_K, wrong_K = (
        gradient(expected_surrogate(logit_K, REFERENCE, law_K, reward_K, jeffreys_weight=1.0), logit_K)
        for reward_K in (tilt_K, (n - 1) * other_K)
    )
    assert (wrong_K - true_K).abs().max().item() == pytest.approx(furthest, abs=6e-4)
    if cosine is not None:
        actual = torch.cosine_similarity(wrong_K, true_K, dim=0).item()
        assert actual == pytest.approx(cosine, abs=6e-4 if cosine > 0.95 else 6e-3)


@pytest.mark.parametrize("vector", REWARDS)
def test_the_forward_gradient_is_policy_less_target(vector):
    law_K, tilt_K = target(vector, 4)
    logit_K = POLICY_LOGIT.clone().requires_grad_()
    surrogate = expected_surrogate(logit_K, REFERENCE, law_K, tilt_K, jeffreys_weight=0.0)
    torch.testing.assert_close(gradient(surrogate, logit_K), POLICY_LOGIT.softmax(-1) - law_K)


@pytest.mark.parametrize("jeffreys_weight", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("kl_strength", [0.0, 1.5])
def test_the_whole_gradient_is_that_of_the_regularised_jeffreys_divergence(jeffreys_weight, kl_strength):
    """(1 − β)·KL(BoN ‖ π) + β·KL(π ‖ BoN) + γ·KL(π ‖ anchor), by central differences: γ pulls back."""
    law_K, tilt_K = target("T", 4)

    def objective(x: Tensor) -> Tensor:
        policy_K = x.softmax(-1)
        total: Tensor = (
            (1 - jeffreys_weight) * divergence(law_K, policy_K)
            + jeffreys_weight * divergence(policy_K, law_K)
            + kl_strength * divergence(policy_K, REFERENCE)
        )
        return total

    logit_K = POLICY_LOGIT.clone().requires_grad_()
    surrogate = expected_surrogate(
        logit_K, REFERENCE, law_K, tilt_K, jeffreys_weight=jeffreys_weight, kl_strength=kl_strength
    )
    expected_K = central_differences(objective, POLICY_LOGIT)
    torch.testing.assert_close(gradient(surrogate, logit_K), expected_K, atol=1e-9, rtol=0)


@pytest.mark.parametrize("n", [2, 4])
def test_best_of_n_is_where_the_gradient_vanishes(n):
    law_K, tilt_K = target("T", n)
    logit_K = law_K.log().requires_grad_()
    for jeffreys_weight in (0.0, 0.5, 1.0):
        surrogate = expected_surrogate(logit_K, REFERENCE, law_K, tilt_K, jeffreys_weight=jeffreys_weight)
        torch.testing.assert_close(gradient(surrogate, logit_K), torch.zeros(20).double(), atol=1e-12, rtol=0)


def test_the_baseline_of_the_other_prompts_adds_no_bias():
    """Two prompts over three outcomes: all 27² batches of (sample, two anchor samples), with probability."""
    reward_2K = torch.tensor([[0.0, 1.0, 1.0], [2.0, 0.0, 1.0]], dtype=torch.float64)
    anchor_law_2K = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], dtype=torch.float64)
    logit_2K = torch.tensor([[0.2, -0.4, 0.1], [0.0, 0.5, -0.3]], dtype=torch.float64, requires_grad=True)
    logprob_2K = logit_2K.log_softmax(-1)
    prompts = torch.tensor([0, 1])
    total = torch.zeros((), dtype=torch.float64)
    for batch in product(product(range(3), repeat=3), repeat=2):
        sample, *anchors = torch.tensor(batch).T
        anchor_B2 = torch.stack(anchors, dim=-1)
        anchor_reward_B2 = reward_2K.gather(1, anchor_B2)
        winner = anchor_B2.gather(1, bond.best_of_two(anchor_reward_B2)[:, None])[:, 0]
        probability = (logprob_2K.exp()[prompts, sample].prod() * anchor_law_2K.gather(1, anchor_B2).prod()).detach()
        total = total + probability * (
            bond.j_bond_loss(
                logprob_2K[prompts, winner],
                logprob_2K[prompts, sample],
                anchor_law_2K.log()[prompts, sample],
                bond.quantile_reward_tie_aware(reward_2K[prompts, sample], anchor_reward_B2),
                jeffreys_weight=0.4,
                kl_strength=0.7,
            ).loss
        )
    actual_2K = torch.autograd.grad(total, logit_2K)[0]
    for prompt in (0, 1):
        logit_K = logit_2K[prompt].detach().requires_grad_()
        reward_K, anchor_law_K = reward_2K[prompt], anchor_law_2K[prompt]
        alone = expected_surrogate(
            logit_K,
            anchor_law_K,
            best_of_two_law(reward_K, anchor_law_K),
            expected_quantile_reward(bond.quantile_reward_tie_aware, reward_K, anchor_law_K),
            jeffreys_weight=0.4,
            kl_strength=0.7,
        )
        torch.testing.assert_close(actual_2K[prompt], gradient(alone, logit_K) / 2, atol=1e-12, rtol=0)


def test_j_bond_by_hand():
    """β = ½, γ = 2. log π(winner) −1, −3; log π(y) −2, −4; log π_a(y) −2.5, −3; r_J −log 16, 0.

    d = .5, −1;   ½·r − (½ + 2)·d = −½·log 16 − 1.25, 2.5;   the other's return is the baseline, so
    A₁ = −½·log 16 − 3.75 = −A₂.   loss = mean of ½·1 + 2·A₁ and ½·3 + 4·A₂ = 1 − A₁.
    """
    logprob_B = torch.tensor([-2.0, -4.0], dtype=torch.float64, requires_grad=True)
    loss, metrics = bond.j_bond_loss(
        torch.tensor([-1.0, -3.0]).double(),
        logprob_B,
        torch.tensor([-2.5, -3.0]).double(),
        torch.tensor([bond.PENALTY, 0.0]).double(),
        kl_strength=2.0,
    )
    advantage = -math.log(16) / 2 - 3.75
    assert loss.item() == pytest.approx(1 - advantage)
    assert torch.autograd.grad(loss, logprob_B)[0].tolist() == pytest.approx([-advantage / 2, advantage / 2])
    assert metrics.imitation.item() == pytest.approx(2)
    assert metrics.log_tilt.item() == pytest.approx(-math.log(16) / 2)
    assert metrics.kl_policy_anchor.item() == pytest.approx(-0.25)
    assert metrics.advantage_scale.item() == pytest.approx(-advantage)


# --- J-BOND's reward -------------------------------------------------------------------------------------


def test_the_reward_case_by_case():
    """A sample of reward 1 against anchors (2, 3), (1, 2), (2, 1), (1, 1), (0, 1), (0, 2), (0, 0)."""
    anchor_reward_B2 = torch.tensor([[2, 3], [1, 2], [2, 1], [1, 1], [0, 1], [0, 2], [0, 0]])
    reward_B = torch.ones(7, dtype=torch.long)
    strict = bond.quantile_reward_strict(reward_B.double(), anchor_reward_B2.double()) / -math.log(16)
    tie_aware = bond.quantile_reward_tie_aware(reward_B.double(), anchor_reward_B2.double()) / -math.log(16)
    assert strict.tolist() == pytest.approx([1, 0, 0, 0, 0, 0, 0])
    assert tie_aware.tolist() == pytest.approx([1, 1 / 2, 1 / 2, 1 / 3, 0, 0, 0])


@pytest.mark.parametrize(
    ("vector", "strict", "mean_strict"),
    [("U", 0.302249, -0.838012), ("T", 0.242528, -0.672429), ("B", 0.069315, -0.192182)],
)
def test_how_often_the_penalty_falls_when_policy_is_anchor(vector, strict, mean_strict):
    reward_K = torch.tensor(REWARDS[vector])
    strict_K = expected_quantile_reward(bond.quantile_reward_strict, reward_K, REFERENCE)
    tie_aware_K = expected_quantile_reward(bond.quantile_reward_tie_aware, reward_K, REFERENCE)
    assert (REFERENCE @ strict_K).item() == pytest.approx(mean_strict, abs=6e-7)
    assert (REFERENCE @ strict_K).item() / bond.PENALTY == pytest.approx(strict, abs=6e-7)
    assert (REFERENCE @ tie_aware_K).item() / bond.PENALTY == pytest.approx(1 / 3, abs=1e-12)


@pytest.mark.parametrize("vector", REWARDS)
def test_the_strict_penalty_falls_with_probability_one_less_quantile_squared(vector):
    reward_K = torch.tensor(REWARDS[vector])
    penalty_K = expected_quantile_reward(bond.quantile_reward_strict, reward_K, REFERENCE) / bond.PENALTY
    at_most_K = (reward_K[:, None] >= reward_K).double() @ REFERENCE
    torch.testing.assert_close(penalty_K, (1 - at_most_K) ** 2, atol=1e-14, rtol=0)


@pytest.mark.parametrize(
    ("vector", "whoever_ties", "mean_log_quantile"),
    [("U", 0.366005, -0.850909), ("T", 0.438924, -0.656718), ("B", 0.713429, -0.261665)],
)
def test_how_often_a_sample_is_last_alone_or_with_others(vector, whoever_ties, mean_log_quantile):
    """Whom the tie-aware rule charges at all is whom eq. 17 with ≤ in place of < would: (1 − p_<)² of samples."""
    reward_K = torch.tensor(REWARDS[vector])
    is_charged_K = expected_quantile_reward(
        lambda reward_B, anchor_B2: (bond.quantile_reward_tie_aware(reward_B, anchor_B2) < 0).double(),
        reward_K,
        REFERENCE,
    )
    assert (REFERENCE @ is_charged_K).item() == pytest.approx(whoever_ties, abs=6e-7)
    below_K = (reward_K[:, None] > reward_K).double() @ REFERENCE
    torch.testing.assert_close(is_charged_K, (1 - below_K) ** 2, atol=1e-14, rtol=0)
    assert (REFERENCE @ at_most(vector).log()).item() == pytest.approx(mean_log_quantile, abs=6e-7)


@pytest.mark.parametrize(
    ("vector", "by_level"),
    [("T", [0.82996, 0.52036, 0.26361, 0.10966, 0.02204]), ("B", [0.47361, 0.03393])],
)
def test_tie_aware_penalty_level_by_level(vector, by_level):
    reward_K = torch.tensor(REWARDS[vector])
    penalty_K = expected_quantile_reward(bond.quantile_reward_tie_aware, reward_K, REFERENCE) / bond.PENALTY
    for level, expected in enumerate(by_level):
        assert penalty_K[reward_K == level].tolist() == pytest.approx(
            [expected] * int((reward_K == level).sum()), abs=6e-6
        )


@pytest.mark.parametrize(
    ("p", "strict", "tie_aware"),
    [
        (0.1, -0.028, -1.017),
        (0.3, -0.250, -1.202),
        (0.5, -0.693, -1.386),
        (2 / 3, -1.232, -1.540),
        (0.9, -2.246, -1.756),
    ],
)
def test_a_rare_right_answer_is_only_rewarded_by_the_tie_aware_rule(p, strict, tie_aware):
    """Reward of a wrong answer less that of a right one, when the anchor is right with probability p."""
    reward_K, law_K = torch.tensor([0.0, 1.0]).double(), torch.tensor([1 - p, p]).double()
    for rule, gap in [(bond.quantile_reward_strict, strict), (bond.quantile_reward_tie_aware, tie_aware)]:
        wrong, right = expected_quantile_reward(rule, reward_K, law_K).tolist()
        assert wrong - right == pytest.approx(gap, abs=6e-4)


@pytest.mark.parametrize(("p", "gap"), [(0.1, -0.747), (0.3, -0.887), (0.5, -1.099), (2 / 3, -1.386), (0.9, -2.398)])
def test_what_best_of_two_itself_says_of_a_wrong_answer(p, gap):
    """log (1 − p)/(2 − p): what either rule is a surrogate of."""
    law_K = np.array([1 - p, p])
    wrong, right = np.log(order.best_of_n_law(law_K, [0, 1], 2) / law_K)
    assert wrong - right == pytest.approx(gap, abs=6e-4)
    assert wrong - right == pytest.approx(math.log((1 - p) / (2 - p)), rel=1e-12)


def test_the_winner_is_the_first_highest():
    assert bond.best_of_two(torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]])).tolist() == [1, 0, 0]
    law_K = best_of_two_law(torch.tensor(TIED_K), REFERENCE)
    np.testing.assert_allclose(law_K, order.best_of_n_law(REFERENCE_K, TIED_K, 2), rtol=1e-12)


# --- refusals --------------------------------------------------------------------------------------------


def test_one_prompt_has_no_baseline():
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="two prompts"):
        bond.j_bond_loss(one, one, one, one)


@pytest.mark.parametrize(("jeffreys_weight", "kl_strength"), [(-0.1, 0), (1.1, 0), (0.5, -1)])
def test_weights_out_of_range_are_refused(jeffreys_weight, kl_strength):
    two = torch.zeros(2)
    with pytest.raises(ValueError, match="β"):
        bond.j_bond_loss(two, two, two, two, jeffreys_weight=jeffreys_weight, kl_strength=kl_strength)


@pytest.mark.parametrize("rule", [bond.quantile_reward_strict, bond.quantile_reward_tie_aware])
def test_rewards_of_the_wrong_shape_or_no_number_are_refused(rule):
    with pytest.raises(ValueError, match=r"\(B, 2\)"):
        rule(torch.zeros(2), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="finite"):
        rule(torch.tensor([float("nan")]), torch.zeros(1, 2))


def test_a_loss_of_mixed_shapes_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        bond.bond_loss(torch.zeros(3, 1), torch.zeros(3), torch.zeros(3), torch.zeros(3), jeffreys_weight=0.5)
