"""The processes that train one policy together: who they are, and what passes between them.

Owns a rank's place, sums over ranks, and the messages by which rank 0 has the others make the calls it makes. Does not
own what is called (`train`, `models`), nor the processes' lives (`crew`). One process is a rank like any other, which
has nobody to tell.

Rank 0 alone holds the job's lease, its window, its engines and its files. The others hold the same policy and optimiser
and take part in what needs all of them; a message is JSON, from a process that this job's own rank 0 started.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

Parallelism = Literal["data", "fsdp"]

SECONDS_FOR_A_SUM = 600
"""A rank that takes part no sooner is taken for dead."""
DAYS_FOR_A_MESSAGE = 30
"""Rank 0 may wait for an engine as long as it likes; when it dies, the others die with it."""


class Ranks:
    """This process among those that train a policy."""

    def __init__(self, rank: int = 0, size: int = 1, control: ProcessGroup | None = None) -> None:
        """control: over which messages go, apart from sums; None where there is nobody to tell."""
        self.rank = rank
        self.size = size
        self._control = control
        self._is_led = rank > 0

    def share(self, count: int, rank: int | None = None) -> slice:
        """Which of so many things are this rank's, or another's: consecutive ones, as many as anybody else's or one
        more."""
        own = self.rank if rank is None else rank
        return slice(count * own // self.size, count * (own + 1) // self.size)

    @torch.no_grad()
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Let every rank have the sums over ranks, in place; all of one kind of number, in one message."""
        if self.size == 1 or not tensors:
            return
        together = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(together)
        for tensor, total in zip(tensors, torch.split(together, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def tell(self, message: object) -> None:
        """From rank 0 to all others; None ends the conversation."""
        content = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        torch.distributed.broadcast(torch.tensor([len(content)]), src=0, group=self._control)
        torch.distributed.broadcast(content, src=0, group=self._control)

    def hear(self) -> Any:
        """What rank 0 tells next."""
        length = torch.zeros(1, dtype=torch.long)
        torch.distributed.broadcast(length, src=0, group=self._control)
        content = torch.empty(int(length), dtype=torch.uint8)
        torch.distributed.broadcast(content, src=0, group=self._control)
        return json.loads(bytes(content.numpy()))

    @contextmanager
    def tells(self, name: str, *args: object, **kwargs: object) -> Iterator[None]:
        """A block that all ranks run: rank 0 has the others call `name`, unless they are in such a block already."""
        if self.size == 1 or self._is_led:
            yield
            return
        self.tell([name, args, kwargs])
        self._is_led = True
        try:
            yield
        finally:
            self._is_led = False


ALONE = Ranks()


class HasRanks(Protocol):
    @property
    def ranks(self) -> Ranks: ...


Self = TypeVar("Self", bound=HasRanks)
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def together(
    method: Callable[Concatenate[Self, Parameters], Result],
) -> Callable[Concatenate[Self, Parameters], Result]:
    """A method that needs all ranks: called on rank 0, the others call it too, with the same arguments, which JSON can
    say and `follower` can read."""

    @functools.wraps(method)
    def on_all_ranks(self: Self, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with self.ranks.tells(method.__name__, *args, **kwargs):
            return method(self, *args, **kwargs)

    return on_all_ranks


def join(rank: int, size: int, device_type: str, meeting: Path) -> Ranks:
    """Meet the other ranks at a file that is not there yet; sums go over NCCL on CUDA, each rank on a device of its
    own."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # all on this machine
    backend = "gloo" if device_type == "cpu" else "cpu:gloo,cuda:nccl"
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend,
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=SECONDS_FOR_A_SUM),
    )
    control = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=DAYS_FOR_A_MESSAGE))
    return Ranks(rank, size, control)
