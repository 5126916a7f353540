"""A job that learns from an uploaded file."""

import hashlib
import json

import pytest

from bon_algos.contracts import (
    FeedbackFilter,
    FileRecord,
    feedback_key,
    files_key,
    job_key,
)
from tests.archive.records import feedback
from tests.worker import world
from tests.worker.distilled import (
    JOB,
    manifest_of,
)
from tests.worker.stub_engine import save_tokenizer
from worker import dataset
from worker.errors import JobFailed
from worker.evaluate import samples_needed
from worker.job_process import read_tokenizer

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize(("chosen", "logged"), [("all", 8), ("by feedback", 0), ("any law", 0)])
def test_only_draws_of_the_references_law_count_beside_its_fresh_ones(job, client, tiny_groups, upload, chosen, logged):
    for group in tiny_groups:
        said = feedback(group, value=1.0)
        client.hset(feedback_key(group.id), said.question, said.model_dump_json())
    rows = [row_of(group, policy="base", sampling={"temperature": 0.5}) for group in tiny_groups]
    attempt = {
        "all": lambda: job(),
        "by feedback": lambda: job(feedback=FeedbackFilter(at_least=0.5)),
        "any law": lambda: job("dpo", training_file=upload(rows)),
    }[chosen]()
    window = attempt.freeze()
    judged = attempt.evaluate(attempt.open_training(window).policy, window).judged
    assert {pool.num_groups for pool in window.held_out} == {1}
    assert {row.order_reference.size for row in judged} == {samples_needed(attempt.spec.n) + logged}


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
