"""Pointwise log-quantile regression: best-of-n from logged candidates, with no importance weights.

Owns the regression of log π/π_ref on the log-ratio of best-of-n. π_BoN/π_ref is already normalised, so there is
no partition function to estimate: QRPO (arXiv:2507.08068) with the log-quantile as reward and β = 1/(n − 1).
Does not own the target's estimation (`quantiles.log_tilt_…`).

Dimension key:  B prompts · N candidates per prompt
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from bon_algos.checks import check_finite, check_one_shape


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

    -> (B,); nats². ValueError when shapes differ, nothing is given, or a target or a log-prob of the reference is not
    finite.
    """
    check_one_shape("BN", logprob_BN, reference_logprob_BN, log_tilt_BN)
    check_finite("tilts and log-probs of the reference", reference_logprob_BN, log_tilt_BN)
    log_ratio_BN = logprob_BN - reference_logprob_BN.detach()
    target_BN = log_tilt_BN.detach().to(log_ratio_BN.dtype)
    if huber_delta is None:
        return (log_ratio_BN - target_BN).square().mean(dim=-1)
    return 2 * functional.huber_loss(log_ratio_BN, target_BN, reduction="none", delta=huber_delta).mean(dim=-1)
