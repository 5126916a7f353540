"""OpenAI's own client against `/v1/fine_tuning/jobs`: what it reads, page by page, and how it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
import redis as blocking_redis
from openai.types.fine_tuning import FineTuningJob

from bon_algos.contracts import job_key
from service.dispatch import waiting_list
from tests.fixtures.gateway import World
from tests.fixtures.waiting import wait_until
from tests.service.records import BASE, STUDENT, policy, report
from worker.lease import Lease, claim

METHOD: Any = {"type": "bon_forward_kl", "bon_forward_kl": {"n": 2, "steps": 40}}
ASKED: Any = {"model": "default", "training_file": "ledger:default", "method": METHOD}


@pytest.fixture
def store(world: World) -> Iterator[blocking_redis.Redis]:
    """With four groups in the ledger."""
    for i in range(4):
        assert world.client.post("/generate", {"prompt": f"p{i}", "n": 2}).status == 200
    world.groups(4)
    with blocking_redis.Redis.from_url(world.redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture
def client(world: World, store: blocking_redis.Redis) -> Iterator[openai.OpenAI]:
    host, port = world.client.address
    with openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key=world.client.key, max_retries=0) as opened:
        yield opened


def taken(store: blocking_redis.Redis, job_id: str) -> Lease:
    own = claim(store, job_id, lease_seconds=60, worker="here:1")
    assert not isinstance(own, str)
    return Lease(store, job_id, own, lease_seconds=60, heartbeat_seconds=60)


def own(job: FineTuningJob) -> Any:
    """What OpenAI's type does not name."""
    return job.to_dict()["bonsai"]


def test_a_job_is_created_listed_and_found_again(client: openai.OpenAI):
    made = client.fine_tuning.jobs.create(**ASKED, seed=7, suffix="first-try", metadata={"team": "search"})
    assert (made.object, made.status) == ("fine_tuning.job", "queued")
    assert (made.model, made.training_file) == (BASE, "ledger:default")
    assert (made.seed, made.metadata, made.result_files, made.organization_id) == (7, {"team": "search"}, [], "default")
    assert (made.fine_tuned_model, made.finished_at, made.error, made.trained_tokens) == (None, None, None, None)
    assert made.method is not None
    parameters: Any = made.method.to_dict()["bon_forward_kl"]
    assert parameters["steps"] == 40
    assert client.fine_tuning.jobs.retrieve(made.id) == made
    others = [client.fine_tuning.jobs.create(**ASKED).id for _ in range(2)]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=1)] == [*reversed(others), made.id]


def test_both_names_show_the_very_same_object(world: World, client: openai.OpenAI):
    made = client.fine_tuning.jobs.create(**ASKED, extra_body={"bonsai": {"n": 2, "priority": "high"}})
    seen = world.client.get(f"/distill/{made.id}").json
    assert seen == world.client.get(f"/v1/fine_tuning/jobs/{made.id}").json
    assert (seen["bonsai"]["spec"]["n"], seen["bonsai"]["spec"]["priority"]) == (2, "high")
    posted = world.client.post("/distill", {"method": METHOD, "n": 2, "priority": "high"}).json
    assert {**posted, "id": made.id, "created_at": made.created_at} == seen


def test_openais_hyperparameters_are_the_methods_own(client: openai.OpenAI):
    hyperparameters: Any = {"batch_size": 4, "learning_rate_multiplier": 0.5, "n_epochs": "auto"}
    made = client.fine_tuning.jobs.create(**ASKED, hyperparameters=hyperparameters)
    assert made.hyperparameters.to_dict() == hyperparameters
    assert made.method is not None
    parameters: Any = made.method.to_dict()["bon_forward_kl"]
    assert (parameters["prompts_per_step"], parameters["learning_rate"], parameters["steps"]) == (4, 5e-4, 40)


def test_a_job_is_paused_and_resumed_while_it_waits(client: openai.OpenAI, store: blocking_redis.Redis):
    job_id = client.fine_tuning.jobs.create(**ASKED).id
    queue = waiting_list("normal")
    wait_until(lambda: store.llen(queue) == 1)
    assert str(client.fine_tuning.jobs.pause(job_id).status) == "paused"
    assert claim(store, job_id, lease_seconds=60, worker="here:1") == "paused"
    store.delete(queue)
    assert client.fine_tuning.jobs.resume(job_id).status == "queued"
    wait_until(lambda: store.llen(waiting_list("normal")) == 1)


