"""Imitation of best-of-n: the forward KL(best-of-n ‖ policy), every candidate at its exact weight.

Owns the loss. Does not own the weights (`order.best_of_n_weights`), which come from rewards alone. Where
plain imitation trains on the winner and throws n − 1 candidates away, the Rao–Blackwell weights use all M
candidates for any n ≤ M, with the same expected gradient and less variance.

Dimension key:  B prompts · N candidates per prompt
"""

from __future__ import annotations

from torch import Tensor


def best_of_n_imitation(logprob_BN: Tensor, weight_BN: Tensor) -> Tensor:
    """Σ_j w_j · (−log π(y_j)): an unbiased estimate, per prompt, of the cross-entropy of π to best-of-n.

    Its gradient is that of KL(best-of-n ‖ π); BOND (arXiv:2407.14622) eq. 13, summed over candidates drawn
    from the policy whose best-of-n is meant.

    (B, N), (B, N) -> (B,); nats. A weight row is `order.best_of_n_weights` of the prompt's rewards: it sums
    to 1. ValueError when shapes differ.
    """
    if logprob_BN.shape != weight_BN.shape:
        raise ValueError(f"one weight for each candidate: {logprob_BN.shape}, {weight_BN.shape}")
    return -(weight_BN.to(logprob_BN.dtype) * logprob_BN).sum(dim=-1)
