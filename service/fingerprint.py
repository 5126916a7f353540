"""Whether an engine that was given an adapter has the policy's weights: its log-probs against the trainer's.

Owns: the comparison and its limits. Does not own: asking the engine (publishing.py), writing fingerprints (the worker).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from bon_algos.contracts import Fingerprint, FingerprintResult

MIN_FINGERPRINT_TOKENS: Final = 256
MAX_SHARE_OF_BASE_DISTANCE: Final = 0.1
FLOAT32_TOLERANCE: Final = 1e-3
BFLOAT16_TOLERANCE: Final = 2e-2
"""Largest mean absolute log-prob difference between engine and trainer; nats."""


def compare_fingerprint(
    fingerprint: Fingerprint, engine_logprobs: Sequence[Sequence[float]], tolerance: float
) -> FingerprintResult:
    """Whether the engine's log-probs of the fixed completions are the policy's.

    Passed: at least MIN_FINGERPRINT_TOKENS, mean |engine − trainer| at most `tolerance` nats and at most a tenth
    of mean |policy − base|, the distance a missing adapter would show. ValueError when lengths do not agree.
    """
    trainer = _flat(fingerprint.policy_logprobs)
    engine = _flat(engine_logprobs)
    base = _flat(fingerprint.base_logprobs)
    for mine, theirs in zip(fingerprint.completion_token_ids, engine_logprobs, strict=True):
        if len(mine) != len(theirs):
            raise ValueError("the engine did not score every token of a completion")
    if not len(trainer) == len(base) == len(engine):
        raise ValueError("the fingerprint's log-probs do not match its tokens")
    difference = float(np.abs(engine - trainer).mean()) if len(trainer) else 0.0
    distance = float(np.abs(trainer - base).mean()) if len(trainer) else 0.0
    reason = ""
    if len(trainer) < MIN_FINGERPRINT_TOKENS:
        reason = f"the fingerprint has {len(trainer)} tokens, {MIN_FINGERPRINT_TOKENS} are needed"
    elif not difference <= tolerance:
        reason = f"the engine is {difference:.2g} nats from the trainer, {tolerance:.2g} are allowed"
    elif not difference <= MAX_SHARE_OF_BASE_DISTANCE * distance:
        reason = f"the engine is {difference:.2g} nats from the trainer and the base is only {distance:.2g} away"
    return FingerprintResult(
        passed=not reason,
        tokens=len(trainer),
        mean_abs_difference=difference,
        mean_abs_base_distance=distance,
        reason=reason,
    )


def is_the_base(fingerprint: Fingerprint, engine_logprobs: Sequence[Sequence[float]], tolerance: float) -> bool:
    """Whether the engine's log-probs of the fixed completions are those of the base the policy was trained on."""
    engine, base = _flat(engine_logprobs), _flat(fingerprint.base_logprobs)
    return len(engine) == len(base) and bool(np.abs(engine - base).mean() <= tolerance)


def _flat(rows: Sequence[Sequence[float]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([value for row in rows for value in row], dtype=np.float64)
