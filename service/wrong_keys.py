"""How many wrong keys came from where.

Owns: the counts of one gateway process, per address and per public part of a key, and their bounds. Does not own: what
a wrong key is (authentication.py). A right key is never held up by what others sent: behind a proxy everybody has one
address, and the public part of a key is public.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from math import ceil
from time import monotonic
from typing import Final

WINDOW_SECONDS: Final = 60.0
PER_ADDRESS: Final = 60
PER_KEY: Final = 20
"""Wrong keys in a window that are told what is wrong; what comes beyond is told to wait."""
MOST_KEPT: Final = 10_000
"""Addresses and keys; beyond it the oldest is forgotten."""


class WrongKeys:
    """Counts in windows that begin with the first wrong key."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._windows: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def note(self, address: str, key_id: str | None) -> int | None:
        """Count a wrong key. Seconds to wait when there were too many; None when not."""
        waits = [self._wait(f"address {address}", PER_ADDRESS)]
        if key_id is not None:
            waits.append(self._wait(f"key {key_id}", PER_KEY))
        return max((wait for wait in waits if wait is not None), default=None)

    def _wait(self, name: str, limit: int) -> int | None:
        now = self._clock()
        began, count = self._windows.pop(name, (now, 0))
        if now - began >= WINDOW_SECONDS:
            began, count = now, 0
        self._windows[name] = (began, count + 1)
        if len(self._windows) > MOST_KEPT:
            self._windows.popitem(last=False)
        return None if count < limit else max(1, ceil(began + WINDOW_SECONDS - now))
