"""The names of the headers that more than one module reads or writes."""

from __future__ import annotations

from typing import Final

ARM: Final = "x-bonsai-arm"
"""Of a request: the arm that must answer. Of a reply: the one that did."""
UNIT: Final = "x-bonsai-unit"
TIMEOUT: Final = "x-bonsai-timeout"
POLICY: Final = "x-bonsai-policy"
IDEMPOTENCY_KEY: Final = "Idempotency-Key"
REPLAYED: Final = "Idempotent-Replayed"
"""Of the reply to a request that was carried out before."""
IF_MATCH: Final = "If-Match"
LAST_EVENT_ID: Final = "Last-Event-ID"
REQUEST_ID: Final = "X-Request-Id"
