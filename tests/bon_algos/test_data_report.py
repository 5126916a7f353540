"""The numbers of a dry run, each by hand."""

import math

import pytest

from bon_algos.acceptance import Requirements, choose
from bon_algos.data_report import data_report
from bon_algos.order import kl_bound
from tests.worker import world

WANTED = Requirements(
    reference_policy=world.BASE,
    reward_model=world.REWARD_MODEL,
    reward_template_digest=world.TEMPLATE,
    num_candidates=2,
)


def report(groups, wanted=WANTED, *, n=2, tokens=1000, fraction=0.3):
    return data_report(
        choose(groups, wanted, 1000),
        wanted,
        {group.id: tokens for group in groups},
        n=n,
        held_out_fraction=fraction,
        groups_read=len(groups),
        is_whole=True,
    )


def prompts(num, rewards=(0.0, 1.0), **fields):
    return [world.group(f"g{i}", [0, 2 + i], rewards, **{"prompt": f"number {i}", **fields}) for i in range(num)]


def test_ties_are_counted_by_pairs_and_take_from_n():
    """{0, 1, 1}: of 3 pairs one is tied; {0, 0, 0}: all three. Together 4 of 6."""
    told = report([*prompts(5, (0.0, 1.0, 1.0)), *[g.model_copy(update={"id": f"h{g.id}", "prompt_token_ids": (9, i)})
                   for i, g in enumerate(prompts(5, (0.0, 0.0, 0.0)))]])  # fmt: skip
    assert told.tied_pairs == pytest.approx(4 / 6)
    assert told.prompts_all_tied == 0.5
    assert told.effective_n is not None
    assert 1 < told.effective_n < 2


def test_effective_n_is_the_n_of_that_kl():
    """Without ties it is n itself, whatever the rewards; with all tied there is nothing to choose: 1."""
    assert report(prompts(6, (0.0, 5.0, 1e9)), n=3).effective_n == pytest.approx(3)
    assert report(prompts(6, (2.0, 2.0)), n=2).effective_n == pytest.approx(1)
    assert kl_bound(3) == pytest.approx(math.log(3) - 2 / 3)


def test_the_curve_ends_where_two_prompts_have_candidates():
    told = report([*prompts(4, (0.0, 1.0, 2.0)), world.group("x", [9, 9], tuple(range(16)))], n=16)
    assert [point.k for point in told.curve] == [1, 2, 3]
    assert told.curve[0].gain == 0


def test_what_is_cut_is_chosen_where_there_is_nothing_else():
    """Whatever its reward. Of 1 and 0, which are complete, 1 is best; of all three one is worth their mean."""
    drawn = [world.candidate(reward=1e12, finish_reason="length"), *(world.candidate(reward=r) for r in (0.0, 1.0))]
    told = report([world.group(f"g{i}", [0, 2 + i], candidates=drawn) for i in range(6)], n=3)
    assert [point.reward for point in told.curve] == [pytest.approx((1e12 + 1) / 3), pytest.approx(2 / 3), 1.0]
    assert told.effective_n == pytest.approx(3)


def test_no_gain_is_not_called_one():
    """Half of the prompts' rewards are worth nothing: the gain's interval begins above 0 only where it is sure."""
    sure, unsure = report(prompts(6)), report([*prompts(1), *prompts(6, (1.0, 1.0))[1:]])
    assert sure.is_there_gain
    assert unsure.is_there_gain is False


def test_sessions_and_prompts_never_leak_and_near_duplicates_are_told():
    text = " ".join(f"w{i}" for i in range(40))
    alike = prompts(10, prompt=text, session="s")
    spread = [group.model_copy(update={"session": None}) for group in alike]
    told = report(spread)
    assert told.leakage is not None
    assert (told.leakage.prompts, told.leakage.sessions) == (0, 0)
    assert told.leakage.near_duplicates == told.leakage.held_out_prompts == told.held_out_prompts
    different = report(prompts(10)).leakage
    assert different is not None
    assert different.near_duplicates == 0


@pytest.mark.parametrize(
    ("groups", "code"),
    [
        ([], "empty_window"),
        (prompts(1), "too_few_prompts"),
        (prompts(9, (1.0,)), "too_few_candidates"),
        (prompts(9, (1.0, 1.0)), "rewards_all_equal"),
    ],
)
def test_what_the_worker_would_fail_with_is_told(groups, code):
    told = report(groups)
    assert [trouble.code for trouble in told.would_fail] == [code]


def test_too_few_tokens_for_a_fingerprint_are_told():
    told = report(prompts(9), tokens=10)
    assert [trouble.code for trouble in told.would_fail] == ["window_too_small"]


def test_groups_of_prompts_with_too_few_candidates_are_rejected_not_accepted():
    told = report([*prompts(9, (0.0, 1.0, 2.0)), world.group("small", [0, 99])], WANTED._replace(num_candidates=3))
    assert (told.accepted, told.rejected) == (9, {"too_few_candidates": 1})


def test_rewards_at_the_ends_of_what_a_float_holds_have_a_distribution():
    told = report(prompts(4, (-1.7e308, 1.7e308)))
    assert told.rewards is not None
    assert told.rewards.counts[0] == told.rewards.counts[-1] == 4
    assert all(math.isfinite(value) for value in (told.rewards.mean, told.rewards.standard_deviation))
