"""A job from its window to its policy: what it makes, of what, and how that is proved."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bon_algos.contracts import (
    METHOD_NAMES,
    WEIGHING_METHODS,
    CountedQuantiles,
    Fingerprint,
    LearnedQuantiles,
    Manifest,
    PolicyRecord,
    adapter_digest,
    job_key,
    policy_key,
)
from bon_algos.importance import effective_sample_size
from bon_algos.logprobs import sequence_logprobs
from tests.worker import world
from tests.worker.distilled import (
    FORWARD,
    JOB,
    OWN_PARAMETERS,
    VBON,
    answered_by,
    manifest_of,
    published,
    report_of,
    state,
)
from tests.worker.stub_engine import save_tokenizer
from worker import checkpoint
from worker.durable import sha256_file
from worker.errors import JobFailed

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_job_ends_with_a_candidate_whose_files_prove_what_it_is(job, client, engine, tmp_path, method):
    attempt = job(method)
    attempt.run()
    assert state(client) == "succeeded"
    policy_id = client.hget(job_key(JOB), "policy_id").decode()
    record = PolicyRecord.model_validate_json(client.hget(policy_key(policy_id), "record"))
    home = tmp_path / record.directory
    manifest = Manifest.model_validate_json((home / "manifest.json").read_text())
    assert record.manifest == manifest
    assert (record.state, record.n_equivalent) == ("candidate", 8)
    assert manifest.files == {name: sha256_file(home / name) for name in manifest.files}
    assert adapter_digest(manifest.files) == manifest.digest == home.name
    assert manifest.policy_id == policy_id == f"pol-{home.name[:16]}"
    assert (manifest.job_id, manifest.epoch, manifest.spec) == (JOB, 1, attempt.spec)
    assert manifest.data is not None
    assert manifest.report is not None
    assert manifest.data.groups == 24
    assert manifest.report is not None
    assert manifest.report.prompts == manifest.data.held_out_groups
    whole = report_of(manifest, tmp_path)
    assert (whole.policy_id, whole.win_rate_reference) == (policy_id, manifest.report.win_rate)
    assert (whole.held_out.ancestors, whole.held_out.seen_in_training) == ((), 0)
    assert whole.held_out.trained_prompts > 10
    assert checkpoint.newest(attempt.directory) is None  # an ended job keeps no states


@pytest.mark.parametrize("quantiles", get_args(CountedQuantiles))
def test_a_regression_learns_by_every_way_to_count_quantiles(job, client, quantiles):
    job("bon_regression", FORWARD | {"quantiles": quantiles, "steps": 20}).run()
    manifest = manifest_of(client, JOB)
    assert manifest.spec.method.spec.quantiles == quantiles
    assert manifest.report.win_rate.mean > 0.5


@pytest.mark.parametrize("quantiles", get_args(LearnedQuantiles))
def test_a_regression_on_learned_quantiles_needs_no_group_of_n(job, client, quantiles):
    """Best-of-40 is aimed at, from groups of fewer candidates."""
    job("bon_regression", FORWARD | {"n": 40, "quantiles": quantiles, "steps": 20}).run()
    manifest = manifest_of(client, JOB)
    assert manifest.spec.method.spec.quantiles == quantiles
    assert manifest.report.win_rate.mean > 0.5


def test_a_law_and_a_head_learn_other_quantiles(job):
    told = []
    for name in get_args(LearnedQuantiles):
        attempt = job("bon_regression", FORWARD | {"n": 2, "quantiles": name}, job_id=name)
        window = attempt.freeze()
        learned = attempt.with_quantiles(attempt.open_training(window).policy, window)
        told.append([pool.log_quantiles for pool in learned.train])
    law, head = told
    assert all(law)
    assert all(head)
    assert law != head


@pytest.mark.parametrize(
    ("method", "quantiles"),
    [("bond", "monte_carlo"), ("bond", "harmonic"), ("vbon", "mid_rank"), ("vbon", "add_one")],
)
def test_fresh_samples_are_ranked_by_the_estimator_that_is_asked_for(job, client, method, quantiles):
    job(method, OWN_PARAMETERS[method] | {"quantiles": quantiles}).run()
    assert state(client) == "succeeded"
    assert manifest_of(client, JOB).spec.method.spec.quantiles == quantiles


@pytest.mark.parametrize("asked", [{"likelihood": "exact"}, {"gradient": "reinforce"}], ids=["exact", "reinforce"])
def test_vbon_is_trained_by_its_exact_likelihood_and_by_reinforce(job, client, asked):
    attempt = job("vbon", VBON | asked)
    attempt.run()
    assert state(client) == "succeeded"
    assert manifest_of(client, JOB).spec.method.spec.model_dump(include=asked.keys()) == asked


@pytest.mark.parametrize("method", WEIGHING_METHODS)
def test_a_published_policys_groups_are_learned_from_where_they_are_wanted(
    job, client, tmp_path, tiny_policy, reward_directory, method
):
    job(parameters=FORWARD | {"steps": 3}).run()
    student = client.hget(job_key(JOB), "policy_id").decode()
    (home,) = (tmp_path / "policies").iterdir()
    world.deliver(client, *answered_by(student, home, tiny_policy, reward_directory))
    job(method, job_id="job_2").run()
    attempt = job(method, job_id="job_3", policies=(student,))
    window = attempt.freeze()
    attempt.run()
    alone, both = manifest_of(client, "job_2"), manifest_of(client, "job_3")
    assert (alone.data.rejected, alone.data.groups) == ({"other_policy": 24}, 24)
    assert (both.data.rejected, both.data.groups) == ({}, 48)
    assert alone.digest != both.digest
    mixed = attempt.weighed(attempt.open_training(window).policy, window).train
    assert all(sum(pool.shares) == pytest.approx(1) for pool in mixed)
    # The student was trained from the reference for a moment: a draw of either is worth nearly one.
    assert all(8 < effective_sample_size(pool.shares) <= 12 for pool in mixed)


def test_groups_that_are_not_the_named_policys_are_found_out(job, client, tmp_path, tiny_policy, reward_directory):
    job().run()
    student = client.hget(job_key(JOB), "policy_id").decode()
    (home,) = (tmp_path / "policies").iterdir()
    world.deliver(client, *answered_by(student, home, tiny_policy, reward_directory, shift=0.1))
    with pytest.raises(JobFailed, match=f"{student} differ from its files' by 1.00e-01") as failed:
        job(job_id="job_2", policies=(student,)).run()
    assert failed.value.code == "train_serve_mismatch"


def test_a_finished_policy_is_taken_back_towards_its_reference(job, client, tmp_path):
    """LITI: what the adapter adds is a share of what it was, its report and proof are its own, its parent is known."""
    job().run()
    parent = client.hget(job_key(JOB), "policy_id").decode()
    whole = load_file(next((tmp_path / "policies").iterdir()) / "adapter_model.safetensors")
    job("interpolation", {"policy": parent, "share": 0.25}, job_id="job_2").run()
    child = client.hget(job_key("job_2"), "policy_id").decode()
    record = PolicyRecord.model_validate_json(client.hget(policy_key(child), "record"))
    assert record.manifest is not None
    assert (record.manifest.parent_policy_id, record.manifest.steps) == (parent, 0)
    held_out = report_of(record.manifest, tmp_path).held_out
    assert (held_out.ancestors, held_out.seen_in_training) == ((parent,), 0)
    part = load_file(tmp_path / record.directory / "adapter_model.safetensors")
    for name, factor in whole.items():
        torch.testing.assert_close(part[name], factor * (0.25 if ".lora_B." in name else 1.0), rtol=0, atol=0)


def test_a_tenants_job_learns_from_its_own_and_what_it_makes_is_its_own(job, client, tmp_path, tiny_groups):
    too_early = job(tenant="acme")
    with pytest.raises(JobFailed) as failed:
        too_early.run()
    assert failed.value.code == "empty_window"
    ours = {"tenant": "acme", "reward_template_digest": too_early.workplace.engines.reward_template_digest}
    world.deliver(client, *(group.model_copy(update={"id": f"ours-{group.id}", **ours}) for group in tiny_groups))
    job(job_id="job_2", tenant="acme").run()
    made = client.hget(job_key("job_2"), "policy_id").decode()
    record = PolicyRecord.model_validate_json(client.hget(policy_key(made), "record"))
    assert record.manifest is not None
    assert (record.tenant, record.manifest.tenant) == ("acme", "acme")
    assert record.manifest.data is not None
    assert record.manifest.data.groups == len(tiny_groups)
    with pytest.raises(JobFailed, match="no distilled policy"):
        job("interpolation", {"policy": made, "share": 0.25}, job_id="job_3").run()


def test_a_published_policy_is_trained_further_and_known_as_the_parent(job, client, tmp_path):
    """It begins as the parent, bit for bit, and the base is its reference still."""
    job().run()
    parent = client.hget(job_key(JOB), "policy_id").decode()
    home = next((tmp_path / "policies").iterdir())
    child = job("bon_sft", FORWARD, job_id="job_2", training={"start_from": parent})
    window = child.freeze()
    begun = child.open_training(window).policy
    for name, factor in load_file(home / "adapter_model.safetensors").items():
        torch.testing.assert_close(begun.factors[name.replace(".weight", ".default.weight")], factor, rtol=0, atol=0)
    groups = [pool.logged_group for pool in window.train]
    reference = torch.cat(begun.reference_logprobs([group.tokens for group in groups]))
    logged = torch.tensor([logprob for group in groups for logprob in group.reference_logprobs])
    torch.testing.assert_close(reference, logged, rtol=0, atol=1e-3)
    child.run()
    manifest = manifest_of(client, "job_2")
    assert (manifest.parent_policy_id, manifest.base_policy_id) == (parent, world.BASE)


@pytest.mark.parametrize(
    ("asked", "said"), [({"lora_alpha": 16}, "asks for 8 and 16"), ({"lora_rank": 16}, "16 and 32")]
)
def test_an_adapter_of_another_shape_is_not_trained_further(job, client, asked, said):
    job().run()
    parent = client.hget(job_key(JOB), "policy_id").decode()
    with pytest.raises(JobFailed, match=f"{said}.*give the method the policy's"):
        job(parameters=FORWARD | asked, job_id="job_2", training={"start_from": parent}).run()


def test_full_weights_are_published_as_a_model_that_transformers_opens(
    job, client, engine, tmp_path, tiny_policy, tiny_window
):
    """They draw for themselves: no engine is asked for anything but the reference. Their report is like any."""
    save_tokenizer(tiny_policy)
    attempt = job("bon_sft", FORWARD, training={"weights": "full"})
    window = attempt.freeze()
    training = attempt.open_training(window)
    attempt.train(training, window)
    attempt.conclude(training.policy, window)
    assert state(client) == "succeeded"
    assert {request["model"] for request in engine.requests} == {world.BASE}
    manifest = manifest_of(client, JOB)
    home = tmp_path / "policies" / manifest.digest
    assert (manifest.kind, manifest.lora_rank) == ("full", 0)
    whole = report_of(manifest, tmp_path)
    assert (whole.kind, whole.policy_id) == ("full", manifest.policy_id)
    assert whole.reward.policy == manifest.report.reward_policy != manifest.report.reward_reference
    assert whole.kl_policy_reference.mean > 0.01
    assert manifest.files == {path.name: sha256_file(path) for path in home.iterdir() if path.name != "manifest.json"}
    assert {"config.json", "model.safetensors"} <= manifest.files.keys()
    groups = [pool.logged_group.tokens for pool in tiny_window.held_out]
    with torch.no_grad():
        exported = sequence_logprobs(AutoModelForCausalLM.from_pretrained(home).eval(), groups)
        own = training.policy.logprobs(groups)
        assert max(float((a - b).abs().max()) for a, b in zip(exported, own, strict=True)) < 1e-5
        reference = training.policy.reference_logprobs(groups)
        assert max(float((a - b).abs().max()) for a, b in zip(exported, reference, strict=True)) > 1e-2
    child = job("interpolation", {"policy": manifest.policy_id, "share": 0.5}, job_id="job_2")
    with pytest.raises(JobFailed, match="full weights, which are for export"):
        child.run()


def test_what_was_trained_in_bfloat16_is_judged_and_proven_as_the_engine_serves_it(job, client):
    setup = {"precision": "bfloat16", "gradient_checkpointing": True, "accumulation": 2}
    job("bond", training=setup).run()
    assert state(client) == "succeeded"


@pytest.mark.parametrize(("method", "parallelism"), [("bon_forward_kl", "data"), ("vbon", "fsdp")])
def test_a_job_of_two_processes_ends_as_one_of_one(job, client, tmp_path, method, parallelism):
    """What samples of the engine settle is not compared."""
    job(method).run()
    (alone,) = published(tmp_path)
    attempt = job(method, job_id="job_2")
    attempt.workplace = replace(attempt.workplace, processes=2, parallelism=parallelism)
    attempt.run()
    one, two = (
        load_file(tmp_path / "policies" / digest / "adapter_model.safetensors")
        for digest in (alone, manifest_of(client, "job_2").digest)
    )
    assert one.keys() == two.keys()
    if method == "bon_forward_kl":
        for name, factor in one.items():
            torch.testing.assert_close(two[name], factor, rtol=0, atol=1e-4)


def test_only_a_published_policy_with_its_own_files_is_interpolated(job, client, tmp_path):
    with pytest.raises(JobFailed, match="no distilled policy"):
        job("interpolation", {"policy": "pol-" + "0" * 16}, job_id="job_2").run()
    job().run()
    parent = client.hget(job_key(JOB), "policy_id").decode()
    config = next((tmp_path / "policies").iterdir()) / "adapter_config.json"
    config.write_text(config.read_text().replace("32.0", "64.0"))
    with pytest.raises(JobFailed, match="not the file of its manifest"):
        job("interpolation", {"policy": parent}, job_id="job_3").run()


def test_the_fingerprint_holds_the_policys_and_the_bases_logprobs(job, tmp_path):
    job().run()
    (home,) = (tmp_path / "policies").iterdir()
    fingerprint = Fingerprint.model_validate_json((home / "fingerprint.json").read_text())
    tokens = sum(map(len, fingerprint.completion_token_ids))
    assert tokens >= 256
    assert [len(row) for row in fingerprint.policy_logprobs] == [len(row) for row in fingerprint.completion_token_ids]
    distance = sum(
        abs(own - base)
        for own_row, base_row in zip(fingerprint.policy_logprobs, fingerprint.base_logprobs, strict=True)
        for own, base in zip(own_row, base_row, strict=True)
    )
    assert distance / tokens > 1e-2
