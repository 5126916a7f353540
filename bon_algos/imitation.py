"""Imitation of best-of-n: the forward KL(best-of-n ‖ policy), every candidate at its exact weight.

Owns the loss. Does not own the weights (`order.best_of_n_weights`), which come from rewards alone. Where
plain imitation trains on the winner and throws n − 1 candidates away, the Rao–Blackwell weights use all M
candidates for any n ≤ M, with the same expected gradient and less variance.

Dimension key:  B prompts · N candidates per prompt
"""

from __future__ import annotations

from torch import Tensor

from bon_algos.checks import check_finite, check_one_shape


def best_of_n_imitation(logprob_BN: Tensor, weight_BN: Tensor) -> Tensor:
    """Σ_j w_j · (−log π(y_j)): an unbiased estimate, per prompt, of the cross-entropy of π to best-of-n.

    Its gradient is that of KL(best-of-n ‖ π); BOND (arXiv:2407.14622) eq. 13, summed over candidates drawn
    from the policy whose best-of-n is meant.

    (B, N), (B, N) -> (B,); nats. A weight row is `order.best_of_n_weights` of the prompt's rewards: it sums
    to 1. A candidate of weight 0 that the policy cannot say counts for nothing; one of more weight makes the loss ∞.
    ValueError when shapes differ, nothing is given or a weight is not finite.
    """
    check_one_shape("BN", logprob_BN, weight_BN)
    check_finite("weights", weight_BN)
    held_BN = logprob_BN.masked_fill((weight_BN == 0) & logprob_BN.isneginf(), 0.0)  # 0 · log 0 is 0
    return -(weight_BN.to(logprob_BN.dtype) * held_BN).sum(dim=-1)
