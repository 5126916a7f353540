"""What a stack's retention keeps whatever its age, wherever that is known from."""

from __future__ import annotations

import pytest
import redis

from archive.fence import ALONE
from archive.reading import Question
from archive.retention import Retention
from archive.writing import write_batch
from bon_algos.contracts import CandidateGroup, feedback_key
from tests.archive.records import archive_at, entries, feedback, group
from worker.retaining import Retaining


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url) as connection:
        yield connection


@pytest.mark.parametrize(
    ("keep", "left"), [(("feedback",), ["0 1", "0 2", ""]), (("pinned",), ["", "", ""])], ids=["feedback", "pinned"]
)
def test_a_row_is_kept_for_feedback_in_the_archive_and_for_feedback_in_redis(client, tmp_path, keep, left):
    """Of a Redis that was lost since, only the archive tells what was said before."""
    archive = archive_at(tmp_path)
    write_batch(archive, entries(group(1), group(2), group(3), feedback(group(1))))
    client.hset(feedback_key(group(2).id), "quality", "{}")
    Retaining(client, archive, tmp_path, Retention(text=1, keep=keep)).carry_out(ALONE)
    records = [one.record for one in archive.records(Question(("groups",)))]
    assert [one.prompt for one in records if isinstance(one, CandidateGroup)][::-1] == left
