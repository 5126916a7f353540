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
    SIZES,
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
from benchmarks.papers.model_jobs import Sizes
from bon_algos.contracts import Method

STEPS: Final[Mapping[Effort, int]] = {"quick": 8, "default": 60, "full": 60}
PROMPTS: Final = 32
"""Of a step."""
CANDIDATES: Final = 32
"""Of a prompt at its turn."""
GOAL_SIZES: Final[Mapping[Effort, Sizes]] = {
    "quick": SIZES["quick"],
    "default": SIZES["default"]._replace(judged_draws=128),
    "full": SIZES["full"]._replace(judged_draws=128, held_out_prompts=128, held_out_draws=512),
}
"""Four times as many samples as elsewhere: 64 × 32 leave a standard error of .017 in a ratio to the frontier's KL, and
64 × 256 draws of the reference one of .016, which all arms share. Full: .006 and .008."""
RANK: Final = 32
OFFLINE_LORA: Final = f"offline_bond, LoRA of rank {RANK}"
OFFLINE_WHOLE: Final = "offline_bond, all weights"
BOND_LORA: Final = f"bond, LoRA of rank {RANK}"
MOST_RATIO: Final = 1.3
"""1.25 is to be reached and 1.1 the aim; the remarks say how far from it we are."""


def arms_of(effort: Effort) -> dict[str, Arm]:
    """Each aims at an n a little above the one whose win rate it is to have."""
    steps = STEPS[effort]
    common = {"n": 24, "steps": steps, "prompts_per_step": PROMPTS, "averaged_steps": max(1, steps // 3)}
    offline = common | {
        "backward_n": 28,
        "jeffreys_weight": 0.8,
        "token_kl_weight": 0.3,
        "candidates_per_prompt": CANDIDATES,
        "interpolation": 1.0,
    }
    arms = {OFFLINE_LORA: _arm("offline_bond", offline | {"learning_rate": 2e-3, "lora_rank": RANK})}
    if effort == "full":  # half an hour each on two cores; `full-fine-tuning` has all weights in every run
        arms[OFFLINE_WHOLE] = _arm("offline_bond", offline | {"learning_rate": 5e-4}, all_weights=True)
        bond = common | {"samples_per_prompt": 4, "imitation_steps": 2 * steps // 3}
        arms[BOND_LORA] = _arm("bond", bond | {"learning_rate": 2e-3, "lora_rank": RANK})
    return arms


def _arm(name: str, spec: dict[str, float], *, all_weights: bool = False) -> Arm:
    return Arm(Method.model_validate({"type": name, name: spec}), all_weights)


def goal(effort: Effort, tell: Tell) -> Finding:
    sizes = GOAL_SIZES[effort]
    seen = found(arms_of(effort), effort, tell, sizes)
    return Finding(
        title=f"The goal: best-of-{N}'s win rate with one sample",
        source="Ours; the frontier is BoNBoN's Theorem 1 up to .0092",
        method=f"{described(effort, STEPS[effort], sizes, PROMPTS)} {settings(arms_of(effort))}",
        columns=COLUMNS,
        rows=(*reference_rows(seen.reference, seen.frontier), *(row(label, seen) for label in seen.arms)),
        claims=fields_of(reached(seen)) if effort != "quick" else (),
        remarks=distance(seen),
        x_label=KL_LABEL,
        y_label=WIN_LABEL,
        curves=win_against_kl(seen, list(seen.arms)),
    )


def settings(arms: Mapping[str, Arm]) -> str:
    """What each arm was given, in words."""
    given = {label: arm.method.algorithm.model_dump(exclude_unset=True) for label, arm in arms.items()}
    own = {label: ", ".join(f"{name} {value:g}" for name, value in spec.items()) for label, spec in given.items()}
    return f"{'; '.join(f'{label}: {listed}' for label, listed in own.items())}."


def reached(seen: Found) -> list[Claim]:
    last = seen.last(OFFLINE_LORA)
    win = float(np.mean([one.win_rate for one in last]))
    ratio = float(np.mean(seen.ratios(OFFLINE_LORA)))
    return [
        claims.at_least(f"{OFFLINE_LORA}: win rate less that of best-of-{N}", win - of_best_of_n(seen), 0.0),
        claims.at_most(f"{OFFLINE_LORA}: KL ÷ frontier's at that win rate, mean of seeds", ratio, MOST_RATIO),
    ]


def distance(seen: Found) -> str:
    ratios = {label: float(np.mean(seen.ratios(label))) for label in seen.arms}
    ours = ", ".join(f"{label} {ratio:.2f}" for label, ratio in ratios.items())
    return (
        f"KL in units of the frontier's at the win rate reached: {ours}; to be reached is 1.25. What is left is "
        "context: these policies shift each word's odds by the same amount whatever was said before it, and no such "
        "policy comes much nearer. Best-of-n asks for less of a good word after good ones; the demo's model, whose "
        "grammar draws words one without the other, learns that last (docs/log.md)."
    )


def of_best_of_n(seen: Found) -> float:
    return float(seen.frontier.win_rate[seen.frontier.n.index(N)])
