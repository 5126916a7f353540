"""Pointwise log-quantile regression: best-of-n from logged candidates, with no importance weights.

Owns the regression of log π/π_ref on the log-ratio of best-of-n, and its mixture with imitation. π_BoN/π_ref
is already normalised, so there is no partition function to estimate: QRPO (arXiv:2507.08068) with the
log-quantile as reward and β = 1/(n − 1). Does not own the target's estimation (`quantiles.log_tilt_…`).

Dimension key:  B prompts · N candidates per prompt
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from bon_algos.imitation import best_of_n_imitation


def log_quantile_regression(
    logprob_BN: Tensor, reference_logprob_BN: Tensor, log_tilt_BN: Tensor, *, huber_delta: float | None = None
) -> Tensor:
    """( log π(y) − log π_ref(y) − t(y) )², averaged over the candidates of each prompt.

    With t = log π_BoN/π_ref, π_BoN is the unique minimiser whatever full-support law the candidates came
    from. A noisy t pulls towards its mean, which is why an estimator without bias matters. Only candidates
    that were drawn are held: mass pushed off the bad ones may land where nothing was drawn, so watch the KL.

    logprob_BN             (B, N)  log π of each candidate, token sum; carries the gradient
    reference_logprob_BN   (B, N)  log π_ref, token sum
    log_tilt_BN            (B, N)  t from the *other* rewards of the prompt; nats
    huber_delta            nats of residual beyond which the loss grows linearly, (2|x| − δ)·δ; None: never

    -> (B,); nats². ValueError when shapes differ.
    """
    if not logprob_BN.shape == reference_logprob_BN.shape == log_tilt_BN.shape:
        raise ValueError(f"need one shape: {logprob_BN.shape}, {reference_logprob_BN.shape}, {log_tilt_BN.shape}")
    log_ratio_BN = logprob_BN - reference_logprob_BN.detach()
    target_BN = log_tilt_BN.detach().to(log_ratio_BN.dtype)
    if huber_delta is None:
        return (log_ratio_BN - target_BN).square().mean(dim=-1)
    return 2 * functional.huber_loss(log_ratio_BN, target_BN, reduction="none", delta=huber_delta).mean(dim=-1)


def imitation_with_regression(
    logprob_BN: Tensor,
    reference_logprob_BN: Tensor,
    weight_BN: Tensor,
    log_tilt_BN: Tensor,
    *,
    regression_weight: float,
    huber_delta: float | None = None,
) -> Tensor:
    """(1 − λ)·imitation + λ·regression: two losses with one minimiser, best-of-n.

    Regression learns from every candidate's rank and moves fast, but does not see mass that leaves the
    logged candidates; imitation, a cross-entropy, charges for exactly that.

    Shapes as in `log_quantile_regression` and `imitation.best_of_n_imitation`; regression_weight λ in [0, 1];
    -> (B,).
    """
    if not 0 <= regression_weight <= 1:
        raise ValueError(f"regression_weight must lie in [0, 1], got {regression_weight}")
    imitation_B = best_of_n_imitation(logprob_BN, weight_BN)
    regression_B = log_quantile_regression(logprob_BN, reference_logprob_BN, log_tilt_BN, huber_delta=huber_delta)
    return (1 - regression_weight) * imitation_B + regression_weight * regression_B
