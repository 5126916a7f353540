"""A job from its window to its policy, and what must not happen on the way. Real Redis, real training of a tiny
model, an engine over HTTP in which faults can be planted."""

import hashlib
import json
import time
from dataclasses import replace
from functools import partial

import pytest
import redis
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from archive.reading import Archive
from bon_algos.contracts import (
    METHOD_NAMES,
    REPORT_FILES,
    WEIGHING_METHODS,
    FileRecord,
    Fingerprint,
    JobSpec,
    Manifest,
    Method,
    PolicyRecord,
    PolicyReport,
    TrainingSetup,
    Window,
    adapter_digest,
    files_key,
    job_checkpoints_key,
    job_key,
    policy_key,
    report_digest,
)
from bon_algos.importance import effective_sample_size
from bon_algos.logprobs import sequence_logprobs
from bon_algos.scoring import Completion, open_readers
from tests.worker import world
from tests.worker.stub_engine import save_tokenizer
from worker import checkpoint, dataset
from worker.distillation import Distillation
from worker.durable import sha256_file
from worker.engine import Engines
from worker.errors import EngineUnavailable, JobCancelled, JobFailed, JobParked, LeaseLost
from worker.evaluate import fingerprint
from worker.job_process import read_tokenizer
from worker.lease import Lease, claim
from worker.models import open_policy
from worker.publish import publish
from worker.workplace import Workplace

pytestmark = pytest.mark.slow

JOB = "job_1"
FORWARD = {"steps": 6, "prompts_per_step": 4, "n": 8, "lora_rank": 8, "learning_rate": 1e-2}
SMALL = {"prompts_per_step": 3, "lora_rank": 8, "learning_rate": 1e-2}
BOND = SMALL | {"steps": 4, "imitation_steps": 1, "samples_per_prompt": 4}
JBOND = SMALL | {"steps": 3, "anchor_rate": 0.2}
ITERATIVE_BOND = SMALL | {"steps": 3, "anchor_steps": 2}
VBON = SMALL | {"steps": 3, "n": 8}
RLOO = SMALL | {"steps": 3}


OWN_PARAMETERS = {"bond": BOND, "jbond": JBOND, "iterative_bond": ITERATIVE_BOND, "vbon": VBON, "rloo": RLOO}


@pytest.fixture
def client(redis_url, tiny_groups, reward_directory):
    digest = read_tokenizer(reward_directory).template_digest
    with redis.Redis.from_url(redis_url) as connection:
        world.deliver(
            connection, *(group.model_copy(update={"reward_template_digest": digest}) for group in tiny_groups)
        )
        yield connection


@pytest.fixture
def job(client, engine, tiny_policy, reward_directory, tmp_path):
    """job(method, …) -> a claimed attempt, ready to run."""
    opened = []

    def attempt(
        method="bon_forward_kl",
        parameters=None,
        *,
        patience=5.0,
        lease_seconds=60.0,
        every=2,
        job_id=JOB,
        policies=(),
        tenant="default",
        training_file=None,
        training=None,
    ):
        given = parameters or OWN_PARAMETERS.get(method, FORWARD)
        spec = JobSpec(
            method=Method(type=method, **{method: given}),
            training=TrainingSetup(**(training or {})),
            window=Window(policies=policies),
            training_file=training_file,
            n=8,
            held_out_fraction=0.3,
            seed=4,
        )
        if not client.exists(job_key(job_id)):
            client.hset(job_key(job_id), mapping={"state": "queued", "epoch": 0, "attempts": 0})
        epoch = claim(client, job_id, lease_seconds=lease_seconds, worker="here:1")
        assert isinstance(epoch, int)
        lease = Lease(client, job_id, epoch, lease_seconds=lease_seconds, heartbeat_seconds=60)
        config = world.reward_model(engine.url, reward_directory)
        readers = open_readers(config, lambda member: read_tokenizer(member.directory))
        engines = Engines(engine.url, config, readers, lease.check)
        opened.append(engines.__enter__())
        place = Workplace(
            client=client,
            engines=engines,
            judge=None,
            artefacts=tmp_path,
            policy_directory=tiny_policy,
            base_policy_id=world.BASE,
            device=torch.device("cpu"),
            torch_threads=1,
            checkpoint_steps=every,
            checkpoint_seconds=60.0,
            engine_patience_seconds=patience,
            archive=Archive.at(str(tmp_path / "ledger")),
        )
        return Distillation(spec, lease, place, tenant)

    yield attempt
    for engines in opened:
        engines.__exit__(None, None, None)


