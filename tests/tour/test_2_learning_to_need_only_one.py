"""Second story: a policy learns the best of n from logged candidates, until one sample is enough.

The policy is a softmax over three answers; "training" is gradient descent on its logits.
"""

import numpy as np
import pytest
import torch

from bon_algos.bond import j_bond_loss, quantile_reward_tie_aware
from bon_algos.imitation import best_of_n_imitation
from bon_algos.order import best_of_n_law, best_of_n_weights

REFERENCE = torch.tensor([1 / 2, 1 / 3, 1 / 6], dtype=torch.float64)
REWARD = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)


def test_imitating_the_weighted_candidates_ends_at_the_best_of_n():
    """6,000 logged groups of 8 candidates teach best-of-4: the rewards alone say how much each candidate counts."""
    drawn = torch.multinomial(REFERENCE.expand(6_000, 3), 8, replacement=True, generator=torch.manual_seed(0))
    weight = torch.tensor(np.stack([best_of_n_weights(REWARD[row], n=4) for row in drawn]))
    logits = REFERENCE.log().clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=50)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = best_of_n_imitation(logits.log_softmax(-1)[drawn], weight).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    learned = logits.detach().softmax(-1)
    assert learned.numpy() == pytest.approx(best_of_n_law(REFERENCE, REWARD, n=4), abs=0.02)


def test_j_bond_raises_what_beats_its_anchor_and_lowers_what_loses_to_it():
    """One step from policy = anchor, over every triple of one policy and two anchor samples at its probability."""
    logits = REFERENCE.log().clone().requires_grad_()
    logprob = logits.log_softmax(-1)
    y, a, b = (index.reshape(-1) for index in torch.meshgrid(*[torch.arange(3)] * 3, indexing="ij"))
    # Each triple as often as its probability says, in units of 1/216, so that a mean over rows is an expectation.
    often = (REFERENCE[y] * REFERENCE[a] * REFERENCE[b] * 216).round().long()
    y, a, b = (index.repeat_interleave(often) for index in (y, a, b))
    winner = torch.where(REWARD[b] > REWARD[a], b, a)
    reward = quantile_reward_tie_aware(REWARD[y], torch.stack([REWARD[a], REWARD[b]], dim=-1))
    loss, _ = j_bond_loss(logprob[winner], logprob[y], logprob[y].detach(), reward)
    loss.backward()

    assert logits.grad is not None
    worst, _, best = (-logits.grad).tolist()
    assert worst < 0 < best


def test_the_same_candidates_with_rescaled_rewards_teach_the_same():
    rewards = torch.tensor([0.3, -1.2, 2.5, 0.9], dtype=torch.float64)
    assert best_of_n_weights(rewards, n=2) == pytest.approx(best_of_n_weights(torch.exp(rewards), n=2))
