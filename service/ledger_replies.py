"""The form of what `/ledger` answers, as JSON Schema.

Owns: its members. Does not own: filling them (ledger_pages.py, erasures.py), the words for them (replies.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from bon_algos.contracts import Erasure
from service.replies import FEEDBACK, FLAG, NUMBER, TEXT, WHOLE, Named, Schema, Shown, kind, maybe, members, rows

_LEDGER_CANDIDATE: Final = members(
    text=maybe(TEXT),
    tokens=WHOLE,
    logprob=maybe(NUMBER),
    finish_reason=maybe(TEXT),
    reward=maybe(NUMBER),
    disagreement=maybe(NUMBER),
    failure=maybe(TEXT),
    policy=maybe(TEXT),
)
_LEDGER_FIELDS: Final[Mapping[str, Schema]] = {
    **dict.fromkeys(("created_at",), NUMBER),
    **dict.fromkeys(("route", "policy", "reward_model", "arm", "arm_reason", "status", "stop_reason"), TEXT),
    **dict.fromkeys(("experiment", "session", "user", "prompt"), maybe(TEXT)),
    "requested": WHOLE,
    "selected": maybe(WHOLE),
    "reward": maybe(NUMBER),
    "store": FLAG,
    "sampling": {"type": "object"},
    "messages": maybe(rows({"type": "object"})),
    "candidates": rows(_LEDGER_CANDIDATE),
    "feedback": rows(FEEDBACK),
}
LEDGER_GROUP: Final = Named("LedgerGroup", members(_LEDGER_FIELDS, id=TEXT, object=kind("bonsai.ledger_group")))
LEDGER_PAGE: Final = members(
    object=kind("list"), data=rows(LEDGER_GROUP), content={"enum": ["shown", "withheld"]}, next_cursor=maybe(TEXT)
)
ERASURE: Final = Named("Erasure", Shown(Erasure, ("tenant", "subject_digest"), {"object": kind("bonsai.erasure")}))
