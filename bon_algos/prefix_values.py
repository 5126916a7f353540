"""What each next token does to a completion's chances: best-of-n, told token by token.

Best-of-n is a law of whole completions, and like any law it is a product of conditionals,

    π_BoN(token | prefix) = π_ref(token | prefix) · V(prefix + token) / V(prefix),
    V(prefix) = E[w(completion) | prefix],  w = π_BoN/π_ref,

so who knows V knows what best-of-n says next, at every prefix and for every token, not only for the one that some
candidate says (values of prefixes: controlled decoding, arXiv:2310.17022; Q♯, arXiv:2502.20548). Here V is not learned
itself, w being n for few and next to nothing for most: what is learned is the law of the candidate's rank, given the
prefix, as a normal law of its normal score. Any n reads its V off that.

Owns the law, the network that tells it, and its loss. Does not own the policy that follows it (`token_bond`), nor the
optimiser. Everything depends on ranks alone.

Dimension key:  B prompts · N candidates of a prompt · L tokens, padded · T tokens of a call · K next tokens · D hidden
size · S size of the critic's state · C size of a token's code
"""

from __future__ import annotations

import math
from functools import cache
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bon_algos.checks import check_finite, check_one_shape
from bon_algos.quantiles import standing_among_others

NODES: Final = 49
"""Of the sum that stands for an integral; even ones, from −6 to 6, do better than Gauss–Hermite's where n is large."""
LEAST_LOG_SCALE: Final = -3.0
MOST_LOG_SCALE: Final = 0.5
"""A score's spread over all completions of a prompt is 1."""


class RankLaw(NamedTuple):
    """A normal law of the normal score that a completion ends with; two tensors of one shape."""

    mean: Tensor
    log_scale: Tensor


class Scores(NamedTuple):
    """Of each candidate among all of its prompt; three (B, N), float64."""

    score_BN: Tensor
    level_variance_BN: Tensor
    """Of the scores that a level of tied candidates stands for; 0 for a candidate that ties with none."""
    error_variance_BN: Tensor
    """Of the score as an estimate: few candidates tell a rank coarsely, and the best of them most coarsely."""


def normal_scores(reward_BN: Tensor) -> Scores:
    """Φ⁻¹(û) of the mid-rank û, the candidate itself as half a tie: standard normal whatever the reward's law.

    A level of ties stands for all ranks from its lowest to its highest, as best-of-n has it, which breaks ties evenly:
    its score is the mean of Φ⁻¹ between the two. Errors are those of shares of N draws (delta method).

    (B, N) -> three (B, N). ValueError with a single candidate.
    """
    standing, num_candidates = standing_among_others(reward_BN), reward_BN.shape[1]
    mid_BN = (standing.below + (standing.tied + 1) / 2).double() / num_candidates
    score_BN: Tensor = torch.special.ndtri(mid_BN)
    error_variance_BN = mid_BN * (1 - mid_BN) / (num_candidates * _density(score_BN).square())
    is_tied_BN, breadth_BN = standing.tied > 0, standing.tied.double().clamp(min=1) / num_candidates
    level = _level(mid_BN - breadth_BN / 2, mid_BN + breadth_BN / 2)
    return Scores(
        torch.where(is_tied_BN, level.mean, score_BN),
        torch.where(is_tied_BN, level.variance, 0.0),
        torch.where(is_tied_BN, level.error_variance / num_candidates, error_variance_BN),
    )


class _Level(NamedTuple):
    mean: Tensor
    variance: Tensor
    error_variance: Tensor
    """Of the mean where both ranks are shares of one draw."""


def _level(low: Tensor, high: Tensor) -> _Level:
    """A standard normal number between two of its quantiles."""
    below, above, breadth = torch.special.ndtri(low), torch.special.ndtri(high), high - low
    mean = (_density(below) - _density(above)) / breadth
    square = 1 + (below * _density(below) - above * _density(above)) / breadth
    by_low, by_high = (mean - below) / breadth, (above - mean) / breadth
    error = by_low**2 * low * (1 - low) + 2 * by_low * by_high * low * (1 - high) + by_high**2 * high * (1 - high)
    return _Level(mean, (square - mean.square()).clamp(min=0.0), error)


def _density(z: Tensor) -> Tensor:
    return (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)


def log_mean_tilt(law: RankLaw, n: int) -> Tensor:
    """log V = log E[n·Φ(z)^{n−1}], z of the law; nats, the law's shape. 0 for a standard normal law; at most log n.
    Right to .002 nats for n up to 256 and to .02 for 4096."""
    node, log_weight = (constant.to(law.mean) for constant in _standard_normal())
    z = law.mean[..., None] + law.log_scale.exp()[..., None] * node
    # Four times as fast as log_ndtr, and the same where anything is left of V.
    log_share = torch.special.ndtr(z).clamp(min=torch.finfo(z.dtype).tiny).log()
    return torch.logsumexp(math.log(n) + (n - 1) * log_share + log_weight, dim=-1)


