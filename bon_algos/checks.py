"""What a loss refuses of what it is given, so that nothing is broadcast and no mean is taken of nothing.

Owns two checks that losses share. Does not own the ranges of their weights, which each loss checks by itself. Shapes
are checked of everything; numbers of data alone (rewards, weights, tilts, log-probs of a reference). What the policy in
training says may stop being a number at any step: whoever steps looks at that, and at the loss.
"""

from __future__ import annotations

from torch import Tensor


def check_one_shape(dimensions: str, *given: Tensor) -> None:
    """ValueError unless all have one shape, with a dimension for each letter ("BN") and something in it."""
    shapes = {tuple(one.shape) for one in given}
    if len(shapes) > 1 or given[0].ndim != len(dimensions) or given[0].numel() == 0:
        wanted = f"({dimensions},)" if len(dimensions) == 1 else f"({', '.join(dimensions)})"
        raise ValueError(f"need one shape {wanted} with something in it, got {sorted(shapes)}")


def check_finite(what: str, *given: Tensor) -> None:
    """ValueError unless all are finite. On an accelerator it waits for them."""
    if not all(one.isfinite().all() for one in given):
        raise ValueError(f"{what} must all be finite")
