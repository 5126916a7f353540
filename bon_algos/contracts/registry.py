"""What a worker proposes and the service decides about: policies with their manifests, routes, experiments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Final, Literal

from pydantic import Field

from bon_algos.contracts.jobs import DataWindow, EvaluationReport, JobSpec
from bon_algos.contracts.record import DEFAULT_TENANT, SCHEMA_VERSION, PolicyId, Record, RouteName
from bon_algos.contracts.serving import Arm

MOST_DESCRIPTION: Final = 1000
"""Characters."""


class Imported(Record):
    """Where a policy comes from that no job here made."""

    by: str
    """The id of a key, or whoever ran the command."""
    source_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    """sha256 over the files as they came, as `adapter_digest` has it."""
    n: int = Field(ge=1)
    """The best-of-n that it stands in for, as its owner says."""


class Manifest(Record):
    """Written once beside the weights; from it alone the registry can be rebuilt."""

    schema_version: int = SCHEMA_VERSION
    tenant: str = DEFAULT_TENANT
    policy_id: PolicyId
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    """sha256 over the adapter's files; the directory has this name."""
    kind: Literal["lora", "full"] = "lora"
    """lora: an adapter in PEFT's format. full: a model directory of transformers, for export alone."""
    base_policy_id: PolicyId
    parent_policy_id: PolicyId
    reward_model_id: str | None
    job_id: str | None
    """None, as the other facts of a job, where it was imported."""
    epoch: int
    created_at: float
    spec: JobSpec | None
    data: DataWindow | None
    report: EvaluationReport | None
    """None too for full weights: a report is drawn from an engine, and none serves them."""
    imported: Imported | None = None
    files: dict[str, str]
    """File name to sha256."""
    report_files: dict[str, str] = Field(default_factory=dict)
    """File name to sha256, in `reports/<report_digest of these>`: the whole report. Empty where none was written."""
    lora_rank: int
    """0 for full weights."""
    steps: int

    @property
    def n_equivalent(self) -> int:
        """The best-of-n that it stands in for."""
        if self.spec is not None:
            return self.spec.n
        return 1 if self.imported is None else self.imported.n

    def as_candidate(self) -> PolicyRecord:
        """The policy as it first stands in the registry."""
        return PolicyRecord(
            id=self.policy_id,
            tenant=self.tenant,
            kind=self.kind,
            state="candidate",
            created_at=self.created_at,
            n_equivalent=self.n_equivalent,
            manifest=self,
            directory=f"policies/{self.digest}",
        )


ADAPTER_FILES: Final = ("adapter_config.json", "adapter_model.safetensors", "fingerprint.json")
"""What stands beside manifest.json in a policy's directory; nothing else does."""


def adapter_digest(files: Mapping[str, str]) -> str:
    """The digest that names a policy's directory, from file name -> sha256 of the adapter's files: sha256 over
    the lines `name sha256`, sorted. `pol-` and its first 16 hex digits are the policy's id."""
    lines = "".join(f"{name} {files[name]}\n" for name in sorted(files))
    return sha256(lines.encode()).hexdigest()


PolicyState = Literal["candidate", "shadow", "canary", "live", "retired", "failed"]
Stage = Literal["shadow", "canary", "live"]
"""What a policy is to a route. shadow: it answers a share of the route's requests beside whoever serves them, and what
it says is only logged. canary: it serves a small share. live: it stands in for best-of-n."""

