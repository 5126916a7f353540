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

STEPS: Final[Mapping[Effort, int]] = {"quick": 8, "default": 110, "full": 200}
PROMPTS: Final = 32
"""A step."""
AIMED_AT: Final = 24
"""The n; every arm lands a little below what it aims at."""
MOST_RATIO: Final = 1.25


def arms_of(effort: Effort) -> dict[str, Arm]:
    steps = STEPS[effort]
    common = {"steps": steps, "prompts_per_step": PROMPTS, "learning_rate": 3e-3}
    bond = common | {"n": AIMED_AT, "imitation_steps": steps // 2, "averaged_steps": 2 * steps // 5}
    offline = common | {"backward_n": AIMED_AT, "averaged_steps": 2 * steps // 5}
    return {
        "bond, LoRA": _arm("bond", bond),
        "bond, all weights": _arm("bond", bond | {"learning_rate": 1e-3}, all_weights=True),
        "offline_bond, LoRA": _arm("offline_bond", offline),
        "bon_forward_kl, LoRA": _arm("bon_forward_kl", common | {"candidates_per_prompt": 8}),
    }


def _arm(name: str, spec: dict[str, float], *, all_weights: bool = False) -> Arm:
    return Arm(Method.model_validate({"type": name, name: spec}), all_weights)


def goal(effort: Effort, tell: Tell) -> Finding:
    seen = found(arms_of(effort), effort, tell)
    return Finding(
        title=f"The goal: best-of-{N}'s win rate with one sample",
        source="Ours; the frontier is BoNBoN's Theorem 1 up to .0092",
        method=f"As every method below, but {STEPS[effort]} steps of {PROMPTS} prompts, aimed at best-of-{AIMED_AT}. "
        f"{described(effort)}",
        columns=COLUMNS,
        rows=(*reference_rows(seen.reference, seen.frontier), *(row(label, seen) for label in seen.arms)),
        claims=fields_of(reached(seen)) if effort != "quick" else (),
        remarks="",
        x_label=KL_LABEL,
        y_label=WIN_LABEL,
        curves=win_against_kl(seen, list(seen.arms)),
    )


def reached(seen: Found) -> list[Claim]:
    """Of the arm that wins most often."""
    best = max(seen.arms, key=lambda label: float(np.mean([one.win_rate for one in seen.last(label)])))
    win = float(np.mean([one.win_rate for one in seen.last(best)]))
    of_best_of_n = float(seen.frontier.win_rate[seen.frontier.n.index(N)])
    return [
        claims.at_least(f"{best}: win rate less that of best-of-{N}", win - of_best_of_n, 0.0),
        claims.at_most(f"{best}: KL ÷ frontier's at that win rate", float(np.mean(seen.ratios(best))), MOST_RATIO),
    ]
