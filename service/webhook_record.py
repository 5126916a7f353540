"""What is known of a webhook, what a caller may say about one, and how it is shown.

Owns: the record, the bodies, the object of the API. Does not own: keeping them (webhooks.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field

from bon_algos.contracts import Record
from service.webhook_events import EventType
from service.webhook_reach import MAX_URL
from service.webhook_signature import shown, webhook_secret

MAX_NAME: Final = 200
FORMER_SECRET_SECONDS: Final = 86_400
"""How long the secret before still signs, where that was asked for."""
Reason = Literal["by_request", "gone", "failing", "overfull"]
"""Why a webhook is disabled. gone: it answered 410. failing: an event failed all its attempts, and no other was
accepted meanwhile."""
Url = Annotated[str, Field(min_length=1, max_length=MAX_URL)]
EventTypes = Annotated[tuple[EventType, ...], Field(fail_fast=True, min_length=1, max_length=32)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]


class WebhookRequest(Record):
    """Body of `POST /v1/webhook_endpoints`."""

    name: Name
    """For people."""
    url: Url
    event_types: EventTypes


class OwnWebhookMembers(Record):
    """What OpenAI has no member for."""

    enabled: bool | None = None


class WebhookChange(Record):
    """Body of `POST /v1/webhook_endpoints/{id}`; what is left out stays."""

    name: Name | None = None
    url: Url | None = None
    event_types: EventTypes | None = None
    """All that it is to be told of from now on."""
    bonsai: OwnWebhookMembers = OwnWebhookMembers()


class WebhookRotation(Record):
    """Body of `POST /v1/webhook_endpoints/{id}/rotate_secret`."""

    keep_old_secret_active_for_24_hours: bool = False
    """Whether the former secret signs beside the new one for a day; left to itself it ends at once."""


class WebhookTest(Record):
    """Body of `POST /v1/webhook_endpoints/{id}/test`."""

    event_type: EventType
    """Of the sample; it need not be one that the webhook is told of."""


class WebhookRecord(Record):
    """What is known of a webhook; its secret follows from the id and the generation."""

    # What a later version adds is passed over: gateways of two versions deliver beside each other.
    model_config = ConfigDict(extra="ignore")

    id: str
    tenant: str
    name: str
    url: str
    event_types: tuple[str, ...]
    created_at: int
    updated_at: int
    """When somebody last changed it or its secret."""
    created_by: str
    generation: int = 1
    former_secret_until: float | None = None
    """How long the secret before signs beside the present one."""
    disabled_at: float | None = None
    disabled_reason: Reason | None = None

    @property
    def is_enabled(self) -> bool:
        return self.disabled_at is None

    def amended(self, asked: WebhookChange, now: float) -> WebhookRecord:
        said = asked.model_dump(exclude_none=True, exclude={"bonsai"})
        if asked.event_types is not None:
            said["event_types"] = once(asked.event_types)
        if asked.bonsai.enabled:
            said |= {"disabled_at": None, "disabled_reason": None}
        amended = self.model_copy(update=said)
        if asked.bonsai.enabled is False and self.disabled_reason != "by_request":
            amended = amended.disabled("by_request", now)
        return self if amended == self else amended.model_copy(update={"updated_at": int(now)})

    def rotated(self, now: float, *, keeps_former: bool) -> WebhookRecord:
        until = now + FORMER_SECRET_SECONDS if keeps_former else None
        said = {"generation": self.generation + 1, "former_secret_until": until, "updated_at": int(now)}
        return self.model_copy(update=said)

    def disabled(self, reason: Reason, now: float) -> WebhookRecord:
        return self.model_copy(update={"disabled_at": now, "disabled_reason": reason})

    def secret(self, pepper: bytes) -> str:
        """The present one, as its receiver is given it."""
        return shown(webhook_secret(pepper, self.id, self.generation))

    def secrets(self, pepper: bytes, now: float) -> list[bytes]:
        """Those that sign at this time, the present one first."""
        until = self.former_secret_until
        generations = [self.generation, self.generation - 1] if until is not None and now < until else [self.generation]
        return [webhook_secret(pepper, self.id, generation) for generation in generations]


def webhook_object(record: WebhookRecord, secret_hint: str, count: int, accepted_at: float | None) -> dict[str, Any]:
    """The webhook of OpenAI's API, without its secret. count: of the deliveries that wait."""
    return {
        "id": record.id,
        "object": "webhook_endpoint",
        "name": record.name,
        "url": record.url,
        "event_types": record.event_types,
        "signing_secret_hint": secret_hint,
        "created_at": record.created_at,
        "updated_at": record.updated_at,
        "bonsai": {
            "enabled": record.is_enabled,
            "disabled_at": record.disabled_at,
            "disabled_reason": record.disabled_reason,
            "former_secret_until": record.former_secret_until,
            "waiting": count,
            "last_accepted_at": accepted_at,
            "created_by": record.created_by,
        },
    }


def once(event_types: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(event_types))
