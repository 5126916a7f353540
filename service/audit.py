"""One entry of the audit: what happened, who asked for it, and to what.

Owns: the fields that every entry has. Does not own: writing it, which each change does in its own transaction.
"""

from __future__ import annotations

from typing import Any

from service.access import Caller


def audit_entry(event: str, by: Caller, **fields: str) -> dict[Any, Any]:
    """by: GATEWAY for what nobody asked for. Never a key, never what was said in a request for text."""
    return {"event": event, "tenant": by.tenant, "by": by.key_id, **fields}
