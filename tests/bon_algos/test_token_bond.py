"""BOND token by token: its terms against all logits, its loss against the divergence it is, and where it ends, on a
language model that can be enumerated."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from bon_algos import order
from bon_algos.algorithms import make_step
from bon_algos.contracts import TokenBondSpec
from bon_algos.logged_steps import choose_guided, choose_scored
from bon_algos.logprobs import TokenGroup
from bon_algos.prefix_values import PrefixCritic, guided_logprobs, log_mean_tilt
from bon_algos.steps import LoggedGroup, TokenBondStep
from bon_algos.token_bond import (
    LEAST_LOG_VALUE,
    LEAST_PROBED_VALUE,
    GuidedTerms,
    guided_terms,
    said_laws,
    token_bond_loss,
)
from tests.bon_algos.test_logprobs import GROUPS, MODELS, llama
from tests.bon_algos.test_methods_on_a_model import (
    COMPLETIONS,
    PROMPTS,
    draws_of,
    law_of,
    minimise,
    tiny_model,
)
from tests.bon_algos.test_offline_bond import PAIRS, laws, logits
from tests.bon_algos.test_prefix_values import exact_values
from tests.bon_algos.test_token_kl import shifted

N = 5


def critic_of(model) -> PrefixCritic:
    torch.manual_seed(1)
    return PrefixCritic(model.config.get_text_config().hidden_size)


def by_all_logits(model, critic: PrefixCritic):
    """For each completion (5, L): forward and backward KL, log V, KL of best-of-n to the reference and the probe's
    error, one row at a time, values of the whole vocabulary."""
    head = model.get_output_embeddings().weight.detach()
    for prompt_ids, completions in GROUPS:
        for completion in completions:
            token_1L, here = torch.tensor([[*prompt_ids, *completion]]), slice(len(prompt_ids) - 1, -1)
            with torch.no_grad(), shifted(model):
                rows = model.get_output_embeddings().weight.detach().clone()
                hidden_LD = model.get_decoder()(input_ids=token_1L).last_hidden_state[0, here]
                reference_LV = (hidden_LD @ rows.T).log_softmax(-1)
                said_LD = torch.stack([torch.zeros_like(rows[0]), *(rows[token] for token in completion[:-1])])
                state_LS = critic.states(hidden_LD[None], said_LD[None])[0]
                law = critic.law(state_LS, critic.codes(rows).expand(len(completion), -1, -1))
                every_LV = torch.arange(len(head)).expand(len(completion), -1)
                guided_LV, value_L = guided_logprobs(
                    reference_LV, log_mean_tilt(law, N).clamp(min=LEAST_LOG_VALUE), every_LV
                )
            logprob_LV = model(input_ids=token_1L).logits[0, here].log_softmax(-1)
            own_LD = model.get_decoder()(input_ids=token_1L).last_hidden_state[0, here]
            scaled_LD = (own_LD - own_LD.mean(-1, keepdim=True)) / (
                own_LD.var(-1, unbiased=False, keepdim=True) + 1e-5
            ).sqrt()
            told_L = scaled_LD @ critic.probe.weight[0] + critic.probe.bias
            off_L = (told_L - value_L.clamp(min=-6)).abs()
            error_L = torch.where(off_L < 1, off_L.square() / 2, off_L - 0.5)
            forward_L = (guided_LV.exp() * (guided_LV - logprob_LV)).sum(-1)
            backward_L = (logprob_LV.exp() * (logprob_LV - guided_LV)).sum(-1)
            guided_L = (guided_LV.exp() * (guided_LV - reference_LV)).sum(-1)
            yield torch.stack([forward_L, backward_L, value_L, guided_L, error_L])


@MODELS
def test_terms_and_gradients_are_those_of_all_logits(build):
    model = build()
    critic = critic_of(model)
    with torch.no_grad():
        critic.get_parameter("read.2.bias")[0] -= 4.2  # some prefixes are worth less than a probe is asked to tell
    actual = guided_terms(model, GROUPS, lambda: shifted(model), critic, N)
    hopeless = torch.cat([(one.log_value_NL < LEAST_PROBED_VALUE).flatten() for one in actual])
    assert hopeless.any()
    assert not hopeless.all()
    moving = [*model.parameters(), *critic.probe.parameters()]
    sums = [[one.forward_kl_NL.sum(), one.backward_kl_NL.sum(), one.value_error_NL.sum()] for one in actual]
    gradients = torch.autograd.grad(torch.stack([a - 0.7 * b + 0.3 * c for a, b, c in sums]).sum(), moving)
    expected = list(by_all_logits(model, critic))
    found = [torch.stack([table[place] for table in terms]) for terms in actual for place in range(len(terms[0]))]
    for here_5L, row_5L in zip(found, expected, strict=True):
        length = row_5L.shape[1]
        torch.testing.assert_close(here_5L[:, :length], row_5L, atol=1e-5, rtol=1e-4)
        assert not here_5L[:, length:].any()  # behind its end
    rows = [(row_5L[0] - 0.7 * row_5L[1] + 0.3 * row_5L[4]).sum() for row_5L in expected]
    wanted = torch.autograd.grad(torch.stack(rows).sum(), moving)
    for own, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(own, other, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 5, 1000])
@torch.no_grad()
def test_chunks_change_nothing(chunk_size):
    model = llama()
    ask = partial(guided_terms, model, GROUPS, lambda: shifted(model), critic_of(model), N)
    for terms, expected in zip(ask(chunk_size=chunk_size), ask(), strict=True):
        torch.testing.assert_close(torch.stack(list(terms)), torch.stack(list(expected)), atol=1e-5, rtol=0)


def test_the_law_after_a_token_that_is_said_is_that_of_the_token_among_all():
    """What the critic learns from is what the policy is later told: the same place, the same token."""
    model = llama()
    critic, head = critic_of(model), model.get_output_embeddings().weight
    group = GROUPS[1]
    (law,) = said_laws(model, [group], lambda: shifted(model), critic)
    places = [(c, k) for c, completion in enumerate(group.completion_ids) for k in range(len(completion))]
    assert law.mean.shape == (len(places),)
    for place, (c, k) in enumerate(places):
        prefix = TokenGroup(group.prompt_ids, [[*group.completion_ids[c][: k + 1]]])
        (alone,) = said_laws(model, [prefix], lambda: shifted(model), critic)
        torch.testing.assert_close(alone.mean[-1], law.mean[place], atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(law.mean.sum(), head, allow_unused=True, materialize_grads=True)
    assert not gradient.any()  # the model stands still
    learning = [parameter for name, parameter in critic.named_parameters() if "probe" not in name]
    assert all(g.any() for g in torch.autograd.grad(law.mean.sum() + law.log_scale.sum(), learning))


# --- the loss --------------------------------------------------------------------------------------------


def exact_terms(logit_43: Tensor, reference_43: Tensor) -> GuidedTerms:
    """Of the nine completions of two tokens out of three, by exact values; best-of-3."""
    policy_43, reference_43 = logit_43.log_softmax(-1), reference_43.log_softmax(-1)
    after_first_3, after_second_33 = exact_values(reference_43, 3)
    value_43 = torch.cat([after_first_3[None], after_second_33])
    guided_43, value_4 = guided_logprobs(reference_43, value_43, torch.arange(3).expand(4, 3))
    of_prefix = (
        (guided_43.exp() * (guided_43 - policy_43)).sum(-1),
        (policy_43.exp() * (policy_43 - guided_43)).sum(-1),
        value_4,
        (guided_43.exp() * (guided_43 - reference_43)).sum(-1),
        torch.zeros_like(value_4),  # a table has no states to probe
    )
    return GuidedTerms(*(torch.stack([torch.stack([one[0], one[1 + a]]) for a, _ in PAIRS]) for one in of_prefix))


def test_over_best_of_n_the_forward_part_is_the_divergence_of_completions():
    """KL(BoN ‖ π) and its gradient, by autograd through all nine; and KL(BoN ‖ π_ref) beside it."""
    logit_43, reference_43 = logits(1).requires_grad_(), logits(2)
    logprob_9, reference_9, best_9 = laws(logit_43, reference_43)
    outcome = token_bond_loss(exact_terms(logit_43, reference_43), best_9.exp(), 0 * best_9, jeffreys_weight=0.0)
    expected = best_9.exp() @ (best_9 - logprob_9)
    torch.testing.assert_close(outcome.loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(one, logit_43)[0] for one in (outcome.loss, expected)))
    torch.testing.assert_close(outcome.metrics.guided_kl, best_9.exp() @ (best_9 - reference_9))


def test_a_prefix_of_the_references_counts_as_far_as_best_of_n_comes_by_it():
    """Values of ½ and of 2: half, and no more than once; one of best-of-n's own draws counts whole."""
    value_12 = torch.tensor([[0.5, 2.0]]).log()
    none_12 = torch.zeros(1, 2)
    terms = GuidedTerms(torch.tensor([[3.0, 5.0]]), none_12, value_12, none_12, none_12)
    for best, even, expected in ((0.0, 1.0, 3.0 / 2 + 5.0), (1.0, 0.0, 8.0), (0.25, 0.75, 2.0 + 0.75 * 6.5)):
        loss = token_bond_loss(terms, torch.tensor([best]), torch.tensor([even]), jeffreys_weight=0.0).loss
        assert float(loss) == pytest.approx(expected)


