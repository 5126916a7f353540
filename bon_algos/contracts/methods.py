"""The methods of distillation: what each is asked to do, with vetted defaults.

Owns the choice of a method, and the parameters of those that sample, their ranges and what they mean. Does not own
those that learn from logged candidates alone (`logged_methods`), nor what becomes of all (`bon_algos.algorithms`).
"""

from __future__ import annotations

import math
from typing import Final, Literal, Self, cast, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from bon_algos.contracts.logged_methods import (
    BonbonConsistentSpec,
    BonbonSpec,
    BonForwardKlSpec,
    BonRegressionSpec,
    BonSftSpec,
    DpoSpec,
    IpoSpec,
    OfflineBondSpec,
    TokenBondSpec,
)
from bon_algos.contracts.method_families import (
    MOST_N,
    CountedQuantiles,
    SampledSpec,
    TrainingSpec,
    a_little_above,
)
from bon_algos.contracts.record import PolicyId, Record


class BondSpec(TrainingSpec):
    """BOND (arXiv 2407.14622, section 4) around the ledger: the reference's logged candidates are imitated and rank
    fresh samples of the policy, so its law of best-of-n needs no draw of the reference.

    Samples are drawn while the step before trains, so they are one update old. Published: n of 4, 8 and 16, 16 draws of
    the reference to rank a sample, weights of 0, ½ and 1 for the backward KL; its rate and batch are not told."""

    n: int = Field(20, ge=2, le=MOST_N)
    """The best-of-n aimed at; a policy lands a little below, so aim a little above the n to be replaced. Left out: a
    quarter above the job's n. Beyond the number of a prompt's candidates, best of them all is imitated."""
    jeffreys_weight: float = Field(0.6, ge=0, le=1)
    """Weight of the backward KL, from fresh samples; 0 is imitation of logged candidates alone."""
    return_floor: float = Field(-15.0, ge=-1000, le=0)
    """Nats below which a sample's return, log π_BoN/π, counts by its logarithm: the worst must not drown the rest."""
    samples_per_prompt: int = Field(4, ge=1, le=64)
    """Fresh samples of a prompt at its turn."""
    candidates_per_prompt: int = Field(1, ge=1, le=4096)
    """Logged candidates imitated at a prompt's turn."""
    imitation_steps: int = Field(60, ge=0)
    """First steps that imitate alone and need no fresh samples: much of the way, at a fraction of the cost."""
    averaged_steps: int = Field(40, ge=1)
    """The policy is the mean of its weights over so many last steps, imitation aside (SWA, arXiv 1803.05407): fresh
    samples are few, and what one step's noise opens up is where a policy drifts from its reference."""
    quantiles: CountedQuantiles = "harmonic_mid"
    """Of a fresh sample's reward among its prompt's logged ones. Published: monte_carlo."""

    @property
    def log_aim(self) -> float | None:
        return math.log(self.n)

    def towards(self, n: int) -> Self:
        return self._with_missing(n=a_little_above(n))


class JBondSpec(TrainingSpec):
    """J-BOND (arXiv 2407.14622, section 5): best-of-2 of a moving anchor, Jeffreys divergence, fresh samples.
    Published: Adam at 3e-6, 100 steps of warm-up, batches of 128, jeffreys_weight ½; anchor_rate .02 for 7B, .01 to .1
    for 2B, and kl_strength 0 to 2 for 2B at .05."""

    jeffreys_weight: float = Field(0.5, ge=0, le=1)
    """Weight of the backward KL; 0 is plain imitation of the better anchor sample."""
    anchor_rate: float = Field(0.02, gt=0, le=1)
    """Weight of the new policy in the anchor's moving average, after every step (eq. 18)."""
    kl_strength: float = Field(0.0, ge=0, le=100)
    """γ: extra pull to the anchor; larger is slower (eq. 19, ambiguity J2)."""
    refresh_steps: int = Field(1, ge=1, le=1000)
    """Steps between two refreshes of the engine's copies of policy and anchor. Beyond 1 the later steps take samples of
    both as they were: nothing weighs them, and what is learned is biased towards where they came from (J10)."""

    @property
    def candidates_needed(self) -> int:
        return 1  # its prompts are all that is used of the ledger

    @property
    def log_aim(self) -> float | None:
        """Best-of-2 of where its anchor is in the end, by the drift law (algorithms.md 1.3)."""
        return math.log(2) + self.steps * math.log1p(self.anchor_rate)


