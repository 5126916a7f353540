"""When to stop drawing: waves of candidates, each drawn only if its expected gain is worth its tokens.

Owns: the waves, the gain that is expected of the next one per token, and the price of a token, learned so that stopping
by it earns what fixed best-of-n earns. Does not own: the law of rewards (`reward_laws`), the drawing. numpy alone.

With recall and a known law it is best to stop as soon as the next draw is worth less than its price (Weitzman's Pandora
rule; for best-of-n arXiv:2510.01394). Here the law is learned, and an operator names no price but an n: logged prompts,
each continued beyond its last draw by what the law makes of it, are played through, and that price is taken at which
their mean reward is that of best-of-n.

Dimension key:  B simulated prompts · S numbers of draws after which drawing may stop · M draws of a prompt
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from bon_algos.reward_laws import Array, RewardLaw, expected_gain, learned_law, weights_of

PATHS: Final = 400
"""Simulated prompts, at least: of fewer groups each comes again, in another order."""
HALVINGS: Final = 40


class LoggedDraws(NamedTuple):
    """All candidates of one prompt, in drawing order."""

    reward: Array
    """(M,); NaN: had none, or was not to be served beside others."""
    tokens: Array
    """(M,)"""


@dataclass(frozen=True)
class StoppingRule:
    """Draw up to the next of the stops as long as that is expected to be worth its price."""

    law: RewardLaw
    stops: tuple[int, ...]
    """Ascending numbers of draws; at the last one drawing ends."""
    price: float
    """Reward per token."""
    token_share: float
    """What it took in the simulation, of best-of-n's tokens there."""

    def is_enough(self, rewards: Sequence[float], mean_tokens: float, drawn: int) -> bool:
        """rewards: of candidates that may be served. drawn: one of the stops."""
        if drawn == self.stops[-1]:
            return True
        count = self.stops[self.stops.index(drawn) + 1] - drawn
        return self.gain(rewards, count) < self.price * count * mean_tokens

    def gain(self, rewards: Sequence[float], count: int) -> float:
        """What `count` further draws are expected to add; infinite while nothing can be served."""
        return expected_gain(self.law, rewards, count) if rewards else math.inf