def test_the_probes_error_counts_by_shares_alone():
    """However little a prefix is worth: that is what is to be told."""
    none_22 = torch.zeros(2, 2)
    terms = GuidedTerms(none_22, none_22, none_22 - 3, none_22, torch.tensor([[1.0, 3.0], [5.0, 0.0]]))
    outcome = token_bond_loss(
        terms, torch.tensor([0.5, 0.0]), torch.tensor([0.25, 0.25]), jeffreys_weight=0.5, value_weight=0.1
    )
    assert float(outcome.metrics.value_error) == pytest.approx(0.75 * 4 + 0.25 * 5)
    assert float(outcome.loss) == pytest.approx(0.425)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_it_ends_at_best_of_n_whatever_the_prefixes_weigh(beta):
    """All prefixes by the reference's law, those of little value counting less."""
    reference_43 = logits(3)
    _, reference_9, best_9 = laws(reference_43, reference_43)
    logit_43 = reference_43.clone().requires_grad_()
    for _ in range(4000):
        terms = exact_terms(logit_43, reference_43)
        loss = token_bond_loss(terms, 0 * best_9, reference_9.exp(), jeffreys_weight=beta).loss
        (gradient,) = torch.autograd.grad(loss, logit_43)
        with torch.no_grad():
            logit_43 -= gradient
    logprob_9, _, _ = laws(logit_43.detach(), reference_43)
    torch.testing.assert_close(logprob_9.exp(), best_9.exp(), atol=2e-4, rtol=0)


