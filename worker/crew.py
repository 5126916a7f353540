"""The processes that a job's process starts to train with it, one per device.

Owns that they live and die together: they are killed with rank 0, and rank 0 ends at once when one of them dies, so
that the attempt is over, the job is given back, and the next attempt goes on from the newest state. Does not own what
they do (`follower`).
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import torch
import torch.distributed

from worker.errors import JobFailed, Stopped
from worker.ranks import ALONE, Ranks, join

log = logging.getLogger(__name__)

LOST_A_RANK = 70
"""Exit code of a job's process that ends with its ranks; EX_SOFTWARE."""


@contextmanager
def crew(size: int, device_type: str) -> Iterator[Ranks]:
    """The ranks of a job, this process the first; the others wait for a plan, and are gone with the block.
    Raises JobFailed where there are fewer devices."""
    if size == 1:
        yield ALONE
        return
    if device_type == "cuda" and torch.cuda.device_count() < size:
        seen = torch.cuda.device_count()
        raise JobFailed("too_few_devices", f"BONSAI_TRAIN_PROCESSES is {size} and the worker sees {seen} CUDA devices")
    is_over = Event()
    with tempfile.TemporaryDirectory(prefix="bonsai-ranks-") as directory:
        meeting = Path(directory) / "meeting"
        followers = [_start(rank, size, device_type, meeting) for rank in range(1, size)]
        for rank, process in enumerate(followers, start=1):
            Thread(target=_watch, args=(rank, process, is_over), name=f"watch-{rank}", daemon=True).start()
        try:
            ranks = join(0, size, device_type, meeting)
            yield ranks
            ranks.tell(None)
        except Stopped:
            raise
        except Exception:
            # Most often a rank died. What else would wait for it must not hold up the next attempt.
            log.exception("training with %d ranks broke off", size)
            os._exit(LOST_A_RANK)
        finally:
            is_over.set()
            for process in followers:
                process.kill()
                process.wait()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def _start(rank: int, size: int, device_type: str, meeting: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "worker.follower", str(rank), str(size), device_type, str(meeting)]
    return subprocess.Popen([*command, str(os.getpid())], stdin=subprocess.DEVNULL)


def _watch(rank: int, process: subprocess.Popen[bytes], is_over: Event) -> None:
    """A dead rank would be waited for; there is nothing to save that the newest state has not."""
    code = process.wait()
    if code != 0 and not is_over.is_set():
        log.error("rank %d ended with %d: this attempt ends with it", rank, code)
        os._exit(LOST_A_RANK)
