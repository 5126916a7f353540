"""What the gateway process is told from outside: environment variables `BONSAI_…`, and nothing else.

Owns: names, defaults, limits. Only `app.py` reads this class; everything below it takes plain values.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from bon_algos.contracts import PolicyId, PrivateUrl, RewardConfigSetting, VllmMember
from service.api_key import read_admin_key, read_pepper
from service.fleet import MOST_ENGINES, read_engines
from service.known_pairs import PairsSetting


def _replicas(urls: tuple[str, ...]) -> tuple[str, ...]:
    if not 1 <= len(urls) <= MOST_ENGINES:
        raise ValueError(f"must name 1 to {MOST_ENGINES} engines")
    if len(set(urls)) < len(urls):
        raise ValueError("names an engine twice")
    return urls


def _redis_url(url: str) -> str:
    if urlsplit(url).scheme not in ("redis", "rediss", "unix"):
        raise ValueError("must begin with redis://, rediss:// or unix:///")
    return url


PrivateUrls = Annotated[tuple[PrivateUrl, ...], AfterValidator(_replicas)]
RedisUrl = Annotated[str, AfterValidator(_redis_url)]


def _engines_file(file: Path) -> Path:
    read_engines(file)
    return file


def _admin_key_file(file: Path) -> Path:
    read_admin_key(file)
    return file


def _pepper_file(file: Path) -> Path:
    read_pepper(file)
    return file


EnginesFile = Annotated[Path, AfterValidator(_engines_file)]
AdminKeyFile = Annotated[Path, AfterValidator(_admin_key_file)]
PepperFile = Annotated[Path, AfterValidator(_pepper_file)]


class GatewaySettings(BaseSettings):
    """Settings of one gateway process."""

    model_config = SettingsConfigDict(env_prefix="BONSAI_", frozen=True, extra="ignore")

    redis_url: RedisUrl
    policy_engine_urls: PrivateUrls
    """A JSON list: the replicas of the policy engine, alike in all that concerns an answer. They are called policy-0,
    policy-1, … in this order; the worker samples from the first."""
    policy_engines_file: EnginesFile | None = None
    """A JSON object name -> URL: engines beside these that come and go. Read again every second; a name that is new
    joins, one that is gone finishes what it has."""
    reward_model: Annotated[RewardConfigSetting, NoDecode]
    """As JSON: where its members answer and how their rewards become one; the worker is told the same."""
    policy_directory: Path
    """The base policy's model directory: tokenizer and chat template are read from it."""
    base_policy_id: PolicyId
    """Also the model's name in the policy engine."""
    reward_pairs: PairsSetting | None = None
    """A JSON list of known pairs that the reward model must rank rightly before it chooses anything; `none`: it is not
    tested. Left out: each vllm member must rank half of the built-in pairs rightly, and nothing else is tested."""
    max_model_len: int = Field(ge=2)
    """Window of the policy engine, tokens."""
    artefacts: Path
    archive: str = ""
    """As the compactor has it: where the ledger is that Redis has no more."""
    spool: Path
    """One gateway process per directory."""
    spool_max_bytes: int = Field(2 * 2**30, ge=2**20)
    """Beyond it whole records are dropped and counted."""
    admin_key_file: AdminKeyFile
    """Holds one API key with the role admin. Mode 0600."""
    key_pepper_file: PepperFile
    """Holds the secret that keys are hashed with: the same for all gateways of one Redis, never another one. Mode
    0600."""
    host: str = Field("127.0.0.1", min_length=1)
    """Keys travel with every request: beyond loopback a proxy in front brings TLS."""
    port: int = Field(8700, ge=0, le=65_535)
    n_cap: int = Field(64, ge=1, le=4096)
    max_body_bytes: int = Field(4 * 2**20, ge=1024)
    file_max_bytes: int = Field(128 * 2**20, ge=1024, le=2**40)
    """Of an uploaded file."""
    max_lora_rank: int = Field(32, ge=1, le=512)
    """The largest rank the policy engine was started for."""
    max_loras: int = Field(4, ge=1)
    """Adapters that the policy engine may hold for the gateway."""
    prove_seconds: float = Field(300, gt=0)
    """After so long an engine proves again what it proved; a proof counts for three times as long."""
    fingerprint_tolerance: float = Field(1e-3, gt=0, allow_inf_nan=False)
    """Nats between engine and trainer: 1e-3 for float32, 2e-2 for bfloat16."""
    default_max_tokens: int = Field(64, ge=1)
    """Of the route `default`, when it is made."""
    holdout_share: float = Field(0.02, ge=0, le=0.5, allow_inf_nan=False)
    """Of the requests that one sample or a strategy that looks at rewards would answer: all n of the policy that
    best-of-n draws from, whatever they are, so that the ledger goes on to tell what best-of-n is worth. Of
    distilled_first as many again are probes."""
    learning_seconds: float = Field(30, gt=0)
    """Between two looks at what the ledger tells strategies."""
    reconcile_seconds: float = Field(5, gt=0)
    canary_after_seconds: float = Field(10, gt=0)
    """A policy engine that gave no token for so long is asked for one."""
    hung_after_seconds: float = Field(30, gt=0)
    """One that gave no token for so long, though asked, is given no requests until it gives one. Of a reward model that
    has answered nobody for so long, though asked, calls whose callers give up count as failed."""
    max_tokens_in_flight: int = Field(2**18, ge=1)
    """Of all requests that run: prompt + n × the expected length. Best the engine's KV cache, whose size it logs."""
    max_tokens_waiting: int = Field(2**20, ge=0)
    """Of the requests that wait for room among those; 0 refuses them."""
    key_requests_per_minute: int | None = Field(None, ge=1)
    key_tokens_per_minute: int | None = Field(None, ge=1)
    """Drawn for one key, prompts included, in any minute."""
    key_tokens_in_flight: int | None = Field(None, ge=1)
    """Of one key's requests: prompt + n × max_tokens."""
    tenant_requests_per_minute: int | None = Field(None, ge=1)
    tenant_tokens_per_minute: int | None = Field(None, ge=1)
    tenant_tokens_in_flight: int | None = Field(None, ge=1)
    """Of all keys of one tenant together."""
    webhook_private_addresses: bool = False
    """Whether webhooks may lead to addresses that are not public: loopback, private networks, cloud metadata."""
    webhook_plain_http: bool = False
    """Whether they may lead to http:// too."""
    header_seconds: float = Field(10, gt=0)
    """A connection is closed that takes longer for a request's headers."""
    unread_seconds: float = Field(30, gt=0)
    """A connection is closed that leaves a reply unread so long."""
    shutdown_seconds: int = Field(75, ge=1)
    """How long accepted requests may go on after SIGTERM."""

    @field_validator("hung_after_seconds")
    @classmethod
    def _canary_has_time(cls, seconds: float, others: ValidationInfo) -> float:
        if seconds <= others.data.get("canary_after_seconds", 0):
            raise ValueError("must be above canary_after_seconds: the time between is what a token may take")
        return seconds

    @property
    def engines(self) -> dict[str, str]:
        """The engines of `policy_engine_urls`, by name."""
        return {f"policy-{place}": url for place, url in enumerate(self.policy_engine_urls)}

    @property
    def digest(self) -> str:
        """Of what the answers depend on; stands in every group. No secrets, no addresses."""
        kept = {"base_policy_id", "max_model_len", "n_cap"}
        windows = [member.window for member in self.reward_model.members if isinstance(member, VllmMember)]
        told = f"{self.model_dump_json(include=kept)} {self.reward_model.id} {windows}"
        return sha256(told.encode()).hexdigest()[:16]
