"""Where a job is done: the engines, directories and limits of one process.

Owns their names. Does not own where they come from (`job_process`), nor what is done there (`distillation`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import redis
import torch

from archive.reading import Archive
from worker.engine import Engines
from worker.ranks import Parallelism


@dataclass(frozen=True)
class Workplace:
    """What a job may touch; built once, at the process edge."""

    client: redis.Redis
    engines: Engines
    judge: Engines | None
    """The second reward model's, for the report."""
    artefacts: Path
    policy_directory: Path
    base_policy_id: str
    device: torch.device
    torch_threads: int
    checkpoint_steps: int
    checkpoint_seconds: float
    engine_patience_seconds: float
    archive: Archive
    """Where groups are that the stream has no more."""
    processes: int = 1
    """That train together."""
    parallelism: Parallelism = "data"
