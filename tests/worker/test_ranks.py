"""Two processes that train together end where one does. Real processes, sums over gloo, a tiny model; what a GPU would
do over NCCL is the `gpu` test's."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from bon_algos.contracts import JobSpec, Method, TrainingSetup
from bon_algos.logprobs import TokenGroup
from tests.worker import world
from tests.worker.test_checkpoint import advance, granted
from worker import checkpoint
from worker.crew import crew
from worker.opening import TrainingPlan, begin, state_of
from worker.passes import Plan
from worker.ranks import ALONE, Ranks

pytestmark = pytest.mark.slow

STEPS = 5
COMMON = {"steps": STEPS, "prompts_per_step": 4, "lora_rank": 8, "learning_rate": 1e-2, "warmup_steps": 2}
OWN: dict[str, dict[str, float]] = {
    "bon_forward_kl": {"n": 8},
    "bon_sft": {"n": 8},
    "bonbon_consistent": {"n": 8},
    "offline_bond": {"n": 8, "averaged_steps": 3, "interpolation": 0.9},
    "token_bond": {"n": 8, "averaged_steps": 2, "learning_rate": 3e-3},
    "jbond": {"anchor_rate": 0.3},
    "vbon": {"n": 8},
}
MOST = {"token_bond": 3e-3}
"""How far apart weights may end, where it is more than 1e-4: Muon makes as much of a gradient's least directions as of
its greatest, in bfloat16, and with them of sums that were added up in another order."""
METHODS = {name: Method.model_validate({"type": name, name: COMMON | own}) for name, own in OWN.items()}
LEAN = TrainingSetup(accumulation=2, gradient_checkpointing=True)
FULL = TrainingSetup(weights="full")
LEAN_FULL = TrainingSetup(weights="full", accumulation=2, gradient_checkpointing=True)


def planned(directory, job_directory, method, setup, **fields):
    spec = JobSpec(method=METHODS[method], training=setup, n=8, seed=3)
    return plan_of(spec, directory, job_directory, **fields)


def plan_of(spec, directory, job_directory, *, parallelism="data", resumed_step=None, device="cpu"):
    return TrainingPlan(
        spec=spec,
        policy_directory=directory,
        base_policy_id=world.BASE,
        parent_directory=None,
        device_type=device,
        threads=1,
        parallelism=parallelism,
        job_directory=job_directory,
        resumed_step=resumed_step,
    )


@pytest.fixture(scope="module")
def pair():
    """This process and another, which train whatever is begun."""
    with crew(2, "cpu") as ranks:
        yield ranks


def opened(plan, ranks=ALONE):
    return begin(plan, state_of(plan), ranks)


def finished(plan, window, ranks=ALONE, until=STEPS):
    training = advance(opened(plan, ranks), window, until)
    training.finish()
    return training


def assert_same(training, other, most=1e-4):
    assert_close(training.policy.factors, other.policy.factors, most)


def assert_close(factors, others, most=1e-4):
    assert factors.keys() == others.keys()
    for name, factor in others.items():
        torch.testing.assert_close(factors[name], factor, rtol=0, atol=most)


def moved(training):
    return max(float(parameter.detach().abs().max()) for parameter in training.policy.trained.values())


@pytest.mark.parametrize(
    ("method", "setup"),
    [
        ("bon_forward_kl", LEAN),
        ("bonbon_consistent", TrainingSetup()),
        ("offline_bond", TrainingSetup()),
        ("token_bond", LEAN),
        ("jbond", LEAN),
        ("vbon", TrainingSetup()),
    ],
)
def test_data_is_divided_and_the_step_is_the_same(method, setup, tiny_policy, tiny_window, tmp_path, pair):
    alone = finished(planned(tiny_policy, tmp_path, method, TrainingSetup()), tiny_window)
    both = finished(planned(tiny_policy, tmp_path, method, setup), tiny_window, pair)
    assert_same(both, alone, MOST.get(method, 1e-4))
    assert moved(alone) > 1e-2


@pytest.mark.parametrize(
    ("method", "setup"), [("offline_bond", FULL), ("token_bond", FULL), ("bon_sft", LEAN_FULL), ("vbon", LEAN)]
)
def test_weights_are_spread_and_the_step_is_the_same(method, setup, tiny_policy, tiny_window, tmp_path, pair):
    plain = TrainingSetup(weights=setup.weights)
    alone = finished(planned(tiny_policy, tmp_path, method, plain), tiny_window)
    groups = [TokenGroup(pool.prompt_ids, [pool.candidates[0].token_ids]) for pool in tiny_window.held_out]
    both = finished(planned(tiny_policy, tmp_path, method, setup, parallelism="fsdp"), tiny_window, pair)
    with pair.tells("factors"):
        spread = both.policy.factors
    assert_close(spread, alone.policy.factors, MOST.get(method, 1e-4))
    for whose in ("policy", "reference", "base"):
        torch.testing.assert_close(
            torch.tensor([rows[0][0] for rows in both.policy.token_logprobs(groups, of=whose)]),
            torch.tensor([rows[0][0] for rows in alone.policy.token_logprobs(groups, of=whose)]),
            rtol=0,
            atol=MOST.get(method, 1e-4),
        )


def test_full_weights_that_are_spread_draw_what_they_would_alone(tiny_policy, tiny_window, tmp_path, pair):
    """Of draws with the same seed nearly all: rounding may turn one."""
    prompts = [[0, 2], [0, 3, 4, 5]]
    policies = [
        opened(planned(tiny_policy, tmp_path, "bon_sft", FULL, parallelism=how), ranks).policy
        for how, ranks in (("data", ALONE), ("fsdp", pair))
    ]
    alone, spread = ([row for rows in one.sampled(prompts, 20, 6, seed=0) for row in rows] for one in policies)
    assert sum(own == other for own, other in zip(alone, spread, strict=True)) >= 38
    assert len({tuple(row) for row in alone}) > 30


def test_a_head_that_is_the_embeddings_is_spread_with_nothing(tiny_policy, tiny_window, tmp_path, pair):
    config = LlamaConfig.from_pretrained(tiny_policy, tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    alone = finished(planned(tmp_path / "tied", tmp_path, "bon_sft", FULL), tiny_window)
    both = finished(planned(tmp_path / "tied", tmp_path, "bon_sft", FULL, parallelism="fsdp"), tiny_window, pair)
    with pair.tells("factors"):
        assert_close(both.policy.factors, alone.policy.factors)


@pytest.mark.parametrize("first", ["alone", "spread"])
def test_a_state_is_taken_up_by_however_many(first, tiny_policy, tiny_window, tmp_path, pair):
    """One process saves and two go on, or two save and one goes on."""
    setup, method = FULL, "offline_bond"
    alone = finished(planned(tiny_policy, tmp_path, method, setup), tiny_window)
    if first == "alone":
        early = advance(opened(planned(tiny_policy, tmp_path, method, setup)), tiny_window, 3)
        checkpoint.save(tmp_path / "1-aa", early.state({}), granted)
        plan = planned(tiny_policy, tmp_path, method, setup, parallelism="fsdp", resumed_step=3)
        late = finished(plan, tiny_window, pair)
    else:
        plan = planned(tiny_policy, tmp_path, method, setup, parallelism="fsdp")
        checkpoint.save(tmp_path / "1-aa", advance(opened(plan, pair), tiny_window, 3).state({}), granted)
        late = finished(planned(tiny_policy, tmp_path, method, setup, resumed_step=3), tiny_window)
    with late.policy.ranks.tells("factors"):
        factors = late.policy.factors
    assert_close(factors, alone.policy.factors)


def test_the_exported_model_is_the_same_file_format_from_one_process_and_from_two(
    tiny_policy, tiny_window, tmp_path, pair
):
    finished(planned(tiny_policy, tmp_path, "bon_sft", FULL), tiny_window).policy.save(tmp_path / "one", tiny_policy)
    plan = planned(tiny_policy, tmp_path, "bon_sft", FULL, parallelism="fsdp")
    finished(plan, tiny_window, pair).policy.save(tmp_path / "two", tiny_policy)
    one, two = ({path.name: path for path in (tmp_path / label).iterdir()} for label in ("one", "two"))
    assert one.keys() == two.keys()
    assert (one["config.json"].read_bytes()) == two["config.json"].read_bytes()
    assert_close(load_file(two["model.safetensors"]), load_file(one["model.safetensors"]))


def test_a_step_in_micro_batches_is_the_step(tiny_policy, tiny_window, tmp_path):
    for method in METHODS:
        whole = finished(planned(tiny_policy, tmp_path, method, TrainingSetup()), tiny_window, until=1)
        for setup in (LEAN, TrainingSetup(accumulation=64)):
            parts = finished(planned(tiny_policy, tmp_path, method, setup), tiny_window, until=1)
            assert_same(parts, whole, most=1e-5)


def test_layers_computed_again_change_no_bit(tiny_policy, tiny_window, tmp_path):
    setup = TrainingSetup(gradient_checkpointing=True)
    for method in METHODS:
        kept = finished(planned(tiny_policy, tmp_path, method, TrainingSetup()), tiny_window, until=2)
        assert_same(finished(planned(tiny_policy, tmp_path, method, setup), tiny_window, until=2), kept, most=0)


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_bfloat16_learns_the_same_to_its_precision_and_keeps_what_trains_in_float32(
    weights, tiny_policy, tiny_window, tmp_path
):
    def trained(precision):
        setup = TrainingSetup(weights=weights, precision=precision)
        return finished(planned(tiny_policy, tmp_path, "bon_forward_kl", setup), tiny_window)

    exact, rounded = trained("float32"), trained("bfloat16")
    assert {parameter.dtype for parameter in rounded.policy.trained.values()} == {torch.float32}
    groups = [pool.logged_group.tokens for pool in tiny_window.train]
    own, other, before = (
        torch.cat(list(rows))
        for rows in (
            exact.policy.logprobs_wearing({}, groups),
            rounded.policy.logprobs_wearing({}, groups),
            exact.policy.reference_logprobs(groups),
        )
    )
    assert 0 < float((own - other).abs().mean()) < 0.1 * float((own - before).abs().mean())


def test_ranks_share_all_groups_and_make_equally_many_passes():
    groups = [TokenGroup([0] * 5, [[1] * length] * 3) for length in (1, 9, 2, 40, 3, 3, 8)]
    for size in (1, 2, 3, 8):
        plans = [Plan(Ranks(rank, size), accumulation=2, rows_tokens=60) for rank in range(size)]
        passes = [plan.passes(groups) for plan in plans]
        assert len({len(own) for own in passes}) == 1
        parts = [part for own in passes for part, share in own if share]
        assert [group for part in parts for group in groups[part]] == groups
        assert sum(share for own in passes for _, share in own) == pytest.approx(1)


@pytest.mark.gpu
@pytest.mark.parametrize("parallelism", ["data", "fsdp"])
def test_two_gpus_train_together(parallelism, tiny_policy, tiny_window, tmp_path):
    """Over NCCL; on a CPU: `test_data_is_divided_and_the_step_is_the_same`, `test_weights_are_spread_…`."""
    setup = TrainingSetup(precision="float32")
    alone = finished(planned(tiny_policy, tmp_path, "bon_sft", setup, device="cuda"), tiny_window)
    with crew(2, "cuda") as ranks:
        plan = planned(tiny_policy, tmp_path, "bon_sft", setup, device="cuda", parallelism=parallelism)
        assert_same(finished(plan, tiny_window, ranks), alone, most=1e-3)