def state(client):
    return client.hget(job_key(JOB), "state").decode()


def published(tmp_path):
    return sorted(path.name for path in (tmp_path / "policies").glob("*")) if (tmp_path / "policies").exists() else []


def report_of(manifest, artefacts):
    """The record that the manifest names, whose files are what it says."""
    home = artefacts / "reports" / report_digest(manifest.report_files)
    assert manifest.report_files == {path.name: sha256_file(path) for path in home.iterdir()}
    assert set(manifest.report_files) == set(REPORT_FILES)
    return PolicyReport.model_validate_json((home / "report.json").read_text())


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


def test_a_regression_on_learned_quantiles_needs_no_group_of_n(job, client):
    """Best-of-40 is aimed at, from groups of fewer candidates."""
    job("bon_regression", FORWARD | {"n": 40, "quantiles": "learned"}).run()
    assert state(client) == "succeeded"


def answered_by(policy_id, home, tiny_policy, reward_directory, *, shift=0.0):
    """A group of four of a published policy's own draws for each prompt of the window."""
    policy = open_policy(
        tiny_policy, world.BASE, rank=8, alpha=32.0, train_factor_a=True, seed=0, device=torch.device("cpu")
    )
    policy.load_adapter(home)
    digest = read_tokenizer(reward_directory).template_digest
    groups = world.sampled_groups(policy.model, num_prompts=24, n=4, seed=1)
    for group in groups:
        drawn = [
            one.model_copy(update={"logprobs": tuple(logprob + shift for logprob in one.logprobs)})
            for one in group.candidates
        ]
        own = {"id": f"student-{group.id}", "policy_id": policy_id, "reward_template_digest": digest}
        yield group.model_copy(update={**own, "candidates": tuple(drawn)})


def manifest_of(client, job_id):
    record = client.hget(policy_key(client.hget(job_key(job_id), "policy_id").decode()), "record")
    return PolicyRecord.model_validate_json(record).manifest


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


# --- files -----------------------------------------------------------------------------------------------


@pytest.fixture
def upload(client, tmp_path, tiny_policy):
    """upload(rows) -> the id of a file of them, as the gateway keeps one."""
    save_tokenizer(tiny_policy)

    def kept(rows, **changes):
        content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        digest = hashlib.sha256(content).hexdigest()
        record = FileRecord(
            id=f"file-{digest[:32]}", filename="f", bytes=len(content), created_at=1.0, digest=digest,
            stored_as=f"{digest}-00000000", format="jsonl", status="processed", rows=len(rows),
            has_rewards="rewards" in rows[0], longest_completion=world.MAX_TOKENS, window=64,
            policy_template_digest=read_tokenizer(tiny_policy).template_digest,
        ).model_copy(update=changes)  # fmt: skip
        (tmp_path / record.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / record.path).write_bytes(content)
        client.hset(files_key(), record.id, record.model_dump_json())
        return record.id

    return kept


def row_of(group, *, tells_logprobs=True, **members):
    """A group of the ledger as a line of a file."""
    completions = [
        {"text": one.text, "token_ids": one.token_ids, "finish_reason": one.finish_reason}
        | ({"logprobs": one.logprobs} if tells_logprobs else {})
        for one in group.candidates
    ]
    rewards = {"rewards": [one.reward for one in group.candidates]}
    return {"prompt_token_ids": group.prompt_token_ids, "completions": completions, **rewards, **members}


def test_a_file_of_the_ledgers_groups_teaches_what_the_ledger_does(job, client, tiny_groups, upload):
    """The very same adapter, and so the same policy: nothing of a group is lost on the way through a file."""
    job().run()
    file = upload([row_of(group, policy="base") for group in tiny_groups])
    attempt = job(job_id="job_2", training_file=file)
    attempt.run()
    assert client.hget(job_key("job_2"), "policy_id") == client.hget(job_key(JOB), "policy_id")
    assert dataset.read(attempt.directory / "window").data.training_file == file


def test_log_probs_that_a_file_does_not_tell_are_the_references(job, tiny_groups, upload):
    told = [row_of(group, policy="base") for group in tiny_groups]
    untold = [row_of(group, policy="base", tells_logprobs=False) for group in tiny_groups]
    pools = []
    for number, rows in enumerate((told, untold)):
        attempt = job("dpo", job_id=f"job_{number}", training_file=upload(rows))
        window = attempt.freeze()
        pools.append(attempt.weighed(attempt.open_training(window).policy, window).train)
    for own, computed in zip(*pools, strict=True):
        assert own.reference_logprobs is None
        assert computed.reference_logprobs == pytest.approx(own.logged_group.reference_logprobs, abs=1e-4)


