"""Targets of a regression that are not counted among the candidates learned from: counted among more, or learned.

Owns a step that regresses on given targets. Does not own their estimation (`bon_algos.quantiles`,
`worker.quantile_model`) nor the loss (`bon_algos.regression`).

Dimension key:  B prompts · N candidates per prompt
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from torch import Tensor

from benchmarks.papers.model_lab import Array
from bon_algos.contracts import BonRegressionSpec
from bon_algos.logged_steps import regress
from bon_algos.logprobs import TokenGroup
from bon_algos.order import systematic_sample
from bon_algos.steps import ChosenGroup, LoggedGroup, LoggedStep


def targeted_step(spec: BonRegressionSpec, prompt_ids: list[list[int]], log_tilt_BN: Tensor) -> LoggedStep:
    """The method's step, with these targets for each prompt's first N candidates."""
    target_of = {tuple(ids): row.numpy() for ids, row in zip(prompt_ids, log_tilt_BN, strict=True)}
    choose = partial(_choose_targeted, target_of=target_of, count=spec.candidates_per_prompt)
    return LoggedStep(choose, partial(regress, huber_delta=spec.huber_delta))


def _choose_targeted(
    group: LoggedGroup, uniform: float, *, target_of: Mapping[tuple[int, ...], Array], count: int
) -> ChosenGroup:
    num_candidates = len(group.rewards)
    drawn = np.flatnonzero(systematic_sample(np.full(num_candidates, 1 / num_candidates), count, uniform))
    return ChosenGroup(
        TokenGroup(group.tokens.prompt_ids, [group.tokens.completion_ids[j] for j in drawn]),
        target_of[tuple(group.tokens.prompt_ids)][drawn].tolist(),
        [group.reference_logprobs[j] for j in drawn],
    )
