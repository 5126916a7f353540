"""What is known of a webhook, what a caller may say about one, and how it is shown.

Owns: the record, the two bodies, the object of the API. Does not own: keeping them (webhooks.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field

from bon_algos.contracts import Record
from service.webhook_events import EventType
from service.webhook_reach import MAX_URL
from service.webhook_signature import shown, webhook_secret

MAX_DESCRIPTION: Final = 200
FORMER_SECRET_SECONDS: Final = 86_400
"""How long the secret before still signs."""
Reason = Literal["by_request", "gone", "failing", "overfull"]
"""Why a webhook is disabled. gone: it answered 410. failing: an event failed all its attempts, and no other was
accepted meanwhile."""
Url = Annotated[str, Field(min_length=1, max_length=MAX_URL)]
Events = Annotated[tuple[EventType, ...], Field(fail_fast=True, min_length=1, max_length=32)]
Description = Annotated[str, Field(max_length=MAX_DESCRIPTION)]


class WebhookRequest(Record):
    """Body of `POST /v1/webhooks`."""

    url: Url
    events: Events
    description: Description = ""


class WebhookChange(Record):
    """Body of `PATCH /v1/webhooks/{id}`; what is left out stays."""

    url: Url | None = None
    events: Events | None = None
    description: Description | None = None
    enabled: bool | None = None


class WebhookRecord(Record):
    """What is known of a webhook; its secret follows from the id and the generation."""

    # What a later version adds is passed over: gateways of two versions deliver beside each other.
    model_config = ConfigDict(extra="ignore")

    id: str
    tenant: str
    url: str
    events: tuple[str, ...]
    description: str
    created_at: float
    created_by: str
    generation: int = 1
    rotated_at: float | None = None
    disabled_at: float | None = None
    disabled_reason: Reason | None = None

    @property
    def is_enabled(self) -> bool:
        return self.disabled_at is None

    @property
    def former_secret_until(self) -> float | None:
        return None if self.rotated_at is None else self.rotated_at + FORMER_SECRET_SECONDS

    def amended(self, asked: WebhookChange, now: float) -> WebhookRecord:
        said = asked.model_dump(exclude_none=True, exclude={"enabled"})
        if asked.events is not None:
            said["events"] = once(asked.events)
        if asked.enabled is not None:
            said |= {"disabled_at": None, "disabled_reason": None}
        amended = self.model_copy(update=said)
        return amended.disabled("by_request", now) if asked.enabled is False else amended

    def rotated(self, now: float) -> WebhookRecord:
        return self.model_copy(update={"generation": self.generation + 1, "rotated_at": now})

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


def webhook_object(record: WebhookRecord, count: int, accepted_at: float | None) -> dict[str, Any]:
    """The webhook of the API, without its secret. count: of the deliveries that wait."""
    return {
        "object": "bonsai.webhook",
        **record.model_dump(mode="json", exclude={"tenant", "generation", "rotated_at"}),
        "enabled": record.is_enabled,
        "former_secret_until": record.former_secret_until,
        "waiting": count,
        "last_accepted_at": accepted_at,
    }


def once(events: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(events))
