"""Which reward model scores: where its members answer, what they are called, and how their rewards become one.

The gateway and the worker are told the same `RewardConfig` and so score with the same reward model. Its id names
whatever decides what a reward means: two configurations with one id give the same numbers.
"""

from __future__ import annotations

import json
import re
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from bon_algos.contracts.record import Record

REWARD_MODEL_ID_PATTERN: Final = r"^rm-[0-9a-f]{16}$"
MOST_MEMBERS: Final = 16


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _private_url(url: str) -> str:
    parts = urlsplit(url)
    is_socket = parts.scheme == "unix" and parts.path.startswith("/") and not parts.netloc
    if not is_socket and not (parts.scheme == "http" and is_loopback(parts.hostname or "") and parts.port):
        raise ValueError("an engine is reached over unix:///path or http://127.0.0.1:PORT, never over a network")
    return url.rstrip("/")


PrivateUrl = Annotated[str, AfterValidator(_private_url)]


class _Member(Record):
    url: PrivateUrl
    model: str = Field(min_length=1, max_length=256)
    """Its name there. A name of the form rm-… is the reward model's id."""
    scale: float = Field(1.0, gt=0)
    """What its rewards are multiplied by before the mean: members in different units need it."""

    @property
    def id(self) -> str:
        return self.model if re.match(REWARD_MODEL_ID_PATTERN, self.model) else reward_model_id(self.model)


class VllmMember(_Member):
    """A vLLM pooling server with a classifier of one label."""

    kind: Literal["vllm"] = "vllm"
    directory: Path
    """The model's: tokenizer and chat template are read from it."""
    window: int = Field(ge=2)
    """Tokens of prompt and completion together."""


class HttpMember(_Member):
    """Anything that speaks the schema of `bon_algos.reward_protocol`."""

    kind: Literal["http"] = "http"
    path: str = Field("/score", pattern=r"^/[!-~]*$", max_length=256)


Member = Annotated[VllmMember | HttpMember, Field(discriminator="kind")]


class RewardConfig(Record):
    """One reward model, of one member or several."""

    members: tuple[Member, ...] = Field(min_length=1, max_length=MOST_MEMBERS)
    caution: float = Field(0.0, ge=0)
    """λ: the reward is mean − λ · standard deviation of the members' scaled rewards."""

    @model_validator(mode="after")
    def _makes_sense(self) -> RewardConfig:
        if len({member.id for member in self.members}) < len(self.members):
            raise ValueError("a reward model is named twice among the members")
        if self.caution and len(self.members) == 1:
            raise ValueError("caution needs two members or more: one does not disagree with itself")
        return self

    @property
    def id(self) -> str:
        """The only member's own, unless it is scaled; of several: of all of them, their scales and the caution."""
        first = self.members[0]
        if len(self.members) == 1 and first.scale == 1:
            return first.id
        return reward_model_id(json.dumps([sorted((one.id, one.scale) for one in self.members), self.caution]))


def read_reward_config(text: str | bytes) -> RewardConfig:
    """From JSON. ValueError, in words that name the field, when it describes no reward model."""
    try:
        return RewardConfig.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise ValueError(f"{place}: {fault['msg']}" if place else fault["msg"]) from None


def _parsed(value: object) -> object:
    return read_reward_config(value) if isinstance(value, str) else value


RewardConfigSetting = Annotated[RewardConfig, BeforeValidator(_parsed)]
"""As an environment variable holds it."""


def reward_model_id(name: str) -> str:
    """The id of a reward model that is told from others by `name`."""
    return f"rm-{sha256(name.encode()).hexdigest()[:16]}"
