"""W3C trace context: to which trace a request belongs, for all that is asked of others on its behalf.

Owns: reading `traceparent` and `tracestate`, where those of the running request are found. Does not own: spans. There
are none of the gateway's: what it asks is a child of the caller's span. A malformed header is no error (4.3 of the
recommendation).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Final, NamedTuple

MAX_STATE_BYTES: Final = 512
"""What everybody should pass on; more is left out."""
_PARENT: Final = re.compile(
    rb"(?!ff)(?P<version>[0-9a-f]{2})"
    rb"-(?P<fields>(?P<trace>(?!0{32})[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2})(?P<more>-.*)?"
)


class Trace(NamedTuple):
    id: str
    """Empty where the request belongs to none."""
    lines: str
    """Of the head of a request, each with its end."""


NONE: Final = Trace("", "")
TRACE: Final = ContextVar("TRACE", default=NONE)
"""Of the request that is being answered, and of what goes on in its name after the reply."""


def trace_of(headers: Iterable[tuple[bytes, bytes]]) -> Trace:
    """headers: of a request, names in lower case."""
    parents = [value for name, value in headers if name == b"traceparent"]
    found = _PARENT.fullmatch(parents[0]) if len(parents) == 1 else None
    if found is None or (found["version"] == b"00" and found["more"]):
        return NONE
    # What a later version has behind these fields is not known here, so the known version is told.
    lines = f"traceparent: 00-{found['fields'].decode()}\r\n"
    state = b",".join(value for name, value in headers if name == b"tracestate")
    if 0 < len(state) <= MAX_STATE_BYTES and all(32 <= byte < 127 for byte in state):
        lines += f"tracestate: {state.decode()}\r\n"
    return Trace(found["trace"].decode(), lines)


def named(request_id: str) -> str:
    """The request that is being answered, in a line of the log."""
    trace = TRACE.get()
    return f"{request_id} trace={trace.id}" if trace.id else request_id
