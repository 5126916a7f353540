"""What the gateway process is told from outside: environment variables `BONSAI_…`, and nothing else.

Owns: names, defaults, limits. Only `app.py` reads this class; everything below it takes plain values.
"""

from __future__ import annotations

from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from bon_algos.contracts import PolicyId
from service.api_key import read_admin_key, read_pepper
from service.reward_test import read_pairs


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _private_url(url: str) -> str:
    parts = urlsplit(url)
    is_socket = parts.scheme == "unix" and parts.path.startswith("/") and not parts.netloc
    if not is_socket and not (parts.scheme == "http" and _is_loopback(parts.hostname or "") and parts.port):
        raise ValueError("an engine is reached over unix:///path or http://127.0.0.1:PORT, never over a network")
    return url.rstrip("/")


def _redis_url(url: str) -> str:
    if urlsplit(url).scheme not in ("redis", "rediss", "unix"):
        raise ValueError("must begin with redis://, rediss:// or unix:///")
    return url


PrivateUrl = Annotated[str, AfterValidator(_private_url)]
RedisUrl = Annotated[str, AfterValidator(_redis_url)]


def _readable_pairs(file: Path) -> Path:
    read_pairs(file)
    return file


def _admin_key_file(file: Path) -> Path:
    read_admin_key(file)
    return file


def _pepper_file(file: Path) -> Path:
    read_pepper(file)
    return file


PairsFile = Annotated[Path, AfterValidator(_readable_pairs)]
AdminKeyFile = Annotated[Path, AfterValidator(_admin_key_file)]
PepperFile = Annotated[Path, AfterValidator(_pepper_file)]


class GatewaySettings(BaseSettings):
    """Settings of one gateway process."""

    model_config = SettingsConfigDict(env_prefix="BONSAI_", frozen=True, extra="ignore")

    redis_url: RedisUrl
    policy_engine_url: PrivateUrl
    reward_engine_url: PrivateUrl
    policy_directory: Path
    """The base policy's model directory: tokenizer and chat template are read from it."""
    reward_directory: Path
    base_policy_id: PolicyId
    """Also the model's name in the policy engine."""
    reward_model_id: str = Field(pattern=r"^rm-[0-9a-f]{16}$")
    """Also the model's name in the reward engine."""
    reward_pairs: PairsFile | None = None
    """A JSON list of known pairs that the reward model must rank rightly before it chooses anything."""
    max_model_len: int = Field(ge=2)
    """Window of the policy engine, tokens."""
    reward_max_model_len: int = Field(ge=2)
    artefacts: Path
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
    max_lora_rank: int = Field(32, ge=1, le=512)
    """The largest rank the policy engine was started for."""
    max_loras: int = Field(4, ge=1)
    """Adapters that the policy engine may hold for the gateway."""
    fingerprint_tolerance: float = Field(1e-3, gt=0, allow_inf_nan=False)
    """Nats between engine and trainer: 1e-3 for float32, 2e-2 for bfloat16."""
    default_max_tokens: int = Field(64, ge=1)
    """Of the route `default`, when it is made."""
    reconcile_seconds: float = Field(5, gt=0)
    shutdown_seconds: int = Field(75, ge=1)
    """How long requests that run may go on after SIGTERM."""

    @property
    def digest(self) -> str:
        """Of what the answers depend on; stands in every group. No secrets, no addresses."""
        kept = {"base_policy_id", "reward_model_id", "max_model_len", "reward_max_model_len", "n_cap"}
        return sha256(self.model_dump_json(include=kept).encode()).hexdigest()[:16]