@pytest.mark.parametrize(("method", "is_able"), [("bon_sft", True), ("dpo", True), ("rloo", True), ("bond", False)])
def test_completions_of_nobody_known_teach_some_methods(job, client, tiny_groups, upload, method, is_able):
    """Texts alone, and the reward model says what they are worth."""
    rows = [
        {"prompt": f"w0 w{2 + i}", "completions": [f"w{2 + (i + k) % 29} w{3 + k} w4 w5 w6" for k in range(8)]}
        for i in range(24)
    ]
    attempt = job(method, training_file=upload(rows))
    if not is_able:
        with pytest.raises(JobFailed, match=r"empty_window.*'other_policy': 24"):
            attempt.run()
        return
    attempt.run()
    data = manifest_of(client, JOB).data
    assert (data.groups, data.rejected) == (24, {})
    window = dataset.read(attempt.directory / "window")
    assert all(len(set(pool.logged_group.rewards)) > 1 for pool in window.train)
    assert window.train[0].candidates[0].token_ids[-1] == world.END


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"status": "error"}, "file_unusable"),
        ({"policy_template_digest": "another"}, "file_of_another_policy"),
        ({"digest": "0" * 64}, "file_damaged"),
        ({"stored_as": "0" * 64 + "-00000001", "tenant": "gone"}, "file_not_found"),
    ],
)
def test_a_file_that_is_not_what_was_checked_fails_the_job(job, client, tiny_groups, upload, changes, code):
    file = upload([row_of(group, policy="base") for group in tiny_groups])
    record = FileRecord.model_validate_json(client.hget(files_key(), file))
    client.hset(files_key(), file, record.model_copy(update=changes).model_dump_json())
    with pytest.raises(JobFailed) as failed:
        job(training_file=file).run()
    assert failed.value.code == code


def test_a_file_that_was_deleted_fails_the_job(job):
    with pytest.raises(JobFailed, match="file_not_found"):
        job(training_file="file-" + "0" * 32).run()


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


def test_full_weights_are_published_as_a_model_that_transformers_opens(job, client, engine, tmp_path, tiny_window):
    """Nobody draws from them, and their log-probs are the trainer's."""
    attempt = job("bon_sft", FORWARD, training={"weights": "full"})
    window = attempt.freeze()
    training = attempt.open_training(window)
    attempt.train(training, window)
    engine.is_away = True
    attempt.conclude(training.policy, window)
    assert state(client) == "succeeded"
    assert client.hget(job_key(JOB), "report") == b""
    manifest = manifest_of(client, JOB)
    home = tmp_path / "policies" / manifest.digest
    assert (manifest.kind, manifest.report, manifest.lora_rank) == ("full", None, 0)
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


def test_nothing_of_a_job_stays_in_the_engine_and_no_name_is_used_twice(job, client, engine):
    engine.adapters[f"{JOB}-0-dead-3"] = engine._base  # what an attempt that was killed left behind
    engine.adapters["job_11-0-over-3"] = engine._base  # and what is left of a job that others ended
    client.hset(job_key("job_11"), "state", "cancelled")
    engine.adapters["job_12-0-alive-3"] = engine._base
    job("jbond").run()
    assert set(engine.adapters) == {"job_12-0-alive-3"}
    assert len(engine.names_ever) == len(set(engine.names_ever)) >= 2 * JBOND["steps"]


def test_rollouts_wait_behind_users(job, engine):
    job("jbond").run()
    assert {body["priority"] for body in engine.requests} == {10}


def test_j_bond_asks_for_one_policy_sample_and_two_of_the_anchor_per_prompt(job, engine):
    job("jbond").run()
    training = [body["n"] for body in engine.requests if body["n"] < 8]
    assert sorted(training) == [1] * 9 + [2] * 9  # 3 steps of 3 prompts


def test_iterative_bond_asks_for_as_many_anchor_samples_as_its_spec_says(job, engine):
    job("iterative_bond", ITERATIVE_BOND | {"anchor_samples": 5}).run()
    training = [body["n"] for body in engine.requests if body["n"] < 8]
    assert sorted(training) == [1] * 9 + [5] * 9  # 3 steps of 3 prompts


