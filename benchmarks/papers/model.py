"""The papers' claims on a language model: the demo's, 2.9 M parameters, with its reward model and its gold reward.

Owns the experiments, their settings and what is claimed of them. Does not own drawing, training or judging
(`model_lab`, `model_jobs`), the form of tables (`model_findings`) nor the report (`__main__`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from benchmarks import claims
from benchmarks.claims import Claim
from benchmarks.papers import model_goal
from benchmarks.papers.findings import Curve, Effort, Experiment, Finding, fields_of
from benchmarks.papers.model_findings import (
    COLUMNS,
    KL_LABEL,
    MANY_STEPS,
    SHARE_LABEL,
    STEPS,
    WIN_LABEL,
    Arm,
    Found,
    N,
    Seeds,
    Tell,
    cell,
    described,
    found,
    points,
    reference_rows,
    reward_frontier,
    row,
    share_against_kl,
    win_against_kl,
)
from benchmarks.papers.model_lab import COMPARED_DRAWS, Judged, distinct_2, lengths_of
from benchmarks.papers.model_verdicts import OffTarget, Reached, bonbon_verdict, j_bond_verdict, pooling_verdict
from bon_algos.contracts import Method
from bon_algos.contracts.methods import METHOD_NAMES, MethodName

ANCHOR_RATE: Final = 0.05
"""η of J-BOND: one of the published, and fast enough for the steps there are."""
SETTINGS: Final[Mapping[str, Mapping[str, object]]] = {
    "iterative_bond": {"n": 4},
    "jbond": {"learning_rate": 1e-2, "anchor_rate": ANCHOR_RATE},
    "rloo": {"learning_rate": 1e-3},
    **{name: {"learning_rate": 1e-3} for name in ("dpo", "ipo", "bonbon", "bonbon_consistent", "bon_regression")},
}
"""Where they differ from a rate of `LEARNING_RATE` and the specs' defaults. Methods that push log-probs of logged
completions down take the end of sequence with them at that rate, and the policy never stops talking; at a third of it
they are near best-of-16's win rate in these steps, and at a tenth still at the reference. RLOO overshoots at it (4 nats
after 16 steps, and one seed of three never came back)."""
LEARNING_RATE: Final = 3e-3
ALL_WEIGHTS_RATE: Final = 3e-4
RLOO_STRENGTHS: Final = (0.1, 0.25, 0.5, 1.0)
TOKEN_BOND: Final = "token_bond, as in the goal"
"""It needs hundreds of steps: before its critic knows something, it learns nothing."""
MOST_BELOW: Final = 0.87
"""Best-of-n is optimal up to .0092 of win rate, worst at n = 2 (BoNBoN; algorithms.md 1.5): there the least possible KL
is .87 of best-of-n's."""


