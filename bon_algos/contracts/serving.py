"""What the gateway serves and logs. A logged `CandidateGroup` is the library's input: nothing is lost between
serving and learning. Times are seconds since the epoch (UTC); log-probs are nats; token ids are the policy's own."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import Field, TypeAdapter

from bon_algos.contracts.record import DEFAULT_TENANT, SCHEMA_VERSION, PolicyId, Record, RouteName, Tag


class ToolCall(Record):
    """What an assistant asked to be done."""

    id: str = Field(min_length=1, max_length=64)
    name: str = Field(min_length=1, max_length=64)
    arguments: str
    """A JSON object, as it was written."""


class Tool(Record):
    """What an assistant may ask to be done."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = Field(None, max_length=16_384)
    parameters: dict[str, Any] = Field(default_factory=dict)
    """JSON Schema of the arguments."""


class Message(Record):
    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[ToolCall, ...] = Field((), fail_fast=True)
    """Of an assistant."""
    tool_call_id: str | None = Field(None, min_length=1, max_length=64)
    """Of a tool: which call it answers."""


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
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token id and what is added to its logit."""
    stop: tuple[str, ...] = ()
    seed: int | None = None
    json_schema: str | None = None
    """Nothing was drawn that does not lead to a document of this JSON Schema, which stands here as JSON."""
    top_logprobs: int = Field(0, ge=0, le=20)
    """Alternatives to each token that the caller wants to see. No part of the law."""

    @property
    def is_policy_law(self) -> bool:
        """Whether candidates are exact samples of the policy, so that quantiles and log-probs mean what
        they say (algorithms.md J10): temperature 1, nothing truncated, nothing penalised, favoured or
        prescribed."""
        return (
            self.temperature == 1
            and self.top_p == 1
            and self.top_k == 0
            and self.min_p == 0
            and self.presence_penalty == 0
            and self.frequency_penalty == 0
            and self.repetition_penalty == 1
            and not self.logit_bias
            and self.json_schema is None
        )


FinishReason = Literal["stop", "length"]
CandidateFailure = Literal[
    "deadline", "engine_error", "empty", "too_long", "reward_error", "reward_not_finite", "not_scored"
]


Alternatives = tuple[tuple[int, float], ...]
"""Token ids with their log-probs, the likeliest first."""


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
    disagreement: float | None = None
    """Standard deviation between the members of an ensemble, of their scaled rewards; None with one member."""
    failure: CandidateFailure | None = None
    alternatives: tuple[Alternatives, ...] = Field((), exclude=True)
    """Of each token, where they were asked for. Not logged."""
    policy_id: PolicyId | None = None
    """Who drew it; None: the group's policy."""

    @property
    def is_complete(self) -> bool:
        return self.finish_reason == "stop" and self.text.strip() != ""


ArmReason = Literal["default", "live", "canary", "shadow", "experiment", "forced", "n_above_equivalent", "n_below_arm"]
"""Why this arm. shadow: nobody was served what it said; the group's id is `shadow_` and that of the served one."""
SelectionStatus = Literal["ok", "partial", "deadline", "reward_failed", "unscored", "single"]
StopReason = Literal[
    "fixed",
    "holdout",
    "gain_below_price",
    "cap",
    "above_threshold",
    "below_threshold",
    "probe",
    "no_time",
    "wave_failed",
]
"""Why no more was drawn.

fixed: what was asked for was. holdout: all n, where the route's strategy would have looked at the rewards, or one
sample have answered. gain_below_price, cap: of adaptive. above_threshold: the live policy's sample was good enough;
below_threshold: it was not, and best-of-n was drawn beside it; probe: that was drawn whatever the sample was worth.
no_time, wave_failed: a further wave could not be had, or not whole.
"""


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
    user: str | None = None
    """Whose request it was, where the caller said so: what an erasure goes by."""
    tags: tuple[Tag, ...] = ()
    """What the caller called it, so that a job's window can ask for it."""
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
    softness: float | None = None
    """λ of soft best-of-n; None where the highest reward is served."""
    selected: int | None
    """Index into candidates; None when nothing could be served."""
    status: SelectionStatus
    stop_reason: StopReason = "fixed"
    gain_missed: float | None = None
    """By how much the draws up to the arm's n were expected to exceed the best; None: not estimated."""
    store: bool = True
    engine_seconds: float = Field(0.0, ge=0)
    total_seconds: float = Field(0.0, ge=0)

    @property
    def scored(self) -> tuple[Candidate, ...]:
        return tuple(candidate for candidate in self.candidates if candidate.reward is not None)

    @property
    def is_fixed(self) -> bool:
        """Whether all n of one policy were drawn at once, whatever their rewards."""
        is_of_one_policy = all(candidate.policy_id in (None, self.policy_id) for candidate in self.candidates)
        return self.stop_reason in ("fixed", "holdout") and is_of_one_policy

    @property
    def is_unbiased(self) -> bool:
        """Whether the rewards are `requested` independent draws of the policy: a group that lost candidates, was drawn
        from a changed law or by two policies, or ended as its rewards were, serves, is logged, and feeds no estimator.
        """
        is_whole = len(self.scored) == self.requested
        return self.store and self.sampling.is_policy_law and is_whole and self.is_fixed

    @property
    def answered_by(self) -> PolicyId:
        """Who drew what is served."""
        served = None if self.selected is None else self.candidates[self.selected].policy_id
        return served or self.policy_id

    @property
    def eligible(self) -> list[int]:
        """Places of the candidates that may be served. A truncated, empty or broken one is among them only if no
        complete one exists."""
        indices = [i for i, candidate in enumerate(self.candidates) if candidate.reward is not None]
        return [i for i in indices if self.candidates[i].is_complete] or indices

    @property
    def best(self) -> int | None:
        """The candidate best-of-n serves: the highest reward, the earliest one when rewards tie. None without a scored
        candidate."""
        return max(self.eligible, key=lambda i: (self.candidates[i].reward or 0.0, -i), default=None)


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


class Feedback(Record):
    """What somebody thought of an answer, of one of its candidates, of a pair of them, or of a session."""

    kind: Literal["feedback"] = "feedback"
    id: str
    schema_version: int = SCHEMA_VERSION
    tenant: str = DEFAULT_TENANT
    created_at: float
    group_id: str | None
    session: str | None
    """Where no group is named."""
    route: RouteName | None
    experiment: str | None
    arm: Arm | None
    arm_reason: ArmReason | None
    """Of the group; feedback on a forced arm is no vote."""
    author: str | None
    name: str
    """Which question it answers. Of one author's answers to one question about one thing the newest counts."""
    candidate: int | None
    """Place in drawing order; None for a pair and for a session."""
    value: bool | float | str | None
    """Yes or no, a number, or a category."""
    better: int | None
    worse: int | None
    comment: str | None
    correction: str | None
    """What should have been said."""

    @property
    def question(self) -> str:
        """What it is an answer to, and whose: the newest with the same one counts."""
        return json.dumps([self.candidate, self.better, self.worse, self.name, self.author])


LedgerRecord = Annotated[Exposure | CandidateGroup | Outcome | Feedback, Field(discriminator="kind")]
LEDGER_RECORD: Final[TypeAdapter[Exposure | CandidateGroup | Outcome | Feedback]] = TypeAdapter(LedgerRecord)