def test_bond_asks_for_samples_of_the_policy_alone_since_the_ledger_has_the_references(job, engine):
    job("bond").run()
    training = [body for body in engine.requests if body["n"] < 8]
    assert [body["n"] for body in training] == [4] * 9  # 3 steps of 3 prompts, after one that imitates alone
    assert all(body["model"].startswith(JOB) for body in training)
    assert len({body["model"] for body in training}) == 3  # the policy of each step


def test_bond_steps_wait_for_an_engine_that_is_away_between_two_of_them(job, client, engine):
    attempt = job("bond", patience=30.0)
    learn = attempt.progress.step

    def away_after_the_second(step, metrics):
        learn(step, metrics)
        engine.away_for = 4 if step == 2 else engine.away_for

    attempt.progress.step = away_after_the_second
    attempt.run()
    assert state(client) == "succeeded"


def test_a_bond_job_that_is_cancelled_while_samples_are_drawn_leaves_nothing_in_the_engine(job, client, engine):
    attempt = job("bond")
    learn = attempt.progress.step

    def cancelled_at_the_second(step, metrics):
        learn(step, metrics)
        if step == 2:
            raise JobCancelled

    attempt.progress.step = cancelled_at_the_second
    with pytest.raises(JobCancelled):
        attempt.run()
    assert engine.adapters == {}


def test_a_job_whose_rank_the_engine_was_not_started_for_fails_at_once(job, engine):
    """As after a restart with a smaller largest rank, while the job was waiting."""
    engine.largest_rank = 4
    with pytest.raises(JobFailed, match=r"engine_refused.*max_lora_rank 4"):
        job("bond", patience=600.0).run()


def test_an_engine_that_serves_the_base_under_the_policys_name_is_found_out(job, client, engine, tmp_path):
    engine.ignores_adapters = True
    with pytest.raises(JobFailed, match="served_policy_differs"):
        job().run()
    assert published(tmp_path) == []


def test_a_trainer_with_other_weights_than_the_engine_refuses_to_train(job, tmp_path, tiny_policy):
    attempt = job()
    other = tmp_path / "other"
    world.save_tiny_policy(other, seed=99)
    attempt.workplace = Workplace(**{**vars(attempt.workplace), "policy_directory": other})
    with pytest.raises(JobFailed, match="train_serve_mismatch"):
        attempt.run()


def test_a_fenced_attempt_writes_no_state_and_publishes_nothing(job, client, tmp_path):
    old = job(every=1)
    window = old.freeze()
    training = old.open_training(window)
    client.hset(job_key(JOB), "lease_until", 1)
    new = job(every=1)
    with pytest.raises(LeaseLost):
        old.train(training, window)
    assert list(old.attempt.glob("step-*")) == []
    new.run()
    assert (state(client), len(published(tmp_path))) == ("succeeded", 1)


def test_an_attempt_fenced_just_before_its_end_does_not_end_the_job(job, client):
    old = job()
    window = old.freeze()
    training = old.open_training(window)
    old.train(training, window)
    evidence = old.evaluate(training.policy, window)
    client.hset(job_key(JOB), "lease_until", 1)
    new = job()
    with pytest.raises(LeaseLost):
        old.publish(training.policy, window, evidence)
    assert state(client) == "running"
    new.run()
    assert state(client) == "succeeded"


def test_the_next_attempt_adopts_what_was_renamed_but_not_registered(job, client, tmp_path):
    """A crash between rename and registration: the same weights come out again, under the same name, and the
    directory that is there is the policy's."""
    old = job()
    window = old.freeze()
    training = old.open_training(window)
    old.train(training, window)
    evidence = old.evaluate(training.policy, window)
    adapter = old.attempt / "adapter"
    training.policy.save_adapter(adapter)
    publish(
        tmp_path,
        adapter,
        fingerprint(training.policy, window.held_out),
        partial(old.manifest, window, evidence, training.policy.rank),
        old.lease.confirm,
    )
    (orphan,) = published(tmp_path)
    client.hset(job_key(JOB), "lease_until", 1)
    job().run()
    assert published(tmp_path) == [orphan]
    assert client.hget(job_key(JOB), "policy_id").decode() == f"pol-{orphan[:16]}"


