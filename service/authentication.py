"""Whose key a request came with.

Owns: reading the one `Authorization: Bearer` header, and what is told to whom nobody knows. Does not own: the keys
(keys.py), what their holders may (access.py). No message and no log line holds a key or a part of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from starlette.types import Scope

from service.access import Caller
from service.api_key import key_id
from service.errors import GatewayError, TooManyWrongKeys, Unauthenticated, Unparseable
from service.keys import KeyRing
from service.wrong_keys import WrongKeys

MISSING: Final = "missing_key"


class Authentication:
    """Of one gateway process."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys
        self._wrong = WrongKeys()

    def caller(self, scope: Scope) -> Caller | GatewayError:
        """Who sent a request, or why that is nobody: Unparseable, Unauthenticated, TooManyWrongKeys,
        StoreUnavailable."""
        try:
            key = _bearer([value for name, value in scope["headers"] if name == b"authorization"])
            return self._keys.caller(key)
        except Unauthenticated as error:
            return error if error.code == MISSING else self._counted(scope, key, error)
        except GatewayError as error:
            return error

    def _counted(self, scope: Scope, key: str, error: Unauthenticated) -> GatewayError:
        """By the peer itself: what a request says of where it came from is not believed."""
        address = scope["client"][0] if scope.get("client") else "unix socket"
        seconds = self._wrong.note(address, key_id(key))
        if seconds is None:
            return error
        refused = TooManyWrongKeys("too many wrong keys came from here", param="Authorization")
        refused.retry_after = seconds
        return refused


def _bearer(values: Sequence[bytes]) -> str:
    if len(values) > 1:
        raise Unparseable("a request has at most one Authorization header", param="Authorization")
    scheme, _, key = (values[0] if values else b"").decode("latin-1").strip().partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthenticated("the header Authorization: Bearer KEY is required", param="Authorization", code=MISSING)
    return key.strip()
