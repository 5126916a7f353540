"""What must be true of a policy's files: of any before the registry has it, of an adapter's before an engine is told to
load them.

Owns: the checks of one directory `policies/<sha256>` against its manifest. Does not own: how the files got there
(worker), nor whether the weights are the right ones: the fingerprint shows that (publishing.py).
An engine takes any path and would download a missing one, so nothing reaches it that was not proven here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from bon_algos.contracts import ADAPTER_FILES, Fingerprint, Manifest, adapter_digest

MANIFEST_FILE: Final = "manifest.json"
CONFIG_FILE, WEIGHTS_FILE, FINGERPRINT_FILE = ADAPTER_FILES
MAX_JSON_BYTES: Final = 32 * 2**20
_ITEM_BYTES: Final[Mapping[str, int]] = {"F32": 4, "F16": 2, "BF16": 2}
RecordT = TypeVar("RecordT", bound=BaseModel)


class ArtefactRefused(Exception):
    """The directory is not what its manifest says, or not what may be loaded; the text says why."""


class ArtefactUnreadable(ArtefactRefused):
    """It could not be looked at. That may pass: a volume that is away, a copy that is still on its way."""


def directory_of(root: Path, manifest: Manifest) -> Path:
    """Where a policy's files are, and nowhere else. root: resolved."""
    return root / "policies" / manifest.digest


def checked_adapter(root: Path, manifest: Manifest, *, max_rank: int) -> tuple[Path, Fingerprint]:
    """The absolute directory of a policy below `root` and its fingerprint, every byte checked against the
    manifest. Blocks while it reads the files. Raises ArtefactRefused."""
    directory = checked_files(root, manifest)
    if manifest.kind != "lora":
        raise ArtefactRefused("full weights are no adapter")
    _require_lora(_json_object(directory / CONFIG_FILE), manifest, max_rank)
    check_safetensors(directory / WEIGHTS_FILE)
    return directory, _record(Fingerprint, directory / FINGERPRINT_FILE)


def checked_files(root: Path, manifest: Manifest) -> Path:
    """The absolute directory of a policy of either kind below `root`, which holds what the manifest lists, byte for
    byte, and nothing else. Blocks while it reads the files. Raises ArtefactRefused."""
    directory = directory_of(root.resolve(), manifest)
    names = _plain_files(directory)
    _require_names(names, manifest)
    if {*manifest.files, MANIFEST_FILE} != names:
        raise ArtefactRefused("the manifest does not list exactly the directory's files")
    if _record(Manifest, directory / MANIFEST_FILE) != manifest:
        raise ArtefactRefused("manifest.json is not the manifest that was registered")
    _require_digests(directory, manifest)
    return directory


def read_manifest(root: Path, digest: str) -> Manifest:
    """The manifest of the directory `policies/<digest>`, which says that this is its name. Raises ArtefactRefused."""
    directory = root.resolve() / "policies" / digest
    names = _plain_files(directory)
    if MANIFEST_FILE not in names:
        raise ArtefactRefused(f"files missing {[MANIFEST_FILE]}")
    manifest = _record(Manifest, directory / MANIFEST_FILE)
    if manifest.digest != digest:
        raise ArtefactRefused("manifest.json names another directory")
    _require_names(names, manifest)
    return manifest


def _plain_files(directory: Path) -> frozenset[str]:
    """The names in a real directory inside a real directory that holds plain files alone: no link anywhere."""
    try:
        for folder in (directory.parent, directory):
            if not stat.S_ISDIR(os.lstat(folder).st_mode):
                raise ArtefactRefused(f"{folder.name} is not a plain directory")
        names = frozenset(os.listdir(directory))
        for name in sorted(names):
            if not stat.S_ISREG(os.lstat(directory / name).st_mode):
                raise ArtefactRefused(f"{name} is not a plain file")
    except OSError as error:
        raise ArtefactUnreadable(f"the policy's directory cannot be read: {error.strerror}") from error
    return names


def _require_names(names: frozenset[str], manifest: Manifest) -> None:
    """Exactly the allowed ones: an adapter's are known, those of full weights are what its manifest lists."""
    wanted = {*(ADAPTER_FILES if manifest.kind == "lora" else manifest.files), MANIFEST_FILE}
    if names != wanted:
        raise ArtefactRefused(f"files missing {sorted(wanted - names)}, not allowed {sorted(names - wanted)[:5]}")


