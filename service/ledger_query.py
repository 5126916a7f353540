"""What may be asked of the ledger: filters, fields, and a cursor that is good for the question it was given for.

Owns: matching a group, signing and checking cursors. Does not own: the query as text (routes/ledger.py), reading the
ledger (ledger_pages.py).
"""

from __future__ import annotations

import hmac
import json
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Final, NamedTuple

from bon_algos.contracts import CandidateGroup
from bon_algos.ledger_entries import EntryId
from service.errors import InvalidField

DEFAULT_LIMIT: Final = 50
MAX_LIMIT: Final = 1000
FIELDS: Final = (
    "created_at", "route", "policy", "reward_model", "experiment", "arm", "arm_reason", "session", "user", "requested",
    "status", "stop_reason", "selected", "reward", "store", "sampling", "prompt", "messages", "candidates", "feedback",
)  # fmt: skip
"""What a row can have beside its id."""
FILTERS: Final = ("route", "policy", "since", "until", "user", "session", "has_feedback", "min_reward")
_CURSOR: Final = re.compile(r"[A-Za-z0-9_-]{1,128}={0,2}\.[0-9a-f]{32}")


class LedgerQuery(NamedTuple):
    """Which groups are wanted, and how much of them."""

    route: str | None = None
    policy: str | None = None
    since: float | None = None
    until: float | None = None
    user: str | None = None
    session: str | None = None
    has_feedback: bool | None = None
    min_reward: float | None = None
    limit: int = DEFAULT_LIMIT
    fields: tuple[str, ...] = FIELDS

    def matches(self, group: CandidateGroup) -> bool:
        """Whether the group is wanted, as far as it says itself; feedback is known elsewhere."""
        return (
            self.route in (None, group.route)
            and self.policy in (None, group.policy_id, group.answered_by)
            and (self.since is None or group.created_at >= self.since)
            and (self.until is None or group.created_at <= self.until)
            and self.user in (None, group.user)
            and self.session in (None, group.session)
            and (self.min_reward is None or _at_least(self.min_reward, served_reward(group)))
        )

    def digest(self, tenant: str) -> bytes:
        """Of what a cursor is good for: the tenant and the filters."""
        return json.dumps([tenant, *(getattr(self, name) for name in FILTERS)]).encode()


def served_reward(group: CandidateGroup) -> float | None:
    """None where nobody was served."""
    return None if group.selected is None or group.arm_reason == "shadow" else group.candidates[group.selected].reward


def _at_least(least: float, reward: float | None) -> bool:
    return reward is not None and reward >= least


def cursor_text(entry: EntryId, query: LedgerQuery, tenant: str, secret: bytes) -> str:
    place = urlsafe_b64encode(str(entry).encode()).decode()
    return f"{place}.{_signature(place, query, tenant, secret)}"


def read_cursor(text: str, query: LedgerQuery, tenant: str, secret: bytes) -> EntryId:
    """Raises InvalidField for one that was not given for this question."""
    place, _, signature = text.partition(".")
    if not _CURSOR.fullmatch(text) or not hmac.compare_digest(signature, _signature(place, query, tenant, secret)):
        raise InvalidField("cursor must be the next_cursor of a reply to the same filters", param="cursor")
    return EntryId.parse(urlsafe_b64decode(place))


def _signature(place: str, query: LedgerQuery, tenant: str, secret: bytes) -> str:
    signed = b"\0".join((b"ledger cursor", place.encode(), query.digest(tenant)))
    return hmac.digest(secret, signed, "sha256").hex()[:32]
