"""What an ancestor learned from is never held out again: the walk from manifest to window, and the split after it."""

import shutil

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from bon_algos.acceptance import MIN_PROMPTS, Requirements, split_sides
from bon_algos.ancestors import Lineage
from bon_algos.contracts import POLICIES_DELETED, POLICIES_INDEX, Window, policy_key
from tests.service.records import job_spec, manifest, numbered, policy
from tests.worker import world
from worker.dataset import freeze
from worker.erased_windows import taint
from worker.errors import JobFailed
from worker.lineage import lineage

WANTED = Requirements(world.BASE, world.REWARD_MODEL, world.TEMPLATE, 2)


def groups(first, last):
    return [world.group(f"g{i}", [0, 2 + i]) for i in range(first, last)]


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url) as connection:
        yield connection


@pytest.fixture
def published(client, tmp_path):
    """published(number, groups, parent, learned from) -> the policy's id, its window frozen and its manifest known."""

    def make(number, learned, parent=world.BASE, others=(), **split):
        job = f"job_{number}"
        window = freeze(
            tmp_path / "jobs" / job / "window", learned, WANTED, max_groups=1000, held_out_fraction=0.3, **split
        )
        written = manifest(numbered(number)).model_copy(
            update={
                "job_id": job,
                "data": window.data,
                "parent_policy_id": parent,
                "spec": job_spec(window=Window(policies=others)),
            }
        )
        record = policy(numbered(number), written=written)
        client.hset(policy_key(record.id), mapping={"record": record.model_dump_json(), "version": 1})
        client.zadd(POLICIES_INDEX, {record.id: number})
        return record.id, {pool.prompt_ids for pool in window.train}

    return make


def test_the_base_has_no_ancestors(client, tmp_path):
    assert lineage(client, tmp_path, (world.BASE,)) == Lineage((), frozenset())


def test_all_ancestors_are_found_through_parents_and_through_what_they_learned_from(client, tmp_path, published):
    """4 was made from 3, which was made from 1 and learned from what 2 drew; each window is another one."""
    one, first = published(1, groups(0, 20))
    two, second = published(2, groups(20, 40))
    three, third = published(3, groups(40, 60), parent=one, others=(two,))
    four, fourth = published(4, groups(60, 80), parent=three)
    found = lineage(client, tmp_path, (four, one))
    assert set(found.ancestors) == {one, two, three, four}
    assert len(found.ancestors) == 4
    assert found.trained == first | second | third | fourth


def test_what_an_import_or_a_deleted_policy_learned_from_is_unknown_and_not_nothing(client, tmp_path, published):
    """4 was made from an import and learned from what 2 drew, which was made from a policy that is deleted."""
    deleted, imported = numbered(1), numbered(3)
    client.zadd(POLICIES_DELETED, {deleted: 1.0})
    none = dict.fromkeys(("job_id", "spec", "data", "report", "reward_model_id"))
    record = policy(imported, written=manifest(imported).model_copy(update={**none, "parent_policy_id": world.BASE}))
    client.hset(policy_key(imported), mapping={"record": record.model_dump_json(), "version": 1})
    two, second = published(2, groups(0, 20), parent=deleted)
    four, fourth = published(4, groups(20, 40), parent=imported, others=(two,))
    found = lineage(client, tmp_path, (four,))
    assert set(found.ancestors) == {two, four, deleted, imported}
    assert set(found.unknown) == {deleted, imported}
    assert found.trained == second | fourth


def test_what_an_ancestor_was_trained_on_is_not_held_out_in_any_later_window(client, tmp_path, published):
    """The child's window overlaps the parent's, and holds out a larger share: by its hash alone some would leak."""
    parent, trained = published(1, groups(0, 40))
    later = groups(20, 80)
    naive = split_sides(later, 0.6)
    assert {prompt for prompt, side in naive.items() if side == "held_out"} & trained
    sides = split_sides(later, 0.6, lineage(client, tmp_path, (parent,)).trained)
    held_out = {prompt for prompt, side in sides.items() if side == "held_out"}
    assert len(held_out) > 10
    assert not held_out & trained


@given(st.sets(st.integers(0, 29), max_size=20), st.lists(st.integers(0, 30), min_size=30, max_size=30))
def test_no_family_with_a_known_prompt_is_ever_held_out(known, sessions):
    window = [world.group(f"g{i}", [0, 2 + i], session=f"s{session}") for i, session in enumerate(sessions)]
    trained = {(0, 2 + i) for i in known}
    try:
        sides = split_sides(window, 0.4, trained)
    except ValueError:
        return  # nearly everything is known, or one family
    by_session = dict(zip((group.session for group in window), ("",) * 30, strict=True))
    for group in window:
        side = sides[group.prompt_token_ids]
        assert by_session[group.session] in ("", side)
        by_session[group.session] = side
        assert side == "train" or group.prompt_token_ids not in trained
    assert sum(side == "held_out" for side in sides.values()) >= MIN_PROMPTS


def test_a_window_in_which_an_ancestor_knows_everything_cannot_be_evaluated(published, tmp_path):
    everything = {(0, 2 + i) for i in range(20)}
    with pytest.raises(JobFailed, match="20 prompts, 20 of them known to an ancestor") as failed:
        published(1, groups(0, 20), trained_before=everything)
    assert failed.value.code == "too_few_prompts"


def test_an_ancestor_whose_window_is_gone_or_another_stops_the_job(client, tmp_path, published):
    one, _ = published(1, groups(0, 20))
    two, _ = published(2, groups(20, 40))
    windows = [tmp_path / "jobs" / f"job_{number}" / "window" for number in (1, 2)]
    windows[0].rename(tmp_path / "elsewhere")
    for why in ("cannot be read", "is not the one that its manifest names"):
        with pytest.raises(JobFailed, match=f"{one} was trained on {why}") as failed:
            lineage(client, tmp_path, (two, one))
        assert failed.value.code == "lineage_unknown"
        if not windows[0].exists():
            shutil.copytree(windows[1], windows[0])


def test_of_an_ancestor_whose_window_was_erased_nobody_is_asked_to_restore_it(client, tmp_path, published):
    one, _ = published(1, groups(0, 20))
    two, _ = published(2, groups(20, 40), parent=one)
    (tmp_path / "jobs" / "job_1" / "window" / "pools.jsonl.z").unlink()
    taint(client, frozenset({"job_1"}))
    with pytest.raises(JobFailed, match="erased") as failed:
        lineage(client, tmp_path, (two,))
    assert failed.value.code == "policy_unusable"