POLICY_TRANSITIONS: Final[Mapping[PolicyState, frozenset[PolicyState]]] = {
    "candidate": frozenset({"shadow", "canary", "live", "retired", "failed"}),
    "shadow": frozenset({"candidate", "canary", "live", "retired", "failed"}),
    "canary": frozenset({"candidate", "shadow", "live", "retired", "failed"}),
    "live": frozenset({"shadow", "canary", "retired", "failed"}),
    "retired": frozenset({"live", "failed"}),
    "failed": frozenset(),
}
"""Which state may follow which; all that can happen to a policy beside being deleted. From retired to live only a
roll-back leads. A policy's state is the highest of what it is to any route (`state_on`)."""


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
    kind: Literal["base", "lora", "full"]
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
    version: int = Field(1, ge=1)
    """One more with every change: what `ETag` and `If-Match` compare."""
    has_been_live: bool = False
    is_protected: bool = False
    """Not to be deleted."""
    description: str = Field("", max_length=MOST_DESCRIPTION)

    @property
    def is_usable(self) -> bool:
        """Whether an engine may be told to load it."""
        return self.kind == "lora" and self.state != "failed" and not self.tainted

    @property
    def parents(self) -> frozenset[str]:
        """The policies that it was made from."""
        if self.manifest is None:
            return frozenset()
        made_from = {self.manifest.base_policy_id, self.manifest.parent_policy_id}
        return frozenset(made_from | set(() if self.manifest.spec is None else self.manifest.spec.policies))

    def become(self, state: PolicyState) -> PolicyRecord:
        """The same in another state. ValueError for one that may not follow."""
        if state != self.state and state not in POLICY_TRANSITIONS[self.state]:
            raise ValueError(f"a policy that is {self.state} cannot become {state}")
        return self.model_copy(update={"state": state, "has_been_live": self.has_been_live or state == "live"})

    def state_on(self, routes: Iterable[Route]) -> PolicyState:
        """What it is where it is these things to the routes of its tenant: live before canary before shadow; on none
        of them retired if it has been live, else a candidate. What has failed or was retired stays so."""
        stages = {stage for route in routes if (stage := route.stage_of(self.id)) is not None}
        for stage in ("live", "canary", "shadow"):
            if stage in stages and self.state != "failed":
                return stage
        if self.state in ("failed", "retired"):
            return self.state
        return "retired" if self.has_been_live or self.state == "live" else "candidate"


class Trial(Record):
    """A policy in the stage shadow or canary of a route."""

    id: str
    """Under which its sums are kept, as those of an experiment."""
    policy: PolicyId
    share: float = Field(gt=0, le=1)
    """Of the route's requests."""
    salt: str
    """Who knows it can choose which units are among them."""
    since: float


Strategy = Literal["fixed", "soft", "adaptive", "distilled_first"]
"""fixed: of n candidates the one with the highest reward is served. soft: one drawn in proportion to exp(reward/λ).
adaptive: the highest of as many as seem worth their tokens. distilled_first: one sample of the live policy, and n of
the base policy beside it where its reward is too low."""


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
    strategy: Strategy = "fixed"
    softness: float | None = Field(None, gt=0)
    """Of strategy soft: λ, in units of the reward."""
    kept_gain: float | None = Field(None, ge=0, le=1)
    """Of strategy distilled_first: the share that is kept of what best-of-n gains over the live policy's sample."""
    max_tokens: int = Field(64, ge=1)
    """When a request does not say."""
    live_policy: PolicyId | None = None
    """The distilled policy that stands in for best-of-n; None: none promoted."""
    previous_policies: tuple[PolicyId | None, ...] = ()
    """Where roll-back goes, newest last."""
    shadow: Trial | None = None
    canary: Trial | None = None
    collect_share: float | None = Field(None, gt=0, le=1)
    """Set while the route has a circle: best-of-n draws from the live policy, and so many of the requests that it would
    answer with one sample are answered that way."""

    @property
    def best_of_n_policy(self) -> PolicyId:
        """Whom best-of-n draws from."""
        return self.base_policy if self.collect_share is None or self.live_policy is None else self.live_policy

    def stage_of(self, policy_id: str) -> Stage | None:
        """What the policy is to this route."""
        if policy_id == self.live_policy:
            return "live"
        if self.canary is not None and self.canary.policy == policy_id:
            return "canary"
        return "shadow" if self.shadow is not None and self.shadow.policy == policy_id else None

    @property
    def is_used(self) -> bool:
        """Whether any policy is anything to it."""
        return any(one is not None for one in (self.live_policy, self.canary, self.shadow))


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
