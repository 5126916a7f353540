"""Candidates that other policies drew: which laws are asked for, what becomes of a pool, and when there are too few."""

import numpy as np
import pytest
import torch

from bon_algos.acceptance import Requirements
from bon_algos.algorithms import make_step
from bon_algos.contracts import BonRegressionSpec
from bon_algos.steps import LoggedStep
from tests.worker import world
from worker import mixture
from worker.dataset import FrozenWindow, freeze
from worker.errors import JobCancelled, JobFailed

STUDENT = "pol-" + "0" * 16
LAWS = {None: torch.tensor([0.2, 0.8]).log(), STUDENT: torch.tensor([0.6, 0.4]).log()}
"""Of a first token that is 5, or another."""


@pytest.fixture
def window(tmp_path):
    """window(candidates of the reference, of the student) -> six prompts, each with those first tokens."""

    def frozen(of_reference, of_student):
        wanted = Requirements(world.BASE, world.REWARD_MODEL, world.TEMPLATE, 1, other_policies=(STUDENT,))
        groups = [
            world.group(
                f"{who}-{prompt}",
                [0, 2 + prompt],
                candidates=[world.candidate([token, world.END], reward=float(token)) for token in tokens],
                policy_id=who,
                created_at=1000.0 + (who == STUDENT),
            )
            for prompt in range(6)
            for who, tokens in ((world.BASE, of_reference), (STUDENT, of_student))
            if tokens
        ]
        return freeze(tmp_path / "window", groups, wanted, max_groups=100, held_out_fraction=0.3)

    return frozen


def law(policy):
    return lambda groups: [
        torch.stack([LAWS[policy][int(completion[0] != 5)] for completion in group.completion_ids]) for group in groups
    ]


def weighed(window: FrozenWindow, num_candidates: int = 1, check=lambda: None) -> FrozenWindow:
    return mixture.weighed(window, law, num_candidates=num_candidates, check=check)


def test_a_window_of_the_reference_alone_asks_for_no_law(window):
    frozen = window([5, 7], [])
    assert mixture.weighed(frozen, lambda policy: pytest.fail("asked"), num_candidates=1, check=pytest.fail) is frozen


def test_candidates_stand_for_the_reference_by_the_mixtures_weights(window):
    """One draw of each policy: the mixture has .4 and .6, so 5 weighs ½ and 7 weighs 4/3."""
    for pool in weighed(window([5], [7])).train:
        assert pool.reference_logprobs == pytest.approx(np.log([0.2, 0.8]))
        assert pool.shares == pytest.approx([3 / 11, 8 / 11])
        assert pool.levels == ((0.0, 0.5), (0.5, 1.0))  # one other draw, worse or better
        assert pool.logged_group.reference_logprobs == pool.reference_logprobs
        assert pool.logged_group.shares == pool.shares


def test_candidates_that_all_tie_are_left_where_they_are(window):
    """Best-of-16 of equal rewards is the reference: a log-ratio of 0, whoever drew them."""
    step = make_step(BonRegressionSpec(n=16))
    assert isinstance(step, LoggedStep)
    frozen = window([5, 7], [5, 7])
    tied = [
        pool.model_copy(update={"candidates": tuple(one for one in pool.candidates if one.reward == 5)})
        for pool in frozen.train
    ]
    for pool in weighed(frozen._replace(train=tuple(tied))).train:
        assert step.choose(pool.logged_group, 0.5).verdicts == pytest.approx([0, 0], abs=1e-9)


def test_a_prompt_the_reference_never_answered_is_weighed_too(window):
    """π_ref/π_b = ⅓ and 2."""
    for pool in weighed(window([], [5, 7])).train:
        assert pool.shares == pytest.approx([1 / 7, 6 / 7])


def test_held_out_pools_stay_as_they_are(window):
    frozen = window([5], [7])
    assert weighed(frozen).held_out is frozen.held_out


def test_prompts_worth_too_few_draws_are_left_out_and_counted(window):
    frozen = window([], [5, 7])
    with pytest.raises(JobFailed, match="too far from it") as failed:
        weighed(frozen, num_candidates=2)  # (1 + 6)²/(1 + 36) = 1.3
    assert failed.value.code == "too_few_candidates"
    alike = [pool.model_copy(update={"candidates": pool.candidates[1:] * 2}) for pool in frozen.train[:2]]
    mixed = weighed(frozen._replace(train=(*alike, *frozen.train[2:])), num_candidates=2)
    assert [pool.shares for pool in mixed.train] == [(0.5, 0.5)] * 2
    assert mixed.data.rejected == {"too_little_weight": len(frozen.train) - 2}


def test_a_job_that_must_stop_stops_between_two_laws(window):
    def cancelled():
        raise JobCancelled("job")

    with pytest.raises(JobCancelled):
        weighed(window([5], [7]), check=cancelled)
