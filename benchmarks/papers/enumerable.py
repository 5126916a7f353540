"""Policies over so few outcomes that every expectation is a sum.

Owns worlds (a reference and rewards), policies as tables and as products of softmaxes, expected surrogates and what a
policy is worth in its world. Does not own any loss or law: those are the library's, weighted by probabilities here.

Dimension key:  S worlds · K outcomes · T tokens · V symbols
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bon_algos.bond import jeffreys_surrogate, policy_return
from bon_algos.contracts import Interval
from bon_algos.order import best_of_n_law, mean_interval

QuantileReward = Callable[[Tensor, Tensor], Tensor]
"""`bond.quantile_reward_…`."""


class World(NamedTuple):
    """S prompts, each with its reference and its rewards; float64."""

    reference: Tensor
    """Laws."""
    reward: Tensor

    @property
    def below(self) -> Tensor:
        return masses(self.reference, self.reward)[0]

    @property
    def mid_rank(self) -> Tensor:
        below_SK, tied_SK = masses(self.reference, self.reward)
        return below_SK + tied_SK / 2

    @property
    def standardised(self) -> Tensor:
        """Rewards of mean 0 and spread 1 under the reference. (S, K)."""
        centred_SK = self.reward - (self.reference * self.reward).sum(-1, keepdim=True)
        return centred_SK / (self.reference * centred_SK.square()).sum(-1, keepdim=True).sqrt()

    def best_of(self, n: int) -> Tensor:
        """The law of best-of-n of the reference. (S, K)."""
        return best_of_n_laws(self.reference, self.reward, n)

    def log_tilt(self, n: int) -> Tensor:
        """log π_BoN/π_ref, exact. (S, K)."""
        return (self.best_of(n) / self.reference).log()


def masses(law_SK: Tensor, reward_SK: Tensor) -> tuple[Tensor, Tensor]:
    """Of a law, strictly below each outcome's reward, and on it. (S, K) each."""
    own_SK1, other_S1K = reward_SK[:, :, None], reward_SK[:, None, :]
    below_SK, tied_SK = (
        (is_so.to(law_SK) @ law_SK[:, :, None])[..., 0] for is_so in (other_S1K < own_SK1, other_S1K == own_SK1)
    )
    return below_SK, tied_SK


def best_of_n_laws(law_SK: Tensor, reward_SK: Tensor, n: int) -> Tensor:
    rows = zip(law_SK.numpy(), reward_SK.numpy(), strict=True)
    return torch.stack([torch.from_numpy(best_of_n_law(law_K, reward_K, n)) for law_K, reward_K in rows])


# --- worlds ----------------------------------------------------------------------------------------------


def vector_u() -> World:
    """The test vectors' own world: 20 outcomes of mass (1 + 7k mod 20)/210 and reward (3k + 5) mod 20."""
    outcome_1K = torch.arange(20)[None]
    return World((1 + (7 * outcome_1K) % 20).double() / 210, ((3 * outcome_1K + 5) % 20).double())


def tables(num_worlds: int, num_outcomes: int, seed: int) -> World:
    """References of uneven masses, and rewards that never tie, in random order."""
    rng = torch.Generator().manual_seed(seed)
    logit_SK = 0.7 * torch.randn(num_worlds, num_outcomes, generator=rng, dtype=torch.float64)
    reward_SK = torch.rand(num_worlds, num_outcomes, generator=rng, dtype=torch.float64).argsort(dim=-1).double()
    return World(logit_SK.softmax(-1), reward_SK)


class ProductWorld(NamedTuple):
    """Sequences of T tokens from V symbols; the reference draws each token by itself, the reward looks at pairs."""

    world: World
    logits: Tensor
    """Of the reference."""


def products(num_worlds: int, seed: int, *, num_tokens: int = 3, num_symbols: int = 6) -> ProductWorld:
    """A product of softmaxes, as its reference is, has no way to say that two tokens go well together."""
    rng = torch.Generator().manual_seed(seed)
    shape = (num_worlds, num_tokens, num_symbols)
    logit_STV = 0.7 * torch.randn(*shape, generator=rng, dtype=torch.float64)
    symbol_KT = torch.cartesian_prod(*[torch.arange(num_symbols)] * num_tokens)
    reward_SK = product_logprob(torch.randn(*shape, generator=rng, dtype=torch.float64), normalised=False)
    for first in range(num_tokens):
        for second in range(first + 1, num_tokens):
            pair_SVV = torch.randn(num_worlds, num_symbols, num_symbols, generator=rng, dtype=torch.float64)
            reward_SK = reward_SK + pair_SVV[:, symbol_KT[:, first], symbol_KT[:, second]]
    return ProductWorld(World(product_logprob(logit_STV).exp(), reward_SK), logit_STV)


