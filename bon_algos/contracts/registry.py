"""What a worker proposes and the service decides about: policies with their manifests, routes, experiments."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Final, Literal

from pydantic import Field

from bon_algos.contracts.jobs import DataWindow, EvaluationReport, JobSpec
from bon_algos.contracts.record import DEFAULT_TENANT, SCHEMA_VERSION, PolicyId, Record, RouteName
from bon_algos.contracts.serving import Arm


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
    reward_model_id: str
    job_id: str
    epoch: int
    created_at: float
    spec: JobSpec
    data: DataWindow
    report: EvaluationReport | None
    """None for full weights: a report is drawn from an engine, and none serves them."""
    files: dict[str, str]
    """File name to sha256."""
    report_files: dict[str, str] = Field(default_factory=dict)
    """File name to sha256, in `reports/<report_digest of these>`: the whole report. Empty where none was written."""
    lora_rank: int
    """0 for full weights."""
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