@pytest.mark.parametrize("share", [[0.5, -0.1], [0.5, float("nan")]])
def test_shares_that_are_none_are_refused(share):
    terms = GuidedTerms(*torch.ones(5, 2, 3))
    for given in ((torch.tensor(share), torch.zeros(2)), (torch.zeros(2), torch.tensor(share))):
        with pytest.raises(ValueError, match="shares"):
            token_bond_loss(terms, *given, jeffreys_weight=0.5)


def test_a_weight_out_of_range_is_refused():
    terms, shares = GuidedTerms(*torch.ones(5, 2, 3)), torch.ones(2, 2)
    with pytest.raises(ValueError, match="β"):
        token_bond_loss(terms, *shares, jeffreys_weight=1.1)
    for weight in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="λ"):
            token_bond_loss(terms, *shares, jeffreys_weight=0.5, value_weight=weight)


# --- which candidates ------------------------------------------------------------------------------------


def group_of(rewards) -> LoggedGroup:
    return LoggedGroup(TokenGroup([0], [[k] for k in range(len(rewards))]), rewards, [-1.0] * len(rewards))


def test_candidates_are_chosen_and_scored_by_order_alone():
    rewards = [0.5, -1.0, 2.0, 0.25, 0.5, 1.5]
    for other in ([np.exp(r) for r in rewards], [r**3 for r in rewards]):
        for u in (0.1, 0.9):
            assert choose_scored(group_of(rewards), u, count=3) == choose_scored(group_of(other), u, count=3)
            assert choose_guided(group_of(rewards), u, n=4, count=4) == choose_guided(group_of(other), u, n=4, count=4)


