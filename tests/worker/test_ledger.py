"""The ledger is read backwards, once, with rewards that came later joined in. A real Redis."""

from zlib import compress

import pytest
import redis

from bon_algos.contracts import LEDGER_STREAM
from bon_algos.ledger_entries import with_outcome
from tests.worker import world
from worker.ledger import groups_newest_first


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url) as connection:
        yield connection


def test_newest_first_over_many_pages_each_once(client):
    groups = [world.group(f"g{i}", [0, i]) for i in range(10)]
    world.deliver(client, *groups, groups[4])  # a spool that was replayed after the 24 h of its mark
    found = [group.id for group in groups_newest_first(client, ("default",), page_entries=3)]
    assert found == ["g4", "g9", "g8", "g7", "g6", "g5", "g3", "g2", "g1", "g0"]


def test_a_reward_measured_after_the_reply_joins_its_candidate(client):
    unscored = world.group("g", [0, 1], candidates=[world.candidate(reward=None)])
    world.deliver(client, unscored, world.outcome(unscored, [2.5]))
    (found,) = groups_newest_first(client, ("default",))
    assert [candidate.reward for candidate in found.candidates] == [2.5]
    assert found.is_unbiased


def test_an_outcome_of_another_reward_model_is_not_mixed_in():
    unscored = world.group("g", [0, 1], candidates=[world.candidate(reward=None)])
    assert with_outcome(unscored, world.outcome(unscored, [2.5], reward_model_id="rm-" + "d" * 16)) == unscored
    assert with_outcome(unscored, world.outcome(unscored, [2.5, 3.0])) == unscored


def test_other_routes_are_not_read(client):
    world.deliver(client, world.group("g", [0, 1], route="other"), world.group("h", [0, 1]))
    assert [group.id for group in groups_newest_first(client, ("default",))] == ["h"]


def test_other_tenants_are_not_read_whatever_their_routes_are_called(client):
    world.deliver(client, world.group("g", [0, 1], tenant="acme"), world.group("h", [0, 1]))
    assert [group.id for group in groups_newest_first(client, ("default",))] == ["h"]
    assert [group.id for group in groups_newest_first(client, ("default",), tenant="acme")] == ["g"]


def test_a_record_of_another_version_takes_the_others_from_nobody(client):
    world.deliver(client, world.group("g", [0, 1]))
    for data in (b"not even compressed", compress(b'{"kind": "group", "schema_version": 99}')):
        client.xadd(LEDGER_STREAM, {"kind": "group", "id": "x", "data": data})
    world.deliver(client, world.group("h", [0, 1]))
    assert [group.id for group in groups_newest_first(client, ("default",))] == ["h", "g"]


def test_an_empty_ledger_has_no_groups(client):
    assert list(groups_newest_first(client, ("default",))) == []
