"""The form of replies about webhooks, as JSON Schema.

Owns: their members. Does not own: filling them (webhooks.py, webhook_queue.py), the words they are written in
(replies.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from service.replies import FLAG, NUMBER, TEXT, WHOLE, Named, Schema, Shown, kind, maybe, members, one_of
from service.webhook_queue import Outcome
from service.webhook_record import WebhookRecord

_MORE: Final[Mapping[str, Schema]] = {
    "object": kind("bonsai.webhook"),
    "enabled": FLAG,
    "former_secret_until": maybe(NUMBER),
    "waiting": WHOLE,
    "last_accepted_at": maybe(NUMBER),
}
_WITHOUT: Final = ("tenant", "generation", "rotated_at")
WEBHOOK: Final = Named("Webhook", Shown(WebhookRecord, _WITHOUT, _MORE))
WEBHOOK_WITH_SECRET: Final = Named(
    "WebhookWithSecret", Shown(WebhookRecord, _WITHOUT, {**_MORE, "secret": {"type": "string", "pattern": "^whsec_"}})
)
TESTED: Final = members(object=kind("bonsai.webhook.test"), webhook=TEXT, event=TEXT)
ATTEMPT: Final = Named(
    "WebhookAttempt",
    members(
        id=TEXT,
        object=kind("bonsai.webhook.attempt"),
        event=TEXT,
        type=TEXT,
        attempt=WHOLE,
        at=NUMBER,
        seconds=NUMBER,
        outcome=one_of(Outcome),
        status_code=maybe(WHOLE),
        error=maybe(TEXT),
        next_attempt_at=maybe(NUMBER),
    ),
)
