"""What a loss is given: one shape and numbers, or a refusal in words; never a loss of NaN, never a silent broadcast."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from bon_algos import order, quantiles
from bon_algos.anchor import EmaAnchor
from bon_algos.bonbon import bonbon_loss, consistent_pair_loss
from bon_algos.bond import bond_loss, j_bond_loss
from bon_algos.imitation import best_of_n_imitation
from bon_algos.learned_quantile import LogisticMixture, negative_log_likelihood, quantile_cross_entropy
from bon_algos.offline_bond import offline_bond_loss
from bon_algos.policy_gradient import ppo_clip_loss, reinforce_loss
from bon_algos.preference import dpo_loss, ipo_loss
from bon_algos.prefix_values import RankLaw
from bon_algos.prefix_values import negative_log_likelihood as rank_likelihood
from bon_algos.quantiles import standing_against, standing_among_others
from bon_algos.regression import log_quantile_regression
from bon_algos.token_bond import GuidedTerms, token_bond_loss
from bon_algos.token_kl import TokenTerms


class Case(NamedTuple):
    loss: Callable[..., Tensor | tuple[Tensor, object]]
    given: tuple[Tensor, ...]
    """What is well-formed, in the order of its arguments."""
    of_policy: int
    """So many of the first are what the policy in training says: their numbers are the training loop's to look at."""


def of(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.full(shape, 0.5) for shape in shapes)


def offline(logprob_NL, kl_NL, reference_NL, *data, **numbers):
    terms = TokenTerms(logprob_NL, reference_NL, kl_NL)
    return offline_bond_loss(terms, *data, **{"jeffreys_weight": 0.5, "token_kl_weight": 0.1, **numbers}).loss


def guided(forward_NL, backward_NL, error_NL, log_value_NL, guided_kl_NL, *shares):
    terms = GuidedTerms(forward_NL, backward_NL, log_value_NL, guided_kl_NL, error_NL)
    return token_bond_loss(terms, *shares, jeffreys_weight=0.5, value_weight=0.1).loss


def rank(mean_T, log_scale_T, *data):
    return rank_likelihood(RankLaw(mean_T, log_scale_T), *data)


def likelihood(reward_BN: Tensor) -> Tensor:
    one_B1 = torch.ones(3, 1)
    return negative_log_likelihood(LogisticMixture(0 * one_B1, one_B1, one_B1), reward_BN)


B, BN, N, NL = (3,), (3, 4), (4,), (4, 5)
LOSSES = {
    "imitation": Case(best_of_n_imitation, of(BN, BN), 1),
    "regression": Case(log_quantile_regression, of(BN, BN, BN), 1),
    "consistent": Case(consistent_pair_loss, of(BN, BN, BN), 1),
    "bonbon": Case(partial(bonbon_loss, n=4), of(B, B, B, B), 2),
    "dpo": Case(partial(dpo_loss, beta=0.1), of(B, B, B, B), 2),
    "ipo": Case(partial(ipo_loss, beta=0.1), of(B, B, B, B), 2),
    "bond": Case(partial(bond_loss, jeffreys_weight=0.5), of(B, B, B, B), 2),
    "j_bond": Case(j_bond_loss, of(B, B, B, B), 2),
    "offline_bond": Case(offline, of(NL, NL, NL, N, N, N), 2),
    "token_bond": Case(guided, of(NL, NL, NL, NL, NL, N, N), 3),
    "rank_law": Case(rank, of(N, N, N, N, N), 2),
    "reinforce": Case(reinforce_loss, of(BN, BN), 0),
    "ppo": Case(partial(ppo_clip_loss, clip_range=0.2), of(BN, BN, BN), 0),
    "cross_entropy": Case(quantile_cross_entropy, of(BN, BN), 1),
    "likelihood": Case(likelihood, of(BN), 0),
}
SHAPES = {"one": (1,), "none": (), "empty": (0,), "empty_row": (3, 0), "empty_rows": (0, 4)}
PLACES = [(name, place) for name, case in LOSSES.items() for place in range(len(case.given))]
DATA = [(name, place) for name, place in PLACES if place >= LOSSES[name].of_policy]


def changed(case: Case, place: int, to: Tensor) -> list[Tensor]:
    return [*case.given[:place], to, *case.given[place + 1 :]]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "place"), DATA)
def test_data_that_is_no_number_is_refused(name, place, wrong):
    case = LOSSES[name]
    bad = case.given[place].clone()
    bad.view(-1)[-1] = wrong
    case.loss(*case.given)
    with pytest.raises(ValueError, match=r"finite|in \[0, 1\]"):
        case.loss(*changed(case, place, bad))


@pytest.mark.parametrize(("name", "place"), sorted({*PLACES} - {*DATA} - {("offline_bond", 0)}))
def test_a_policy_that_says_no_number_has_a_loss_that_is_none(name, place):
    """For the training loop, which fails its job by name. (Offline BOND refuses it, as it weighs by the policy.)"""
    case = LOSSES[name]
    bad = case.given[place].clone()
    bad.view(-1)[-1] = math.nan
    outcome = case.loss(*changed(case, place, bad))
    loss = outcome if isinstance(outcome, Tensor) else outcome[0]
    assert loss.isnan().any()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("name", "place"), PLACES)
