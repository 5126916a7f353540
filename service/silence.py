"""How long somebody has waited for an answer while nobody was given one: the sign of a server that hangs.

Owns: that one number. Does not own: what follows from it (reward.py).

Of a call that is given up nobody knows whether its caller had too little patience or the server hangs. While others
are answered it does not hang, and no caller is so impatient that many of them, waiting one after the other, are not
answered once. So the time counts, whoever waited and why he went; nothing counts while nobody waits.
"""

from __future__ import annotations

from collections.abc import Callable


class Silence:
    """Of one server."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """clock: seconds, never going back."""
        self._clock = clock
        self._waiting = 0
        self._before = 0.0
        """Seconds of those who waited before the present ones."""
        self._since = 0.0
        """When those began."""

    @property
    def seconds(self) -> float:
        """In which at least one call waited, since the last answer."""
        return self._before + (self._clock() - self._since if self._waiting else 0.0)

    def call_begins(self) -> None:
        if not self._waiting:
            self._since = self._clock()
        self._waiting += 1

    def call_ends(self) -> None:
        """However it ended; an answer is told by `broken` too."""
        self._before = self.seconds
        self._since = self._clock()
        self._waiting -= 1

    def broken(self) -> None:
        """An answer came, whatever it says; or what was silent has been dealt with."""
        self._before, self._since = 0.0, self._clock()
