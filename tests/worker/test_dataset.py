"""How prompts are pooled, and that a frozen window stays what it was."""

import pytest

from bon_algos.acceptance import choose
from bon_algos.acceptance import pool as pools_of
from bon_algos.contracts import Sampling
from bon_algos.order import best_of_n_weights
from tests.worker import world
from tests.worker.fit_groups import STUDENT, WANTED, fit_groups
from worker import dataset
from worker.dataset import PromptPool, freeze, prompt_pool
from worker.errors import JobFailed


def pool(groups, sides, reference):
    return [prompt_pool(entry, reference) for entry in pools_of(groups, sides)]


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
    """However large its reward, and after a window's file has told of it."""
    cuts = [world.candidate(reward=reward, finish_reason="length") for reward in (50.0, 49.0, 1e300, -1e300, 0.0)]
    wholes = [world.candidate(reward=reward) for reward in (-50.0, 1e300, -1e9 - 50.0)]
    (pooled,) = pool([world.group("a", [0, 1], candidates=[*cuts, *wholes])], {(0, 1): "train"}, world.BASE)
    for known in (pooled, PromptPool.model_validate_json(pooled.model_dump_json())):
        assert [one.is_complete for one in known.candidates] == [False] * 5 + [True] * 3
        assert known.logged_group.rewards == [3, 2, 4, 0, 1, 6, 7, 5]


def test_a_windows_file_says_of_a_completion_that_is_cut_what_it_always_said():
    """Of a window that was frozen before, a job goes on with the same ranks."""
    cut = world.candidate(reward=50.0, finish_reason="length")
    (pooled,) = pool([world.group("a", [0, 1], candidates=[cut, world.candidate()])], {(0, 1): "train"}, world.BASE)
    assert [one.ranking_reward for one in pooled.candidates] == [50.0 - 1e9, 0.0]


def test_wanted_policies_candidates_know_who_drew_them():
    wanted = WANTED._replace(other_policies=(STUDENT,))
    groups = [world.group("a", [0, 1], (0.0, 1.0)), world.group("b", [0, 1], (3.0,), policy_id=STUDENT)]
    (pooled,) = pool(choose(groups, wanted, 10).chosen, {(0, 1): "train"}, world.BASE)
    assert [one.policy for one in pooled.candidates] == [None, None, STUDENT]
    assert [one.reward for one in pooled.drawn_by_reference] == [0.0, 1.0]


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
