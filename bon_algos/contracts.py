"""Records and names that cross a process boundary. pydantic and the standard library only.

Owns: what the gateway logs, what a job is asked to do, what a worker proposes, and the names of the Redis
keys both sides use (the data model is docs/redis.md). Does not own: how anything is stored, sent or trained.

A logged `CandidateGroup` is the library's input: nothing is lost between serving and learning.
Times are seconds since the epoch (UTC); log-probs are nats; token ids are the policy's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

SCHEMA_VERSION: Final = 1
DEFAULT_TENANT: Final = "default"

# --- names -----------------------------------------------------------------------------------------------

DISTILL_TASK: Final = "bonsai.distill"
DISTILL_QUEUE: Final = "bonsai-distill"

LEDGER_STREAM: Final = "bonsai:ledger"
LEDGER_COUNTS: Final = "bonsai:ledger:counts"
"""Hash route -> groups with `is_unbiased`, counted by the script that delivers them."""
AUDIT_STREAM: Final = "bonsai:audit"
JOBS_INDEX: Final = "bonsai:jobs"
OPEN_JOBS: Final = "bonsai:jobs:open"
"""Set of the jobs the reconciler still looks at; it takes out the finished ones itself."""
POLICIES_INDEX: Final = "bonsai:policies"
ROUTES_INDEX: Final = "bonsai:routes"
RECONCILER_LEASE: Final = "bonsai:reconciler"
BROKER_PREFIX: Final = "bonsai:celery:"


def seen_key(record_id: str) -> str:
    """Marks a ledger record as delivered, so that a replayed spool delivers it once. Expires after 24 h."""
    return f"bonsai:seen:{record_id}"


def job_key(job_id: str) -> str:
    return f"bonsai:job:{job_id}"


def job_events_key(job_id: str) -> str:
    return f"bonsai:job:{job_id}:events"


def policy_key(policy_id: str) -> str:
    return f"bonsai:policy:{policy_id}"


def route_key(route: str) -> str:
    return f"bonsai:route:{route}"


def experiment_key(route: str) -> str:
    return f"bonsai:experiment:{route}"


def experiment_stats_key(experiment_id: str) -> str:
    return f"bonsai:experiment:{experiment_id}:stats"


def idempotency_key(digest: str) -> str:
    return f"bonsai:idempotency:{digest}"


POLICY_ID_PATTERN: Final = r"^pol-[0-9a-f]{16}$"
ROUTE_PATTERN: Final = r"^[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?$"
PolicyId = Annotated[str, Field(pattern=POLICY_ID_PATTERN)]
RouteName = Annotated[str, Field(pattern=ROUTE_PATTERN)]


class Record(BaseModel):
    """Frozen, and refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# --- serving ---------------------------------------------------------------------------------------------


class Message(Record):
    role: Literal["system", "user", "assistant"]
    content: str


class Sampling(Record):
    """The law the candidates were drawn from, field by field as it was sent to the engine."""

    max_tokens: int = Field(ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    """0 keeps the whole vocabulary."""
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=2)
    stop: tuple[str, ...] = ()
    seed: int | None = None

    @property
    def is_policy_law(self) -> bool:
        """Whether candidates are exact samples of the policy, so that quantiles and log-probs mean what
        they say (algorithms.md J10): temperature 1, nothing truncated, nothing penalised."""
        return (
            self.temperature == 1
            and self.top_p == 1
            and self.top_k == 0
            and self.min_p == 0
            and self.presence_penalty == 0
            and self.frequency_penalty == 0
            and self.repetition_penalty == 1
        )


FinishReason = Literal["stop", "length"]
CandidateFailure = Literal[
    "deadline", "engine_error", "empty", "too_long", "reward_error", "reward_not_finite", "not_scored"
]


class Candidate(Record):
    """One completion, at its place in drawing order."""

    text: str
    token_ids: tuple[int, ...]
    """Includes the end-of-sequence token when the completion stopped at it."""
    logprobs: tuple[float, ...]
    """Raw log-prob of each token under the sampling policy at temperature 1; nats, same length as token_ids."""
    finish_reason: FinishReason | None = None
    """None: never finished."""
    reward: float | None = None
    failure: CandidateFailure | None = None

    @property
    def is_complete(self) -> bool:
        return self.finish_reason == "stop" and self.text.strip() != ""


ArmReason = Literal["default", "live", "experiment", "forced", "n_above_equivalent", "n_below_arm"]
SelectionStatus = Literal["ok", "partial", "deadline", "reward_failed", "unscored", "single"]


class Arm(Record):
    """What answers a request: a policy sampled n times. `(base, 16)` is the teacher, `(pol-…, 1)` the student."""

    policy: PolicyId
    n: int = Field(ge=1)

    def __str__(self) -> str:
        return f"{self.policy}:{self.n}"


class Exposure(Record):
    """A unit met an arm. Spooled at assignment, before the engine is called, so that a slow arm cannot lose it."""

    kind: Literal["exposure"] = "exposure"
    id: str
    schema_version: int = SCHEMA_VERSION
    tenant: str = DEFAULT_TENANT
    created_at: float
    group_id: str
    route: RouteName
    experiment: str | None
    arm: Arm
    arm_reason: ArmReason


