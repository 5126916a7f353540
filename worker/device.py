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


def locks_of(artefacts: Path, device: torch.device, processes: int) -> list[Path]:
    """Of the devices on which so many processes train, whatever numbers they know them by, in the order in which every
    job takes them; none for a CPU, which the system shares out."""
    if device.type != "cuda":
        return []
    used = range(min(processes, torch.cuda.device_count()))
    names = sorted(str(torch.cuda.get_device_properties(number).uuid) for number in used)
    return [artefacts / "devices" / f"{name}.lock" for name in names]


@contextmanager
def sole_use(lock: Path, wait: Callable[[float], None]) -> Iterator[None]:
    """Hold the lock while the block runs. `wait` lets time pass until it is free, and raises when the job must stop."""
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
