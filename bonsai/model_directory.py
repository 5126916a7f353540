"""A model on disk: is it one we can serve, how long a text does it take, and what is its name.

Owns the checks made before anything starts, the id (a digest of everything that decides what the model computes)
and the way from a hub id to a directory. Loads no weights; imports no tensor library.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

Role = Literal["policy", "reward"]
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt")
"""What is fetched from a hub: never a pickle, never code."""
NAMED_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "model.safetensors.index.json",
)
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


class BadModel(Exception):
    """The directory does not hold a model that can play this role; the message says what to change."""


class _Config(BaseModel):
    """The part of a Hugging Face `config.json` that is read here."""

    model_config = ConfigDict(extra="ignore")

    architectures: tuple[str, ...] = Field(min_length=1)
    max_position_embeddings: int | None = Field(None, ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int | None = None
    hidden_size: int = Field(ge=1)
    head_dim: int | None = None
    id2label: dict[str, str] | None = None
    num_labels: int | None = None

    @property
    def labels(self) -> int:
        """transformers' own default is two."""
        if self.num_labels is not None:
            return self.num_labels
        return len(self.id2label) if self.id2label is not None else 2


@dataclass(frozen=True)
class ModelDirectory:
    path: Path
    """Absolute."""
    max_model_len: int
    """Tokens."""
    cache_bytes_per_token: int
    """Keys and values of all layers in float32."""


def open_model(path: Path, role: Role, longest: int) -> ModelDirectory:
    """Check that `path` holds a model for this role; texts are cut off at `longest` tokens at most.

    Raises BadModel.
    """
    _check_files(path, role)
    try:
        config = _Config.model_validate_json((path / "config.json").read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadModel(f"{path}/config.json: {where}: {first['msg']}") from error
    _check_role(path, role, config)
    heads = config.num_key_value_heads or config.num_attention_heads
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    return ModelDirectory(
        path=path.resolve(),
        max_model_len=min(config.max_position_embeddings or longest, longest),
        cache_bytes_per_token=2 * config.num_hidden_layers * heads * head_dim * 4,
    )


def _check_files(path: Path, role: Role) -> None:
    if not path.is_dir():
        raise BadModel(f"the {role} model {str(path)!r} is neither a directory nor a hub id like 'owner/name'")
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            raise BadModel(f"{path} is no {role} model: it holds no {name}")
    if not any(path.glob("*.safetensors")):
        raise BadModel(f"{path} holds no *.safetensors; other weight formats are not loaded")


def _check_role(path: Path, role: Role, config: _Config) -> None:
    architecture = config.architectures[0]
    if role == "policy" and not architecture.endswith("ForCausalLM"):
        raise BadModel(f"{path}: {architecture} does not generate; a policy is a …ForCausalLM")
    if role == "reward" and not architecture.endswith("ForSequenceClassification"):
        raise BadModel(f"{path}: {architecture} is no reward model; …ForSequenceClassification with one label is")
    if role == "reward" and config.labels != 1:
        raise BadModel(f"{path}: a reward model has one label, this one has {config.labels}")


def resolve(name: str, role: Role, shipped: Path) -> Path:
    """The directory of a model named by path or hub id; `shipped` where it is not named ("").

    A directory wins over a hub id of the same spelling. A hub id is downloaded into the hub's own cache (network).
    """
    if name == "":
        if not shipped.is_dir():
            raise BadModel(f"this installation ships no {role} model: run `bonsai models build-demo`, or name one")
        return shipped
    path = Path(name).expanduser()
    if path.is_dir() or not _HUB_ID.match(name):
        return path
    return _download(name, role)


def _download(name: str, role: Role) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        message = f"the {role} model {name!r} is no directory here and the hub did not give it: {reason[0]}"
        raise BadModel(message) from error


class _FileDigest(BaseModel):
    size: int
    mtime_ns: int
    sha256: str


_DIGESTS = TypeAdapter(dict[str, _FileDigest])


def model_digest(path: Path, cache: Path) -> str:
    """sha256 over names and digests of the files that decide what the model computes.

    Big weights take minutes to read, so each file's digest is kept in `cache` under path, size and mtime.
    """
    known = _read_cache(cache)
    names = {name for name in NAMED_FILES if (path / name).is_file()}
    files = sorted(names | {file.name for file in path.glob("*.safetensors")})
    seen = {str((path / name).resolve()): _digest(path / name, known) for name in files}
    if any(known.get(key) != digest for key, digest in seen.items()):
        _write_cache(cache, known | seen)
    digests = dict(zip(files, (digest.sha256 for digest in seen.values()), strict=True))
    return sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def policy_id(digest: str) -> str:
    return f"pol-{digest[:16]}"


def reward_model_id(digest: str) -> str:
    return f"rm-{digest[:16]}"


def _digest(file: Path, known: dict[str, _FileDigest]) -> _FileDigest:
    stat, kept = file.stat(), known.get(str(file.resolve()))
    if kept is not None and (kept.size, kept.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
        return kept
    with file.open("rb") as content:
        computed = file_digest(content, "sha256").hexdigest()
    return _FileDigest(size=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=computed)


def _read_cache(cache: Path) -> dict[str, _FileDigest]:
    try:
        return _DIGESTS.validate_json(cache.read_bytes())
    except (FileNotFoundError, ValidationError):
        return {}


def _write_cache(cache: Path, digests: dict[str, _FileDigest]) -> None:
    aside = cache.with_suffix(".tmp")
    aside.write_bytes(_DIGESTS.dump_json(digests, indent=1))
    aside.replace(cache)
