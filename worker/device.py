"""One job per GPU: a second one on the same machine waits outside instead of taking the first one's memory.

Owns the lock. Held by a process through the kernel, so it is free the moment its holder is dead, however it died.
Does not own which device a worker is given (`CUDA_VISIBLE_DEVICES`).
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SECONDS_BETWEEN_TRIES = 1.0


def lock_of(artefacts: Path, device: torch.device) -> Path | None:
    """Of the device itself, whatever number a process knows it by; None for a CPU, which the system shares out."""
    if device.type != "cuda":
        return None
    return artefacts / "devices" / f"{torch.cuda.get_device_properties(device).uuid}.lock"


@contextmanager
def sole_use(lock: Path | None, wait: Callable[[float], None]) -> Iterator[None]:
    """Hold the lock while the block runs. `wait` lets time pass until it is free, and raises when the job must stop."""
    if lock is None:
        yield
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        while not _taken(descriptor):
            log.info("waiting: another job of this machine has the device of %s", lock.name)
            wait(SECONDS_BETWEEN_TRIES)
        yield
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