class CandidateGroup(Record):
    """The n candidates of one prompt from one policy, and what was done with them."""

    kind: Literal["group"] = "group"
    id: str
    schema_version: int = SCHEMA_VERSION
    tenant: str = DEFAULT_TENANT
    created_at: float
    route: RouteName
    experiment: str | None = None
    arm: Arm
    arm_reason: ArmReason
    session: str | None = None
    """Groups of one session never fall on both sides of a train/held-out split."""
    policy_id: PolicyId
    """Who sampled it. Quantiles are only meaningful against this policy."""
    reward_model_id: str
    reward_template_digest: str
    policy_template_digest: str
    settings_digest: str
    prompt: str
    """As rendered for the policy. Empty when `store` is false."""
    messages: tuple[Message, ...] | None = None
    """What the caller sent, when it was messages: the reward model renders them in its own template."""
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    requested: int = Field(ge=1)
    candidates: tuple[Candidate, ...]
    """In the order they were drawn."""
    selected: int | None
    """Index into candidates; None when nothing could be served."""
    status: SelectionStatus
    store: bool = True
    engine_seconds: float = Field(0.0, ge=0)
    total_seconds: float = Field(0.0, ge=0)

    @property
    def scored(self) -> tuple[Candidate, ...]:
        return tuple(candidate for candidate in self.candidates if candidate.reward is not None)

    @property
    def is_unbiased(self) -> bool:
        """Whether the rewards are `requested` independent draws of the policy: a group that lost candidates
        or was drawn from a changed law serves, is logged, and feeds no estimator."""
        return self.store and self.sampling.is_policy_law and len(self.scored) == self.requested

    @property
    def best(self) -> int | None:
        """The candidate best-of-n serves: the highest reward, the earliest one when rewards tie. A truncated,
        empty or broken candidate wins only if no complete one exists. None without a scored candidate."""
        indices = [i for i, candidate in enumerate(self.candidates) if candidate.reward is not None]
        complete = [i for i in indices if self.candidates[i].is_complete]
        pool = complete or indices
        return max(pool, key=lambda i: (self.candidates[i].reward or 0.0, -i)) if pool else None


class Outcome(Record):
    """Rewards that were measured after the reply (one sample is never delayed by its score)."""

    kind: Literal["outcome"] = "outcome"
    id: str
    schema_version: int = SCHEMA_VERSION
    tenant: str = DEFAULT_TENANT
    created_at: float
    group_id: str
    route: RouteName
    experiment: str | None
    arm: Arm
    arm_reason: ArmReason
    reward_model_id: str
    rewards: tuple[float | None, ...]
    """One for each candidate of the group, in drawing order."""


LedgerRecord = Annotated[Exposure | CandidateGroup | Outcome, Field(discriminator="kind")]
LEDGER_RECORD: Final[TypeAdapter[Exposure | CandidateGroup | Outcome]] = TypeAdapter(LedgerRecord)

# --- distilling ------------------------------------------------------------------------------------------