def product_logprob(logit_STV: Tensor, *, normalised: bool = True) -> Tensor:
    """log π of every sequence, the last token running fastest. (S, T, V) -> (S, V^T)."""
    token_STV = logit_STV.log_softmax(-1) if normalised else logit_STV
    total_SK = token_STV[:, 0]
    for place in range(1, token_STV.shape[1]):
        total_SK = (total_SK[:, :, None] + token_STV[:, place, None, :]).flatten(1)
    return total_SK


# --- expectations ----------------------------------------------------------------------------------------


def expected_surrogate(
    logprob_SK: Tensor,
    anchor_logprob_SK: Tensor,
    winner_law_SK: Tensor,
    log_tilt_SK: Tensor,
    *,
    jeffreys_weight: float,
    kl_strength: float = 0.0,
) -> Tensor:
    """`bond.bond_loss` without its baseline, over every sample of the policy and every winner. (S,).

    Winner and sample are independent, so each part is averaged under its own law.
    """
    log_ratio_SK = (logprob_SK - anchor_logprob_SK).detach()
    return_SK = policy_return(log_tilt_SK, log_ratio_SK, jeffreys_weight=jeffreys_weight, kl_strength=kl_strength)
    zero_SK = torch.zeros_like(logprob_SK)
    imitation_SK = jeffreys_surrogate(-logprob_SK, logprob_SK, zero_SK, jeffreys_weight=jeffreys_weight)
    own_SK = jeffreys_surrogate(zero_SK, logprob_SK, return_SK, jeffreys_weight=jeffreys_weight)
    return (winner_law_SK * imitation_SK + logprob_SK.exp().detach() * own_SK).sum(dim=-1)


def expected_quantile_reward(quantile_reward: QuantileReward, anchor_law_SK: Tensor, reward_SK: Tensor) -> Tensor:
    """J-BOND's reward of each outcome over both anchor samples: each is below it, tied with it or above. (S, K)."""
    below_SK, tied_SK = masses(anchor_law_SK, reward_SK)
    place_SK3 = torch.stack([below_SK, tied_SK, 1 - below_SK - tied_SK], dim=-1)
    pair_P2 = torch.cartesian_prod(torch.arange(-1.0, 2.0), torch.arange(-1.0, 2.0))
    value_33 = quantile_reward(torch.zeros(9), pair_P2).view(3, 3)
    return torch.einsum("ska,skb,ab->sk", place_SK3, place_SK3, value_33)


def descend(
    parameters: Sequence[Tensor],
    loss: Callable[[], Tensor],
    steps: int,
    learning_rate: float,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Adam on a sum of independent losses, which leaves each parameter its own trajectory; `after` counts from 1."""
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        after(step)


# --- what a policy is worth ------------------------------------------------------------------------------


class Worth(NamedTuple):
    """Of S policies, each in its world."""

    reward: Tensor
    """Gain over the reference, in its standard deviations."""
    win_rate: Tensor
    log_quantile: Tensor
    """Mean of log P(r(y') ≤ r(y)); nats."""
    kl: Tensor
    """KL(policy ‖ reference); nats."""


@torch.no_grad()
def worth(logprob_SK: Tensor, world: World) -> Worth:
    law_SK, below_SK, tied_SK = logprob_SK.exp(), *masses(world.reference, world.reward)
    return Worth(
        (law_SK * world.standardised).sum(-1),
        (law_SK * (below_SK + tied_SK / 2)).sum(-1),
        (law_SK * (below_SK + tied_SK).log()).sum(-1),
        kl(law_SK, world.reference),
    )


@torch.no_grad()
def kl(law_SK: Tensor, other_SK: Tensor) -> Tensor:
    """KL(law ‖ other) in nats. (S,)."""
    return torch.xlogy(law_SK, law_SK / other_SK).sum(dim=-1)


# --- seeds -----------------------------------------------------------------------------------------------


def interval(value_S: Tensor) -> Interval:
    return mean_interval(value_S.numpy())


def cell(value_S: Tensor, digits: int = 3) -> str:
    """`1.84 ± 0.05`: the mean over worlds and half of its 95 % interval."""
    seen = interval(value_S)
    return f"{seen.mean:.{digits}f} ± {(seen.high - seen.low) / 2:.{digits}f}"


def interpolated(at_S: Tensor, x_PS: Tensor, y_PS: Tensor) -> Tensor:
    """y at a given x for each world, along a path whose x rises (where it falls back, its highest so far). (S,)."""
    rising_PS = x_PS.cummax(dim=0).values
    upper_S = (rising_PS < at_S).sum(dim=0).clamp(1, len(x_PS) - 1)[None]
    x0, x1, y0, y1 = (one_PS.gather(0, place)[0] for one_PS in (rising_PS, y_PS) for place in (upper_S - 1, upper_S))
    share_S = ((at_S - x0) / (x1 - x0).clamp(min=1e-12)).clamp(0, 1)
    return y0 + share_S * (y1 - y0)
