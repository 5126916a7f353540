"""Which groups are fit, how prompts are pooled and split, and that a frozen window stays what it was."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bon_algos.contracts import Sampling
from bon_algos.order import best_of_n_weights
from tests.worker import world
from worker import dataset
from worker.dataset import INCOMPLETE_PENALTY, Requirements, choose, freeze, pool, split_sides
from worker.errors import JobFailed

STUDENT = "pol-" + "0" * 16
WANTED = Requirements(
    reference_policy=world.BASE,
    reward_model=world.REWARD_MODEL,
    reward_template_digest=world.TEMPLATE,
    num_candidates=2,
)


def fit_groups(num_prompts, per_prompt=1, rewards=(0.0, 1.0)):
    return [
        world.group(f"g{prompt}-{i}", [0, 2 + prompt], rewards, created_at=1000.0 + i)
        for prompt in range(num_prompts)
        for i in range(per_prompt)
    ]


# --- fitness ---------------------------------------------------------------------------------------------

UNFIT = {
    "too_new": {"created_at": 3000.0},
    "too_old": {"created_at": 1.0},
    "not_stored": {"store": False},
    "other_policy": {"policy_id": STUDENT},
    "other_reward_model": {"reward_model_id": "rm-" + "0" * 16},
    "other_reward_template": {"reward_template_digest": "another"},
    "changed_law": {"sampling": Sampling(max_tokens=6, temperature=0.7)},
    "not_fixed": {"stop_reason": "gain_below_price"},
    "incomplete": {"candidates": [world.candidate(reward=1.0), world.candidate(reward=None)]},
}


@pytest.mark.parametrize(("reason", "fields"), UNFIT.items())
def test_an_unfit_group_is_counted_under_its_reason(reason, fields):
    wanted = WANTED._replace(since=500.0, until=2000.0)
    chosen, rejected = choose([world.group("bad", [0, 1], **fields), world.group("good", [0, 1])], wanted, 10)
    assert [group.id for group in chosen] == ["good"]
    assert rejected == {reason: 1}


def test_a_group_of_two_policies_is_nobodys_draws():
    """A distilled policy's sample beside the base policy's: neither a window of the one nor of both takes it."""
    of_both = [world.candidate(reward=2.0).model_copy(update={"policy_id": STUDENT}), world.candidate(reward=1.0)]
    mixed = [world.group("m", [0, 1], candidates=of_both, stop_reason=why) for why in ("below_threshold", "fixed")]
    for wanted in (WANTED, WANTED._replace(other_policies=(STUDENT,))):
        chosen, rejected = choose([*mixed, world.group("good", [0, 1])], wanted, 10)
        assert [group.id for group in chosen] == ["good"]
        assert rejected == {"not_fixed": 2}


def test_a_repeated_seed_is_no_second_draw():
    seeded = Sampling(max_tokens=6, seed=11)
    groups = [world.group(f"g{i}", [0, 1], sampling=seeded) for i in range(2)]
    other = world.group("g2", [0, 2], sampling=seeded)
    chosen, rejected = choose([*groups, other], WANTED, 10)
    assert ([group.id for group in chosen], rejected) == (["g0", "g2"], {"repeated_seed": 1})


def test_a_seed_is_repeated_only_by_the_same_policy():
    seeded, wanted = Sampling(max_tokens=6, seed=11), WANTED._replace(other_policies=(STUDENT,))
    groups = [
        world.group(f"g{i}", [0, 1], sampling=seeded, policy_id=who) for i, who in enumerate((world.BASE, STUDENT))
    ]
    assert choose(groups, wanted, 10) == (groups, {})


def test_wanted_policies_candidates_know_who_drew_them():
    wanted = WANTED._replace(other_policies=(STUDENT,))
    groups = [world.group("a", [0, 1], (0.0, 1.0)), world.group("b", [0, 1], (3.0,), policy_id=STUDENT)]
    chosen, _ = choose(groups, wanted, 10)
    (pooled,) = pool(chosen, {(0, 1): "train"}, world.BASE)
    assert [one.policy for one in pooled.candidates] == [None, None, STUDENT]
    assert [one.reward for one in pooled.drawn_by_reference] == [0.0, 1.0]


def test_the_newest_groups_are_kept_up_to_the_limit():
    chosen, _ = choose(fit_groups(5), WANTED, 3)
    assert len(chosen) == 3


# --- pooling ---------------------------------------------------------------------------------------------


def test_two_groups_of_four_serve_best_of_eight():
    """Independent draws of one policy: together they are a group of eight, and rank as one."""
    groups = [world.group("a", [0, 1], [3, 1, 4, 1.5]), world.group("b", [0, 1], [9, 2, 6, 5], created_at=1001.0)]
    (pooled,) = pool(groups, {(0, 1): "train"}, world.BASE)
    assert [one.reward for one in pooled.candidates] == [3, 1, 4, 1.5, 9, 2, 6, 5]
    weights = best_of_n_weights(pooled.logged_group.rewards, 8)
    assert weights.argmax() == 4
    assert weights[4] == pytest.approx(1.0)  # best of all eight: the 9, whichever group it came from


def test_a_single_answer_adds_its_candidate_to_the_prompt():
    groups = [world.group("a", [0, 1], [3, 1]), world.group("b", [0, 1], [2], created_at=1001.0)]
    (pooled,) = pool(groups, {(0, 1): "train"}, world.BASE)
    assert (len(pooled.candidates), pooled.num_groups) == (3, 2)


def test_another_length_limit_is_another_law_and_is_not_pooled():
    groups = [world.group("a", [0, 1]), world.group("b", [0, 1], sampling=Sampling(max_tokens=3))]
    assert [entry.max_tokens for entry in pool(groups, {(0, 1): "train"}, world.BASE)] == [3, 6]


def test_a_truncated_completion_ranks_below_every_complete_one():
    cut = world.candidate(reward=50.0, finish_reason="length")
    worse_cut = world.candidate(reward=49.0, finish_reason="length")
    whole = world.candidate(reward=-50.0)
    (pooled,) = pool([world.group("a", [0, 1], candidates=[cut, whole, worse_cut])], {(0, 1): "train"}, world.BASE)
    ranks = pooled.logged_group.rewards
    assert ranks[1] > ranks[0] > ranks[2]
    assert ranks[0] == 50.0 - INCOMPLETE_PENALTY


# --- splitting -------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=30, max_size=80), st.floats(0.05, 0.6))
def test_a_session_is_never_on_both_sides(pairs, fraction):
    groups = [world.group(f"g{i}", [0, 2 + prompt], session=f"s{session}") for i, (prompt, session) in enumerate(pairs)]
    try:
        sides = split_sides(groups, fraction)
    except ValueError:
        return  # one family holds nearly everything
    by_session: dict[str, set[str]] = {}
    for group in groups:
        by_session.setdefault(group.session, set()).add(sides[group.prompt_token_ids])
    assert all(len(found) == 1 for found in by_session.values())


def test_prompts_linked_through_a_third_stay_together():
    """p1 and p2 share session a, p2 and p3 share session b: all three are one family."""
    linked = [
        world.group("1", [0, 1], session="a"),
        world.group("2", [0, 2], session="a"),
        world.group("3", [0, 2], session="b"),
        world.group("4", [0, 3], session="b"),
    ]
    sides = split_sides([*linked, *fit_groups(40)], 0.3)
    assert len({sides[(0, 1)], sides[(0, 2)], sides[(0, 3)]}) == 1


def test_the_split_takes_its_share_and_is_the_same_in_a_larger_window():
    small, large = fit_groups(200), fit_groups(400)
    few, many = split_sides(small, 0.2), split_sides(large, 0.2)
    share = sum(side == "held_out" for side in many.values()) / 400
    assert abs(share - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 400)
    assert all(many[prompt] == side for prompt, side in few.items())


def test_a_small_window_still_has_two_prompts_held_out():
    sides = split_sides(fit_groups(5), 0.01)
    assert sorted(sides.values()) == ["held_out"] * 2 + ["train"] * 3


# --- freezing --------------------------------------------------------------------------------------------


def freeze_groups(directory, groups, wanted=WANTED, fraction=0.3):
    return freeze(directory / "window", groups, wanted, max_groups=1000, held_out_fraction=fraction)


def test_a_later_attempt_reads_the_first_ones_window(tmp_path):
    first = freeze_groups(tmp_path, fit_groups(20, per_prompt=2))
    again = freeze_groups(tmp_path, [])  # whatever the ledger holds by then
    assert again == first
    assert first.data.groups == first.data.train_groups + first.data.held_out_groups == 40


def test_the_window_does_not_depend_on_the_order_of_delivery(tmp_path):
    groups = fit_groups(20, per_prompt=2)
    one = freeze_groups(tmp_path / "a", groups)
    other = freeze_groups(tmp_path / "b", groups[::-1])
    assert one.data.digest == other.data.digest


def test_a_damaged_window_is_refused(tmp_path):
    freeze_groups(tmp_path, fit_groups(20))
    other = tmp_path / "other"
    freeze_groups(other, fit_groups(21))
    (tmp_path / "window" / "pools.jsonl.z").write_bytes((other / "window" / "pools.jsonl.z").read_bytes())
    with pytest.raises(JobFailed, match="window_damaged"):
        dataset.read(tmp_path / "window")


@pytest.mark.parametrize(
    ("groups", "code", "numbers"),
    [
        ([], "empty_window", "0 usable groups"),
        ([world.group("g", [0, 1], store=False)], "empty_window", "'not_stored': 1"),
        (fit_groups(1, per_prompt=9), "too_few_prompts", "1 prompts"),
        (fit_groups(20, rewards=(1.0, 1.0)), "rewards_all_equal", "of 20"),
        (fit_groups(20, rewards=(1.0,)), "too_few_candidates", "20 prompts has 1"),
    ],
    ids=["nothing", "nothing fit", "one prompt", "all rewards equal", "n above the candidates"],
)
def test_a_window_that_cannot_teach_fails_with_its_numbers(tmp_path, groups, code, numbers):
    with pytest.raises(JobFailed, match=numbers) as failure:
        freeze_groups(tmp_path, groups)
    assert failure.value.code == code
    assert not (tmp_path / "window").exists()


def test_prompts_with_too_few_candidates_are_left_out_and_counted(tmp_path):
    groups = [*fit_groups(20, rewards=(0.0, 1.0, 2.0)), world.group("small", [0, 99], (0.0, 1.0))]
    window = freeze_groups(tmp_path, groups, WANTED._replace(num_candidates=3))
    assert window.data.rejected == {"too_few_candidates": 1}
    assert window.data.groups == 20