def test_a_second_attempt_goes_on_where_the_first_left_off_and_ends_in_the_same_policy(job, client, tmp_path):
    whole = job()
    whole.run()
    (expected,) = published(tmp_path)
    client.delete(job_key(JOB))
    first = job(every=2)
    window = first.freeze()
    training = first.open_training(window)
    first.spec = first.spec.model_copy(
        update={"method": Method(type="bon_forward_kl", bon_forward_kl={**FORWARD, "steps": 4})}
    )
    first.train(training, window)  # stops after 4 of 6 steps, as if killed there
    client.hset(job_key(JOB), "lease_until", 1)
    second = job()
    resumed = second.open_training(second.freeze())
    assert resumed.done == 4
    second.run()
    assert published(tmp_path) == [expected]


def test_cancellation_is_honoured_within_one_step(job, client):
    attempt = job(every=100)
    window = attempt.freeze()
    training = attempt.open_training(window)
    client.hset(job_key(JOB), "cancel", 1)
    with pytest.raises(JobCancelled):
        attempt.train(training, window)
    assert training.done <= 1


def test_a_paused_job_keeps_the_state_of_its_last_step_and_goes_on_to_the_same_policy(job, client, tmp_path):
    """Paused between two states: the step that was under way is the last, and it is kept."""
    job().run()
    (expected,) = published(tmp_path)
    client.delete(job_key(JOB), job_checkpoints_key(JOB))
    first = job(every=100)
    learn = first.progress.step

    def asked_at_the_third(step, metrics):
        if step == 3:
            client.hset(job_key(JOB), "pause", 1)
            first.lease.beat()
        learn(step, metrics)

    first.progress.step = asked_at_the_third
    with pytest.raises(JobParked):
        first.run()
    first.lease.park()
    kept = checkpoint.newest(first.directory)
    assert kept is not None
    assert (state(client), kept.step) == ("paused", 3)
    assert [*client.hgetall(job_checkpoints_key(JOB))] == [b"3"]
    client.hset(job_key(JOB), "state", "queued")
    second = job()
    second.run()
    assert published(tmp_path) == [expected]
    assert client.hget(job_key(JOB), "attempts") == b"2"
    assert int(client.hget(job_key(JOB), "trained_tokens")) > second.tokens_trained > 0


def test_a_job_that_is_paused_while_samples_are_drawn_leaves_nothing_in_the_engine(job, client, engine):
    attempt = job("bond")
    learn = attempt.progress.step

    def asked_at_the_second(step, metrics):
        if step == 2:
            client.hset(job_key(JOB), "pause", 1)
            attempt.lease.beat()
        learn(step, metrics)

    attempt.progress.step = asked_at_the_second
    with pytest.raises(JobParked):
        attempt.run()
    assert engine.adapters == {}
    kept = checkpoint.newest(attempt.directory)
    assert kept is not None
    assert kept.step == 2


def test_a_job_that_pauses_before_its_report_trains_no_step_again(job, client):
    first = job()
    window = first.freeze()
    training = first.open_training(window)
    first.train(training, window)
    client.hset(job_key(JOB), "pause", 1)
    with pytest.raises(JobParked):
        first.evaluate(training.policy, window)
    first.lease.park()
    client.hset(job_key(JOB), "state", "queued")
    second = job()
    second.run()
    assert (state(client), second.tokens_trained) == ("succeeded", 0)


def test_training_on_the_ledger_needs_no_engine_but_the_report_does(job, client, engine):
    attempt = job(patience=0.1)
    engine.is_away = True
    with pytest.raises(EngineUnavailable):
        attempt.run()
    kept = checkpoint.newest(attempt.directory)
    assert kept is not None
    assert kept.step == FORWARD["steps"]
    assert state(client) == "running"


def test_a_job_waits_for_an_engine_that_comes_back(job, engine):
    attempt = job("jbond", patience=30.0)
    window = attempt.freeze()
    training = attempt.open_training(window)
    engine.away_for = 3
    attempt.train(training, window)
    assert engine.away_for < 0
    assert training.done == JBOND["steps"]


def test_what_the_engine_takes_too_long_for_is_given_up_when_the_job_must_stop(engine, reward_directory):
    """A call under way is aborted by the lease: a fenced job does not hold the engine until it answers."""

    def lost():
        raise LeaseLost("fenced")

    config = world.reward_model(engine.url, reward_directory)
    readers = open_readers(config, lambda member: read_tokenizer(member.directory))
    with Engines(engine.url, config, readers, lost) as engines:
        started = time.monotonic()
        with pytest.raises(LeaseLost):
            engines.score([Completion("w1", None, "w2")] * 4)
        assert time.monotonic() - started < 5
