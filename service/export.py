"""A policy as a plain PEFT directory in a tar archive, which others load unchanged.

Owns: what is in it, its model card, its bytes. Does not own: the checks of the files (artefacts.py), merging
(`bonsai policies export --merged`; this process has no torch).
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Final, NamedTuple

from bon_algos.contracts import PolicyRecord
from service.artefacts import CONFIG_FILE, WEIGHTS_FILE

CARD_FILE: Final = "README.md"
CHUNK_BYTES: Final = 2**20


class Archive(NamedTuple):
    """A tar archive that is read from disk as it is sent."""

    small: tuple[tuple[str, bytes], ...]
    weights: Path
    weights_bytes: int
    written_at: int

    @property
    def num_bytes(self) -> int:
        sizes = [len(content) for _, content in self.small] + [self.weights_bytes]
        return sum(tarfile.BLOCKSIZE + _padded(size) for size in sizes) + 2 * tarfile.BLOCKSIZE

    def chunks(self) -> Iterator[bytes]:
        """Blocks while it reads."""
        for name, content in self.small:
            yield self._header(name, len(content)) + content + _padding(len(content))
        yield self._header(WEIGHTS_FILE, self.weights_bytes)
        with self.weights.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
        yield _padding(self.weights_bytes) + bytes(2 * tarfile.BLOCKSIZE)

    def _header(self, name: str, size: int) -> bytes:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mtime, entry.mode = size, self.written_at, 0o644
        return entry.tobuf(tarfile.PAX_FORMAT)


def archive_of(policy: PolicyRecord, directory: Path, base: str) -> Archive:
    """base: what `base_model_name_or_path` says, for whoever looks the base model up by it. The directory's files have
    been checked. The same policy and base give the same bytes."""
    config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    weights = directory / WEIGHTS_FILE
    small = (
        (CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True).encode()),
        (CARD_FILE, model_card(policy, base).encode()),
    )
    return Archive(small, weights, weights.stat().st_size, int(policy.created_at))


def model_card(policy: PolicyRecord, base: str) -> str:
    """In the format of the Hugging Face hub."""
    manifest = policy.manifest
    assert manifest is not None
    front = ["---", f"base_model: {json.dumps(base)}", "library_name: peft", "tags: [bonsai, lora, best-of-n]", "---"]
    facts = {
        "base policy": manifest.base_policy_id,
        "parent policy": manifest.parent_policy_id,
        "stands in for": f"best of {policy.n_equivalent}",
        "rank": str(manifest.lora_rank),
        "files' digest": manifest.digest,
    }
    if manifest.spec is not None:
        facts |= {"method": manifest.spec.method.type, "job": str(manifest.job_id), "steps": str(manifest.steps)}
    if manifest.reward_model_id is not None:
        facts["reward model"] = manifest.reward_model_id
    if manifest.imported is not None:
        facts["imported"] = f"by {manifest.imported.by}, from {manifest.imported.source_digest}"
    if manifest.report is not None:
        facts["win rate against the base"] = f"{manifest.report.win_rate.mean:.3f}"
        facts["KL to the base, nats"] = f"{manifest.report.kl_policy_reference.mean:.3f}"
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    use = ["```python", "model = PeftModel.from_pretrained(base_model, DIRECTORY)", "```", "", "or", "",
           "```console", f"$ vllm serve BASE --enable-lora --lora-modules {policy.id}=DIRECTORY", "```"]  # fmt: skip
    return "\n".join([*front, "", f"# {policy.id}", "", "| | |", "|---|---|", *rows, "", *use, ""])


def unpack(archive: bytes, directory: Path) -> None:
    """Write the files of an archive into a new directory: plain files without a path, nothing else."""
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        members = tar.getmembers()
        names = {member.name for member in members if member.isreg()}
        if names != {CONFIG_FILE, CARD_FILE, WEIGHTS_FILE} or len(members) != len(names):
            raise ValueError("this is no archive of a policy")
        directory.mkdir(parents=True)
        tar.extractall(directory, filter="data")


def _padded(size: int) -> int:
    return size + len(_padding(size))


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)
