"""F41: training that leaves numbers behind fails its job by name and step, whatever the method and whichever rank."""

import math
from typing import get_args

import pytest
import torch

from bon_algos.contracts import AlgorithmSpec, BondSpec, TokenBondSpec, TrainingSetup
from bon_algos.logprobs import TokenGroup
from bon_algos.steps import LoggedGroup
from tests.worker import world
from tests.worker.test_checkpoint import SPECS, advance, opened
from tests.worker.test_ranks import planned
from worker.crew import crew
from worker.errors import JobFailed
from worker.opening import begin, state_of
from worker.train import Training

pytestmark = pytest.mark.slow

BROKEN = r"^loss_not_finite: step 2: "
BOTH_PARTS = SPECS | {
    "bond, fresh": BondSpec(n=8, lora_rank=8, imitation_steps=1),
    "token_bond": TokenBondSpec(n=8, lora_rank=8, steps=7, critic_share=0.1),
}
"""Whose second step is the policy's; a critic's looks at the reference alone."""


class Broken:
    """A policy that adds a number to the log-prob of its first completion, or its anchor does, as where logits leave
    their range."""

    def __init__(self, policy, *, own=0.0, of_anchor=0.0):
        self._policy, self._own, self._of_anchor = policy, own, of_anchor

    def __getattr__(self, name):
        return getattr(self._policy, name)

    def logprobs(self, groups):
        return first_changed(self._policy.logprobs(groups), self._own)

    def logprobs_wearing(self, factors, groups):
        return first_changed(self._policy.logprobs_wearing(factors, groups), self._of_anchor)

    def token_terms(self, groups):
        first, *others = self._policy.token_terms(groups)
        return [first._replace(logprob_NL=first_changed([first.logprob_NL], self._own)[0]), *others]

    def guided_terms(self, critic, n, groups):
        first, *others = self._policy.guided_terms(critic, n, groups)
        return [first._replace(forward_kl_NL=first_changed([first.forward_kl_NL], self._own)[0]), *others]


def first_changed(rows, by):
    (one, *others), *groups = rows
    return [torch.stack((one + by, *others)), *groups]


def broken(spec, directory, window, **numbers):
    """A training that has made a step, and goes on with a policy that is broken."""
    training = advance(opened(directory, spec), window, 1)
    going_on = Training(
        Broken(training.policy, **numbers),  # type: ignore[arg-type]
        training.step,
        steps=7,
        learning_rate=spec.learning_rate,
        warmup_steps=spec.warmup_steps,
        max_grad_norm=spec.max_grad_norm,
        seed=5,
    )
    going_on.resume(training.state({}))
    return going_on


def test_every_method_is_here():
    assert {type(spec) for spec in SPECS.values()} == {*get_args(AlgorithmSpec)}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", BOTH_PARTS)
def test_a_log_prob_that_is_no_number_fails_the_job_at_its_step(name, number, tiny_policy, tiny_window):
    training = broken(BOTH_PARTS[name], tiny_policy, tiny_window, own=number)
    with pytest.raises(JobFailed, match=BROKEN):
        advance(training, tiny_window, 2)


@pytest.mark.parametrize("spec", [*BOTH_PARTS.values(), SPECS["token_bond"]], ids=[*BOTH_PARTS, "token_bond, critic"])
def test_so_do_weights_that_are_none(spec, tiny_policy, tiny_window):
    training = advance(opened(tiny_policy, spec), tiny_window, 1)
    with torch.no_grad():
        next(iter(training.policy.trained.values())).fill_(math.nan)
    with pytest.raises(JobFailed, match=BROKEN):
        advance(training, tiny_window, 2)


@pytest.mark.parametrize("name", ["jbond", "iterative_bond"])
def test_so_does_an_anchor_that_says_none(name, tiny_policy, tiny_window):
    training = broken(SPECS[name], tiny_policy, tiny_window, of_anchor=-math.inf)
    with pytest.raises(JobFailed, match=BROKEN):
        advance(training, tiny_window, 2)


def test_a_policy_that_says_numbers_goes_on(tiny_policy, tiny_window):
    for spec in BOTH_PARTS.values():
        assert advance(broken(spec, tiny_policy, tiny_window), tiny_window, 2).done == 2


def test_a_gradient_that_is_no_number_is_told_apart(tiny_policy, tiny_window):
    """A loss and log-probs that are numbers do not save the step."""
    training = advance(opened(tiny_policy, SPECS["bon_forward_kl"]), tiny_window, 1)
    factor = next(factor for name, factor in training.policy.trained.items() if ".lora_B." in name)
    factor.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(JobFailed, match=BROKEN + r"loss [\d.]+, gradient norm (nan|inf)"):
        advance(training, tiny_window, 2)


@pytest.mark.parametrize("method", ["bon_forward_kl", "offline_bond", "token_bond"])
def test_all_ranks_meet_what_one_of_them_sees(method, tmp_path):
    """The second rank's prompt has a token whose embedding is no number; the first rank's has not."""
    model = world.save_tiny_policy(tmp_path / "policy")
    with torch.no_grad():
        model.get_input_embeddings().weight[31] = math.nan
    model.save_pretrained(tmp_path / "policy")
    groups = [
        LoggedGroup(TokenGroup([0, token], [[5, world.END]] * 8), [float(k) for k in range(8)], [-1.0] * 8)
        for token in (7, 31)
    ]
    plan = planned(tmp_path / "policy", tmp_path, method, TrainingSetup())
    with pytest.raises(JobFailed, match=r"^loss_not_finite: step 1: "), crew(2, "cpu") as ranks:  # noqa: PT012
        training = begin(plan, state_of(plan), ranks)
        training.learn_logged(groups)
