"""The papers' claims that do not need a language model: every expectation, or every law, by enumeration.

Owns the list. Does not own the experiments: each is in a module of its topic, and what they share in `enumerable`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.papers.exact_binary import binary
from benchmarks.papers.exact_bond import bond_iterative, bond_jeffreys
from benchmarks.papers.exact_curve import curve
from benchmarks.papers.exact_importance import other_policy
from benchmarks.papers.exact_interpolation import interpolation
from benchmarks.papers.exact_jbond import jbond_drift, jbond_gamma
from benchmarks.papers.exact_law import law
from benchmarks.papers.exact_noise import jbond_ema, weights
from benchmarks.papers.exact_off_policy import other_policy_gradient
from benchmarks.papers.exact_pairs import consistent_pairs
from benchmarks.papers.exact_quantiles import quantiles
from benchmarks.papers.exact_vbon import vbon
from benchmarks.papers.findings import Effort, Experiment, Finding

Run = Callable[[Effort, Callable[[float], None]], Finding]


def _on_one_thread(run: Run) -> Run:
    """Tensors here are small: threads would cost more than they bring."""

    def alone(effort: Effort, tell: Callable[[float], None]) -> Finding:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return run(effort, tell)
        finally:
            torch.set_num_threads(num_threads)

    return alone


EXPERIMENTS = tuple(
    Experiment(key, _on_one_thread(run))
    for key, run in {
        "law": law,
        "bond-jeffreys": bond_jeffreys,
        "bond-iterative": bond_iterative,
        "jbond-drift": jbond_drift,
        "jbond-gamma": jbond_gamma,
        "jbond-ema": jbond_ema,
        "quantiles": quantiles,
        "vbon": vbon,
        "binary": binary,
        "weights": weights,
        "consistent-pairs": consistent_pairs,
        "other-policy": other_policy,
        "other-policy-gradient": other_policy_gradient,
        "interpolation": interpolation,
        "n-curve": curve,
    }.items()
)
