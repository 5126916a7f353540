"""Rows of the OpenAPI document's facts: webhooks.

Owns them alone; otherwise as operations.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from service import webhook_replies as replies
from service.errors import Conflict, InvalidField, ReceiverUnreached, StoreFull, WebhookNotFound
from service.operation import PAGE, Body, Operation
from service.replies import listed
from service.webhook_record import WebhookChange, WebhookRequest, WebhookRotation, WebhookTest

ENDED: Final = "fine_tuning.job.succeeded"
ASKED: Final = {"name": "the pager", "url": "https://hooks.example/bonsai", "event_types": [ENDED]}
CHANGING: Final = (WebhookNotFound, InvalidField, StoreFull)

WEBHOOK_OPERATIONS: Final[Mapping[tuple[str, str], Operation]] = {
    ("GET", "/v1/webhook_event_types"): Operation(
        "What a webhook can be told of", {200: replies.EVENT_TYPES}, errors=(InvalidField,)
    ),
    ("POST", "/v1/webhook_endpoints"): Operation(
        "Be told of what happens to jobs and policies; the secret is shown this once",
        {200: replies.WEBHOOK_WITH_SECRET},
        Body(WebhookRequest, ASKED),
        errors=(Conflict, StoreFull),
    ),
    ("GET", "/v1/webhook_endpoints"): Operation(
        "All webhooks, the newest first", {200: listed(replies.WEBHOOK)}, parameters=PAGE, errors=(InvalidField,)
    ),
    ("GET", "/v1/webhook_endpoints/{webhook_id}"): Operation(
        "A webhook", {200: replies.WEBHOOK}, errors=(WebhookNotFound, InvalidField)
    ),
    ("POST", "/v1/webhook_endpoints/{webhook_id}"): Operation(
        "Change, enable or disable a webhook",
        {200: replies.WEBHOOK},
        Body(WebhookChange, {"bonsai": {"enabled": False}}),
        errors=CHANGING,
    ),
    ("DELETE", "/v1/webhook_endpoints/{webhook_id}"): Operation(
        "Delete a webhook and what waits for it", {200: replies.DELETED}, errors=CHANGING
    ),
    ("POST", "/v1/webhook_endpoints/{webhook_id}/test"): Operation(
        "Send a sample of an event at once, and see what the receiver answers",
        {200: replies.TESTED},
        Body(WebhookTest, {"event_type": ENDED}),
        errors=(Conflict, ReceiverUnreached, WebhookNotFound),
    ),
    ("POST", "/v1/webhook_endpoints/{webhook_id}/rotate_secret"): Operation(
        "Another secret, shown this once; the former one may sign beside it for a day",
        {200: replies.WEBHOOK_WITH_SECRET},
        Body(WebhookRotation, {"keep_old_secret_active_for_24_hours": True}),
        errors=CHANGING,
    ),
    ("GET", "/v1/webhook_endpoints/{webhook_id}/deliveries"): Operation(
        "What became of the attempts, the newest first",
        {200: listed(replies.ATTEMPT)},
        parameters=PAGE,
        errors=(WebhookNotFound, InvalidField),
    ),
}
