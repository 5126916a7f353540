"""What a distillation is asked to do beside its method (`methods`), and what it found: phases, reports."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, ValidationInfo, field_validator

from bon_algos.contracts.job_states import JobPriority
from bon_algos.contracts.method_families import MOST_N
from bon_algos.contracts.methods import Method, MethodName
from bon_algos.contracts.record import FileId, PolicyId, Record, RouteName, Tag
from bon_algos.contracts.training import TrainingSetup

FeedbackName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
"""Which question feedback answers."""


class FeedbackFilter(Record):
    """Only replies that people said something about; of one author's answers to one question the newest counts."""

    name: FeedbackName | None = None
    """The question; left out: any."""
    at_least: float | None = Field(None, ge=-1e9, le=1e9)
    """The mean of what was said, true being 1 and false 0; categories do not count."""


class Window(Record):
    """Which part of the ledger a job learns from; frozen when the job starts."""

    max_groups: int = Field(20_000, ge=1, le=10_000_000)
    """The newest groups of the route, at most this many."""
    since: float | None = None
    until: float | None = None
    routes: tuple[RouteName, ...] = Field((), fail_fast=True, max_length=8)
    """Routes of the tenant whose groups are read; left out: the job's own. Groups that another reward model scored are
    rejected whatever their route."""
    tags: tuple[Tag, ...] = Field((), fail_fast=True, max_length=8)
    """Only groups that have all of these: `metadata.tags` of their requests."""
    feedback: FeedbackFilter | None = None
    policies: tuple[PolicyId, ...] = Field((), fail_fast=True, max_length=8)
    """Published policies whose groups are learned from beside the reference's own, weighed as the reference's draws
    (`bon_algos.importance`). Only for methods that can weigh: `WEIGHING_METHODS`."""


WEIGHING_METHODS: Final[tuple[MethodName, ...]] = ("bon_forward_kl", "bon_regression", "offline_bond")
"""They learn from logged candidates whatever policy drew them, once it is known for how much each stands."""


ANY_LAW_METHODS: Final[tuple[MethodName | Literal["interpolation"], ...]] = (
    "bon_sft", "dpo", "ipo", "jbond", "iterative_bond", "rloo", "interpolation",
)  # fmt: skip
"""They learn from a file's completions whoever wrote them: of some they imitate or compare, whatever law they are draws
of; of others they use the prompts alone. What the other methods estimate holds for the reference's own draws."""

Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
JobMetadata = dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]]
"""The caller's own pairs; OpenAI's limits."""


class JobSpec(Record):
    """What `POST /distill` asks for."""

    route: RouteName = "default"
    n: int = Field(16, ge=2, le=MOST_N)
    """The best-of-n that the finished policy stands in for."""
    method: Method
    training: TrainingSetup = TrainingSetup()
    window: Window = Window()
    training_file: FileId | None = None
    """Learn from this file (`/v1/files`) instead of the ledger; of the window `max_groups` and `policies` count."""
    held_out_fraction: float = Field(0.1, gt=0, lt=1)
    seed: int = Field(0, ge=0, lt=2**63)
    priority: JobPriority = "normal"
    """A free worker takes the class that is highest; within one, the job that came first."""
    suffix: Label | None = None
    """A label for people; policies are named by their digest."""
    metadata: JobMetadata = Field(default_factory=dict, max_length=16)

    @field_validator("method")
    @classmethod
    def aims_at_n(cls, method: Method, so_far: ValidationInfo) -> Method:
        return method.towards(so_far.data["n"]) if "n" in so_far.data else method

    @property
    def policies(self) -> tuple[PolicyId, ...]:
        """Published policies that the job needs."""
        interpolated = () if self.method.interpolation is None else (self.method.interpolation.policy,)
        start = () if self.training.start_from == "base" else (self.training.start_from,)
        return (*self.window.policies, *interpolated, *start)

    def reference_policy(self, base_policy: str) -> str:
        """Whose draws the job learns from, and to whom it is compared. base_policy: of the route."""
        setup = self.training
        return base_policy if setup.reference == "base" or setup.start_from == "base" else setup.start_from


JobPhase = Literal["queued", "freezing", "training", "evaluating", "publishing", "done"]


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
    kl_policy_base: Interval | None = None
    """The same to the base model; None where that is the reference."""
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
    training_file: FileId | None = None
    """Where the groups are from; None: the ledger."""
