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
from bon_algos.contracts import Method, TokenBondSpec

STEPS: Final[Mapping[Effort, int]] = {"quick": 16, "default": 1120, "full": 1200}
PROMPTS: Final[Mapping[Effort, int]] = {"quick": 8, "default": 8, "full": 16}
"""Of a step."""
AIM: Final = 32
"""A policy ends below what it aims at, the farther the less it learned, and is to have the win rate of best-of-16."""
JUDGED_DRAWS: Final = 64
"""64 prompts × 64 leave a standard error of .012 in a ratio to the frontier's KL, and 64 × 256 draws of the reference
one of .016, which all arms share."""
RANK: Final = 32
LORA: Final = f"token_bond, LoRA of rank {TokenBondSpec().lora_rank}"
ONE_GROUP: Final = f"{LORA}, {N} candidates of a prompt"
WHOLE: Final = "token_bond, all weights"
OFFLINE_LORA: Final = f"offline_bond, LoRA of rank {RANK}"
MOST_RATIO: Final = 1.25


def arms_of(effort: Effort) -> dict[str, Arm]:
    """Full has a LoRA as POST /distill trains it, also from what one request for best-of-16 leaves of each prompt, and
    the best that learns from whole completions."""
    arms = {WHOLE: whole(effort)}
    if effort == "full":
        arms[LORA] = _arm("token_bond", _token(effort))
        arms[ONE_GROUP] = arms[LORA]._replace(candidates=N)
        arms[OFFLINE_LORA] = _arm("offline_bond", {**OFFLINE, "learning_rate": 2e-3, "lora_rank": RANK})
    return arms


def whole(effort: Effort) -> Arm:
    return _arm("token_bond", {**_token(effort), "learning_rate": 7e-4}, all_weights=True)


def _token(effort: Effort) -> dict[str, float]:
    """Full has the spec's defaults; the others fewer prompts a step, for the hour."""
    if effort == "full":
        return {"n": AIM}
    steps = STEPS[effort]
    return {
        "n": AIM,
        "steps": steps,
        "critic_share": 15 / 28,
        "critic_candidates": 16,
        "prompts_per_step": PROMPTS[effort],
        "averaged_steps": max(1, steps // 10),
    }


OFFLINE: Final[Mapping[str, float]] = {
    "n": 24,
    "steps": 60,
    "prompts_per_step": 32,
    "averaged_steps": 20,
    "backward_n": 28,
    "jeffreys_weight": 0.8,
    "token_kl_weight": 0.3,
    "candidates_per_prompt": 32,
    "interpolation": 1.0,
}
"""The best of the sixteen settings that were tried of the best method that looks at whole completions (docs/log.md)."""


def _arm(name: str, spec: Mapping[str, float], *, all_weights: bool = False) -> Arm:
    return Arm(Method.model_validate({"type": name, name: spec}), all_weights, judged_draws=JUDGED_DRAWS)


def goal(effort: Effort, tell: Tell) -> Finding:
    seen = found(arms_of(effort), effort, tell)
    return Finding(
        title=f"The goal: best-of-{N}'s win rate with one sample",
        source="Ours; the frontier is BoNBoN's Theorem 1 up to .0092",
        method=f"{described(effort, STEPS[effort], prompts=PROMPTS[effort], judged_draws=JUDGED_DRAWS)} "
        f"{settings(arms_of(effort))}",
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
    return f"{'; '.join(f'{label}: {listed}' for label, listed in own.items())}; all else the specs' defaults."


def reached(seen: Found) -> list[Claim]:
    """Of the arms that go for it by tokens."""
    return [claim for label in (LORA, WHOLE) if label in seen.arms for claim in reached_by(label, seen)]


def reached_by(label: str, seen: Found) -> list[Claim]:
    win = float(np.mean([one.win_rate for one in seen.last(label)]))
    ratio = float(np.mean(seen.ratios(label)))
    return [
        claims.at_least(f"{label}: win rate less that of best-of-{N}", win - of_best_of_n(seen), 0.0),
        claims.at_most(f"{label}: KL ÷ frontier's at that win rate, mean of seeds", ratio, MOST_RATIO),
    ]


def distance(seen: Found) -> str:
    ratios = {label: float(np.mean(seen.ratios(label))) for label in seen.arms}
    ours = ", ".join(f"{label} {ratio:.2f}" for label, ratio in ratios.items())
    return (
        f"KL in units of the frontier's at the win rate reached: {ours}; to be reached is {MOST_RATIO:g}, the aim is "
        "1.1. What is told of whole completions alone shifts each word's odds by the same amount whatever was said "
        "before it, and no such policy comes much nearer than offline_bond. What is left of token_bond's distance is "
        "its critic's, which sees some of a rank only when it is too late, and that one completion of a hundred that "
        "comes off every candidate's way, and has up to a tenth of all KL (docs/log.md)."
    )


def of_best_of_n(seen: Found) -> float:
    return float(seen.frontier.win_rate[seen.frontier.n.index(N)])
