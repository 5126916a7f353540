"""What of a ledger is a subject's: its groups, and the sessions that are nobody else's."""

import tracemalloc

from bon_algos.contracts import Erasure, subject_digest, target_of
from worker.erasures import targets_of

ASKED_AT = 100.0
ERASURE = Erasure(
    id="erasure_1",
    tenant="default",
    subject_digest=subject_digest("default", "ada"),
    requested_at=ASKED_AT,
    requested_by="key_1",
)


def row(number, user, session, created_at=1.0):
    return {"id": f"resp_{number}", "user": user, "session": session, "created_at": created_at}


def test_a_session_of_others_too_is_not_the_subjects():
    rows = [
        row(1, "ada", "hers"),
        row(2, "ada", "shared with bob"),
        row(3, "ada", "shared with nobody known"),
        row(4, "ada", "gone on after she asked"),
        row(5, "ada", None),
        row(6, "bob", "shared with bob"),
        row(7, None, "shared with nobody known"),
        row(8, "ada", "gone on after she asked", created_at=ASKED_AT + 1),
        row(9, "bob", "his"),
    ]
    own = {f"resp_{number}" for number in range(1, 6)} | {target_of(None, "hers")}
    assert targets_of(ERASURE, rows.copy) == targets_of(ERASURE, rows[::-1].copy) == own


def test_what_was_found_before_is_the_subjects_until_somebody_else_is_there():
    before = {"resp_1", target_of(None, "hers"), target_of(None, "shared by now")}
    rows = [row(2, "bob", "shared by now"), row(3, "bob", "his")]
    assert targets_of(ERASURE, rows.copy, before) == {"resp_1", target_of(None, "hers")}


def test_what_is_held_does_not_grow_with_what_others_said():
    def ledger():
        yield row(0, "ada", "hers")
        for number in range(1, 20_001):
            yield row(number, None, f"session {number}")

    tracemalloc.start()
    assert targets_of(ERASURE, ledger) == {"resp_0", target_of(None, "hers")}
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**18
