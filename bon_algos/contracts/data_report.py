"""What a dry run tells of the data that a job would learn from."""

from __future__ import annotations

from bon_algos.contracts.record import Record


class Spread(Record):
    """Of some numbers."""

    count: int
    least: float
    median: float
    mean: float
    most: float


class RewardDistribution(Record):
    """Of the accepted candidates' rewards."""

    count: int
    mean: float
    standard_deviation: float
    quantiles: dict[str, float]
    """By share in percent: 0, 5, 25, 50, 75, 95, 100."""
    edges: tuple[float, ...]
    """Of the histogram; one more than counts."""
    counts: tuple[int, ...]


class Leakage(Record):
    """What the held-out prompts have in common with those learned from."""

    prompts: int
    """Held out that are learned from too."""
    sessions: int
    """With groups on both sides."""
    near_duplicates: int
    """Held-out prompts that share at least eight tenths of their word triples with one that is learned from."""
    held_out_prompts: int


class GainPoint(Record):
    """What best-of-k earns in the mean over prompts."""

    k: int
    reward: float
    gain: float
    """Over one sample."""
    gain_low: float
    """The lower end of its 95 % interval over prompts."""


class Trouble(Record):
    """Why a job with this data would fail."""

    code: str
    message: str


class DataReport(Record):
    """The data that a job would learn from, as the worker would choose it."""

    groups_read: int
    is_whole: bool
    """Everything in the window was read; otherwise the newest part, and all numbers are of that."""
    accepted: int
    rejected: dict[str, int]
    """By reason, prompts that have too few candidates included."""
    policies: dict[str, int]
    """Accepted candidates by who drew them. What those of others than the reference are worth takes both policies'
    log-probs, so the job tells."""
    train_prompts: int
    held_out_prompts: int
    groups_per_prompt: Spread | None
    candidates_per_prompt: Spread | None
    rewards: RewardDistribution | None
    """None: there are none yet, the job has them measured."""
    tied_pairs: float | None
    """Share of the pairs of a prompt's candidates that have one reward."""
    prompts_all_tied: float | None
    """Share of prompts with nothing to choose among."""
    effective_n: float | None
    """The n without ties whose best-of-n is as far from the reference, in KL, as that of these candidates."""
    curve: tuple[GainPoint, ...]
    is_there_gain: bool | None
    """Whether the last point's gain is above 0 beyond doubt; None: it is not known."""
    leakage: Leakage | None
    would_fail: tuple[Trouble, ...]
