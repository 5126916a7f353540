"""An erasure: what somebody asked to be forgotten, and what became of that. Never names the person."""

from __future__ import annotations

import unicodedata
from hashlib import sha256
from typing import Literal

from bon_algos.contracts.record import Record, Tenant

ErasureState = Literal["requested", "erased", "proven"]
"""requested: nothing was done yet. erased: gone from stream and archive; a gateway's spool may hold something that was
not delivered yet. proven: nothing was found in a last search of everything."""


class Erased(Record):
    """How much was removed so far."""

    groups: int = 0
    feedback: int = 0
    other_records: int = 0
    """Exposures and outcomes of those groups, and records that no version here can read."""
    kept_replies: int = 0
    """Answers that were held for a retry with the same `Idempotency-Key`."""
    datasets: int = 0
    """Frozen windows of jobs whose content was deleted."""


class Erasure(Record):
    """The receipt of `POST /ledger/erasures`."""

    id: str
    tenant: Tenant
    subject_digest: str
    """Of tenant and user: what the user's rows are found by. The name itself is kept nowhere."""
    requested_at: float
    """Records made before it are erased, whenever they arrive."""
    requested_by: str
    """A key's id."""
    state: ErasureState = "requested"
    erased: Erased = Erased()
    jobs: tuple[str, ...] = ()
    """Whose windows contained rows."""
    policies: tuple[str, ...] = ()
    """Learned from those windows; tainted since."""
    waits_for: tuple[str, ...] = ()
    """Spools that may still hold something."""
    unsearched: tuple[str, ...] = ()
    """Files that may hold something and are damaged: nothing is proven while there are any."""
    proven_at: float | None = None


def subject_digest(tenant: str, user: str) -> str:
    """One for all Unicode forms of the same name."""
    return sha256(f"{tenant}\0{unicodedata.normalize('NFC', user)}".encode()).hexdigest()


def erasure_id(digest: str) -> str:
    """Of one subject always the same: asked twice, it is the same receipt."""
    return f"erasure_{digest[:32]}"
