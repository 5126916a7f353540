"""Which groups are fit, and how prompts are split: what the worker freezes and the gateway tells beforehand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bon_algos.acceptance import Requirements, choose, split_sides
from bon_algos.contracts import Feedback, FeedbackFilter, JobSpec, Sampling
from tests.worker import world
from tests.worker.fit_groups import STUDENT, WANTED, fit_groups

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
    choice = choose([world.group("bad", [0, 1], **fields), world.group("good", [0, 1])], wanted, 10)
    assert [group.id for group in choice.chosen] == ["good"]
    assert choice.rejected == {reason: 1}


def test_a_group_of_two_policies_is_nobodys_draws():
    """A distilled policy's sample beside the base policy's: neither a window of the one nor of both takes it."""
    of_both = [world.candidate(reward=2.0).model_copy(update={"policy_id": STUDENT}), world.candidate(reward=1.0)]
    mixed = [world.group("m", [0, 1], candidates=of_both, stop_reason=why) for why in ("below_threshold", "fixed")]
    for wanted in (WANTED, WANTED._replace(other_policies=(STUDENT,))):
        choice = choose([*mixed, world.group("good", [0, 1])], wanted, 10)
        assert [group.id for group in choice.chosen] == ["good"]
        assert choice.rejected == {"not_fixed": 2}


def test_a_repeated_seed_is_no_second_draw():
    seeded = Sampling(max_tokens=6, seed=11)
    groups = [world.group(f"g{i}", [0, 1], sampling=seeded) for i in range(2)]
    other = world.group("g2", [0, 2], sampling=seeded)
    choice = choose([*groups, other], WANTED, 10)
    assert ([group.id for group in choice.chosen], choice.rejected) == (["g0", "g2"], {"repeated_seed": 1})


def test_a_seed_is_repeated_only_by_the_same_policy():
    seeded, wanted = Sampling(max_tokens=6, seed=11), WANTED._replace(other_policies=(STUDENT,))
    groups = [
        world.group(f"g{i}", [0, 1], sampling=seeded, policy_id=who) for i, who in enumerate((world.BASE, STUDENT))
    ]
    choice = choose(groups, wanted, 10)
    assert (choice.chosen, choice.rejected) == (groups, {})


def test_the_newest_groups_are_kept_up_to_the_limit():
    choice = choose(fit_groups(5), WANTED, 3)
    assert [group.id for group in choice.chosen] == ["g0-0", "g1-0", "g2-0"]


# --- tags and feedback -----------------------------------------------------------------------------------


def test_a_group_must_have_all_tags_that_are_asked_for():
    tagged = [world.group(f"g{i}", [0, i], tags=tags) for i, tags in enumerate([("a", "b"), ("a",), ()])]
    choice = choose(tagged, WANTED._replace(tags=("b", "a")), 10)
    assert ([group.id for group in choice.chosen], choice.rejected) == (["g0"], {"other_tags": 2})


def said(value, name="quality", author=None):
    return Feedback(
        id="fb", created_at=0.0, group_id="g", session=None, route=None, experiment=None, arm=None, arm_reason=None,
        author=author, name=name, candidate=0, value=value, better=None, worse=None, comment=None, correction=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("feedback", "wanted", "reason"),
    [
        ([], {}, "no_feedback"),
        ([said(None)], {}, None),
        ([said(True, "tone")], {"name": "quality"}, "no_feedback"),
        ([said(True)], {"name": "quality", "at_least": 1.0}, None),
        # Two authors: (1 + 0) / 2.
        ([said(True), said(False)], {"at_least": 0.5}, None),
        ([said(True), said(False)], {"at_least": 0.51}, "feedback_below"),
        ([said("brilliant")], {"at_least": 0.0}, "no_feedback"),
    ],
)
def test_a_group_is_taken_for_what_people_said_of_it(feedback, wanted, reason):
    criteria = WANTED._replace(feedback=FeedbackFilter(**wanted))
    choice = choose([world.group("g", [0, 1])], criteria, 10, lambda group_id: feedback)
    assert choice.rejected == ({} if reason is None else {reason: 1})


def test_feedback_is_asked_for_only_where_nothing_else_is_wrong():
    asked = []

    def nothing_was_said(group_id):
        asked.append(group_id)
        return []

    groups = [world.group("g", [0, 1], store=False), world.group("h", [0, 1])]
    choose(groups, WANTED._replace(feedback=FeedbackFilter()), 10, nothing_was_said)
    assert asked == ["h"]


# --- files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "is_any_law"), [("dpo", True), ("bon_sft", True), ("bond", False), ("bonbon", False)]
)
def test_only_methods_that_estimate_nothing_of_the_reference_take_completions_of_nobody_known(method, is_any_law):
    spec = JobSpec.model_validate({"method": {"type": method}, "training_file": "file-" + "0" * 32})
    ours = {"base_policy": world.BASE, "reward_model": world.REWARD_MODEL}
    wanted = Requirements.of(spec, **ours, reward_template_digest=world.TEMPLATE)
    foreign = world.group("g", [0, 1], policy_id=STUDENT, sampling=Sampling(max_tokens=6, temperature=0.7))
    assert choose([foreign], wanted, 10).rejected == ({} if is_any_law else {"other_policy": 1})
    from_ledger = Requirements.of(
        spec.model_copy(update={"training_file": None}), **ours, reward_template_digest=world.TEMPLATE
    )
    assert choose([foreign], from_ledger, 10).rejected == {"other_policy": 1}


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
