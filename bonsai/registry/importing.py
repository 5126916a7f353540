"""Somebody else's PEFT adapter becomes files that the registry can take: copied, checked, fingerprinted.

Owns what is accepted, and why not. Does not own the registry's own checks (service/registration.py) nor the engine's
proof. What is checked is a copy that nobody else writes to; nothing of it is ever executed or unpickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from bon_algos.contracts import (
    ADAPTER_FILES,
    POLICY_ID_PATTERN,
    Imported,
    Manifest,
    PolicyId,
    adapter_digest,
)
from service.artefacts import ArtefactRefused, check_safetensors
from worker.durable import sha256_file, staged

CONFIG_FILE, WEIGHTS_FILE, FINGERPRINT_FILE = ADAPTER_FILES
MAX_WEIGHTS_BYTES: Final = 8 * 2**30
MAX_CONFIG_BYTES: Final = 2**20
MAX_FILES: Final = 100
FOREIGN_SUFFIXES: Final = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".gguf", ".npz", ".py", ".so", ".joblib")
"""They run what is in them when they are loaded, or are other formats: an adapter that brings one is refused whole."""
PLAIN: Final[Mapping[str, tuple[object, ...]]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", None),
    **dict.fromkeys(
        ("modules_to_save", "auto_mapping", "rank_pattern", "alpha_pattern", "layer_replication", "layers_to_transform",
         "trainable_token_indices", "target_parameters", "use_dora", "use_rslora", "lora_bias", "fan_in_fan_out"),
        (None, False),
    ),
}  # fmt: skip
"""What a plain LoRA says; empty lists and objects count as None."""


class AdapterRefused(Exception):
    """This adapter is not taken; the text says why."""


class Base(NamedTuple):
    """The model that the stack serves."""

    directory: Path
    policy_id: PolicyId


class Adapter(NamedTuple):
    directory: Path
    rank: int
    alpha: float
    modules: tuple[str, ...]


def import_adapter(
    source: Path, base: Base, artefacts: Path, *, n: int, max_rank: int, by: str, tenant: str
) -> Manifest:
    """Put a checked and fingerprinted copy below the artefact root, under its digest. n: the best-of-n it stands in
    for. Loads the base model (torch). Raises AdapterRefused, OSError."""
    from bonsai.registry.fingerprinting import fingerprint_of

    with _copied(source, artefacts) as scratch:
        adapter = checked(scratch, base.policy_id, max_rank)
        came_as = adapter_digest({name: sha256_file(scratch / name) for name in (CONFIG_FILE, WEIGHTS_FILE)})
        proof = fingerprint_of(adapter, base)
        (scratch / CONFIG_FILE).write_text(_plain_config(adapter, base))
        (scratch / FINGERPRINT_FILE).write_text(proof.model_dump_json())
        imported = Imported(by=by, source_digest=came_as, n=n)
        return _published(scratch, artefacts, adapter, base, imported, tenant)


def checked(directory: Path, base_policy_id: str, max_rank: int) -> Adapter:
    """Raises AdapterRefused for what is no plain LoRA of a rank the engine takes."""
    config = _config(directory / CONFIG_FILE)
    for name, allowed in PLAIN.items():
        if (config.get(name) or None) not in (*allowed, None) or (name == "peft_type" and not config.get(name)):
            raise AdapterRefused(f"adapter_config.json: {name} must be {' or '.join(map(str, allowed))}")
    rank, alpha, modules = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= max_rank:
        raise AdapterRefused(f"adapter_config.json: r must be 1 to the engine's {max_rank} (--max-lora-rank)")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e6:
        raise AdapterRefused("adapter_config.json: lora_alpha must be a positive number")
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules) or not modules:
        raise AdapterRefused("adapter_config.json: target_modules must be a list of names")
    named = config.get("base_model_name_or_path")
    if isinstance(named, str) and re.fullmatch(POLICY_ID_PATTERN, named) and named != base_policy_id:
        raise AdapterRefused(f"the adapter is for the base {named}, and {base_policy_id} is served")
    try:
        check_safetensors(directory / WEIGHTS_FILE)
    except ArtefactRefused as error:
        raise AdapterRefused(f"{WEIGHTS_FILE}: {error}") from error
    return Adapter(directory, rank, float(alpha), tuple(sorted({name.rsplit(".", 1)[-1] for name in modules})))


@contextmanager
def _copied(source: Path, artefacts: Path) -> Iterator[Path]:
    """The two files of an adapter in a directory of our own."""
    _require_plain(source)
    artefacts.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".import-", dir=artefacts) as name:
        for file, most in ((CONFIG_FILE, MAX_CONFIG_BYTES), (WEIGHTS_FILE, MAX_WEIGHTS_BYTES)):
            _copy(source / file, Path(name) / file, most)
        yield Path(name)


def _require_plain(source: Path) -> None:
    if source.is_symlink() or not source.is_dir():
        raise AdapterRefused(f"{source} is no directory")
    names = sorted(os.listdir(source))
    if len(names) > MAX_FILES:
        raise AdapterRefused(f"{source} has more than {MAX_FILES} entries")
    for name in names:
        if name.lower().endswith(FOREIGN_SUFFIXES):
            raise AdapterRefused(f"{name}: only safetensors are taken; remove it if the adapter does not need it")
        if not stat.S_ISREG(os.lstat(source / name).st_mode):
            raise AdapterRefused(f"{name} is not a plain file")
    if missing := {CONFIG_FILE, WEIGHTS_FILE} - set(names):
        raise AdapterRefused(f"{source} lacks {', '.join(sorted(missing))}")


def _copy(source: Path, target: Path, most: int) -> None:
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as content:
        size = os.fstat(descriptor).st_size
        if not 0 < size <= most:
            raise AdapterRefused(f"{source.name} has {size} bytes; 1 to {most} are taken")
        with target.open("wb") as copy:
            shutil.copyfileobj(content, copy)


def _config(file: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterRefused(f"{file.name} is not JSON") from error
    if not isinstance(config, dict):
        raise AdapterRefused(f"{file.name} is not an object")
    return config


def _plain_config(adapter: Adapter, base: Base) -> str:
    """As the worker writes it: what was said beside a plain LoRA's facts stays behind."""
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.policy_id,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": list(adapter.modules),
    }
    return json.dumps(said, indent=2, sort_keys=True)


def _published(
    scratch: Path, artefacts: Path, adapter: Adapter, base: Base, imported: Imported, tenant: str
) -> Manifest:
    files = {name: sha256_file(scratch / name) for name in ADAPTER_FILES}
    digest = adapter_digest(files)
    manifest = Manifest(
        tenant=tenant,
        policy_id=f"pol-{digest[:16]}",
        digest=digest,
        base_policy_id=base.policy_id,
        parent_policy_id=base.policy_id,
        reward_model_id=None,
        job_id=None,
        epoch=0,
        created_at=time.time(),
        spec=None,
        data=None,
        report=None,
        imported=imported,
        files=files,
        lora_rank=adapter.rank,
        steps=0,
    )
    with staged(artefacts / "policies" / digest, points=("import.written", "import.renamed")) as aside:
        for name in ADAPTER_FILES:
            shutil.copyfile(scratch / name, aside / name)
        (aside / "manifest.json").write_text(manifest.model_dump_json(indent=2))
    return manifest
