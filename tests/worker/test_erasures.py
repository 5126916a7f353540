"""What of a ledger is a subject's: its groups, and the sessions that are nobody else's."""

import tracemalloc

from bon_algos.contracts import Erasure, subject_digest
from worker.erasures import groups_and_sessions

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
    for ledger in (rows, rows[::-1]):
        groups, sessions = groups_and_sessions(ERASURE, ledger.copy)
        assert groups == {f"resp_{number}" for number in range(1, 6)}
        assert sessions == {"hers"}


def test_what_is_held_does_not_grow_with_what_others_said():
    def ledger():
        yield row(0, "ada", "hers")
        for number in range(1, 20_001):
            yield row(number, None, f"session {number}")

    tracemalloc.start()
    assert groups_and_sessions(ERASURE, ledger) == ({"resp_0"}, {"hers"})
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**18
