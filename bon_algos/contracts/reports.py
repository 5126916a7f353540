"""The whole report of a policy on held-out prompts: the record behind `report.json`, the model card and the figure.

Owns its form. Does not own the summary that stands in the manifest (`jobs.EvaluationReport`) nor any estimate.
Rewards are in the reward model's own units, KLs in nats per completion, lengths in the policy's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Final

from bon_algos.contracts.jobs import Interval
from bon_algos.contracts.record import SCHEMA_VERSION, PolicyId, Record, RouteName

REPORT_FILES: Final = ("README.md", "report.json", "report.png")
"""What stands in `reports/<digest>`; nothing else does."""


def report_digest(files: Mapping[str, str]) -> str:
    """The digest that names a report's directory, from file name -> sha256: sha256 over the lines `name sha256`."""
    return sha256("".join(f"{name} {files[name]}\n" for name in sorted(files)).encode()).hexdigest()


class HeldOut(Record):
    """Which prompts the report is about, and the proof that nothing was trained on them."""

    prompts: int
    samples_per_prompt: int
    """Drawn for this report, of the policy and of the reference each."""
    reference_draws: tuple[int, int]
    """Fewest and most draws of the reference for one prompt: the fresh ones and those that the ledger held."""
    trained_prompts: int
    """Of the policy and of all its ancestors, but the unknown ones."""
    ancestors: tuple[PolicyId, ...]
    """Policies that this one was made from or learned from, and theirs."""
    unknown_ancestors: tuple[PolicyId, ...] = ()
    """Those of them that were imported, or deleted: what they were trained on is not known here."""
    seen_in_training: int
    """Held-out prompts among the trained ones, counted token by token."""


class Sides(Record):
    """A number of the policy beside the same number of the reference."""

    policy: Interval
    reference: Interval


class MaybeSides(Record):
    """None: there was nothing to measure, such as n-grams of empty completions."""

    policy: Interval | None
    reference: Interval | None


class Rewards(Record):
    """What one reward model says of one sample of each, and of what best-of-n serves."""

    reward_model_id: str
    policy: Interval
    reference: Interval
    best_of_n: Interval
    """Of the reference; chosen by the reward model that serves, whichever this one is."""
    gain: Interval
    """policy − reference, paired by prompt."""
    gain_share: Interval | None
    """gain / (best-of-n − reference). None where best-of-n gains nothing."""


class Lengths(Record):
    """Tokens of a completion."""

    policy: Interval
    reference: Interval
    best_of_n: Interval
    difference: Interval
    """policy − reference, paired by prompt."""
    p90_policy: float
    p90_reference: float


class Refusals(Record):
    """What the detector of `bon_algos.refusals` says."""

    share: Interval | None
    """Of the completions that it can judge. None when it can judge none, or those of one prompt only."""
    judged: int
    unjudged: int
    """Too short, or not in English: nothing is said of them."""


class Cost(Record):
    """Tokens for one answer. Prompts are the policy's and computed once, whatever n is."""

    generated_policy: float
    generated_best_of_n: float
    scored_best_of_n: float
    """Read by the reward model to choose: prompt and completion of n candidates, for each of its members. In the
    policy's tokens. The single sample is served without."""
    cheaper: float | None
    """Generated tokens of best-of-n for one of the policy. None where the policy generates none."""


class FrontierPoint(Record):
    """Best-of-k of the reference, exact for the draws at hand: the mean over all ways to pick k of them."""

    k: int
    reward: Interval
    win_rate: Interval
    """Against one other draw of the reference, half the ties."""
    kl: float
    """Estimate that knows of ties; at most `kl_bound`."""
    kl_bound: float
    """log k − (k − 1)/k."""
    judge: Interval | None
    """What the second reward model says of what the first one chose; of the fresh draws, so not for every k."""


class Standing(Record):
    """Where the policy stands beside the frontier."""

    frontier_kl: Interval | None
    """KL of best-of-k at the policy's own win rate; between two k that of choosing one of them at random."""
    kl_ratio: Interval | None
    """The policy's KL divided by that: 1 is as cheap as best-of-n, above 1 dearer."""
    note: str
    """Why there is no ratio; empty when there is one."""


class PolicyReport(Record):
    """A policy on prompts that neither it nor any ancestor was trained on."""

    schema_version: int = SCHEMA_VERSION
    policy_id: PolicyId
    base_policy_id: PolicyId
    parent_policy_id: PolicyId
    reference_policy_id: PolicyId | None = None
    """Whose samples it is compared to; None: the base's."""
    job_id: str
    route: RouteName
    method: str
    created_at: float
    seed: int
    n: int
    """The best-of-n it was distilled to replace."""
    intervals: str
    """How the 95 % intervals were made."""
    held_out: HeldOut
    reward: Rewards
    judge: Rewards | None
    """The same by a reward model that neither chose nor trained."""
    judge_note: str
    """Why there is none, or what it could not score; empty otherwise."""
    win_rate_reference: Interval
    """P(policy > one draw of the reference) + half the ties."""
    win_rate_best_of_n: Interval
    """P(policy > what best-of-n of the reference serves) + half the ties."""
    kl_policy_reference: Interval
    kl_policy_base: Interval | None = None
    """To the base model; None where that is the reference."""
    log_quantile: Sides
    """Mean log of the share of the reference's rewards below: −1 for the reference itself and −1/n for best-of-n where
    no rewards tie, at most 0."""
    lengths: Lengths
    distinct: tuple[MaybeSides, ...]
    """Distinct-1, -2, -3: of all token n-grams of a prompt's completions, the share that are different."""
    finish_reasons_policy: dict[str, float]
    finish_reasons_reference: dict[str, float]
    """Shares."""
    refusals_policy: Refusals
    refusals_reference: Refusals
    cost: Cost
    frontier: tuple[FrontierPoint, ...]
    """k = 1 first."""
    standing: Standing