def _require_digests(directory: Path, manifest: Manifest) -> None:
    for name, expected in manifest.files.items():
        with (directory / name).open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != expected:
                raise ArtefactRefused(f"{name} does not have the digest of the manifest")
    digest = adapter_digest(manifest.files)
    if digest != manifest.digest or manifest.policy_id != f"pol-{digest[:16]}":
        raise ArtefactRefused("the policy's name is not the digest of its files")


def _require_lora(config: Mapping[str, Any], manifest: Manifest, max_rank: int) -> None:
    if config.get("peft_type") != "LORA":
        raise ArtefactRefused("the adapter is not a LoRA")
    if config.get("modules_to_save") or config.get("auto_mapping"):
        raise ArtefactRefused("the adapter brings whole modules or classes of its own")
    rank = config.get("r")
    if rank != manifest.lora_rank or manifest.lora_rank > max_rank:
        raise ArtefactRefused(f"rank {manifest.lora_rank} is not the adapter's, or more than the engine's {max_rank}")


def check_safetensors(path: Path) -> None:
    """Header within bounds, tensors of a floating type one after the other to the end of the file, all finite.
    Raises ArtefactRefused."""
    size = path.stat().st_size
    with path.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_JSON_BYTES):
            raise ArtefactRefused("the safetensors header is longer than the file")
        try:
            header = json.loads(content.read(length))
        except (ValueError, RecursionError) as error:
            raise ArtefactRefused("the safetensors header is not JSON") from error
    if not isinstance(header, dict):
        raise ArtefactRefused("the safetensors header is not an object")
    spans = sorted(_span(name, entry) for name, entry in header.items() if name != "__metadata__")
    if not spans:
        raise ArtefactRefused("the adapter has no tensors")
    end = 0
    for begin, stop, dtype in spans:
        if begin != end:
            raise ArtefactRefused("tensors overlap or leave a gap")
        _require_finite(path, 8 + length + begin, stop - begin, dtype, size)
        end = stop
    if 8 + length + end != size:
        raise ArtefactRefused("the tensors do not end with the file")


def _span(name: str, entry: object) -> tuple[int, int, str]:
    """(begin, end, dtype) of one tensor in the data part; its size agrees with its shape."""
    try:
        dtype, shape, (begin, end) = (cast(dict[str, Any], entry)[key] for key in ("dtype", "shape", "data_offsets"))
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactRefused("a tensor lacks its type, shape or place") from error
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ArtefactRefused("a tensor is not of a floating type")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ArtefactRefused("a tensor's shape or place is not made of whole numbers")
    if end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise ArtefactRefused("a tensor's size does not agree with its shape")
    return begin, end, dtype


def _require_finite(path: Path, offset: int, num_bytes: int, dtype: str, size: int) -> None:
    if offset + num_bytes > size:
        raise ArtefactRefused("a tensor lies beyond the end of the file")
    count = num_bytes // _ITEM_BYTES[dtype]
    if dtype == "BF16":
        # numpy has no bfloat16: infinite and not-a-number are exactly the values whose exponent is all ones.
        words = np.fromfile(path, dtype="<u2", count=count, offset=offset)
        finite: NDArray[np.bool_] = (words & 0x7F80) != 0x7F80
    else:
        finite = np.isfinite(np.fromfile(path, dtype="<f4" if dtype == "F32" else "<f2", count=count, offset=offset))
    if not bool(finite.all()):
        raise ArtefactRefused("a tensor is not finite")


def _record(kind: type[RecordT], path: Path) -> RecordT:
    try:
        return kind.model_validate_json(_read(path))
    except ValidationError as error:
        raise ArtefactRefused(f"{path.name} is unreadable: {error.error_count()} faults") from error


def _json_object(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ArtefactRefused(f"{path.name} is not JSON") from error
    if not isinstance(value, dict):
        raise ArtefactRefused(f"{path.name} is not an object")
    return value


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ArtefactRefused(f"{path.name} is longer than {MAX_JSON_BYTES} bytes")
    return path.read_bytes()
