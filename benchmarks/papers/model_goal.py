"""The goal on the demo's model: best-of-16's win rate with one sample, at little more than the least KL it can cost.

Owns the arms that go for it and what is claimed of them. Does not own how they are trained and judged (`model_jobs`,
`model_lab`) nor the form of tables (`model_findings`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from benchmarks import claims
from benchmarks.claims import Claim
from benchmarks.papers.findings import Effort, Finding, fields_of
from benchmarks.papers.model_findings import (
    COLUMNS,
    KL_LABEL,
    WIN_LABEL,
    Arm,
    Found,
    N,
    Tell,
    described,
    found,
    reference_rows,
    row,
    win_against_kl,
)
from bon_algos.contracts import Method

STEPS: Final[Mapping[Effort, int]] = {"quick": 8, "default": 60, "full": 60}
PROMPTS: Final = 64
"""A step."""
RANK: Final = 32
OFFLINE_LORA: Final = f"offline_bond, LoRA of rank {RANK}"
OFFLINE_WHOLE: Final = "offline_bond, all weights"
BOND_LORA: Final = f"bond, LoRA of rank {RANK}"
MOST_RATIO: Final = 1.4
"""1.25 is the aim; the remarks say how far from it we are."""
AIM: Final = 1.25


def arms_of(effort: Effort) -> dict[str, Arm]:
    """Each aims at an n a little above the one whose win rate it is to have."""
    steps = STEPS[effort]
    common = {"steps": steps, "prompts_per_step": PROMPTS, "averaged_steps": max(1, steps // 3)}
    offline = common | {"n": 24, "backward_n": 40, "token_kl_weight": 0.3, "interpolation": 1.0}
    bond = common | {"n": 24, "samples_per_prompt": 4, "imitation_steps": 2 * steps // 3, "prompts_per_step": 32}
    return {
        OFFLINE_LORA: _arm("offline_bond", offline | {"learning_rate": 2e-3, "lora_rank": RANK}),
        OFFLINE_WHOLE: _arm("offline_bond", offline | {"learning_rate": 5e-4}, all_weights=True),
        BOND_LORA: _arm("bond", bond | {"learning_rate": 2e-3, "lora_rank": RANK}),
    }


def _arm(name: str, spec: dict[str, float], *, all_weights: bool = False) -> Arm:
    return Arm(Method.model_validate({"type": name, name: spec}), all_weights)


def goal(effort: Effort, tell: Tell) -> Finding:
    seen = found(arms_of(effort), effort, tell)
    return Finding(
        title=f"The goal: best-of-{N}'s win rate with one sample",
        source="Ours; the frontier is BoNBoN's Theorem 1 up to .0092",
        method=f"As every method below, but {STEPS[effort]} steps of {PROMPTS} prompts (bond: 32), aimed at best-of-40 "
        "and imitating best-of-24, with a weight of .3 on every token's KL (bond: aimed at 24). "
        f"{described(effort, STEPS[effort])}",
        columns=COLUMNS,
        rows=(*reference_rows(seen.reference, seen.frontier), *(row(label, seen) for label in seen.arms)),
        claims=fields_of(reached(seen)) if effort != "quick" else (),
        remarks=distance(seen),
        x_label=KL_LABEL,
        y_label=WIN_LABEL,
        curves=win_against_kl(seen, list(seen.arms)),
    )


def reached(seen: Found) -> list[Claim]:
    """Of the arm that wins most often."""
    best = winner(seen)
    win = float(np.mean([one.win_rate for one in seen.last(best)]))
    return [
        claims.at_least(f"{best}: win rate less that of best-of-{N}", win - of_best_of_n(seen), 0.0),
        claims.at_most(f"{best}: KL ÷ frontier's at that win rate", float(np.mean(seen.ratios(best))), MOST_RATIO),
    ]


def distance(seen: Found) -> str:
    ratios = {label: float(np.mean(seen.ratios(label))) for label in seen.arms}
    ours = ", ".join(f"{label} {ratio:.2f}" for label, ratio in ratios.items())
    said = "reached" if min(ratios.values()) <= AIM else "not reached"
    return (
        f"The aim is best-of-{N}'s win rate at {AIM} times the frontier's KL: {said}. Here: {ours}. "
        "The rest is neither overfitting nor drift: on training prompts it is the same, and nearly all of the KL is in "
        "the law of ranks. What this model cannot do is rule bad answers out token by token, and the good ones make up "
        "for it (docs/log.md)."
    )


def winner(seen: Found) -> str:
    return max(seen.arms, key=lambda label: float(np.mean([one.win_rate for one in seen.last(label)])))


def of_best_of_n(seen: Found) -> float:
    return float(seen.frontier.win_rate[seen.frontier.n.index(N)])
