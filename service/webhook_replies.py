"""The form of replies about webhooks, as JSON Schema.

Owns: their members. Does not own: filling them (webhooks.py, webhook_queue.py), the words they are written in
(replies.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from service.replies import FLAG, NUMBER, TEXT, WHOLE, Named, Schema, kind, listed, maybe, members, one_of, rows
from service.webhook_events import EventType
from service.webhook_queue import Outcome
from service.webhook_record import Reason

_WEBHOOK: Final[Mapping[str, Schema]] = {
    "id": TEXT,
    "object": kind("webhook_endpoint"),
    "name": TEXT,
    "url": TEXT,
    "event_types": rows(one_of(EventType)),
    "signing_secret_hint": TEXT,
    "created_at": WHOLE,
    "updated_at": WHOLE,
    "bonsai": members(
        enabled=FLAG,
        disabled_at=maybe(NUMBER),
        disabled_reason=maybe(one_of(Reason)),
        former_secret_until=maybe(NUMBER),
        waiting=WHOLE,
        last_accepted_at=maybe(NUMBER),
        created_by=TEXT,
    ),
}
WEBHOOK: Final = Named("WebhookEndpoint", members(**_WEBHOOK))
WEBHOOK_WITH_SECRET: Final = Named(
    "WebhookEndpointWithSecret",
    members(**_WEBHOOK, signing_secret={"type": "string", "pattern": "^whsec_"}),
)
DELETED: Final = Named(
    "DeletedWebhookEndpoint", members(id=TEXT, object=kind("webhook_endpoint.deleted"), deleted={"const": True})
)
TESTED: Final = Named(
    "WebhookEndpointTest",
    members(
        object=kind("webhook_endpoint.test"),
        webhook_endpoint_id=TEXT,
        event_type=one_of(EventType),
        success={"const": True},
        status_code=WHOLE,
    ),
)
EVENT_TYPES: Final = listed(one_of(EventType), is_paged=False)
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
