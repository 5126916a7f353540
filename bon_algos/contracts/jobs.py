"""What a distillation is asked to do, and what it found: specs of the methods, job states, reports."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field, model_validator

from bon_algos.contracts.record import Record, RouteName


class TrainingSpec(Record):
    """What every method needs to be trained."""

    steps: int = Field(200, ge=1, le=1_000_000)
    prompts_per_step: int = Field(16, ge=2, le=4096)
    """Each prompt brings its candidates; the baseline of on-policy methods needs at least two."""
    learning_rate: float = Field(1e-3, gt=0, le=1)
    warmup_steps: int = Field(10, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    lora_rank: Literal[1, 8, 16, 32, 64, 128, 256] = 8
    """One of the ranks the engine can serve."""
    lora_alpha: float = Field(32.0, gt=0, le=4096)


class LoggedSpec(TrainingSpec):
    """What methods that learn from logged candidates share."""

    n: int = Field(16, ge=2, le=4096)
    """The best-of-n that is learned; at most the number of candidates of a prompt, all its groups pooled."""
    candidates_per_prompt: int = Field(4, ge=1, le=4096)
    """Candidates looked at when a prompt's turn comes: drawn so that the loss is unbiased, others at the next turn."""


class BondSpec(TrainingSpec):
    """BOND (arXiv 2407.14622, section 4) around the ledger: the reference's logged candidates are imitated and rank
    fresh samples of the policy, so its law of best-of-n needs no draw of the reference.

    Samples are drawn while the step before trains, so they are one update old."""

    n: int = Field(40, ge=2, le=4096)
    """The best-of-n aimed at; a policy that cannot express its law lands below, so aim above the n to be replaced.
    Beyond the number of a prompt's candidates, best of them all is imitated."""
    jeffreys_weight: float = Field(0.85, ge=0, le=1)
    """Weight of the backward KL, from fresh samples; 0 is imitation of logged candidates alone."""
    return_floor: float = Field(-15.0, ge=-1000, le=0)
    """Nats below which a sample's return, log π_BoN/π, counts by its logarithm: the worst must not drown the rest."""
    samples_per_prompt: int = Field(4, ge=1, le=64)
    """Fresh samples of a prompt at its turn."""
    candidates_per_prompt: int = Field(1, ge=1, le=4096)
    """Logged candidates imitated at a prompt's turn."""
    imitation_steps: int = Field(40, ge=0)
    """First steps that imitate alone and need no fresh samples: much of the way, at a fraction of the cost."""
    averaged_steps: int = Field(40, ge=1)
    """The policy is the mean of its weights over so many last steps, imitation aside (SWA, arXiv 1803.05407): fresh
    samples are few, and what one step's noise opens up is where a policy drifts from its reference."""


class OfflineBondSpec(TrainingSpec):
    """BOND (arXiv 2407.14622, eq. 15) from logged candidates alone: its backward part by importance weights, held to
    the reference by the exact KL of every token, which sees what no candidate says."""

    n: int = Field(16, ge=2, le=4096)
    """The best-of-n imitated; at most the number of candidates of a prompt, all its groups pooled."""
    backward_n: int = Field(96, ge=2, le=4096)
    """The best-of-n aimed at by the backward part, which extrapolates beyond the candidates there are: a policy that
    cannot express its law lands below."""
    jeffreys_weight: float = Field(0.85, ge=0, le=1)
    """Weight of the backward KL; 0 is imitation alone."""
    token_kl_weight: float = Field(0.12, ge=0, le=100)
    """Weight of the exact KL of every token; less lets mass leak to completions that no log holds."""
    max_importance: float = Field(4.0, ge=1, le=1e6)
    """A candidate's weight π/π_ref counts at most so much."""
    return_floor: float = Field(-10.0, ge=-1000, le=0)
    """Nats below which a candidate's return, log π_BoN/π, counts by its logarithm."""
    candidates_per_prompt: int = Field(8, ge=2, le=4096)
    """Candidates looked at when a prompt's turn comes: half of them drawn by best-of-n's weights, half evenly."""
    averaged_steps: int = Field(40, ge=1)
    """The policy is the mean of its weights over so many last steps (SWA, arXiv 1803.05407)."""
    interpolation: float = Field(0.96, gt=0, le=1)
    """How far from the reference's weights to those the policy is put in the end (LITI, WARP, arXiv 2406.16768): the
    last of the way brings little reward and much KL."""


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


METHOD_NAMES: Final = ("bond", "offline_bond", "jbond", "bon_forward_kl", "bon_regression")
MethodName = Literal["bond", "offline_bond", "jbond", "bon_forward_kl", "bon_regression"]
AlgorithmSpec = BondSpec | OfflineBondSpec | JBondSpec | BonForwardKlSpec | BonRegressionSpec


class Method(Record):
    """`{"type": NAME, NAME: {…}}`, the shape of OpenAI's fine-tuning jobs."""

    type: MethodName
    bond: BondSpec | None = None
    offline_bond: OfflineBondSpec | None = None
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
            case "bond":
                return self.bond or BondSpec()
            case "offline_bond":
                return self.offline_bond or OfflineBondSpec()
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
