"""A turn of iterated BOND: a job whose reference is the policy that it starts from, on groups that this one drew."""

import pytest
import torch

from bon_algos.contracts import Fingerprint, job_key
from tests.worker import world
from tests.worker.distilled import FORWARD, JOB, answered_by, manifest_of
from worker.errors import JobFailed

pytestmark = pytest.mark.slow

STANDING_STILL = FORWARD | {"steps": 1, "learning_rate": 1e-9}


@pytest.fixture
def parent(job, client, tmp_path, tiny_policy, reward_directory):
    """A published policy, and a ledger with groups that it drew beside those of the base."""
    job(parameters=FORWARD).run()
    policy_id = client.hget(job_key(JOB), "policy_id").decode()
    (home,) = (tmp_path / "policies").iterdir()
    world.deliver(client, *answered_by(policy_id, home, tiny_policy, reward_directory, n=8))
    return policy_id


def turn(job, parent):
    """A job that begins at its parent, and stays there."""
    return job("bon_forward_kl", STANDING_STILL, job_id="job_2", training={"start_from": parent, "reference": "start"})


def test_it_learns_from_its_parents_draws_alone_and_is_compared_to_it(job, client, tmp_path, parent):
    turn(job, parent).run()
    manifest = manifest_of(client, "job_2")
    assert manifest.parent_policy_id == parent
    assert manifest.data is not None
    assert manifest.data.rejected == {"other_policy": 24}
    report, before = manifest.report, manifest_of(client, JOB).report
    assert report is not None
    assert before is not None
    assert before.kl_policy_base is None
    assert report.kl_policy_base is not None
    assert report.kl_policy_reference.low <= 0.0 <= report.kl_policy_reference.high
    drift, drift_before = report.kl_policy_base, before.kl_policy_reference
    assert drift.low < drift_before.high
    assert drift_before.low < drift.high
    assert drift.low > report.kl_policy_reference.high
    # What an engine shows that does not apply the adapter is the base, not the parent: the fingerprint tells them apart
    written = tmp_path / "policies" / manifest.digest / "fingerprint.json"
    found = Fingerprint.model_validate_json(written.read_text())
    own, base = (
        torch.cat([torch.tensor(row) for row in rows]) for rows in (found.policy_logprobs, found.base_logprobs)
    )
    assert (own - base).abs().mean() > 0.01


def test_methods_that_interpolate_or_draw_take_a_turn(job, client, parent):
    for number, method in enumerate(("offline_bond", "jbond"), start=2):
        child = f"job_{number}"
        job(method, job_id=child, training={"start_from": parent, "reference": "start"}).run()
        report = manifest_of(client, child).report
        assert report is not None
        assert report.kl_policy_base is not None


def test_without_draws_of_its_parent_there_is_nothing_to_learn(job, client):
    job(parameters=FORWARD).run()
    parent = client.hget(job_key(JOB), "policy_id").decode()
    with pytest.raises(JobFailed) as failed:
        job(job_id="job_2", training={"start_from": parent, "reference": "start"}).run()
    assert failed.value.code == "empty_window"
