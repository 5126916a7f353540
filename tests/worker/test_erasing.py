"""What one user left goes from stream, archive, Redis and windows, and a search of all of it finds nothing."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from time import time

import redis

from archive.fence import ALONE
from archive.merging import merge
from archive.reading import Archive
from bon_algos.contracts import (
    ERASURES,
    SPOOLS,
    Erasure,
    feedback_key,
    idempotency_key,
    target_of,
)
from tests.archive.records import Died, Fate, MortalStorage, archive_at, feedback, group
from tests.worker import world
from tests.worker.erasure import ADA, AT_ONCE, asked, client, erase, everywhere, of, place, stream
from worker.compaction import Compaction
from worker.erasing import Eraser

__all__ = ["client", "place"]


def test_nothing_of_a_user_is_left_and_all_of_the_others_is(client, place):
    directory, compaction = place
    assert ADA.encode() in everywhere(client, directory)
    asked(client)
    (receipt,) = erase(client, directory, compaction)
    assert receipt.state == "proven"
    assert (receipt.erased.groups, receipt.erased.feedback, receipt.erased.kept_replies) == (2, 2, 1)
    left = everywhere(client, directory)
    assert ADA.encode() not in left
    for user in (b"bob", b"eve"):
        assert left.count(b"I am " + user) >= 2
    assert client.exists(idempotency_key("2"))


def test_what_was_merged_holds_nothing_either(client, place):
    """Neither the file, nor those it was made of, nor one that nobody could name."""
    directory, compaction = place
    archive = archive_at(directory / "ledger")
    asked(client)
    batches = archive.manifest.read(archive.manifest.days()[0]).batches
    assert len(batches) > 1
    merge(archive, batches, ALONE, now=time())
    (first, *_) = (one for one in batches[0].segments if one.kind == "groups")
    archive.storage.put("groups/tenant=default/notes.parquet", archive.storage.get(first.path or ""))
    (receipt,) = erase(client, directory, compaction)
    assert receipt.state == "proven"
    left = everywhere(client, directory)
    assert ADA.encode() not in left
    assert left.count(b"I am bob") >= 2
    assert archive.storage.names("_quarantine") == []


def test_L21_again_finds_nothing_more(client, place):
    directory, compaction = place
    asked(client)
    (first,) = erase(client, directory, compaction)
    asked(client, at=first.requested_at)
    (again,) = erase(client, directory, compaction)
    assert again.erased.groups == 0
    assert again.state == "proven"


class Interrupted(redis.Redis):
    """Does something else once, when the first entry of the stream is to go."""

    meanwhile = None

    def execute_command(self, *args, **options):
        if args[0] == "XDEL" and self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return super().execute_command(*args, **options)


def test_asked_again_in_the_middle_it_looks_again_and_what_was_found_is_told(client, place, redis_url):
    directory, compaction = place
    compaction.flush()
    first = asked(client)
    again = first.model_copy(update={"requested_at": first.requested_at + 1})
    with Interrupted.from_url(redis_url) as interrupted:
        interrupted.meanwhile = lambda: client.hset(ERASURES, again.id, again.model_dump_json())
        Eraser(interrupted, archive_at(directory / "ledger"), directory).work()
    kept = Erasure.model_validate_json(client.hget(ERASURES, first.id))
    assert (kept.state, kept.requested_at, kept.erased.groups) == ("requested", again.requested_at, 2)
    (receipt,) = erase(client, directory, compaction)
    assert (receipt.state, receipt.erased.groups) == ("proven", 2)


def test_L20_another_tenants_user_of_that_name_is_another(client, place):
    directory, compaction = place
    asked(client, tenant="acme")
    (receipt,) = erase(client, directory, compaction)
    assert receipt.erased.groups == 0
    assert ADA.encode() in everywhere(client, directory)


def test_what_the_user_does_afterwards_is_kept(client, place):
    directory, compaction = place
    asked(client, at=group(5).created_at)
    (receipt,) = erase(client, directory, compaction)
    assert receipt.erased.groups == 1
    assert [one.id for one in stream(client) if one.kind == "group" and one.user == ADA] == [of(ADA, 10).id]


def test_a_spool_that_may_hold_something_is_waited_for(client, place):
    """And what it brings meanwhile reaches no segment."""
    directory, compaction = place
    erasure = asked(client)
    client.hset(SPOOLS, "gateway", str(erasure.requested_at - 1))
    (receipt,) = erase(client, directory, compaction)
    assert (receipt.state, receipt.waits_for) == ("erased", ("gateway",))
    world.deliver(client, of(ADA, 20))
    compaction.step(wait_seconds=0.01)
    assert ADA.encode() not in everywhere(client, directory)
    client.hset(SPOOLS, "gateway", str(erasure.requested_at + 1))
    (receipt,) = erase(client, directory, compaction)
    assert receipt.state == "proven"


def test_L22_killed_in_the_middle_it_is_done_by_the_next(client, place):
    """Every call of the store is the last one once."""
    directory, compaction = place
    asked(client)
    compaction.flush()
    fate, deaths = Fate(), 0
    while True:
        archive = Archive(MortalStorage(directory / "ledger", fate))
        try:
            with fate.dying_at(deaths % 3, after=True):
                Eraser(client, archive, directory).work()
            break
        except Died:
            deaths += 1
            assert deaths < 50
    assert deaths > 0
    assert ADA.encode() not in everywhere(client, directory)


def test_what_a_shadow_said_beside_an_answer_goes_with_it_also_when_it_was_said_later(client, place):
    directory, compaction = place
    answered = of(ADA, 50)
    world.deliver(client, answered)
    erasure = asked(client)
    late = answered.model_copy(
        update={"id": f"shadow_{answered.id}", "created_at": erasure.requested_at + 1, "arm_reason": "shadow"}
    )
    world.deliver(client, late, world.outcome(late, [1.0] * 3))
    (receipt,) = erase(client, directory, compaction)
    assert receipt.state == "proven"
    assert ADA.encode() not in everywhere(client, directory)
    assert late.id.encode() not in everywhere(client, directory)


def test_what_was_said_of_a_session_is_known_when_its_groups_are_gone(client, tmp_path):
    """It came first, so that it is looked at last; every change of the archive is the last one once."""
    call, is_over = 0, False
    while not is_over:
        client.flushall()
        directory, fate = tmp_path / str(call), Fate()
        archive = Archive(MortalStorage(directory / "ledger", fate))
        compaction = Compaction(client, archive, replace(AT_ONCE, hot_groups=0))
        compaction.open()
        said = feedback(of("bob", 1), 1, group_id=None, session=f"of {ADA}", comment=f"about {ADA}")
        world.deliver(client, said, of("bob", 1), of("bob", 2), of(ADA, 3), of("bob", 4), of("bob", 5))
        while compaction.step(wait_seconds=0.01) is not None:
            pass
        client.hset(feedback_key(target_of(None, said.session)), said.question, said.model_dump_json())
        asked(client)
        with suppress(Died), fate.dying_at(call, after=True):
            Eraser(client, archive, directory).work()
        is_over = fate.calls <= call
        erase(client, directory, compaction)
        assert ADA.encode() not in everywhere(client, directory), call
        call += 1
    assert call > 5
