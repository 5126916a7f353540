"""A training state on disk: whole, verified, or skipped for the one before.

Owns the files and which of them to resume from. Does not own what is in a state (`train`).

Each attempt writes into a directory of its own, so a process that was frozen and replaced can damage nothing;
the newest state that verifies wins, whichever attempt wrote it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bon_algos.crash_points import crash_point
from worker import attempts
from worker.durable import sha256_file, staged

log = logging.getLogger(__name__)

KEPT = 2
"""States per attempt: the newest, and the one before it should that turn out torn."""


class TrainingState(NamedTuple):
    step: int
    """Steps done."""
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    """What is not a tensor; JSON."""


def save(attempt: Path, state: TrainingState, confirm: Callable[[], None]) -> None:
    """Write the state of `step` into the attempt's directory and forget all but the newest two, with everything
    that earlier attempts left once there are two.

    `confirm` raises when the attempt no longer owns the job. It is asked when all is written and only the rename
    is left, so a process that was frozen while it wrote leaves nothing.
    """
    final = attempt / f"step-{state.step:08d}"
    with staged(final, confirm=confirm, points=("checkpoint.written", "checkpoint.renamed")) as aside:
        save_file({name: tensor.contiguous() for name, tensor in state.tensors.items()}, aside / "state.safetensors")
        body = {
            "step": state.step,
            "numbers": state.numbers,
            "tensors_sha256": sha256_file(aside / "state.safetensors"),
        }
        (aside / "state.json").write_text(json.dumps({"body": body, "sha256": _digest(body)}))
    states = sorted(attempt.glob("step-*"))
    for old in states[:-KEPT]:
        shutil.rmtree(old)
    if len(states) >= KEPT:
        attempts.forget_before(attempt)
    crash_point("checkpoint.forgotten")


def newest(job_directory: Path) -> TrainingState | None:
    """The state with the most steps that verifies, over all attempts of the job; None when there is none."""
    for directory in sorted(
        job_directory.glob("*/step-*"), key=lambda path: (path.name, path.parent.name), reverse=True
    ):
        state = _read(directory)
        if state is not None:
            return state
        log.warning("state %s is damaged; the one before it is used", directory.name)
    return None


def _read(directory: Path) -> TrainingState | None:
    try:
        sealed = json.loads((directory / "state.json").read_text())
        body = sealed["body"]
        tensors_file = directory / "state.safetensors"
        if sealed["sha256"] != _digest(body) or body["tensors_sha256"] != sha256_file(tensors_file):
            return None
        return TrainingState(body["step"], load_file(tensors_file), body["numbers"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
