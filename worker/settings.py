"""What the worker reads from its environment: names, places, intervals. Never a hyper-parameter.

Read once, at a process edge (`app` for Celery, `job_process` for a job); everything below takes plain values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from archive.retention import Retention
from bon_algos.contracts import PolicyId, PrivateUrl, RewardConfigSetting


class BrokerSettings(BaseSettings):
    """What the Celery process needs: where messages come from, and what a job that it claims takes up."""

    model_config = SettingsConfigDict(env_prefix="BONSAI_", frozen=True, extra="ignore")

    redis_url: str = "redis://127.0.0.1:6379/0"
    artefacts: Path
    lease_seconds: float = Field(60.0, gt=0)
    train_processes: int = Field(1, ge=1, le=64)
    """That train one job together on this machine: on CUDA, one for each device that the worker sees."""


class WorkerSettings(BrokerSettings):
    """What a job needs besides."""

    archive: str = ""
    """As the compactor has it: where older groups are read from."""
    policy_engine_urls: tuple[PrivateUrl, ...] = Field(min_length=1)
    """As the gateway has them. A job samples from the first, and lends its adapters to no other."""
    reward_model: Annotated[RewardConfigSetting, NoDecode]
    """As JSON; the gateway is told the same."""
    judge_reward_model: Annotated[RewardConfigSetting | None, NoDecode] = None
    """As JSON: a second one, which has no member with the first in common and scores a policy's report alone."""
    policy_directory: Path
    base_policy_id: PolicyId
    max_model_len: int = Field(ge=2)
    """Tokens of prompt and completion together that the policy engine takes."""
    heartbeat_seconds: float = Field(10.0, gt=0)
    checkpoint_steps: int = Field(20, ge=1)
    checkpoint_seconds: float = Field(30.0, gt=0)
    torch_threads: int = Field(1, ge=1)
    """Part of what makes a run repeatable bit for bit: sums are split by thread."""
    device: Literal["cpu", "cuda"] | None = None
    """None: CUDA when there is one."""
    train_parallelism: Literal["data", "fsdp"] = "data"
    """data: every process holds the whole model. fsdp: its weights are spread over the processes."""
    engine_patience_seconds: float = Field(600.0, gt=0)
    """How long a job waits, inside its lease, for an engine that does not answer."""

    @model_validator(mode="after")
    def _judge_is_another(self) -> WorkerSettings:
        judge = () if self.judge_reward_model is None else self.judge_reward_model.members
        if {member.id for member in judge} & {member.id for member in self.reward_model.members}:
            raise ValueError(
                "judge_reward_model has a member that chooses and trains too: its opinion would be no second"
            )
        return self


class CompactorSettings(BrokerSettings):
    """What the compactor needs."""

    archive: str = ""
    """As the gateway has it: a directory, or `s3://bucket/prefix`; empty: `ledger` in the artefact directory."""
    compaction_entries: int = Field(20_000, ge=1)
    compaction_bytes: int = Field(64 * 2**20, ge=1)
    compaction_seconds: float = Field(300.0, gt=0)
    """A batch is written when it has so many entries, so many bytes, or when its first entry has waited so long."""
    hot_groups: int = Field(20_000, ge=0)
    hot_seconds: float = Field(3600.0, ge=0)
    """What stays in Redis: at least the newest groups, and all that are younger. Strategies and `bonsai replay` look
    at no other."""
    merge_bytes: int = Field(64 * 2**20, ge=1)
    """Of a file that small ones are merged into, at most."""
    retention: Retention = Retention()
    """As JSON, days by class of content: `{"text": 30, "tokens": 30, "scores": 365}`."""
    retention_seconds: float = Field(3600.0, gt=0)
    """Between two looks at what is to go."""
