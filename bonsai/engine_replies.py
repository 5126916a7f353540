"""What a caller of ours reads of replies about engines.

Owns their members. Does not own asking for them (client.py), nor other replies.
"""

from __future__ import annotations

from bonsai.job_replies import Reply


class EngineAdapter(Reply):
    """One policy on one engine."""

    policy: str
    wanted: bool
    resident: bool
    served: bool
    draining: bool
    proven_at: float | None = None
    used_at: float | None = None
    reason: str | None = None


class Engine(Reply):
    """A replica of the policy engine."""

    id: str
    state: str
    reason: str | None = None
    slots: int
    adapters: tuple[EngineAdapter, ...]


class EnginePage(Reply):
    data: list[Engine]
