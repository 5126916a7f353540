"""DPO and IPO: what they are by hand, what they end at by enumeration of all pairs, and which pair a group gives."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_expit
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bon_algos.bonbon import optimal_tilt_kl, optimal_tilt_win_rate
from bon_algos.logprobs import TokenGroup, sequence_logprobs
from bon_algos.preference import best_and_worst, dpo_loss, ipo_loss, log_ratio_margin
from tests.bon_algos.tabular import all_pairs, minimiser
from tests.bon_algos.vectors import REFERENCE_K, REWARDS, kl, win_rate_against_reference

REFERENCE = torch.tensor(REFERENCE_K)
relaxed = settings(deadline=None, max_examples=60)
nats = st.floats(-300, 0)


def expected_over_pairs(pair_loss, preference_KK: Tensor, data_K: Tensor, reference_K: Tensor, beta: float):
    """The loss over independent pairs of the data, each labelled by P(row preferred to column), of the logits."""
    chosen, rejected = all_pairs(len(data_K))
    weight = 2 * data_K[chosen] * data_K[rejected] * preference_KK[chosen, rejected]
    logref_K = reference_K.log()

    def objective(logit_K: Tensor) -> Tensor:
        logprob_K = logit_K.log_softmax(-1)
        loss: Tensor = weight @ pair_loss(
            logprob_K[chosen], logprob_K[rejected], logref_K[chosen], logref_K[rejected], beta=beta
        )
        return loss

    return objective


# --- values ----------------------------------------------------------------------------------------------


def test_losses_by_hand():
    """log π −1, −4 against −2, −3: Δ = 3 − 1 = 2. β = ½: −log σ(1) = log(1 + 1/e); (2 − 1)² = 1.
    log π −3, −1 against −2, −2: Δ = −2 − 0. β = ½: log(1 + e); (−2 − 1)² = 9."""
    pairs = [torch.tensor(row).double() for row in ([-1, -3], [-4, -1], [-2, -2], [-3, -2])]
    assert log_ratio_margin(*pairs).tolist() == [2, -2]
    expected = [math.log(1 + math.exp(-1)), math.log(1 + math.e)]
    assert dpo_loss(*pairs, beta=0.5).tolist() == pytest.approx(expected, abs=1e-15)
    assert ipo_loss(*pairs, beta=0.5).tolist() == [1, 9]


@given(st.lists(nats, min_size=4, max_size=4), st.floats(0.01, 3))
@relaxed
def test_losses_are_the_formulas_also_far_out(logprobs, beta):
    """Against scipy in float64; β·Δ reaches ±1,800, where σ itself is 0 or 1."""
    pairs = [torch.tensor([logprob], dtype=torch.float64) for logprob in logprobs]
    margin = (logprobs[0] - logprobs[1]) - (logprobs[2] - logprobs[3])
    assert dpo_loss(*pairs, beta=beta).item() == pytest.approx(-log_expit(beta * margin), rel=1e-12, abs=1e-300)
    assert ipo_loss(*pairs, beta=beta).item() == pytest.approx((margin - 0.5 / beta) ** 2, rel=1e-12)


@given(st.lists(nats, min_size=4, max_size=4), st.floats(0.05, 2))
@relaxed
def test_swapping_a_pair_turns_its_margin_round(logprobs, beta):
    """σ(x)/σ(−x) = eˣ, so the DPO losses of a pair and its swap differ by β·Δ; the IPO losses by 2Δ/β."""
    best, worst, best_ref, worst_ref = (torch.tensor([logprob], dtype=torch.float64) for logprob in logprobs)
    pair, swapped = (best, worst, best_ref, worst_ref), (worst, best, worst_ref, best_ref)
    margin_B = log_ratio_margin(*pair)
    assert torch.equal(log_ratio_margin(*swapped), -margin_B)
    for loss, difference_B in ((dpo_loss, beta * margin_B), (ipo_loss, 2 * margin_B / beta)):
        by_swapping_B = loss(*swapped, beta=beta) - loss(*pair, beta=beta)
        torch.testing.assert_close(by_swapping_B, difference_B, atol=1e-9, rtol=1e-9)


def test_a_constant_on_both_completions_cancels():
    """The prompt's own log-prob, counted in or not, changes nothing."""
    pairs = [torch.tensor(row).double() for row in ([-1, -3], [-4, -1], [-2, -2], [-3, -2])]
    moved = [pairs[0] - 64, pairs[1] - 64, pairs[2] - 32, pairs[3] - 32]
    for loss in (dpo_loss, ipo_loss):
        assert torch.equal(loss(*moved, beta=0.25), loss(*pairs, beta=0.25))