class IterativeBondSpec(TrainingSpec):
    """Iterative BOND (arXiv 2407.14622, Algorithm 1): best-of-n of an anchor that becomes the policy every so many
    steps, so that m rounds aim at best-of-n^m of the reference. Published: n of 2 or 4, a copy every 1000 steps,
    jeffreys_weight ½."""

    n: int = Field(2, ge=2, le=64)
    """The best-of-n of the anchor that is aimed at."""
    anchor_samples: int = Field(4, ge=2, le=64)
    """Fresh samples of the anchor for each prompt, at least n: they are imitated by best-of-n's weights, and rank the
    policy's sample. Few rank it coarsely: the log of its quantile is a series cut off after so many terms. Without
    ties, the backward KL to best-of-2 alone ends at a win rate of .617 with 2, .644 with 4, .658 with 8; it is .667."""
    jeffreys_weight: float = Field(0.5, ge=0, le=1)
    """Weight of the backward KL; 0 is imitation alone."""
    kl_strength: float = Field(0.0, ge=0, le=100)
    """γ: extra pull to the anchor."""
    anchor_steps: int = Field(50, ge=1, le=1_000_000)
    """Steps of a round: then the anchor becomes the policy."""
    refresh_steps: int = Field(1, ge=1, le=1000)
    """Steps between two refreshes of the engine's copies of policy and anchor; beyond 1 as for J-BOND."""

    @model_validator(mode="after")
    def enough_anchor_samples(self) -> IterativeBondSpec:
        if self.anchor_samples < self.n:
            raise ValueError(f"best-of-{self.n} needs anchor_samples of at least {self.n}")
        return self

    @property
    def candidates_needed(self) -> int:
        return 1

    @property
    def log_aim(self) -> float | None:
        return math.log(self.n) * math.ceil(self.steps / self.anchor_steps)


class VbonSpec(SampledSpec):
    """vBoN (arXiv 2407.06057): the backward KL to best-of-n of the reference, from fresh samples of the policy. Logged
    candidates estimate the quantiles. Published: n = 1/β + 1 by the KL coefficient β, clip_range .2; for sentiment
    AdamW at 3e-5, batches of 32 from 128 rollouts, four epochs on them, 10,000 steps, up to 301 reference samples of a
    prompt; for summaries 3e-6 and batches of 4."""

    n: int = Field(16, ge=2, le=MOST_N)
    """The best-of-n aimed at; there may be fewer candidates. Left out: the job's n."""
    clip_range: float = Field(0.2, gt=0, lt=1)
    """By how much π/π_old of a completion may leave 1 before its gradient ends; π_old drew it. Of ppo_clip alone."""
    likelihood: Literal["bound", "exact"] = "bound"
    """bound: the paper's lower bound of best-of-n's likelihood, n·F^{n−1}, at the mid-rank and so for rewards that tie.
    exact: the likelihood of a total order, at the released add-one share strictly below: rewards should not tie. They
    differ where a completion is a good part of the reference's mass."""
    gradient: Literal["ppo_clip", "reinforce"] = "ppo_clip"
    """ppo_clip: PPO's clipping of whole completions. reinforce: samples as they are, one update old. Both take
    the mean of a prompt's others off."""
    quantiles: CountedQuantiles | None = None
    """F, of a sample's reward among its prompt's logged ones. None: harmonic_mid for bound, add_one for exact, which
    takes no other: its F is strict. With harmonic and monte_carlo, whose F counts ties as beaten, the
    bound is none where rewards tie."""

    @field_validator("quantiles")
    @classmethod
    def strict_where_exact(cls, quantiles: CountedQuantiles | None, given: ValidationInfo) -> CountedQuantiles | None:
        if given.data.get("likelihood") == "exact" and quantiles not in (None, "add_one"):
            raise ValueError("must be add_one for the exact likelihood")
        return quantiles

    @property
    def log_aim(self) -> float | None:
        return math.log(self.n)

    def towards(self, n: int) -> Self:
        return self._with_missing(n=n)


class RlooSpec(SampledSpec):
    """REINFORCE with a leave-one-out baseline (arXiv 2402.14740) on the reward model's own scale, less a KL to the
    reference: the baseline that best-of-n distillation is to beat. Its optimum is π_ref·exp(r/β)/Z. That samples are
    one update old nothing corrects. Published, beside J-BOND: 2 samples of a prompt, kl_strength .001 to 1."""

    kl_strength: float = Field(0.5, gt=0, le=1e4)
    """β, in units of the reward per nat."""


