"""The circle of a route: collect, distil, prove, promote, and again, without anybody.

Owns: what its operator settles (`CircleSpec`) and what is kept of it (`Circle`, `Turn`). Does not own: the rules by
which it goes on (`service.circle_rules`), nor what is done (`service.circle_driver`).
"""

from __future__ import annotations

import math
from typing import Final, Literal

from pydantic import Field, ValidationInfo, field_validator

from bon_algos.contracts.jobs import Interval, JobSpec, Window
from bon_algos.contracts.method_families import MOST_N
from bon_algos.contracts.methods import Method
from bon_algos.contracts.record import DEFAULT_TENANT, SCHEMA_VERSION, PolicyId, Record, RouteName
from bon_algos.contracts.training import Precision, TrainingSetup

TURNS_KEPT: Final = 50
"""Of those that are over, at least."""


class TrialRule(Record):
    """How a policy of the circle is tried before it goes on."""

    share: float = Field(gt=0, le=1)
    """Of the route's requests."""
    answers: int = Field(ge=1, le=1_000_000)
    """So many before it goes on."""
    seconds: float = Field(0.0, ge=0, le=30 * 86_400)
    """And no sooner than after these."""
    most_lost: float = Field(0.2, ge=0, lt=1)
    """Share of its requests that may stay without an answer; with more it is withdrawn."""


class Gate(Record):
    """What the report on held-out prompts must say, beside that reward rose: both are paired by prompt, policy against
    the one that is live."""

    least_gain: float = Field(0.0, ge=0, le=1e9)
    """The lower end of the reward's gain must be above it; reward's units."""
    needs_judge: bool = True
    """Whether a second reward model must have looked. Without one nobody sees that the first is exploited."""
    judge_margin: float = Field(0.0, ge=0, le=1e9)
    """By how much the second reward may fall at the lower end of its interval; its own units."""


class Budgets(Record):
    jobs_per_day: int = Field(4, ge=1, le=1000)
    """Begun in any 24 hours."""
    gpu_seconds_per_day: float = Field(86_400.0, gt=0, le=1e9)
    """That workers spent on jobs begun in the last 24 hours; of a job that several processes train, each counts as one
    GPU. A job that would not fit, by the longest one before, waits; one that is over it is cancelled."""
    max_kl: float = Field(10.0, gt=0, le=1e6)
    """KL to the base, the first reference, in nats per completion; measured, and foreseen by the drift law."""


class CircleSpec(Record):
    """Body of `PUT /routes/{route}/circle`."""

    n: int = Field(16, ge=2, le=MOST_N)
    """Each turn learns best-of-n of the policy that is live."""
    method: Method = Field(default_factory=lambda: Method(type="offline_bond"), validate_default=True)
    """What it leaves out of how far one turn is to go follows from n."""
    precision: Precision | None = None
    seed: int = Field(0, ge=0, lt=2**62)
    """Of the first turn; each has the next one."""
    held_out_fraction: float = Field(0.1, gt=0, lt=1)
    collect_share: float = Field(0.1, gt=0, le=1)
    """Of the requests that the live policy would answer with one sample, so many are answered by best-of-n of it: the
    next turn learns from them."""
    min_groups: int = Field(1000, ge=4, le=5000)
    """Fresh groups that a turn needs."""
    max_groups: int = Field(20_000, ge=4, le=10_000_000)
    """The newest that a turn learns from."""
    min_gain: float = Field(0.0, ge=0, le=1e9)
    """What best-of-n must gain over one sample, by the n-curve of the fresh groups, at the lower end of its interval;
    reward's units. Below it there is nothing left to learn."""
    gate: Gate = Gate()
    shadow: TrialRule = TrialRule(share=0.1, answers=50)
    canary: TrialRule = TrialRule(share=0.05, answers=100)
    budgets: Budgets = Budgets()
    max_turns: int | None = Field(None, ge=1, le=10_000)
    max_refusals: int = Field(3, ge=1, le=1000)
    """Turns in a row that promote nothing, after which it stops."""

    @field_validator("method")
    @classmethod
    def aims_at_n(cls, method: Method, so_far: ValidationInfo) -> Method:
        return method.towards(so_far.data["n"]) if "n" in so_far.data else method

    @property
    def log_aim(self) -> float:
        """log of the best-of-n of the live policy that a turn is to end at; of n for a method that aims at none."""
        aim = self.method.spec.log_aim
        return math.log(self.n) if aim is None else aim

    def job(self, route: str, number: int, live_policy: str | None) -> JobSpec:
        """What a turn asks a worker for. number: of the turn, from 1."""
        return JobSpec(
            route=route,
            method=self.method,
            training=TrainingSetup(start_from=live_policy or "base", reference="start", precision=self.precision),
            window=Window(max_groups=self.max_groups),
            n=self.n,
            held_out_fraction=self.held_out_fraction,
            seed=self.seed + number - 1,
            priority="low",
            metadata={"circle": route, "turn": str(number)},
        )


TurnPhase = Literal["training", "proving", "shadow", "canary", "over"]
TurnOutcome = Literal["promoted", "refused", "failed", "withdrawn", "stopped"]
"""refused: by the gate. failed: its job, or its fingerprint. withdrawn: it went wrong as shadow or canary. stopped:
the circle was, meanwhile."""


class Turn(Record):
    """One time round. Times are Unix seconds."""

    number: int = Field(ge=1)
    began_at: float
    parent: PolicyId
    """The live policy, or the base: what is drawn from and what is learned from."""
    phase: TurnPhase = "training"
    job_id: str | None = None
    policy: PolicyId | None = None
    seconds: float = 0.0
    """GPU-seconds that workers spent on its job."""
    ended_at: float | None = None
    outcome: TurnOutcome | None = None
    reason: str = ""
    reward_gain: Interval | None = None
    """Over the parent; None before there is a report."""
    judge_gain: Interval | None = None
    """The same, as the second reward model says."""
    kl_base: float | None = None
    """Nats per completion, to the first reference."""


class Circle(Record):
    """A route's circle."""

    schema_version: int = SCHEMA_VERSION
    route: RouteName
    tenant: str = DEFAULT_TENANT
    version: int = Field(1, ge=1)
    spec: CircleSpec
    status: Literal["running", "stopped"] = "running"
    reason: str = ""
    """What it waits for, or why it stopped."""
    live_policy: PolicyId | None = None
    """As the circle left it: another one on the route means that somebody else moved it."""
    since: float
    """Groups from then on are fresh."""
    counted: int = 0
    """Groups that the route's count told then."""
    refusals: int = 0
    """In a row."""
    turn: Turn | None = None
    """Under way."""
    turns: tuple[Turn, ...] = ()
    """Those that are over, the newest last: `TURNS_KEPT` of them, and all that began in the last 24 hours."""
    num_turns: int = 0
    """Ever begun."""
    kl_base: float = 0.0
    """Of the live policy to the first reference, as its report measured it; nats per completion."""
