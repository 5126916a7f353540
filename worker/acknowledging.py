"""A message that could not be acknowledged, and a worker that goes on.

Owns: asking again until the broker has heard it. Does not own: what a message means (tasks.py).

A job lasts for hours, in which nothing is said over the link that its message came by; what is between forgets such
links without a word. The acknowledgement is then lost, Celery logs it and leaves it there, and the message counts as
under way for ever: with a prefetch of one no other is ever asked for, by a worker that looks alive.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from celery.worker.request import Request
from kombu.asynchronous import get_event_loop

AGAIN_SECONDS: Final = 1.0
log = logging.getLogger("bonsai.worker")


class AcknowledgingRequest(Request):  # type: ignore[misc]  # Celery has no types
    def acknowledge(self) -> None:
        super().acknowledge()
        self._look_again()

    def _look_again(self) -> None:
        loop = get_event_loop()
        if loop is not None:  # there is one wherever messages come from a broker
            loop.call_later(AGAIN_SECONDS, self._settle)

    def _settle(self) -> None:
        """A link that failed is not used again: the next attempt has one of its own. A consumer that began anew has put
        the message back, and is not asked. Raises what is no failure of the link, as when the broker refuses to write,
        which is logged."""
        message: Any = self.message
        if message.acknowledged or message.channel is None or message.channel.closed:
            return
        try:
            message.ack_log_error(log, self.connection_errors)
        finally:
            self._look_again()
