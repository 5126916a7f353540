"""A state is whole or it is not there; a torn one is passed over; who goes on from one makes the same steps."""

import shutil
from functools import partial

import pytest
import torch

from bon_algos.algorithms import make_step
from bon_algos.contracts import (
    BonbonConsistentSpec,
    BonbonSpec,
    BondSpec,
    BonForwardKlSpec,
    BonRegressionSpec,
    BonSftSpec,
    DpoSpec,
    IpoSpec,
    IterativeBondSpec,
    JBondSpec,
    OfflineBondSpec,
    RlooSpec,
    TokenBondSpec,
    VbonSpec,
)
from bon_algos.steps import BondStep, FreshGroup, OnPolicyStep, RankedGroup, SampledStep
from tests.worker import world
from worker import checkpoint
from worker.checkpoint import TrainingState
from worker.errors import LeaseLost
from worker.models import open_policy
from worker.train import Training, batch_of

STEPS = 7
SPECS = {
    "bon_forward_kl": BonForwardKlSpec(n=8, lora_rank=8, learning_rate=1e-2, warmup_steps=3),
    "bon_regression": BonRegressionSpec(n=8, lora_rank=8, learning_rate=3e-3, warmup_steps=3, huber_delta=2.0),
    "offline_bond": OfflineBondSpec(n=8, lora_rank=8, learning_rate=1e-2, warmup_steps=3, averaged_steps=4),
    "token_bond": TokenBondSpec(
        n=8, steps=STEPS, critic_share=0.4, lora_rank=8, learning_rate=1e-2, warmup_steps=2, averaged_steps=2
    ),
    "bond": BondSpec(n=8, lora_rank=8, learning_rate=1e-2, warmup_steps=3, imitation_steps=3),
    "jbond": JBondSpec(lora_rank=8, learning_rate=1e-2, warmup_steps=3, anchor_rate=0.3),
    "iterative_bond": IterativeBondSpec(
        lora_rank=8, learning_rate=1e-2, warmup_steps=3, anchor_samples=2, anchor_steps=3
    ),
    "vbon": VbonSpec(n=8, lora_rank=8, learning_rate=1e-2, warmup_steps=3),
    "rloo": RlooSpec(lora_rank=8, learning_rate=1e-2, warmup_steps=3),
    "bonbon": BonbonSpec(n=8, lora_rank=8, learning_rate=1e-2, warmup_steps=3),
    "bonbon_consistent": BonbonConsistentSpec(n=8, lora_rank=8, learning_rate=1e-2, warmup_steps=3),
    "bon_sft": BonSftSpec(n=8, lora_rank=8, learning_rate=1e-2, warmup_steps=3),
    "dpo": DpoSpec(n=8, lora_rank=8, learning_rate=1e-2, warmup_steps=3),
    "ipo": IpoSpec(n=8, lora_rank=8, learning_rate=1e-2, warmup_steps=3),
}


def state(step, value=1.0):
    return TrainingState(step, {"weight": torch.full((3,), value)}, {"metrics": {"loss": 0.5}})


def granted():
    """The lease is held."""


def lost():
    raise LeaseLost("another attempt holds it")


def resumable(job_directory):
    """The state a later attempt would go on from; there is one."""
    found = checkpoint.newest(job_directory)
    assert found is not None
    return found


def test_the_newest_state_of_any_attempt_is_taken_up(tmp_path):
    checkpoint.save(tmp_path / "1-aa", state(20), granted)
    checkpoint.save(tmp_path / "1-aa", state(40), granted)
    checkpoint.save(tmp_path / "2-bb", state(60, value=6.0), granted)
    newest = resumable(tmp_path)
    assert (newest.step, newest.tensors["weight"][0], newest.numbers) == (60, 6.0, {"metrics": {"loss": 0.5}})