class TrainingSpec(Record):
    """What every method needs to be trained."""

    steps: int = Field(200, ge=1, le=1_000_000)
    prompts_per_step: int = Field(16, ge=2, le=4096)
    """Each prompt brings its candidates; the baseline of on-policy methods needs at least two."""
    learning_rate: float = Field(1e-3, gt=0, le=1)
    warmup_steps: int = Field(10, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    lora_rank: Literal[1, 8, 16, 32, 64, 128, 256] = 32
    """One of the ranks the engine can serve."""
    lora_alpha: float = Field(64.0, gt=0, le=4096)


class LoggedSpec(TrainingSpec):
    """What methods that learn from logged candidates share."""

    n: int = Field(16, ge=2, le=4096)
    """The best-of-n that is learned; at most the number of candidates of a prompt, all its groups pooled."""
    candidates_per_prompt: int = Field(4, ge=1, le=4096)
    """Candidates looked at when a prompt's turn comes: drawn so that the loss is unbiased, others at the next turn."""


class JBondSpec(TrainingSpec):
    """J-BOND (arXiv 2407.14622, section 5): best-of-2 of a moving anchor, Jeffreys divergence, fresh samples."""

    jeffreys_weight: float = Field(0.5, ge=0, le=1)
    """Weight of the backward KL; 0 is plain imitation of the better anchor sample."""
    anchor_rate: float = Field(0.02, gt=0, le=1)
    """Weight of the new policy in the anchor's moving average, after every step (eq. 18)."""
    kl_strength: float = Field(0.0, ge=0, le=100)
    """γ: extra pull to the anchor; larger is slower (eq. 19, ambiguity J2)."""
    refresh_steps: int = Field(1, ge=1, le=1000)
    """Steps between two refreshes of the engine's copies of policy and anchor."""


class BonForwardKlSpec(LoggedSpec):
    """Imitation of best-of-n from logged candidates alone: forward KL with the exact (Rao–Blackwell) weights
    of every candidate (algorithms.md 1.1), i.e. the forward part of BOND without throwing candidates away."""


class BonRegressionSpec(LoggedSpec):
    """Pointwise log-quantile regression of the policy's log-ratio (algorithms.md 1.7, item 5; QRPO 2507.08068)."""

    huber_delta: float | None = Field(None, gt=0)
    """Nats beyond which the loss is linear; None is the square loss."""


METHOD_NAMES: Final = ("jbond", "bon_forward_kl", "bon_regression")
MethodName = Literal["jbond", "bon_forward_kl", "bon_regression"]
AlgorithmSpec = JBondSpec | BonForwardKlSpec | BonRegressionSpec


class Method(Record):
    """`{"type": NAME, NAME: {…}}`, the shape of OpenAI's fine-tuning jobs."""

    type: MethodName
    jbond: JBondSpec | None = None
    bon_forward_kl: BonForwardKlSpec | None = None
    bon_regression: BonRegressionSpec | None = None

    @model_validator(mode="after")
    def only_its_own_parameters(self) -> Method:
        foreign = [name for name in METHOD_NAMES if name != self.type and getattr(self, name) is not None]
        if foreign:
            raise ValueError(f"parameters of {foreign[0]} given for method {self.type}")
        return self

    @property
    def spec(self) -> AlgorithmSpec:
        """The parameters, the vetted defaults where none were given."""
        match self.type:
            case "jbond":
                return self.jbond or JBondSpec()
            case "bon_forward_kl":
                return self.bon_forward_kl or BonForwardKlSpec()
            case "bon_regression":
                return self.bon_regression or BonRegressionSpec()


class Window(Record):
    """Which part of the ledger a job learns from; frozen when the job starts."""

    max_groups: int = Field(20_000, ge=1, le=10_000_000)
    """The newest groups of the route, at most this many."""
    since: float | None = None
    until: float | None = None


class JobSpec(Record):
    """What `POST /distill` asks for."""

    route: RouteName = "default"
    method: Method
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


class Manifest(Record):
    """Written once beside the weights; from it alone the registry can be rebuilt."""

    schema_version: int = SCHEMA_VERSION
    tenant: str = DEFAULT_TENANT
    policy_id: PolicyId
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    """sha256 over the adapter's files; the directory has this name."""
    kind: Literal["lora"] = "lora"
    base_policy_id: PolicyId
    parent_policy_id: PolicyId
    reward_model_id: str
    job_id: str
    epoch: int
    created_at: float
    spec: JobSpec
    data: DataWindow
    report: EvaluationReport
    files: dict[str, str]
    """File name to sha256."""
    lora_rank: int
    steps: int


ADAPTER_FILES: Final = ("adapter_config.json", "adapter_model.safetensors", "fingerprint.json")
"""What stands beside manifest.json in a policy's directory; nothing else does."""


def adapter_digest(files: Mapping[str, str]) -> str:
    """The digest that names a policy's directory, from file name -> sha256 of the adapter's files: sha256 over
    the lines `name sha256`, sorted. `pol-` and its first 16 hex digits are the policy's id."""
    lines = "".join(f"{name} {files[name]}\n" for name in sorted(files))
    return sha256(lines.encode()).hexdigest()


PolicyState = Literal["candidate", "shadow", "canary", "live", "retired", "failed"]


class FingerprintResult(Record):
    """What the engine answered to a policy's fingerprint."""

    passed: bool
    tokens: int
    mean_abs_difference: float
    """Nats, engine against trainer."""
    mean_abs_base_distance: float
    """Nats, policy against base: what a missing adapter would show."""
    reason: str = ""


class PolicyRecord(Record):
    """A policy as the registry knows it."""

    id: PolicyId
    tenant: str = DEFAULT_TENANT
    kind: Literal["base", "lora"]
    state: PolicyState
    created_at: float
    n_equivalent: int = 1
    """The best-of-n it was distilled to replace."""
    manifest: Manifest | None = None
    """None for a base policy."""
    directory: str = ""
    """Relative to the artefact directory."""
    fingerprint: FingerprintResult | None = None
    tainted: bool = False


class Route(Record):
    """What `PUT /routes/{route}` settles."""

    name: RouteName
    tenant: str = DEFAULT_TENANT
    base_policy: PolicyId
    reward_model: str
    default_n: int = Field(16, ge=1)
    n_cap: int = Field(64, ge=1)
    quorum: int | None = Field(None, ge=1)
    """Scored candidates that suffice when the deadline passes; None is half of n."""
    deadline_ms: int = Field(60_000, ge=1, le=3_600_000)
    strategy: Literal["fixed"] = "fixed"
    max_tokens: int = Field(64, ge=1)
    """When a request does not say."""
    live_policy: PolicyId | None = None
    """The distilled policy that stands in for best-of-n; None: none promoted."""
    previous_policies: tuple[PolicyId | None, ...] = ()
    """Where roll-back goes, newest last."""


class ExperimentArm(Record):
    arm: Arm
    weight: int = Field(ge=1, le=10_000)


class Experiment(Record):
    id: str
    route: RouteName
    tenant: str = DEFAULT_TENANT
    salt: str
    arms: tuple[ExperimentArm, ...]
    created_at: float
    stopped_at: float | None = None