def test_a_running_job_tells_of_itself_until_it_has_paused(client: openai.OpenAI, store: blocking_redis.Redis):
    job_id = client.fine_tuning.jobs.create(**ASKED).id
    lease = taken(store, job_id)
    lease.progress("training", 20, 40, {"loss": 0.5}, 30.0, trained_tokens=900, sampled_tokens=70)
    lease.tell_checkpoint(20, {"loss": 0.5}, kept=2)
    asked = client.fine_tuning.jobs.pause(job_id)
    assert asked.status == "running"
    seen = own(asked)
    assert (seen["stopping"], seen["step"], seen["steps"], seen["seconds_left"]) == ("pause", 20, 40, 30.0)
    assert seen["tokens"] == {"trained": 900, "sampled": 70}
    assert asked.estimated_finish is not None
    assert asked.estimated_finish >= asked.created_at + 29
    lease.park()
    paused = client.fine_tuning.jobs.retrieve(job_id)
    assert (paused.status, paused.estimated_finish) == ("paused", None)
    [kept] = client.fine_tuning.jobs.checkpoints.list(job_id)
    assert (kept.object, kept.step_number, kept.metrics.train_loss) == ("fine_tuning.job.checkpoint", 20, 0.5)
    assert kept.fine_tuning_job_id == job_id


def test_tokens_and_time_are_those_of_all_attempts(client: openai.OpenAI, store: blocking_redis.Redis):
    job_id = client.fine_tuning.jobs.create(**ASKED).id
    first = taken(store, job_id)
    first.progress("training", 5, 40, {}, None, trained_tokens=100, sampled_tokens=10)
    first.progress("training", 9, 40, {}, None, trained_tokens=200, sampled_tokens=20)
    store.hset(job_key(job_id), "spent_ms", 5000)
    store.hset(job_key(job_id), "lease_until", 1)
    second = taken(store, job_id)
    second.progress("training", 9, 40, {}, None, trained_tokens=50, sampled_tokens=5)
    second.finish_succeeded(policy(STUDENT), report().model_dump_json())
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert (job.status, job.fine_tuned_model, job.trained_tokens) == ("succeeded", STUDENT, 250)
    seen = own(job)
    assert (seen["tokens"]["sampled"], seen["attempts"]) == (25, 2)
    assert 5 <= seen["seconds"] < 60
    [kept] = client.fine_tuning.jobs.checkpoints.list(job_id)
    assert kept.fine_tuned_model_checkpoint == STUDENT


def test_events_are_read_page_by_page(client: openai.OpenAI, store: blocking_redis.Redis):
    job_id = client.fine_tuning.jobs.create(**ASKED).id
    lease = taken(store, job_id)
    lease.progress("training", 20, 40, {"loss": 0.5}, None)
    lease.tell_checkpoint(20, {"loss": 0.5}, kept=2)
    lease.finish_failed("loss_not_finite", "step 21: loss nan")
    events = list(client.fine_tuning.jobs.list_events(job_id, limit=2))
    assert [(event.level, event.type, event.message) for event in events] == [
        ("info", "message", "The job is queued."),
        ("info", "message", "Attempt 1 has begun."),
        ("info", "metrics", "Step 20 is done."),
        ("info", "message", "The state after step 20 is kept."),
        ("error", "message", "The job has failed; its error says why."),
    ]
    assert {event.object for event in events} == {"fine_tuning.job.event"}
    error = client.fine_tuning.jobs.retrieve(job_id).error
    assert error is not None
    assert (error.code, error.message, error.param) == ("loss_not_finite", "step 21: loss nan", None)


def test_what_the_state_forbids_is_a_conflict_that_says_why(client: openai.OpenAI):
    jobs = client.fine_tuning.jobs
    job_id = jobs.create(**ASKED).id

    def refused(ask: Callable[[str], object]) -> str | None:
        with pytest.raises(openai.ConflictError) as conflict:
            ask(job_id)
        return conflict.value.code

    assert refused(jobs.resume) == "not_paused"
    jobs.pause(job_id)
    assert refused(jobs.pause) == "already_paused"
    assert jobs.cancel(job_id).status == "cancelled"
    assert [refused(ask) for ask in (jobs.cancel, jobs.pause, jobs.resume)] == ["job_finished"] * 3


def test_a_job_that_is_being_cancelled_is_not_paused(client: openai.OpenAI, store: blocking_redis.Redis):
    job_id = client.fine_tuning.jobs.create(**ASKED).id
    taken(store, job_id)
    for _ in range(2):  # asked again is no error while its worker is on the way to it
        assert own(client.fine_tuning.jobs.cancel(job_id))["stopping"] == "cancel"
    with pytest.raises(openai.ConflictError, match="being cancelled"):
        client.fine_tuning.jobs.pause(job_id)


def test_a_wish_with_an_idempotency_key_is_granted_again_and_no_other_with_it(client: openai.OpenAI):
    """As a client that lost the reply asks again; without the key a paused job is not paused."""
    job, once = client.fine_tuning.jobs.create(**ASKED), {"Idempotency-Key": "once"}
    jobs = client.fine_tuning.jobs
    assert [jobs.pause(job.id, extra_headers=once).status for _ in range(2)] == ["paused", "paused"]
    assert jobs.resume(job.id).status == "queued"
    assert jobs.pause(job.id, extra_headers=once).status == "queued"
    with pytest.raises(openai.UnprocessableEntityError) as conflict:
        jobs.cancel(job.id, extra_headers=once)
    assert conflict.value.code == "idempotency_conflict"