def method_of(name: MethodName, steps: int, **changes: object) -> Method:
    """A method at the benchmark's settings, with changes."""
    given: dict[str, object] = {"steps": steps, "learning_rate": LEARNING_RATE}
    if name == "bond":
        given |= {"imitation_steps": steps // 2, "averaged_steps": max(1, 2 * steps // 5)}
    if name == "iterative_bond":
        given |= {"anchor_steps": max(1, steps // 4)}
    return Method.model_validate({"type": name, name: given | dict(SETTINGS.get(name, {})) | changes})


def settings() -> str:
    """In words, for a report."""
    others = "; ".join(
        f"{name} {', '.join(f'{field} {value:g}' for field, value in own.items())}" for name, own in SETTINGS.items()
    )
    return (
        f"Learning rate {LEARNING_RATE:g}, but {others}; iterative BOND in four rounds, BOND with half of its steps "
        "imitating and two fifths averaged; all else the specs' defaults. Where a setting differs it was the better of "
        "two to four that were tried with one seed on these held-out prompts, which favours those methods."
    )


# --- every method ----------------------------------------------------------------------------------------


def every_method(effort: Effort) -> dict[str, Arm]:
    """The longest first, for two at a time."""
    return {TOKEN_BOND: model_goal.whole(effort)} | {
        name: Arm(method_of(name, STEPS[effort])) for name in METHOD_NAMES if name != "token_bond"
    }


def methods(effort: Effort, tell: Tell) -> Finding:
    seen = found(every_method(effort), effort, tell)
    return Finding(
        title=f"Every method, n = {N}: win rate against KL",
        source="BOND Fig. 7, vBoN Fig. 1, BoNBoN Fig. 1",
        method=f"{described(effort, STEPS[effort])} {settings()} Token BOND has the steps, all weights and 64 samples "
        "that the goal has.",
        columns=COLUMNS,
        rows=(*reference_rows(seen.reference, seen.frontier), *(row(label, seen) for label in seen.arms)),
        claims=fields_of(not_below_frontier(seen)),
        remarks="The frontier lies within .0092 of the highest win rate that any policy has at its KL, so nothing can "
        "lie far above it; how far below a method lies is the KL it wastes. " + ranked(seen),
        x_label=KL_LABEL,
        y_label=WIN_LABEL,
        curves=win_against_kl(seen, list(seen.arms)),
    )


def methods_by_reward(effort: Effort, tell: Tell) -> Finding:
    seen = found(every_method(effort), effort, tell)
    rows = [(label, *(cell(values, 2) for values in rewards_of(seen.last(label)))) for label in seen.arms]
    return Finding(
        title=f"Every method, n = {N}: reward against KL",
        source="BOND Fig. 7, vBoN Fig. 1",
        method="The policies of the picture of win rates.",
        columns=("policy", "reward", "gold", "half of KL's interval over prompts, nats"),
        rows=tuple(rows),
        claims=fields_of(not_below_frontier(seen)),
        remarks="The reward model overrates enthusiasm: the gold reward says what a gain is worth.",
        x_label=KL_LABEL,
        y_label=SHARE_LABEL,
        curves=share_against_kl(seen, list(seen.arms)),
    )


def rewards_of(last: list[Judged]) -> tuple[list[float], ...]:
    return [one.reward for one in last], [one.gold for one in last], [one.kl_error for one in last]


def ratio_beyond_doubt(seen: Found, label: str) -> float:
    """Highest KL ÷ frontier's that the noise allows an arm, mean of its seeds; NaN for an arm that hardly wins."""
    return float(np.mean([seen.ratio(one) * (one.kl + one.kl_error) / one.kl for one in seen.last(label)]))


def not_below_frontier(seen: Found) -> list[Claim]:
    """Nothing to claim where no arm has left the reference."""
    ratios = [ratio for label in seen.arms if np.isfinite(ratio := ratio_beyond_doubt(seen, label))]
    name = "least KL ÷ frontier's at the win rate reached, of all arms, upper 95 % bound"
    return [claims.at_least(name, min(ratios), MOST_BELOW)] if ratios else []


def ranked(seen: Found) -> str:
    """The arms that win at least three times in four, by what their win rate costs."""
    costs = {
        label: float(np.mean(seen.ratios(label)))
        for label in seen.arms
        if float(np.mean([one.win_rate for one in seen.last(label)])) >= 0.75
    }
    beyond = [label for label, cost in costs.items() if not np.isfinite(cost)]
    order = sorted(costs.keys() - beyond, key=lambda label: costs[label])
    found_ = ", ".join([f"{label} {costs[label]:.2f}" for label in order] + [f"{one} beyond its end" for one in beyond])
    return f"KL in units of the frontier's, of those that win three times in four: {found_ or 'none'}."


# --- quantiles of a regression ---------------------------------------------------------------------------

OWN_GROUP: Final = "regression, 16 candidates, counted among them"
POOLED: Final = "regression, 16 candidates, counted among all logged"
LEARNED: Final = "regression, 16 candidates, learned law"


def regression(effort: Effort, tell: Tell) -> Finding:
    steps = STEPS[effort]
    method, imitation = method_of("bon_regression", steps), method_of("bon_forward_kl", steps)
    arms = {
        OWN_GROUP: Arm(method, candidates=N),
        POOLED: Arm(method, candidates=N, targets="pooled"),
        LEARNED: Arm(method, candidates=N, targets="learned"),
    }
    if effort == "full":
        arms |= {
            "regression, all logged candidates": Arm(method),
            "forward KL, 16 candidates": Arm(imitation, candidates=N),
            "forward KL, all logged candidates": Arm(imitation),
        }
    seen = found(arms, effort, tell)
    return Finding(
        title="Regression from logs: where its quantiles come from",
        source="Ours; log-quantile regression (QRPO, arXiv:2507.08068), learned quantiles (BOND, B.1)",
        method="Three regressions learn from the same 16 candidates of each prompt and differ in their targets alone: "
        "counted among those 16, counted among all that are logged, or by a law of rewards learned from other prompts' "
        f"16 (of the reference's last hidden state of the prompt; four folds). {described(effort, steps)} {settings()}",
        columns=COLUMNS,
        rows=tuple(row(label, seen) for label in arms),
        claims=fields_of(not_below_frontier(seen)),
        remarks=pooling_verdict(*(Reached(seen.last(one), seen.ratios(one)) for one in (OWN_GROUP, POOLED, LEARNED)))
        + " A regression holds only what was drawn: what it pushes off bad candidates may land where no candidate is, "
        "which its KL shows and its loss does not.",
        x_label=KL_LABEL,
        y_label=WIN_LABEL,
        curves=win_against_kl(seen, list(arms)),
    )


# --- J-BOND against RLOO ---------------------------------------------------------------------------------


def j_bond(effort: Effort, tell: Tell) -> Finding:
    steps = MANY_STEPS[effort]
    arms = {"J-BOND": Arm(method_of("jbond", steps))}
    arms |= {f"RLOO, β = {beta:g}": Arm(method_of("rloo", steps, kl_strength=beta)) for beta in RLOO_STRENGTHS}
    seen = found(arms, effort, tell)
    return Finding(
        title="J-BOND against RLOO at four KL strengths, over steps",
        source="BOND §6, Fig. 7",
        method="Every line is one policy over its steps, mean of the seeds, judged at each third. "
        f"{described(effort, steps)} {settings()}",
        columns=("policy", "steps", "share of gain, %", "win rate, %", "KL, nats", "KL ÷ frontier's"),
        rows=tuple(line for label in arms for line in over_steps(label, seen)),
        claims=fields_of([*not_below_frontier(seen), drift_rate(seen)]),
        remarks=f"{against_rloo(seen)} {ranked(seen)} The paper has J-BOND above all four strengths at every KL. Its "
        f"anchor moves by {ANCHOR_RATE} a step, so that its KL rises by at most as many nats a step in the long run.",
        x_label=KL_LABEL,
        y_label=SHARE_LABEL,
        curves=(reward_frontier(seen.frontier), *(path(label, seen) for label in arms)),
    )


def against_rloo(seen: Found) -> str:
    best, rloo = reward_frontier(seen.frontier), {**seen.arms}
    roots = np.sqrt(np.maximum(best.x, 0.0))
    return j_bond_verdict(rloo.pop("J-BOND"), rloo, lambda kl: float(np.interp(max(kl, 0.0) ** 0.5, roots, best.y)))


def drift_rate(seen: Found) -> Claim:
    """The drift law (algorithms.md 1.3): KL rises by no more than η a step; less what the noise of both ends allows."""
    rates = []
    for *_, before, after in seen.arms["J-BOND"]:
        noise = float(np.hypot(before.kl_error, after.kl_error))
        rates.append((after.kl - before.kl - noise) / (after.step - before.step))
    name = "J-BOND: nats a step over the last third, lower 95 % bound, mean of seeds"
    return claims.at_most(name, float(np.mean(rates)), ANCHOR_RATE)


def at_mark(seeds: Seeds, mark: int) -> list[Judged]:
    return [judgements[mark] for judgements in seeds]


def over_steps(label: str, seen: Found) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for mark, first in enumerate(seen.arms[label][0]):
        here = at_mark(seen.arms[label], mark)
        ratios = [seen.ratio(one) for one in here]
        shares, wins = [one.gain_share for one in here], [one.win_rate for one in here]
        kl = cell([one.kl for one in here], 2)
        rows.append((label, str(first.step), cell(shares, 1, 100), cell(wins, 1, 100), kl, cell(ratios, 2)))
    return rows


def path(label: str, seen: Found) -> Curve:
    means = [at_mark(seen.arms[label], mark) for mark in range(len(seen.arms[label][0]))]
    x = [float(np.mean([one.kl for one in here])) for here in means]
    y = [float(np.mean([one.gain_share for one in here])) for here in means]
    return points(label, [0.0, *x], [0.0, *y], is_line=True)


# --- BoNBoN ----------------------------------------------------------------------------------------------


BONBON: Final = "BoNBoN, α = .005"


def bonbon(effort: Effort, tell: Tell) -> Finding:
    ns = (2, 4, 8, 16) if effort == "full" else (N,)
    arms = {f"{label}, n = {n}": arm for n in ns for label, arm in on_pairs(effort, n).items()}
    seen = found(arms, effort, tell)
    return Finding(
        title="BoNBoN: win rate against off-target drift",
        source="BoNBoN §5, Fig. 1 and Table 1",
        method="The best and the worst of n logged candidates. Off target: length, and different pairs of words. "
        f"{described(effort, STEPS[effort])} {settings()}",
        columns=COLUMNS,
        rows=(*reference_rows(seen.reference, seen.frontier), *(row(label, seen) for label in arms)),
        claims=fields_of(not_below_frontier(seen)),
        remarks=" ".join(drift_of_bonbon(seen, n) for n in ns) + " Published: BoNBoN near best-of-n's win rate with "
        "the least change of length. " + ranked(seen),
        x_label="tokens of a completion",
        y_label=WIN_LABEL,
        curves=tuple(win_against_length(label, seen) for label in arms),
    )


def drift_of_bonbon(seen: Found, n: int) -> str:
    texts = [group[:COMPARED_DRAWS] for group in seen.reference.texts]
    best = float(seen.frontier.win_rate[seen.frontier.n.index(n)])
    reference = OffTarget(best, float(lengths_of(seen.reference).mean()), distinct_2(texts))
    others = {label: seen.last(f"{label}, n = {n}") for label in ("SFT on the best", "DPO", "IPO")}
    return f"n = {n}: {bonbon_verdict(seen.last(f'{BONBON}, n = {n}'), others, reference)}"


def win_against_length(label: str, seen: Found) -> Curve:
    last = seen.last(label)
    x, y = tuple(one.length for one in last), tuple(one.win_rate for one in last)
    return Curve(label=label, x=x, y=y, is_line=False)


def on_pairs(effort: Effort, n: int) -> dict[str, Arm]:
    return {
        BONBON: Arm(method_of("bonbon", STEPS[effort], n=n)),
        "BoNBoN, α = .5": Arm(method_of("bonbon", STEPS[effort], n=n, imitation_weight=0.5)),
        "BoNBoN, each pair's own target": Arm(method_of("bonbon_consistent", STEPS[effort], n=n)),
        "SFT on the best": Arm(method_of("bon_sft", STEPS[effort], n=n)),
        "DPO": Arm(method_of("dpo", STEPS[effort], n=n)),
        "IPO": Arm(method_of("ipo", STEPS[effort], n=n)),
    }


# --- full fine-tuning ------------------------------------------------------------------------------------


def full_fine_tuning(effort: Effort, tell: Tell) -> Finding:
    names: tuple[MethodName, ...] = ("bon_forward_kl", "bon_sft") if effort == "full" else ("bon_forward_kl",)
    arms = {f"{name}, LoRA of rank 8": Arm(method_of(name, STEPS[effort])) for name in names}
    arms |= {
        f"{name}, all weights": Arm(method_of(name, STEPS[effort], learning_rate=ALL_WEIGHTS_RATE), all_weights=True)
        for name in names
    }
    seen = found(arms, effort, tell)
    return Finding(
        title="All weights against LoRA",
        source="Ours",
        method=f"All weights at a rate of {ALL_WEIGHTS_RATE:g}. {described(effort, STEPS[effort])} {settings()}",
        columns=COLUMNS,
        rows=tuple(row(label, seen) for label in arms),
        claims=fields_of(not_below_frontier(seen)),
        remarks=ranked(seen),
        x_label=KL_LABEL,
        y_label=WIN_LABEL,
        curves=win_against_kl(seen, list(arms)),
    )


EXPERIMENTS: Final = (
    Experiment("methods", methods),
    Experiment("methods-reward", methods_by_reward),
    Experiment("goal", model_goal.goal),
    Experiment("regression", regression),
    Experiment("jbond-rloo", j_bond),
    Experiment("bonbon", bonbon),
    Experiment("full-fine-tuning", full_fine_tuning),
)