class InterpolationSpec(Record):
    """A finished policy taken back towards its reference, without training (LITI, WARP, arXiv 2406.16768): what its
    adapter adds to every weight becomes a share of it. The dial between reward and KL."""

    policy: PolicyId
    share: float = Field(0.8, gt=0, lt=1)
    """1 would be the policy, 0 its reference."""

    @property
    def candidates_needed(self) -> int:
        return 1  # its prompts are what it is evaluated on

    @property
    def log_aim(self) -> float | None:
        """Where its policy was; it ends nearer."""
        return None

    def towards(self, n: int) -> Self:
        """What it is taken back to does not depend on n."""
        return self


MethodName = Literal[
    "bond",
    "offline_bond",
    "token_bond",
    "jbond",
    "iterative_bond",
    "vbon",
    "bonbon",
    "bonbon_consistent",
    "bon_forward_kl",
    "bon_regression",
    "bon_sft",
    "dpo",
    "ipo",
    "rloo",
]
METHOD_NAMES: Final[tuple[MethodName, ...]] = get_args(MethodName)
AlgorithmSpec = (
    BondSpec
    | OfflineBondSpec
    | TokenBondSpec
    | JBondSpec
    | IterativeBondSpec
    | VbonSpec
    | BonbonSpec
    | BonbonConsistentSpec
    | BonForwardKlSpec
    | BonRegressionSpec
    | BonSftSpec
    | DpoSpec
    | IpoSpec
    | RlooSpec
)


class Method(Record):
    """`{"type": NAME, NAME: {…}}`, the shape of OpenAI's fine-tuning jobs."""

    type: Literal[MethodName, "interpolation"]
    bond: BondSpec | None = None
    offline_bond: OfflineBondSpec | None = None
    token_bond: TokenBondSpec | None = None
    jbond: JBondSpec | None = None
    iterative_bond: IterativeBondSpec | None = None
    vbon: VbonSpec | None = None
    bonbon: BonbonSpec | None = None
    bonbon_consistent: BonbonConsistentSpec | None = None
    bon_forward_kl: BonForwardKlSpec | None = None
    bon_regression: BonRegressionSpec | None = None
    bon_sft: BonSftSpec | None = None
    dpo: DpoSpec | None = None
    ipo: IpoSpec | None = None
    rloo: RlooSpec | None = None

    interpolation: InterpolationSpec | None = None

    @model_validator(mode="after")
    def only_its_own_parameters(self) -> Method:
        names = (*METHOD_NAMES, "interpolation")
        foreign = [name for name in names if name != self.type and getattr(self, name) is not None]
        if foreign:
            raise ValueError(f"parameters of {foreign[0]} given for method {self.type}")
        if self.type == "interpolation" and self.interpolation is None:
            raise ValueError("interpolation needs the policy that is interpolated")
        return self

    @property
    def spec(self) -> AlgorithmSpec | InterpolationSpec:
        """The parameters, the vetted defaults where none were given."""
        if self.interpolation is not None:
            return self.interpolation
        return self.algorithm

    def towards(self, n: int) -> Method:
        """The method of a job that is to replace best-of-n: what was left out of how far to go is filled in."""
        return self.model_copy(update={self.type: self.spec.towards(n)})

    @property
    def algorithm(self) -> AlgorithmSpec:
        """The parameters of a method that trains. KeyError for one that does not."""
        given = getattr(self, self.type)
        return cast(AlgorithmSpec, _SPECS[cast(MethodName, self.type)]() if given is None else given)


_SPECS: Final[dict[MethodName, type[AlgorithmSpec]]] = {
    "bond": BondSpec,
    "offline_bond": OfflineBondSpec,
    "token_bond": TokenBondSpec,
    "jbond": JBondSpec,
    "iterative_bond": IterativeBondSpec,
    "vbon": VbonSpec,
    "bonbon": BonbonSpec,
    "bonbon_consistent": BonbonConsistentSpec,
    "bon_forward_kl": BonForwardKlSpec,
    "bon_regression": BonRegressionSpec,
    "bon_sft": BonSftSpec,
    "dpo": DpoSpec,
    "ipo": IpoSpec,
    "rloo": RlooSpec,
}
