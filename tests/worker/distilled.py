"""A job that is claimed and ready to run: real Redis, real training of a tiny model, an engine over HTTP in which
faults can be planted.

Owns: the fixtures `client` and `job`, and what is asked of what a job left. Does not own: what happens to it.
"""

import pytest
import redis
import torch

from archive.reading import Archive
from bon_algos.contracts import (
    REPORT_FILES,
    JobSpec,
    Method,
    PolicyRecord,
    PolicyReport,
    TrainingSetup,
    Window,
    job_key,
    policy_key,
    report_digest,
)
from bon_algos.scoring import open_readers
from tests.worker import world
from worker.distillation import Distillation
from worker.durable import sha256_file
from worker.engine import Engines
from worker.job_process import read_tokenizer
from worker.lease import Lease, claim
from worker.models import open_policy
from worker.workplace import Workplace

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
        feedback=None,
        tenant="default",
        training_file=None,
        training=None,
    ):
        given = parameters or OWN_PARAMETERS.get(method, FORWARD)
        spec = JobSpec(
            method=Method(type=method, **{method: given}),
            training=TrainingSetup(**(training or {})),
            window=Window(policies=policies, feedback=feedback),
            training_file=training_file,
            n=8,
            held_out_fraction=0.3,
            seed=4,
        )
        if not client.exists(job_key(job_id)):
            client.hset(job_key(job_id), mapping={"state": "queued", "epoch": 0, "attempts": 0})
        own = claim(client, job_id, lease_seconds=lease_seconds, worker="here:1")
        assert not isinstance(own, str)
        lease = Lease(client, job_id, own, lease_seconds=lease_seconds, heartbeat_seconds=60)
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


def answered_by(policy_id, home, tiny_policy, reward_directory, *, n=4, shift=0.0):
    """A group of n of a published policy's own draws for each prompt of the window."""
    policy = open_policy(
        tiny_policy, world.BASE, rank=8, alpha=32.0, train_factor_a=True, seed=0, device=torch.device("cpu")
    )
    policy.load_adapter(home)
    digest = read_tokenizer(reward_directory).template_digest
    groups = world.sampled_groups(policy.model, num_prompts=24, n=n, seed=1)
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