# --- against trl -----------------------------------------------------------------------------------------

PROMPT_IDS, VOCABULARY = [5, 9, 4], 31
OF_ONE_LENGTH = [([3, 7, 8], [11, 12, 13]), ([6, 2, 14], [15, 3, 9])]
OF_ANY_LENGTH = [([3, 7, 8, 10, 2], [11]), ([6, 2], [15, 3, 9])]


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, initializer_range=0.4)).eval()


def loss_by_trl(directory: Path, loss_type: str, beta: float, pairs) -> tuple[Tensor, list[Tensor]]:
    """What trl's trainer computes for the batch, and its gradient on every weight of the policy."""
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0")),
        pad_token="0",
        eos_token="1",
    )
    arguments = DPOConfig(
        output_dir=str(directory),
        beta=beta,
        loss_type=[loss_type],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
    )
    unused = Dataset.from_list([{"prompt": "0", "chosen": "1", "rejected": "2"}])
    trainer = DPOTrainer(tiny_llama(0), tiny_llama(1), arguments, train_dataset=unused, processing_class=words)
    examples = [{"prompt_ids": PROMPT_IDS, "chosen_ids": best, "rejected_ids": worst} for best, worst in pairs]
    batch = DataCollatorForPreference(pad_token_id=0)(examples)
    loss = trainer.compute_loss(trainer.model, batch)
    return loss.detach(), list(torch.autograd.grad(loss, list(trainer.model.parameters())))


def loss_by_ours(pair_loss, pairs) -> tuple[Tensor, list[Tensor]]:
    policy, reference = tiny_llama(0), tiny_llama(1)
    groups = [TokenGroup(PROMPT_IDS, pair) for pair in pairs]
    logprobs = [torch.stack(sequence_logprobs(model, groups)) for model in (policy, reference)]
    loss = pair_loss(*(logprob_B2[:, place] for logprob_B2 in logprobs for place in (0, 1))).mean()
    return loss.detach(), list(torch.autograd.grad(loss, list(policy.parameters())))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss_type", "pairs", "pair_loss"),
    [
        ("sigmoid", OF_ANY_LENGTH, lambda *pair: dpo_loss(*pair, beta=0.3)),
        # (Δ/3 − 1/(2β))² = (Δ − 3/(2β))²/9 where every completion has three tokens
        ("ipo", OF_ONE_LENGTH, lambda *pair: ipo_loss(*pair, beta=0.3 / 3) / 9),
    ],
)
def test_a_language_model_is_taught_what_trl_teaches_it(tmp_path, loss_type, pairs, pair_loss):
    actual, expected = loss_by_ours(pair_loss, pairs), loss_by_trl(tmp_path, loss_type, 0.3, pairs)
    assert expected[0] > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_ipo_in_trl_is_another_loss_where_lengths_differ(tmp_path):
    """Whatever β ours is given: it is the difference of two sums, not of two means."""
    _, of_trl = loss_by_trl(tmp_path, "ipo", 0.3, OF_ANY_LENGTH[:1])
    _, of_ours = loss_by_ours(lambda *pair: ipo_loss(*pair, beta=0.3), OF_ANY_LENGTH[:1])
    flat = [torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (of_trl, of_ours)]
    assert torch.cosine_similarity(flat[0], flat[1], dim=0).abs() < 0.99


