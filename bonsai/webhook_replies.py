"""What a caller of ours reads of replies about webhooks.

Owns their members. Does not own asking for them (client.py), nor other replies.
"""

from __future__ import annotations

from bonsai.job_replies import Reply


class OwnWebhookMembers(Reply):
    enabled: bool
    disabled_reason: str | None = None
    waiting: int


class Webhook(Reply):
    id: str
    name: str
    url: str
    event_types: list[str]
    bonsai: OwnWebhookMembers
    signing_secret: str = ""
    """Where it was just made or rotated."""


class WebhookPage(Reply):
    data: list[Webhook]


class WebhookTest(Reply):
    event_type: str
    status_code: int


class WebhookAttempt(Reply):
    event: str
    type: str
    attempt: int
    at: float
    outcome: str
    status_code: int | None = None
    error: str | None = None
    next_attempt_at: float | None = None


class WebhookAttempts(Reply):
    data: list[WebhookAttempt]