@cache
def _standard_normal() -> tuple[Tensor, Tensor]:
    """Where to look, and the log of how much each look weighs."""
    node = torch.linspace(-6, 6, NODES, dtype=torch.float64)
    return node, (-0.5 * node.square()).log_softmax(dim=0)


def negative_log_likelihood(
    law: RankLaw, score_T: Tensor, level_variance_T: Tensor, error_variance_T: Tensor
) -> Tensor:
    """−log density of each score, mean over its level, that was estimated with so much error, without its constant:
    what is left to the law is the completion's own. (T,) each. ValueError when shapes differ, nothing is given, a
    number is not finite or a variance negative."""
    check_one_shape("T", *law, score_T, level_variance_T, error_variance_T)
    check_finite("scores", score_T, level_variance_T, error_variance_T)
    if min(level_variance_T.min(), error_variance_T.min()) < 0:
        raise ValueError("a variance must not be negative")
    total_T = (2 * law.log_scale).exp() + error_variance_T
    return 0.5 * (total_T.log() + ((score_T - law.mean).square() + level_variance_T) / total_T)


class PrefixCritic(nn.Module):
    """The law of the score after each next token, from the reference's hidden states along a completion.

    A recurrent net, because a language model's state need not remember what has been said: it may have forgotten the
    token before as soon as that no longer bears on the next. Tokens are told apart by their rows of the reference's
    head, so that no table of a vocabulary is learned.
    """

    def __init__(self, hidden_size: int, *, state_size: int = 192, code_size: int = 64) -> None:
        super().__init__()
        self.code_said = nn.Linear(hidden_size, code_size, bias=False)
        self.memory = nn.GRU(hidden_size + code_size, state_size, batch_first=True)
        self.read = nn.Sequential(
            nn.Linear(state_size + hidden_size + code_size, state_size), nn.SiLU(), nn.Linear(state_size, 2 + code_size)
        )
        self.code_next = nn.Linear(hidden_size, 2 + code_size, bias=False)
        self.probe = nn.Linear(hidden_size, 1)

    def states(self, hidden_NLD: Tensor, said_NLD: Tensor) -> Tensor:
        """What is known before each token of a completion.

        hidden_NLD  the reference's states that predict the tokens
        said_NLD    the head's rows of the tokens said last; zeros before the first

        -> (N, L, S). What stands behind a completion's end changes nothing before it.
        """
        seen = torch.cat([_scaled(hidden_NLD), self.code_said(_scaled(said_NLD))], dim=-1)
        memory, _ = self.memory(seen)
        read: Tensor = self.read(torch.cat([memory, seen], dim=-1))
        return read

    def codes(self, row_KD: Tensor) -> Tensor:
        """Of next tokens, by their rows of the head. (K, D) -> (K, C)."""
        code: Tensor = self.code_next(_scaled(row_KD))
        return code

    def law(self, state_TS: Tensor, code_TKC: Tensor) -> RankLaw:
        """Of the score where the next token is one of K. (T, S), (T, K, C) -> two (T, K)."""
        mean_TK = (
            state_TS[:, None, 0] + code_TKC[..., 0] + torch.einsum("ts,tks->tk", state_TS[:, 2:], code_TKC[..., 2:])
        )
        log_scale_TK = state_TS[:, None, 1] + code_TKC[..., 1]
        return RankLaw(mean_TK, log_scale_TK.clamp(LEAST_LOG_SCALE, MOST_LOG_SCALE))

    def probed(self, hidden_TD: Tensor) -> Tensor:
        """log V of a prefix, read off the state in which a policy says the next token; nats. (T, D) -> (T,). Learned
        with the policy, not with the law."""
        value_T1: Tensor = self.probe(_scaled(hidden_TD))
        return value_T1[:, 0]


def _scaled(vector: Tensor) -> Tensor:
    """With mean 0 and spread 1, in float32; zeros stay zeros."""
    return functional.layer_norm(vector.float(), vector.shape[-1:])


def guided_logprobs(reference_TV: Tensor, log_value_TK: Tensor, token_TK: Tensor) -> tuple[Tensor, Tensor]:
    """log π_BoN of the next token and log V of the prefix, from the values of the K tokens that are likeliest.

    What is unlikelier counts as worth what the others are worth together: its odds stay the reference's.

    reference_TV  log π_ref of the next token, all of a vocabulary
    log_value_TK  log V after each of K tokens
    token_TK      which tokens these are, K different ones

    -> (T, V), normalised, and (T,); nats.
    """
    likely_TK = reference_TV.gather(1, token_TK)
    log_value_T = torch.logsumexp(likely_TK.log_softmax(dim=-1) + log_value_TK, dim=-1)
    raised_TV = reference_TV.scatter(1, token_TK, likely_TK + log_value_TK - log_value_T[:, None])
    return raised_TV.log_softmax(dim=-1), log_value_T