# --- gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss])
def test_the_gradient_is_that_of_central_differences(loss):
    logit_2K = torch.randn(2, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    reference_2K = torch.linspace(-2, 1, 10, dtype=torch.float64).reshape(2, 5).log_softmax(-1)
    rows, chosen, rejected = torch.arange(2), torch.tensor([3, 0]), torch.tensor([1, 4])

    def of_logits(logit_2K: Tensor) -> Tensor:
        logprob_2K = logit_2K.log_softmax(-1)
        at = [table[rows, place] for table in (logprob_2K, reference_2K) for place in (chosen, rejected)]
        result: Tensor = loss(*at, beta=0.7)
        return result

    assert torch.autograd.gradcheck(of_logits, (logit_2K,), eps=1e-6, atol=1e-8)


def test_only_the_policy_carries_a_gradient():
    for loss in (dpo_loss, ipo_loss):
        tensors = [torch.zeros(2, requires_grad=True) for _ in range(4)]
        gradients = torch.autograd.grad(loss(*tensors, beta=1.0).sum(), tensors, allow_unused=True)
        assert [gradient is None for gradient in gradients] == [False, False, True, True]
        assert torch.equal(gradients[0], -gradients[1])


def test_where_the_gradient_vanishes():
    """IPO: at Δ = 1/(2β) = 2 and nowhere else. DPO: nowhere; at Δ = 0, 2, 20 it still asks for more, by β·σ(−β·Δ)."""
    zero = torch.zeros(3, dtype=torch.float64)
    chosen = torch.tensor([0.0, 2.0, 20.0], dtype=torch.float64, requires_grad=True)
    (of_ipo,) = torch.autograd.grad(ipo_loss(chosen, zero, zero, zero, beta=0.25).sum(), chosen)
    assert of_ipo.tolist() == [-4, 0, 36]
    (of_dpo,) = torch.autograd.grad(dpo_loss(chosen, zero, zero, zero, beta=0.25).sum(), chosen)
    assert of_dpo.tolist() == pytest.approx([-0.25 / (1 + math.exp(margin / 4)) for margin in (0, 2, 20)], rel=1e-12)


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss])
def test_a_group_tied_throughout_teaches_nothing(loss):
    """It gives the same sample twice: the two gradients on it cancel, wherever the policy is."""
    best, worst = best_and_worst(torch.full((1, 4), 3.0))
    logprob_BN = torch.tensor([[-7.0, -1.0, -2.0, -3.0]], requires_grad=True)
    reference_BN = torch.tensor([[-2.0, -9.0, -4.0, -1.0]])
    pair = [table.gather(1, at[:, None])[:, 0] for table in (logprob_BN, reference_BN) for at in (best, worst)]
    (gradient,) = torch.autograd.grad(loss(*pair, beta=0.1).sum(), logprob_BN)
    assert torch.equal(gradient, torch.zeros(1, 4))


# --- where they end --------------------------------------------------------------------------------------


def test_dpo_ends_at_the_tilt_of_bradley_terry_rewards():
    """P(i ≻ j) = σ(r_i − r_j): π ∝ π_ref · exp(r/β), the theorem the loss is derived from; any full-support data."""
    reward_K = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1], dtype=torch.float64)
    reference_K = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64)
    preference_KK = torch.sigmoid(reward_K[:, None] - reward_K)
    for data_K in (reference_K, torch.full((5,), 0.2).double()):
        objective = expected_over_pairs(dpo_loss, preference_KK, data_K, reference_K, beta=0.8)
        expected_K = (reference_K.log() + reward_K / 0.8).softmax(-1)
        torch.testing.assert_close(minimiser(objective, reference_K.log()), expected_K, atol=1e-11, rtol=0)


