"""Candidates are ranked as they are served wherever they meet: a scale of rewards, or a huge one, decides nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bon_algos.acceptance import Requirements
from bon_algos.acceptance import pool as pools_of
from bon_algos.contracts import BondSpec
from bon_algos.steps import BondStep, OnPolicyStep, SampledStep
from tests.worker import world
from tests.worker.drawn import evidence, pool, rollout, row, subject
from tests.worker.test_checkpoint import SPECS, opened
from worker.dataset import freeze, prompt_pool
from worker.evaluate import Judged
from worker.models import TrainedPolicy
from worker.quantile_model import with_learned_quantiles
from worker.report import held_out, policy_report
from worker.rollouts import Rollout, fresh_group, live_metrics, ranked_group
from worker.train import batch_of

CUT = {"finish_reason": "length"}
TRANSFORMS = {"e^r": math.exp, "r·1e12": lambda reward: reward * 1e12}
BY_ORDER = {name: spec for name, spec in SPECS.items() if name != "rloo"} | {
    "bond": BondSpec(n=8, lora_rank=8, learning_rate=1e-2, warmup_steps=3, imitation_steps=1),
    "token_bond": SPECS["token_bond"].model_copy(update={"critic_share": 0.15}),
}
"""So that the second step is one of fresh samples, and one of the policy."""


# --- groups of a step ------------------------------------------------------------------------------------


def test_fresh_samples_are_ranked_among_logged_candidates():
    """1e300 of what is cut is worth less than any complete one; what has no reward less than that."""
    samples = [rollout(1e300, **CUT), rollout(2.0), rollout(None), rollout(9.0)]
    group = ranked_group(pool(0, [1.0, 2.0, 3.0]), samples)
    assert (list(group.logged.rewards), list(group.rewards)) == ([2, 3, 4], [1, 3, 0, 5])
    assert list(group.raw_rewards) == [1e300, 2.0, None, 9.0]


def test_a_sample_is_ranked_among_its_anchors():
    group = fresh_group(pool(0), rollout(1e300, **CUT), [rollout(-1e300), rollout(1e300, **CUT)])
    assert (group.reward, list(group.anchor_rewards)) == (0, [1, 0])


# --- what training makes of it ---------------------------------------------------------------------------


def transformed(group, transform):
    """The same group under a reward model of another scale."""
    candidates = tuple(one.model_copy(update={"reward": transform(one.reward)}) for one in group.candidates)
    return group.model_copy(update={"candidates": candidates})


def window_of(groups, directory):
    wanted = Requirements(world.BASE, world.REWARD_MODEL, world.TEMPLATE, num_candidates=8)
    return freeze(directory / "window", groups, wanted, max_groups=100, held_out_fraction=0.3)


def advance(training, window, transform, until):
    """As the loop does, with samples that are some of the candidates and have rewards of their own."""
    while training.done < until:
        batch = batch_of(window.train, training.done, size=4, seed=5)
        drawn = [[sample(one, transform(float(k))) for k, one in enumerate(own.candidates[:3])] for own in batch]
        match training.step:
            case OnPolicyStep():
                training.learn_fresh([fresh_group(own, a, [b, c]) for own, (a, b, c) in zip(batch, drawn, strict=True)])
            case BondStep() | SampledStep() if training.logged_step is None:
                training.learn_ranked([ranked_group(own, some) for own, some in zip(batch, drawn, strict=True)])
            case _:
                training.learn_logged([own.logged_group for own in batch])
    return training.policy.factors


def sample(logged, reward):
    reason = "stop" if logged.is_complete else "length"
    return Rollout(world.candidate(logged.token_ids, logged.token_logprobs, reward, finish_reason=reason), reward)


def is_cut_at_its_best(own):
    best = max(own.candidates, key=lambda one: one.reward)
    return not best.is_complete and any(one.is_complete for one in own.candidates)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_ORDER)
def test_a_strictly_increasing_transform_of_rewards_changes_no_bit_of_a_policy(
    name, tiny_policy, tiny_groups, tmp_path
):
    plain = window_of(tiny_groups, tmp_path)
    assert any(map(is_cut_at_its_best, plain.train))
    at_first = opened(tiny_policy, BY_ORDER[name]).policy.factors
    expected = advance(opened(tiny_policy, BY_ORDER[name]), plain, float, 2)
    assert not all(torch.equal(at_first[key], factor) for key, factor in expected.items())
    for label, transform in TRANSFORMS.items():
        other = window_of([transformed(group, transform) for group in tiny_groups], tmp_path / label)
        found = advance(opened(tiny_policy, BY_ORDER[name]), other, transform, 2)
        assert all(torch.equal(found[key], factor) for key, factor in expected.items())


@pytest.mark.slow
def test_learned_quantiles_rank_all_prompts_candidates_together():
    feature_BD = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 3)))
    cut = world.candidate(reward=9.0, **CUT)
    groups = [
        world.group(f"g{b}", [0, b], candidates=[cut, *(world.candidate(reward=b + k) for k in (0.0, 2.0, 5.0))])
        for b in range(8)
    ]

    def learned(transform):
        entries = pools_of([transformed(group, transform) for group in groups], {(0, b): "train" for b in range(8)})
        pools = [prompt_pool(entry, world.BASE) for entry in entries]
        return [
            one.log_quantiles for one in with_learned_quantiles(pools, lambda _: feature_BD, "learned_law", n=4, seed=0)
        ]

    plain = learned(float)
    assert all(own[0] == min(own) for own in plain)
    for transform in TRANSFORMS.values():
        assert learned(transform) == plain


# --- what is said of a policy ----------------------------------------------------------------------------


def test_a_live_win_rate_is_of_what_is_served(tiny_policy):
    policy: TrainedPolicy = opened(tiny_policy, SPECS["jbond"]).policy
    about = pool(2, [-1e10, 0.0, 1e10])
    for drawn, expected in (
        (rollout(1e300, **CUT), 0.0),
        (rollout(0.0), 0.5),
        (rollout(None), 0.0),
        (rollout(2e10), 1),
    ):
        assert live_metrics(policy, [about], [drawn])["win_rate"] == expected


def test_a_policy_whose_answers_are_cut_wins_nothing_in_its_report():
    judged = [row(b, [rollout(1e12, **CUT)] * 2, [-1e12, rollout(3e12, **CUT), 5.0], [0.0]) for b in range(3)]
    assert (judged[0].order_policy.tolist(), judged[0].order_reference.tolist()) == ([0, 0], [2, 1, 4, 3])
    report = policy_report(subject(2), held_out(judged, frozenset(), ()), evidence(judged, 2))
    assert report.win_rate_reference.mean == 0
    assert report.win_rate_best_of_n.mean == 0


def test_the_order_of_a_report_is_of_both_sides():
    judged = Judged(pool(0), [rollout(2.0)], [rollout(1.0), rollout(3.0)], ())
    assert judged.order_policy < judged.order_reference[1]
    assert judged.order_policy > judged.order_reference[0]
    assert judged.order_fresh.tolist() == judged.order_reference.tolist()
