"""Who asks.

Owns: what is known of the sender of a request. Does not own: what a request may cost.
"""

from __future__ import annotations

from typing import Final, NamedTuple, cast

from starlette.requests import Request

from bon_algos.contracts import DEFAULT_TENANT


class Caller(NamedTuple):
    """The sender of one request."""

    key_id: str
    """What is counted together."""
    tenant: str


ON_LOOPBACK: Final = Caller("loopback", DEFAULT_TENANT)
"""Everybody, until there are API keys: the gateway listens on loopback only."""


def caller_of(request: Request) -> Caller:
    """As the edge found out."""
    return cast(Caller, request.state.caller)