@pytest.mark.parametrize("vector", REWARDS)
@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_ipo_on_pairs_of_the_reference_ends_at_the_tilt_by_mid_rank(vector, beta):
    """π ∝ π_ref · exp(p_mid/β): the paper's optimum for preferences P(y ≻ reference), ties counting half."""
    reward_K = torch.tensor(REWARDS[vector])
    preference_KK = (reward_K[:, None] > reward_K).double() + (reward_K[:, None] == reward_K).double() / 2
    objective = expected_over_pairs(ipo_loss, preference_KK, REFERENCE, REFERENCE, beta)
    expected_K = (REFERENCE.log() + preference_KK @ REFERENCE / beta).softmax(-1)
    torch.testing.assert_close(minimiser(objective, REFERENCE.log()), expected_K, atol=1e-11, rtol=0)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_without_ties_that_tilt_wins_the_most_for_its_kl(beta):
    """U is close to continuous: win rate and KL are near those of the density e^{u/β}, and never both better."""
    reward_K = torch.tensor(REWARDS["U"])
    preference_KK = (reward_K[:, None] > reward_K).double() + (reward_K[:, None] == reward_K).double() / 2
    objective = expected_over_pairs(ipo_loss, preference_KK, REFERENCE, REFERENCE, beta)
    policy_K = minimiser(objective, REFERENCE.log()).numpy()
    win, nats = win_rate_against_reference(policy_K, REWARDS["U"]), kl(policy_K, REFERENCE_K)
    assert win == pytest.approx(optimal_tilt_win_rate(1 / beta), abs=0.006)
    assert nats == pytest.approx(optimal_tilt_kl(1 / beta), abs=0.03)
    assert nats < optimal_tilt_kl(1 / beta)


# --- which pair a group gives ----------------------------------------------------------------------------


def test_the_pair_is_the_first_highest_and_the_first_lowest():
    """Every group of four rewards out of three values, as Python's own `index` finds them."""
    groups = list(product([0.0, 1.0, 2.0], repeat=4))
    best_B, worst_B = best_and_worst(torch.tensor(groups))
    assert best_B.tolist() == [group.index(max(group)) for group in groups]
    assert worst_B.tolist() == [group.index(min(group)) for group in groups]


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=9))
@relaxed
def test_only_the_order_of_rewards_picks_the_pair(rewards):
    reward_BN = torch.tensor([rewards], dtype=torch.float64)
    original = best_and_worst(reward_BN)
    for transform in (torch.exp, lambda reward: reward**3, lambda reward: 7 - torch.exp(-reward)):
        best, worst = best_and_worst(transform(reward_BN))
        assert torch.equal(best, original.best)
        assert torch.equal(worst, original.worst)
    turned = best_and_worst(-reward_BN)
    assert (turned.best.item(), turned.worst.item()) == (original.worst.item(), original.best.item())


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=9, unique=True).flatmap(st.permutations))
@relaxed
def test_without_ties_drawing_order_does_not_matter(rewards):
    best, worst = best_and_worst(torch.tensor([rewards]))
    assert rewards[best.item()] == np.max(rewards)
    assert rewards[worst.item()] == np.min(rewards)


def test_a_single_draw_is_its_own_best_and_worst():
    assert [place.tolist() for place in best_and_worst(torch.tensor([[4.0], [-1.0]]))] == [[0, 0], [0, 0]]


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [torch.zeros(3), torch.zeros(2, 0), torch.zeros(1, 2, 3)])
def test_groups_of_the_wrong_shape_are_refused(reward):
    with pytest.raises(ValueError, match=r"\(B, N\)"):
        best_and_worst(reward)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_refused(wrong):
    with pytest.raises(ValueError, match="finite"):
        best_and_worst(torch.tensor([[0.0, wrong]]))


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss])
def test_shapes_that_would_broadcast_are_refused(loss):
    two = torch.zeros(2)
    for place, wrong in product(range(4), (torch.zeros(1), torch.zeros(2, 1), torch.tensor(0.0))):
        pairs = [two, two, two, two]
        pairs[place] = wrong
        with pytest.raises(ValueError, match=r"\(B,\)"):
            loss(*pairs, beta=1.0)
    with pytest.raises(ValueError, match=r"\(B,\)"):
        loss(*[torch.zeros(2, 2)] * 4, beta=1.0)


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss])
@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_a_beta_that_is_not_positive_is_refused(loss, beta):
    with pytest.raises(ValueError, match="β"):
        loss(*[torch.zeros(2)] * 4, beta=beta)