def stops_of(n: int, cap: int) -> tuple[int, ...]:
    """After how many draws it is asked whether to go on: waves of a quarter of n up to n, of half of n beyond, the cap
    last. Longer waves late cost few tokens and spare the slowest requests their rounds."""
    quarter, half = max(1, n // 4), max(1, n // 2)
    stops = {*range(quarter, n, quarter), *range(n, cap, half), cap}
    return tuple(sorted(stop for stop in stops if stop <= cap))


def learned_rules(
    history: Sequence[LoggedDraws], stops: tuple[int, ...], aims: Iterable[int]
) -> Mapping[int, StoppingRule]:
    """For every n that is aimed at, the rule that earns what best-of-n earns; none where it would save no tokens.

    history: full groups of one policy, each an unselected prompt's. aims: at most the last of the stops. ValueError
    where no law can be learned from it.
    """
    usable = [draws for draws in history if np.isfinite(draws.reward).sum() > 1]
    law = learned_law([draws.reward[np.isfinite(draws.reward)] for draws in usable])
    played = Simulation.of(law, usable, stops)
    rules = {n: _rule(played, n) for n in aims if n > stops[0]}
    return {n: rule for n, rule in rules.items() if rule.token_share < 1}


def _rule(played: Simulation, n: int) -> StoppingRule:
    price = played.price_of(n)
    share = played.outcome(price).tokens.mean() / played.fixed(n).tokens.mean()
    return StoppingRule(played.law, played.stops, price, float(share))


# --- simulation ------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What was served and what it took, for every simulated prompt."""

    reward: Array
    """(B,); NaN: nothing that may be served beside others was drawn."""
    tokens: Array
    """(B,)"""
    drawn: NDArray[np.intp]
    """(B,)"""


@dataclass(frozen=True)
class Simulation:
    """Prompts with more draws than any rule takes, and what the next wave seemed to be worth at each stop."""

    law: RewardLaw
    stops: tuple[int, ...]
    served_BM: Array
    """The best of the first m draws."""
    tokens_BM: Array
    """Of the first m draws."""
    gain_per_token_BS: Array
    """Of the wave that follows; the last is 0."""

    @classmethod
    def of(cls, law: RewardLaw, history: Sequence[LoggedDraws], stops: tuple[int, ...]) -> Simulation:
        """Each prompt's draws in random order, continued by draws from its posterior; the same ones every time."""
        rng = np.random.default_rng(0)
        rounds = -(-PATHS // len(history))
        paths = [_continued(law, draws, stops[-1], rng) for draws in history for _ in range(rounds)]
        return cls.of_paths(law, paths, stops)

    @classmethod
    def of_paths(cls, law: RewardLaw, paths: Sequence[LoggedDraws], stops: tuple[int, ...]) -> Simulation:
        """Of prompts that all have as many draws as the last of the stops."""
        reward_BM = np.stack([path.reward for path in paths])
        tokens_BM = np.stack([path.tokens for path in paths]).cumsum(axis=1)
        served_BM = np.fmax.accumulate(reward_BM, axis=1)
        gain_per_token_BS = np.stack([_gains_per_token(law, path, stops) for path in paths])
        return cls(law, stops, served_BM, tokens_BM, gain_per_token_BS)

    def outcome(self, price: float) -> Outcome:
        is_enough_BS = self.gain_per_token_BS < price
        is_enough_BS[:, -1] = True
        return self._after(np.array(self.stops)[is_enough_BS.argmax(axis=1)])

    def fixed(self, n: int) -> Outcome:
        return self._after(np.full(len(self.served_BM), n))

    def price_of(self, n: int) -> float:
        """The highest at which the mean reward is at least that of best-of-n."""
        return self.price_for(float(np.nanmean(self.fixed(n).reward)))

    def price_for(self, reward: float) -> float:
        """The highest at which the mean reward is at least as much; 0 where none is."""
        low, high = 0.0, float(self.gain_per_token_BS[np.isfinite(self.gain_per_token_BS)].max())
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            is_as_good = np.nanmean(self.outcome(middle).reward) >= reward
            low, high = (middle, high) if is_as_good else (low, middle)
        return low

    def _after(self, drawn_B: NDArray[np.intp]) -> Outcome:
        rows = np.arange(len(drawn_B))
        return Outcome(self.served_BM[rows, drawn_B - 1], self.tokens_BM[rows, drawn_B - 1], drawn_B)


def _continued(law: RewardLaw, draws: LoggedDraws, length: int, rng: Generator) -> LoggedDraws:
    order = rng.permutation(draws.reward.size)[:length]
    reward, missing = draws.reward[order], length - len(order)
    if missing <= 0:
        return LoggedDraws(reward, draws.tokens[order])
    weight_P = weights_of(law.log_likelihood(reward[np.isfinite(reward)]).sum(axis=0))
    further = law.draw(weight_P, missing, rng)
    # What could not be served, and how long candidates are, goes on as it was.
    like = rng.integers(draws.reward.size, size=missing)
    further[np.isnan(draws.reward[like])] = np.nan
    return LoggedDraws(np.concatenate((reward, further)), np.concatenate((draws.tokens[order], draws.tokens[like])))


def _gains_per_token(law: RewardLaw, path: LoggedDraws, stops: tuple[int, ...]) -> Array:
    """What `StoppingRule.is_enough` compares with the price, at every stop from one pass over the draws."""
    is_usable = np.isfinite(path.reward)
    log_weight_kP = law.log_likelihood(path.reward[is_usable]).cumsum(axis=0)
    gains = []
    for stop, following in pairwise(stops):
        seen = int(is_usable[:stop].sum())
        if seen == 0:
            gains.append(math.inf)
            continue
        gain_P = law.gain(float(np.nanmax(path.reward[:stop])), following - stop)
        gain = float(weights_of(log_weight_kP[seen - 1]) @ gain_P)
        gains.append(gain / ((following - stop) * path.tokens[:stop].mean()))
    return np.array([*gains, 0.0])
