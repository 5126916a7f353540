"""Rows of the OpenAPI document's facts: webhooks.

Owns them alone; otherwise as operations.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from service import webhook_replies as replies
from service.errors import Conflict, InvalidField, StoreFull, WebhookNotFound
from service.operation import PAGE, Body, Operation
from service.replies import listed
from service.webhook_record import WebhookChange, WebhookRequest

CHANGING: Final = (WebhookNotFound, InvalidField, StoreFull)

WEBHOOK_OPERATIONS: Final[Mapping[tuple[str, str], Operation]] = {
    ("POST", "/v1/webhooks"): Operation(
        "Be told of what happens to jobs and policies; the secret is shown this once",
        {201: replies.WEBHOOK_WITH_SECRET},
        Body(
            WebhookRequest,
            {"url": "https://hooks.example/bonsai", "events": ["fine_tuning.job.succeeded", "fine_tuning.job.failed"]},
        ),
        errors=(Conflict, StoreFull),
        headers=("Location",),
    ),
    ("GET", "/v1/webhooks"): Operation(
        "All webhooks", {200: listed(replies.WEBHOOK)}, parameters=PAGE, errors=(InvalidField,)
    ),
    ("GET", "/v1/webhooks/{webhook_id}"): Operation(
        "A webhook", {200: replies.WEBHOOK}, errors=(WebhookNotFound, InvalidField)
    ),
    ("PATCH", "/v1/webhooks/{webhook_id}"): Operation(
        "Change, enable or disable a webhook",
        {200: replies.WEBHOOK},
        Body(WebhookChange, {"enabled": False}),
        errors=CHANGING,
    ),
    ("DELETE", "/v1/webhooks/{webhook_id}"): Operation(
        "Delete a webhook and what waits for it", {204: None}, errors=CHANGING
    ),
    ("POST", "/v1/webhooks/{webhook_id}/test"): Operation(
        "Have an event sent that says nothing", {202: replies.TESTED}, errors=(Conflict, *CHANGING)
    ),
    ("POST", "/v1/webhooks/{webhook_id}/rotate"): Operation(
        "Another secret, shown this once; the former one signs beside it for a day",
        {200: replies.WEBHOOK_WITH_SECRET},
        errors=CHANGING,
    ),
    ("GET", "/v1/webhooks/{webhook_id}/deliveries"): Operation(
        "What became of the attempts, the newest first",
        {200: listed(replies.ATTEMPT)},
        parameters=PAGE,
        errors=(WebhookNotFound, InvalidField),
    ),
}
