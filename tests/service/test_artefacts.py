"""What must be true of an adapter's files before an engine is told to load them."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from bon_algos.contracts import (
    Manifest,
)
from service.artefacts import ArtefactRefused, check_safetensors, checked_adapter, checked_files, read_manifest
from tests.service.published import fingerprint, safetensors, write_full_policy, write_policy
from tests.service.records import STUDENT


def test_an_untouched_directory_is_accepted(tmp_path: Path):
    written = write_policy(tmp_path)
    directory, found = checked_adapter(tmp_path, written, max_rank=32)
    assert directory == tmp_path.resolve() / "policies" / written.digest
    assert found == fingerprint()


def _link_to(root: Path, written: Manifest) -> None:
    directory = root / "policies" / written.digest
    directory.rename(root / "elsewhere")
    directory.symlink_to(root / "elsewhere")


def _linked_file(root: Path, written: Manifest) -> None:
    weights = root / "policies" / written.digest / "adapter_model.safetensors"
    weights.rename(root / "weights")
    weights.symlink_to(root / "weights")


def _extra_file(root: Path, written: Manifest) -> None:
    (root / "policies" / written.digest / "adapter_model.bin").write_bytes(b"")


def _missing_file(root: Path, written: Manifest) -> None:
    (root / "policies" / written.digest / "fingerprint.json").unlink()


def _missing_directory(root: Path, written: Manifest) -> None:
    (root / "policies" / written.digest).rename(root / "gone")


def _one_bit(root: Path, written: Manifest) -> None:
    weights = root / "policies" / written.digest / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def _other_manifest(root: Path, written: Manifest) -> None:
    other = written.model_copy(update={"epoch": 2})
    (root / "policies" / written.digest / "manifest.json").write_text(other.model_dump_json())


def _device(root: Path, written: Manifest) -> None:
    weights = root / "policies" / written.digest / "adapter_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)


@pytest.mark.parametrize(
    "damage",
    [
        _link_to, _linked_file, _extra_file, _missing_file, _missing_directory, _one_bit, _other_manifest, _device,
    ],
)  # fmt: skip
def test_a_directory_that_is_not_what_was_registered_is_refused(
    tmp_path: Path, damage: Callable[[Path, Manifest], None]
):
    written = write_policy(tmp_path)
    damage(tmp_path, written)
    with pytest.raises(ArtefactRefused):
        checked_adapter(tmp_path, written, max_rank=32)


def test_full_weights_are_whole_as_their_manifest_lists_them_and_no_adapter(tmp_path: Path):
    written = write_full_policy(tmp_path)
    assert read_manifest(tmp_path, written.digest) == written
    assert checked_files(tmp_path, written) == tmp_path.resolve() / "policies" / written.digest
    with pytest.raises(ArtefactRefused, match="no adapter"):
        checked_adapter(tmp_path, written, max_rank=32)


@pytest.mark.parametrize("name", ["tokenizer.json", "extra.json"])
def test_full_weights_that_miss_or_gained_a_file_are_refused(tmp_path: Path, name: str):
    written = write_full_policy(tmp_path)
    file = tmp_path / "policies" / written.digest / name
    if file.exists():
        file.unlink()
    else:
        file.write_bytes(b"{}")
    for check in (lambda: read_manifest(tmp_path, written.digest), lambda: checked_files(tmp_path, written)):
        with pytest.raises(ArtefactRefused, match=name):
            check()


def test_a_manifest_that_lists_a_file_elsewhere_is_refused_before_that_is_opened(tmp_path: Path):
    written = write_policy(tmp_path)
    os.mkfifo(tmp_path / "policies" / "waits")
    listing = written.model_copy(update={"files": {"../waits": "a" * 64, **written.files}})
    (tmp_path / "policies" / written.digest / "manifest.json").write_text(listing.model_dump_json())
    with pytest.raises(ArtefactRefused, match="list exactly"):
        checked_adapter(tmp_path, listing, max_rank=32)


@pytest.mark.parametrize(
    "files",
    [
        {"adapter_config.json": b'{"peft_type": "IA3", "r": 8}'},
        {"adapter_config.json": b'{"peft_type": "LORA", "r": 16}'},
        {"adapter_config.json": b'{"peft_type": "LORA", "r": 8, "modules_to_save": ["embed_tokens"]}'},
        {"adapter_config.json": b'{"peft_type": "LORA", "r": 8, "auto_mapping": {"base_model_class": "X"}}'},
        {"adapter_config.json": b"[" * 5000},
        {"fingerprint.json": b"{}"},
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(tmp_path: Path, files: dict[str, bytes]):
    with pytest.raises(ArtefactRefused):
        checked_adapter(tmp_path, write_policy(tmp_path, files), max_rank=32)


def test_a_rank_above_the_engines_is_refused(tmp_path: Path):
    with pytest.raises(ArtefactRefused, match="rank"):
        checked_adapter(tmp_path, write_policy(tmp_path), max_rank=4)


def test_a_policy_whose_name_is_not_its_digest_is_refused(tmp_path: Path):
    written = write_policy(tmp_path)
    renamed = written.model_copy(update={"policy_id": STUDENT})
    (tmp_path / "policies" / written.digest / "manifest.json").write_text(renamed.model_dump_json())
    with pytest.raises(ArtefactRefused, match="name"):
        checked_adapter(tmp_path, renamed, max_rank=32)


def tensor(shape: list[int], offsets: list[object], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        safetensors(length=2**63),
        safetensors(length=10**6),
        safetensors(header={"a": tensor([2, 2], [0, 16]), "b": tensor([2], [8, 16])}),  # Overlap.
        safetensors(header={"a": tensor([1], [0, 4]), "b": tensor([2], [8, 16])}),  # Gap.
        safetensors(header={"a": tensor([8], [0, 32])}),  # Beyond the end.
        safetensors(header={"a": tensor([2], [0, 8])}),  # Bytes nobody declared.
        safetensors(header={"a": tensor([3], [0, 16])}),  # 3 · 4 is not 16.
        safetensors(header={"a": tensor([4], [0, 16], dtype="I32")}),
        safetensors(header={"a": tensor([4], [-16, 0])}),
        safetensors(header={"a": tensor([4], [0.0, 16.0])}),
        safetensors(header={"a": tensor([4], [True, 16])}),
        safetensors(header={"a": tensor([2**62, 4], [0, 16])}),
        safetensors(header={"a": {"dtype": "F32"}}),
        safetensors(header={"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}),
        safetensors(header={"a": {"dtype": "F32", "shape": [["4"]], "data_offsets": [0, 16]}}),
        safetensors(header={"__metadata__": {}}),
        safetensors(struct.pack("<4f", 1, 2, 3, float("nan"))),
        safetensors(struct.pack("<4f", 1, 2, float("inf"), 4)),
        safetensors(struct.pack("<4H", 0, 0, 0x7F80, 0), {"a": tensor([4], [0, 8], dtype="BF16")}),  # Infinity.
        safetensors(struct.pack("<4H", 0, 0, 0xFFC0, 0), {"a": tensor([4], [0, 8], dtype="BF16")}),  # Not a number.
        safetensors(struct.pack("<4e", 0, 0, float("-inf"), 0), {"a": tensor([4], [0, 8], dtype="F16")}),
        b"\x02\0\0\0\0\0\0\0[]",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
)
def test_weights_that_are_not_finite_tensors_end_to_end_are_refused(tmp_path: Path, content: bytes):
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(ArtefactRefused):
        check_safetensors(tmp_path / "w")


@pytest.mark.parametrize(
    "content",
    [
        safetensors(),
        safetensors(
            struct.pack("<4H", 0, 0x7F7F, 0xFF7F, 1), {"a": tensor([4], [0, 8], dtype="BF16")}
        ),  # Largest finite.
        safetensors(struct.pack("<2f", 0, 1), {"a": tensor([2], [0, 8]), "b": tensor([0, 4], [8, 8])}),
        safetensors(struct.pack("<f", 3), {"scalar": tensor([], [0, 4]), "__metadata__": {"format": "pt"}}),
    ],
)
def test_finite_tensors_of_floating_types_are_accepted(tmp_path: Path, content: bytes):
    (tmp_path / "w").write_bytes(content)
    check_safetensors(tmp_path / "w")
