"""A policy's archive as it is sent: its announced length, what of it is in memory, and what is taken for one."""

from __future__ import annotations

import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from service.artefacts import directory_of
from service.export import Archive, archive_of, unpack
from tests.service.published import write_full_policy

MiB = 2**20
GiB = 2**30
WEIGHTS = "tokenizer.json"
"""Stands in for them: the last file of the archive."""


def archive_with(root: Path, weight_bytes: int) -> Archive:
    """Of full weights whose last file is a hole of this length."""
    written = write_full_policy(root)
    directory = directory_of(root, written)
    os.truncate(directory / WEIGHTS, weight_bytes)
    return archive_of(written.as_candidate(), directory, "owner/model")


def written_up_to_the_weights(archive: Archive, file: Path) -> None:
    """The archive as it would arrive, but that its last file is a hole instead of zeros that were read and sent."""
    with file.open("wb") as content:
        for chunk in archive.chunks():
            content.write(chunk)
            if WEIGHTS.encode() in chunk:
                break
        content.truncate(archive.num_bytes)


@pytest.mark.parametrize("weight_bytes", [8 * GiB - 1, 8 * GiB, 9 * GiB])
def test_the_announced_length_is_the_archives_also_where_a_header_is_longer(tmp_path: Path, weight_bytes: int):
    archive = archive_with(tmp_path, weight_bytes)
    written_up_to_the_weights(archive, tmp_path / "policy.tar")
    with tarfile.open(tmp_path / "policy.tar", "r:") as tar:
        last = tar.getmembers()[-1]
    assert (last.name, last.size) == (WEIGHTS, weight_bytes)
    padded = -(-weight_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    # POSIX ends an archive with two blocks of zeros.
    assert archive.num_bytes == last.offset_data + padded + 2 * tarfile.BLOCKSIZE


def test_weights_are_read_as_they_are_sent(tmp_path: Path):
    archive = archive_with(tmp_path, 64 * MiB)
    tracemalloc.start()
    try:
        assert sum(len(chunk) for chunk in archive.chunks()) == archive.num_bytes
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * MiB


def test_what_is_no_policy_is_not_unpacked(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with tarfile.open(tmp_path / "policy.tar", "w") as tar:
        tar.add(tmp_path / "config.json", "../config.json")
    with pytest.raises(ValueError, match="no archive of a policy"):
        unpack(tmp_path / "policy.tar", tmp_path / "out")
    assert not (tmp_path / "out").exists()
