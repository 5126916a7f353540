"""What a caller of ours reads of replies about webhooks.

Owns their members. Does not own asking for them (client.py), nor other replies.
"""

from __future__ import annotations

from bonsai.job_replies import Reply


class Webhook(Reply):
    id: str
    url: str
    events: list[str]
    enabled: bool
    disabled_reason: str | None = None
    waiting: int
    secret: str = ""
    """Of a new one alone."""


class WebhookPage(Reply):
    data: list[Webhook]


class WebhookTest(Reply):
    event: str


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