def test_a_job_that_never_saved_begins_at_the_beginning(tmp_path):
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_torn_state_is_passed_over_for_the_one_before(tmp_path, file, damage):
    for step in (20, 40):
        checkpoint.save(tmp_path / "1-aa", state(step), granted)
    path = tmp_path / "1-aa" / "step-00000040" / file
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:middle])
    else:
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert resumable(tmp_path).step == 20


def test_a_state_whose_numbers_were_changed_is_passed_over(tmp_path):
    """Still good JSON beside good tensors: only the digest of the numbers tells."""
    for step in (20, 40):
        checkpoint.save(tmp_path / "1-aa", state(step), granted)
    path = tmp_path / "1-aa" / "step-00000040" / "state.json"
    path.write_text(path.read_text().replace('"step": 40', '"step": 41'))
    assert resumable(tmp_path).step == 20


def test_a_state_whose_rename_never_happened_does_not_exist(tmp_path):
    checkpoint.save(tmp_path / "1-aa", state(20), granted)
    shutil.copytree(tmp_path / "1-aa" / "step-00000020", tmp_path / "1-aa" / ".step-00000040.9f")
    assert resumable(tmp_path).step == 20


def test_an_attempt_that_lost_its_lease_while_it_wrote_leaves_nothing(tmp_path):
    with pytest.raises(LeaseLost):
        checkpoint.save(tmp_path / "1-aa", state(20), lost)
    assert not list((tmp_path / "1-aa").iterdir())


def test_the_one_before_is_kept_and_no_more(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path / "1-aa", state(step), granted)
    assert [path.name for path in sorted((tmp_path / "1-aa").iterdir())] == ["step-00000003", "step-00000004"]


# --- going on --------------------------------------------------------------------------------------------


def opened(directory, spec, steps=STEPS):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    step = make_step(spec)
    policy = open_policy(
        directory,
        world.BASE,
        rank=spec.lora_rank,
        alpha=spec.lora_alpha,
        train_factor_a=not isinstance(step, OnPolicyStep),
        seed=3,
        device=torch.device("cpu"),
    )
    return Training(
        policy,
        step,
        steps=steps,
        learning_rate=spec.learning_rate,
        warmup_steps=spec.warmup_steps,
        max_grad_norm=spec.max_grad_norm,
        seed=5,
    )


def fresh(pool):
    """A group as the engine would give it, but the same one every time."""
    (first, second, third, *_), (rank, *ranks) = pool.candidates, pool.logged_group.rewards
    return FreshGroup(pool.prompt_ids, first.token_ids, rank, [second.token_ids, third.token_ids], ranks[:2])


def ranked(pool):
    first, second, *_ = pool.candidates
    return RankedGroup(
        pool.logged_group,
        [first.token_ids, second.token_ids],
        pool.logged_group.rewards[:2],
        [sum(first.token_logprobs), sum(second.token_logprobs)],
        [first.reward, None],
    )