def test_another_shape_is_refused(name, place, shape):
    case = LOSSES[name]
    with pytest.raises(ValueError, match=r"one shape|a row of rewards"):
        case.loss(*changed(case, place, torch.full(shape, 0.5)))


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_at_all_is_refused(name):
    case = LOSSES[name]
    for rows in (0, len(case.given[0])):
        empty = [given[:rows] if rows == 0 else given[..., :0] for given in case.given]
        with pytest.raises(ValueError, match=r"one shape|a row of rewards|a mask"):
            case.loss(*empty)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_a_strength_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="γ"):
        bond_loss(*LOSSES["bond"].given, jeffreys_weight=0.5, kl_strength=wrong)
    with pytest.raises(ValueError, match="κ"):
        offline(*LOSSES["offline_bond"].given, token_kl_weight=wrong)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_floor_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="floor"):
        offline(*LOSSES["offline_bond"].given, return_floor=wrong)


@pytest.mark.parametrize("share", [[0.5, 0.6, -0.1, 0.0], [0.0, 0.0, 0.0, 0.0]])
def test_shares_that_are_no_law_are_refused(share):
    *given, _ = LOSSES["offline_bond"].given
    with pytest.raises(ValueError, match="negative"):
        offline(*given, torch.tensor(share))


# --- defined, where the literal formula is 0 · ∞ ----------------------------------------------------------


def test_what_the_policy_cannot_say_counts_for_nothing_at_weight_0():
    """½·1 + ½·2, whatever the third; at weight ½ it costs ∞. What is no number stays none."""
    logprob_BN = torch.tensor([[-1.0, -2.0, -math.inf]], requires_grad=True)
    loss = best_of_n_imitation(logprob_BN, torch.tensor([[0.5, 0.5, 0.0]]))
    assert loss.tolist() == [1.5]
    assert torch.autograd.grad(loss, logprob_BN)[0].tolist() == [[-0.5, -0.5, 0.0]]
    assert best_of_n_imitation(logprob_BN, torch.tensor([[0.5, 0.0, 0.5]])).tolist() == [math.inf]
    assert best_of_n_imitation(logprob_BN.nan_to_num(neginf=math.nan), torch.tensor([[0.5, 0.5, 0.0]])).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("advantage", [-2.0, 2.0])
def test_a_ratio_that_no_dtype_holds_is_cut(dtype, advantage):
    """A good sample is clipped at 1.2. A bad one is pushed down with all the force of e²⁰."""
    logprob_BN = torch.tensor([[1000.0]], dtype=dtype, requires_grad=True)
    given = logprob_BN, torch.zeros(1, 1, dtype=dtype), torch.full((1, 1), advantage, dtype=dtype)
    loss, metrics = ppo_clip_loss(*given, clip_range=0.2)
    (slope_BN,) = torch.autograd.grad(loss, logprob_BN)
    cut = math.exp(20)
    expected = (2 * cut, 2 * cut, 0.0) if advantage < 0 else (-2 * 1.2, 0.0, 1.0)
    rel = 1e-6 if dtype != torch.bfloat16 else 0.01
    assert (loss.item(), slope_BN.item(), metrics.clip_fraction.item()) == pytest.approx(expected, rel=rel)
    assert metrics.mean_ratio.item() == pytest.approx(cut, rel=rel)


# --- order and quantiles ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "reference"), [((1, 3), (2, 3)), ((2, 3), (1, 3)), ((2,), (2, 3)), ((2, 0), (2, 3)), ((2, 3), (2, 0))]
)
def test_a_win_rate_compares_each_prompt_with_its_own(own, reference):
    with pytest.raises(ValueError, match=r"\(B, N\) and \(B, M\)|nothing to compare"):
        order.win_rate(np.zeros(own), np.zeros(reference))


@pytest.mark.parametrize("reward", [0.0, [[0.0, 1.0], [2.0, 3.0]]])
def test_weights_are_of_one_prompts_draws(reward):
    for weights in (partial(order.best_of_n_weights, n=2), partial(order.soft_best_of_n_weights, softness=1.0)):
        with pytest.raises(ValueError, match=r"\(M,\)"):
            weights(reward)


def test_no_draw_has_no_weight():
    for weights in (partial(order.best_of_n_weights, n=1), partial(order.soft_best_of_n_weights, softness=1.0)):
        with pytest.raises(ValueError, match="draw"):
            weights([])


@pytest.mark.parametrize("shapes", [((1, 2), (1, 0)), ((1, 0), (1, 2)), ((0, 2), (0, 2))])
def test_nothing_is_known_of_a_quantile_among_no_rewards(shapes):
    with pytest.raises(ValueError, match="no rewards"):
        standing_against(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("n", [0, -1])
@pytest.mark.parametrize("tilt", [quantiles.log_tilt_harmonic, quantiles.log_tilt_levels, quantiles.log_tilt_tie_aware])
def test_best_of_less_than_one_is_refused(tilt, n):
    with pytest.raises(ValueError, match="n ≥ 1"):
        tilt(standing_among_others(torch.tensor([[0.0, 1.0, 1.0]])), n)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_an_anchor_takes_nothing_that_it_would_never_lose(wrong):
    bad = {"v": torch.zeros(3), "w": torch.tensor([0.0, wrong])}
    with pytest.raises(ValueError, match="finite"):
        EmaAnchor(bad)
    anchor = EmaAnchor({"v": torch.ones(3), "w": torch.ones(2)})
    with pytest.raises(ValueError, match="finite"):
        anchor.update(bad, 0.5)
    assert all((tensor == 1).all() for tensor in anchor.tensors.values())