def test_draws_are_those_of_best_of_n_and_even_ones_in_the_mean():
    rewards = [0.5, -1.0, 2.0, 0.25, 0.5, 1.5]
    best_K, even_K = np.zeros(6), np.zeros(6)
    for number in range(1000):
        chosen = choose_guided(group_of(rewards), (number + 0.5) / 1000, n=4, count=4)
        places = [completion[0] for completion in chosen.tokens.completion_ids]
        best_K[places] += chosen.best_shares
        even_K[places] += chosen.even_shares
    np.testing.assert_allclose(best_K / 500, order.best_of_n_weights(rewards, 4), atol=1e-3)
    np.testing.assert_allclose(even_K / 500, 1 / 6, atol=1e-3)


def test_a_group_of_fewer_than_n_gives_the_best_of_all():
    chosen = choose_guided(group_of([0.0, 1.0]), 0.3, n=20, count=8)
    assert sum(chosen.best_shares) == pytest.approx(0.5)
    assert choose_guided(group_of([0.0, 1.0]), 0.3, n=2, count=8) == chosen


# --- where it ends ---------------------------------------------------------------------------------------

REWARD_25 = np.random.default_rng(0).permutation(25).astype(float)
"""None tie; a completion's first token says little of it."""
PASSES_25 = (REWARD_25 >= 18).astype(float)


@pytest.mark.slow
@pytest.mark.parametrize("reward_25", [REWARD_25, PASSES_25], ids=["of_ranks", "of_those_that_pass"])
def test_a_language_model_becomes_its_own_best_of_four_by_what_a_critic_tells_it(reward_25):
    """Logged groups of 16 only. Win rate and KL end where best-of-4's are, prompt by prompt, but for what a normal law
    leaves of a law of five: a tenth of the KL, and .015 of the win rate."""
    model = tiny_model()
    step = make_step(TokenBondSpec(n=4, candidates_per_prompt=16))
    assert isinstance(step, TokenBondStep)
    reference_P25, as_reference = law_of(model).detach(), partial(worn, model, [p.clone() for p in model.parameters()])
    critic, generator = critic_of(model), torch.Generator().manual_seed(1)

    def chosen(choose):
        drawn = draws_of(reference_P25, 16, generator)
        return [
            choose(logged_with(reward_25, row % 2, some), torch.rand((), generator=generator).item())
            for row, some in enumerate(drawn)
        ]

    def critic_loss() -> Tensor:
        return step.critic_loss(chosen(step.judge), lambda asked: said_laws(model, asked, as_reference, critic)).loss

    def loss() -> Tensor:
        terms = partial(guided_terms, model, as_reference=as_reference, critic=critic, n=step.n)
        return step.loss(chosen(step.choose), terms).loss

    minimise(critic.parameters(), 400, critic_loss)
    minimise([*model.parameters(), *critic.probe.parameters()], 150, loss)
    for law_25, reference_25 in zip(law_of(model).detach().numpy(), reference_P25.numpy(), strict=True):
        best_25 = order.best_of_n_law(reference_25, reward_25, 4)
        assert wins(law_25, reward_25) == pytest.approx(wins(best_25, reward_25), abs=0.03)
        assert divergence(law_25, reference_25) == pytest.approx(divergence(best_25, reference_25), abs=0.12)
        assert divergence(best_25, law_25) < 0.02


@contextmanager
def worn(model, weights: list[Tensor]):
    """The model with other weights, for the length of a block."""
    own = [parameter.data for parameter in model.parameters()]
    try:
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.data = weight
        yield
    finally:
        for parameter, data in zip(model.parameters(), own, strict=True):
            parameter.data = data


def logged_with(reward_25: np.ndarray, prompt: int, outcomes: list[int]) -> LoggedGroup:
    completions = [COMPLETIONS[k] for k in outcomes]
    return LoggedGroup(TokenGroup(PROMPTS[prompt], completions), reward_25[outcomes].tolist(), [0.0] * len(outcomes))


def wins(law_25: np.ndarray, reward_25: np.ndarray) -> float:
    return float(law_25 @ (np.sign(reward_25[:, None] - reward_25).mean(axis=1) + 1) / 2)


def divergence(law_25: np.ndarray, reference_25: np.ndarray) -> float:
    return float((law_25 * np.log(law_25 / reference_25)).sum())