def advance(training, window, until):
    while training.done < until:
        batch = batch_of(window.train, training.done, size=4, seed=5)
        if training.logged_step is not None:
            training.learn_logged([pool.logged_group for pool in batch])
        elif isinstance(training.step, BondStep | SampledStep):
            training.learn_ranked([ranked(pool) for pool in batch])
        else:
            training.learn_fresh([fresh(pool) for pool in batch])
    return training


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("interrupted_at", [1, 4])
def test_a_run_that_was_interrupted_ends_with_the_same_bytes(name, interrupted_at, tiny_policy, tiny_window, tmp_path):
    """Weights, optimiser, anchor and place in the data come back: the steps after are the steps that would have
    been. On-policy methods too, given the same samples."""
    spec = SPECS[name]
    whole = advance(opened(tiny_policy, spec), tiny_window, STEPS)
    first = advance(opened(tiny_policy, spec), tiny_window, interrupted_at)
    checkpoint.save(tmp_path / "1-aa", first.state({}), granted)
    second = opened(tiny_policy, spec)
    second.resume(resumable(tmp_path))
    advance(second, tiny_window, STEPS)
    for label, training in (("whole", whole), ("second", second)):
        training.finish()
        training.policy.save_adapter(tmp_path / label)
    whole_bytes, second_bytes = (
        (tmp_path / label / "adapter_model.safetensors").read_bytes() for label in ("whole", "second")
    )
    assert whole_bytes == second_bytes
    assert second.done == STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (BondSpec(imitation_steps=2, averaged_steps=2), [5, 6]),
        (BondSpec(imitation_steps=2, averaged_steps=40), [3, 4, 5, 6]),  # none of its imitation
        (OfflineBondSpec(n=8, averaged_steps=3, interpolation=1), [4, 5, 6]),
        (OfflineBondSpec(n=8, averaged_steps=40, interpolation=1), [1, 2, 3, 4, 5, 6]),
        (TokenBondSpec(n=8, steps=6, critic_share=0.5, averaged_steps=2, interpolation=1), [5, 6]),
        # None of its critic's.
        (TokenBondSpec(n=8, steps=6, critic_share=0.5, averaged_steps=40, interpolation=1), [4, 5, 6]),
    ],
)
def test_the_policy_is_the_mean_of_its_last_steps(spec, expected, tiny_policy, tiny_window):
    training = opened(tiny_policy, spec, steps=6)
    weights = {}
    for step in range(1, 7):
        weights[step] = advance(training, tiny_window, step).policy.factors
    training.finish()
    for name, factor in training.policy.factors.items():
        mean = torch.stack([weights[step][name] for step in expected]).mean(dim=0)
        torch.testing.assert_close(factor, mean)


@pytest.mark.slow
@pytest.mark.parametrize("method", [OfflineBondSpec, partial(TokenBondSpec, critic_share=0.5)])
def test_a_policy_goes_back_some_of_the_way_to_its_reference(method, tiny_policy, tiny_window):
    training = opened(tiny_policy, method(n=8, steps=3, averaged_steps=1, interpolation=0.25), steps=3)
    advance(training, tiny_window, 3)
    before = changes(training.policy)
    training.finish()
    for name, change in changes(training.policy).items():
        torch.testing.assert_close(change, 0.25 * before[name])


def changes(policy):
    """B·A of every layer: what the adapter adds to its weight, up to a constant."""
    factors = policy.factors
    return {
        name: factor @ factors[name.replace(".lora_B.", ".lora_A.")]
        for name, factor in factors.items()
        if ".lora_B." in name
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bon_forward_kl", "bon_regression"])
def test_steps_bring_the_loss_of_the_whole_window_down(name, tiny_policy, tiny_window):
    training = opened(tiny_policy, SPECS[name], steps=20)
    groups = [pool.logged_group for pool in tiny_window.train]
    chosen = [training.step.choose(group, 0.5) for group in groups]

    def loss():
        return float(training.step.loss(chosen, lambda tokens: training.policy.logprobs_wearing({}, tokens)).loss)

    before = loss()
    for _ in range(20):
        training.learn_logged(groups)
    assert loss() < 0.95 * before


@pytest.mark.slow
def test_parts_of_a_batch_give_the_gradient_of_the_whole(tiny_policy, tiny_window):
    """The mean over prompts does not know how the batch was cut to fit."""
    groups = [pool.logged_group for pool in tiny_window.train[:5]]
    norms = []
    for budget in (10_000, 100):
        training = opened(tiny_policy, SPECS["bon_regression"])
        norms.append(training.learn_logged(groups, rows_tokens=budget)["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


# --- the order of prompts --------------------------------------------------------------------------------


def test_every_prompt_comes_once_in_a_round():
    items = list(range(12))
    for round_number in range(3):
        seen = [item for step in range(3) for item in batch_of(items, 3 * round_number + step, size=4, seed=1)]
        assert sorted(seen) == items


def test_rounds_differ_and_seeds_differ():
    items = list(range(12))
    first, second = batch_of(items, 0, size=12, seed=1), batch_of(items, 1, size=12, seed=1)
    assert first != second
    assert batch_of(items, 0, size=12, seed=2) != first
