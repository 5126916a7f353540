"""The same spec, data and seed are the same adapter to the last bit, for every method that learns from logged
candidates alone; methods that sample agree only as well as two seeds do, since an engine draws what it draws."""

import pytest

from bon_algos.algorithms import make_step
from bon_algos.contracts import METHOD_NAMES, OFFLINE_METHODS, JobSpec, Method
from bon_algos.steps import LoggedStep, OfflineBondStep, TokenBondStep
from tests.worker.test_ranks import finished, plan_of
from worker.durable import sha256_file

SMALL = {"steps": 2, "prompts_per_step": 3, "n": 4, "lora_rank": 1, "learning_rate": 1e-2}


def test_offline_methods_are_those_whose_steps_need_no_engine():
    steps = {name: make_step(Method(type=name).algorithm) for name in METHOD_NAMES}
    offline = LoggedStep | OfflineBondStep | TokenBondStep
    assert set(OFFLINE_METHODS) == {name for name, step in steps.items() if isinstance(step, offline)}


@pytest.mark.parametrize("method", OFFLINE_METHODS)
def test_the_same_spec_data_and_seed_are_the_same_bytes(method, tiny_policy, tiny_window, tmp_path):
    def digest(name, seed):
        spec = JobSpec(method=Method(type=method, **{method: SMALL}), n=4, seed=seed)
        finished(plan_of(spec, tiny_policy, tmp_path), tiny_window, until=2).policy.save_adapter(tmp_path / name)
        return sha256_file(tmp_path / name / "adapter_model.safetensors")

    first = digest("first", seed=3)
    assert digest("again", seed=3) == first
    assert digest("other", seed=4) != first
