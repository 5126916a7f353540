"""The right to change the archive: an epoch that only one writer ever has.

Owns: what the archive's code asks of it. Does not own: how it is taken (`worker.archive_lease`).

A writer may be frozen anywhere and go on when another has taken its place. Nothing it then does may harm: its files and
its manifests have names of their own, for they hold its epoch; of a day's manifests the newest epoch's counts; and what
cannot be taken back, to delete, to acknowledge, is done only after Redis has said that nobody came in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol


class Fence(Protocol):
    @property
    def epoch(self) -> int:
        """Larger than that of everybody before."""
        ...

    def confirm(self) -> None:
        """Raises Overtaken when somebody else has, or had, the right since it was taken."""
        ...


class Overtaken(Exception):
    """Another process writes into the archive, or did: whatever was under way is its to repeat."""


@dataclass(frozen=True)
class Alone:
    """For an archive that no other process knows."""

    epoch: int = 0

    def confirm(self) -> None:
        """Nobody can come in between."""


ALONE: Final = Alone()
