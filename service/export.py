"""A policy in a tar archive, which others load unchanged: an adapter as a plain PEFT directory, full weights as the
model directory that they are.

Owns: what is in it, its model card, its bytes. Does not own: the checks of the files (artefacts.py), merging
(`bonsai policies export --merged`; this process has no torch).
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from bon_algos.contracts import Manifest, PolicyRecord
from service.artefacts import CONFIG_FILE, WEIGHTS_FILE

CARD_FILE: Final = "README.md"
MODEL_FILE: Final = "config.json"
"""What a whole model has, and an adapter has not."""
CHUNK_BYTES: Final = 2**20


class Archive(NamedTuple):
    """A tar archive that is read from disk as it is sent."""

    small: tuple[tuple[str, bytes], ...]
    files: tuple[tuple[Path, int], ...]
    """What is read as it is sent, with its size."""
    written_at: int

    @property
    def num_bytes(self) -> int:
        small = [(name, len(content)) for name, content in self.small]
        entries = small + [(path.name, size) for path, size in self.files]
        return sum(len(self._header(name, size)) + _padded(size) for name, size in entries) + 2 * tarfile.BLOCKSIZE

    def chunks(self) -> Iterator[bytes]:
        """Blocks while it reads."""
        for name, content in self.small:
            yield self._header(name, len(content)) + content + _padding(len(content))
        for path, size in self.files:
            yield self._header(path.name, size)
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
            yield _padding(size)
        yield bytes(2 * tarfile.BLOCKSIZE)

    def _header(self, name: str, size: int) -> bytes:
        """One block, or three: a size of 8 GiB and more has a record of its own."""
        entry = tarfile.TarInfo(name)
        entry.size, entry.mtime, entry.mode = size, self.written_at, 0o644
        return entry.tobuf(tarfile.PAX_FORMAT)


def archive_of(policy: PolicyRecord, directory: Path, base: str) -> Archive:
    """base: what an adapter's `base_model_name_or_path` says, and the card, for whoever looks the base model up by it.
    The directory's files have been checked. The same policy and base give the same bytes."""
    manifest = policy.manifest
    assert manifest is not None
    card = (CARD_FILE, model_card(policy, base).encode())
    is_lora = manifest.kind == "lora"
    small = ((CONFIG_FILE, _config_for(directory, base)), card) if is_lora else (card,)
    names = [WEIGHTS_FILE] if is_lora else sorted(manifest.files)
    files = tuple((directory / name, (directory / name).stat().st_size) for name in names)
    return Archive(small, files, int(policy.created_at))


def _config_for(directory: Path, base: str) -> bytes:
    config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    return json.dumps(config, indent=2, sort_keys=True).encode()


def model_card(policy: PolicyRecord, base: str) -> str:
    """In the format of the Hugging Face hub."""
    manifest = policy.manifest
    assert manifest is not None
    library = "peft" if manifest.kind == "lora" else "transformers"
    tags = f"tags: [bonsai, {manifest.kind}, best-of-n]"
    front = ["---", f"base_model: {json.dumps(base)}", f"library_name: {library}", tags, "---"]
    facts = {
        "base policy": manifest.base_policy_id,
        "parent policy": manifest.parent_policy_id,
        "stands in for": f"best of {policy.n_equivalent}",
        "rank": "all weights" if manifest.kind == "full" else str(manifest.lora_rank),
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
    return "\n".join([*front, "", f"# {policy.id}", "", "| | |", "|---|---|", *rows, "", *_use(manifest), ""])


def _use(manifest: Manifest) -> list[str]:
    """How others load it, as lines of Markdown."""
    if manifest.kind == "lora":
        load = "model = PeftModel.from_pretrained(base_model, DIRECTORY)"
        serve = f"$ vllm serve BASE --enable-lora --lora-modules {manifest.policy_id}=DIRECTORY"
    else:
        load, serve = "model = AutoModelForCausalLM.from_pretrained(DIRECTORY)", "$ vllm serve DIRECTORY"
    return ["```python", load, "```", "", "or", "", "```console", serve, "```"]


def unpack(archive: Path, directory: Path) -> None:
    """Write the files of an archive into a directory: plain files without a path, nothing else. Raises
    ValueError, OSError."""
    with tarfile.open(archive, "r:") as tar:
        members = tar.getmembers()
        names = {member.name for member in members if member.isreg()}
        is_policy = names == {CONFIG_FILE, CARD_FILE, WEIGHTS_FILE} or names > {CARD_FILE, MODEL_FILE}
        if not is_policy or len(members) != len(names) or any("/" in name for name in names):
            raise ValueError("this is no archive of a policy")
        tar.extractall(directory, filter="data")


def is_adapter(archive: Path) -> bool:
    """Whether it holds an adapter, and not a whole model."""
    with tarfile.open(archive, "r:") as tar:
        return CONFIG_FILE in tar.getnames()


def _padded(size: int) -> int:
    return size + len(_padding(size))


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)
