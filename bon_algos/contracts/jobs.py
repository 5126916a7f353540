"""What a distillation is asked to do beside its method (`methods`), and what it found: job states, reports."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

from bon_algos.contracts.methods import Method, MethodName
from bon_algos.contracts.record import PolicyId, Record, RouteName
from bon_algos.contracts.training import TrainingSetup


class Window(Record):
    """Which part of the ledger a job learns from; frozen when the job starts."""

    max_groups: int = Field(20_000, ge=1, le=10_000_000)
    """The newest groups of the route, at most this many."""
    since: float | None = None
    until: float | None = None
    policies: tuple[PolicyId, ...] = Field((), max_length=8)
    """Published policies whose groups are learned from beside the reference's own, weighed as the reference's draws
    (`bon_algos.importance`). Only for methods that can weigh: `WEIGHING_METHODS`."""


WEIGHING_METHODS: Final[tuple[MethodName, ...]] = ("bon_forward_kl", "bon_regression", "offline_bond")
"""They learn from logged candidates whatever policy drew them, once it is known for how much each stands."""


class JobSpec(Record):
    """What `POST /distill` asks for."""

    route: RouteName = "default"
    method: Method
    training: TrainingSetup = TrainingSetup()
    window: Window = Window()
    n: int = Field(16, ge=2, le=4096)
    """The best-of-n that the finished policy stands in for."""
    held_out_fraction: float = Field(0.1, gt=0, lt=1)
    seed: int = Field(0, ge=0, lt=2**63)


JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
JobPhase = Literal["queued", "freezing", "training", "evaluating", "publishing", "done"]
FINAL_JOB_STATES: Final = ("succeeded", "failed", "cancelled")


class Interval(Record):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


class EvaluationReport(Record):
    """The policy against its reference on the window's held-out prompts, every sample drawn from the engine."""

    prompts: int
    samples_per_prompt: int
    reward_policy: Interval
    reward_reference: Interval
    reward_best_of_n: Interval
    """Expected reward of best-of-n of the reference, Rao–Blackwell over the same samples."""
    reward_gain: Interval
    """Paired by prompt: policy − reference, one sample each."""
    n: int
    gain_share: float
    """(policy − reference) / (best-of-n − reference)."""
    win_rate: Interval
    """P(policy > one sample of the reference) + half the ties."""
    kl_policy_reference: Interval
    """KL(policy ‖ reference) in nats per sequence, on the policy's own samples."""
    mean_tokens_policy: float
    mean_tokens_reference: float


class Fingerprint(Record):
    """Log-probs of fixed completions by which an engine proves that it serves this policy and no other."""

    prompt_token_ids: tuple[tuple[int, ...], ...]
    completion_token_ids: tuple[tuple[int, ...], ...]
    policy_logprobs: tuple[tuple[float, ...], ...]
    base_logprobs: tuple[tuple[float, ...], ...]


class DataWindow(Record):
    """What the job really learned from."""

    groups: int
    rejected: dict[str, int]
    train_groups: int
    held_out_groups: int
    first_id: str
    last_id: str
    digest: str