def test_the_same_idempotency_key_is_the_same_job(client: openai.OpenAI):
    once = {"Idempotency-Key": "once"}
    first = client.fine_tuning.jobs.create(**ASKED, extra_headers=once)
    again = client.fine_tuning.jobs.with_raw_response.create(**ASKED, extra_headers=once)
    assert (again.parse().id, again.headers["idempotent-replayed"]) == (first.id, "true")
    assert again.headers["location"] == f"/v1/fine_tuning/jobs/{first.id}"
    with pytest.raises(openai.UnprocessableEntityError) as conflict:
        client.fine_tuning.jobs.create(**ASKED, seed=1, extra_headers=once)
    assert conflict.value.code == "idempotency_conflict"


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "nowhere"}, 422, "model"),
    ({"model": STUDENT}, 422, "model"),
    ({"model": ""}, 422, "model"),
    ({"training_file": "ledger:nowhere"}, 404, "training_file"),
    ({"training_file": "file:///etc/passwd"}, 422, "training_file"),
    ({"training_file": "ledger:../x"}, 422, "training_file"),
    ({"training_file": "file-abc"}, 422, "training_file"),
    ({"method": {"type": "supervised"}}, 422, "method.type"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {}}}}, 422, "method.dpo.hyperparameters"),
    ({"validation_file": "file-abc"}, 422, "validation_file"),
    ({"integrations": [{"type": "wandb"}]}, 422, "integrations"),
    ({"hyperparameters": {"n_epochs": 3}}, 422, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"batch_size": 1}}, 422, "bon_forward_kl.prompts_per_step"),
    ({"hyperparameters": {"learning_rate_multiplier": -1}}, 422, "bon_forward_kl.learning_rate"),
    (
        {
            "method": {"type": "bon_sft", "bon_sft": {"prompts_per_step": 4}},
            "hyperparameters": {"batch_size": 4},
        },
        422,
        "hyperparameters.batch_size",
    ),
    *(({"bonsai": {"priority": priority}}, 422, "bonsai.priority") for priority in ("urgent", 10**6, None)),
    ({"bonsai": {"n": 65}}, 422, "n"),
    ({"bonsai": {"dry": True}}, 422, "bonsai.dry"),
    *(({"suffix": suffix}, 422, "suffix") for suffix in ("", "a\nb", "a\x1bb", "../p", "x" * 65, "é", 1)),
    ({"metadata": {f"k{i}": "v" for i in range(17)}}, 422, "metadata"),
    ({"metadata": {"k": "v" * 513}}, 422, "metadata.k"),
    ({"metadata": {"k": 1}}, 422, "metadata.k"),
    ({"metadata": "k=v"}, 422, "metadata"),
    *(({"seed": seed}, 422, "seed") for seed in (-1, 2**64, "7", 1.5)),
    ({"tenant": "other"}, 422, "tenant"),
    ({"status": "succeeded"}, 422, "status"),
]


@pytest.mark.parametrize(("changes", "status", "param"), BAD, ids=[f"{i}-{param}" for i, (*_, param) in enumerate(BAD)])
def test_a_bad_field_is_named(still_world: World, changes: dict[str, Any], status: int, param: str):
    reply = still_world.client.post("/v1/fine_tuning/jobs", {**ASKED, **changes})
    assert (reply.status, reply.json["error"]["param"]) == (status, param), reply.body


def test_a_bad_page_or_cursor_is_named(client: openai.OpenAI, world: World):
    job_id = client.fine_tuning.jobs.create(**ASKED).id
    jobs, job = "/v1/fine_tuning/jobs", f"/v1/fine_tuning/jobs/{job_id}"
    for path, param in (
        *((f"{where}?limit={limit}", "limit") for where in (jobs, f"{job}/events") for limit in (0, -1, 10**9)),
        (f"{jobs}?after=job_x", "after"),
        (f"{jobs}?metadata[k]=v", "(unprintable name)"),
        *((f"{job}/events?after={after}", "after") for after in ("x", "-1-1", f"{'9' * 19}-0", "1-1%0a")),
        (f"{job}/checkpoints?after=x", "after"),
        (f"{job}?limit=1", "limit"),
    ):
        reply = world.client.get(path)
        assert (reply.status, reply.json["error"]["param"]) == (422, param), (path, reply.body)
    for ask in (client.fine_tuning.jobs.retrieve, client.fine_tuning.jobs.pause, client.fine_tuning.jobs.list_events):
        with pytest.raises(openai.NotFoundError) as absent:
            ask("job_" + "0" * 32)
        assert absent.value.code == "job_not_found"
