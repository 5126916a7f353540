"""The signature of a delivery, as Standard Webhooks has it, and the secret it is made with.

Owns: secrets, the headers of a delivery. Does not own: what is delivered (webhook_events.py), how
(webhook_delivery.py). https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md

An HMAC needs the secret itself, not a hash of it, so that it would have to lie somewhere in the clear. It lies nowhere:
it is computed from the pepper, which is not in Redis, and the webhook's id. Whoever reads Redis can sign nothing.
"""

from __future__ import annotations

import hmac
from base64 import b64encode
from collections.abc import Iterable
from typing import Final

PREFIX: Final = "whsec_"
HINT_CHARACTERS: Final = 4
"""24 bits of 256: enough to tell two secrets apart, too few to guess one."""


def webhook_secret(pepper: bytes, webhook_id: str, generation: int) -> bytes:
    """32 bytes. generation: one more with every rotation."""
    return hmac.digest(pepper, f"webhook-secret\0{webhook_id}\0{generation}".encode(), "sha256")


def shown(secret: bytes) -> str:
    """The secret as its receiver is given it."""
    return PREFIX + b64encode(secret).decode()


def hint(secret: bytes) -> str:
    """By which somebody who has the secret knows it again."""
    return f"{shown(secret)[: len(PREFIX) + HINT_CHARACTERS]}..."


def signed_headers(event_id: str, at: int, body: bytes, secrets: Iterable[bytes]) -> dict[str, str]:
    """at: Unix seconds of this attempt. secrets: the present one, and the one before while it still counts: a receiver
    takes a delivery that one of the signatures is right for."""
    said = b".".join((event_id.encode(), str(at).encode(), body))
    signatures = (b64encode(hmac.digest(secret, said, "sha256")).decode() for secret in secrets)
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(at),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }
