"""The chunks of one stream are of one completion."""

from __future__ import annotations

from typing import cast

from service.access import GATEWAY
from service.best_of_n import Budget
from service.openai_bodies import Presentation
from service.openai_replies import CompletionShape, Part
from service.serving import Prepared, Serving
from service.strategies import Fixed
from tests.service.records import group


def test_a_chunk_after_a_wait_says_the_same_second_as_the_chunks_before_it():
    """OpenAI: each chunk of a stream has the same `created`. The group is made anew when its turn has come."""
    asked = group([(None, 1)]).model_copy(update={"created_at": 1000.9})
    answered = asked.model_copy(update={"created_at": 1001.1})
    budget = Budget(started=0.0, deadline=1.0, scoring_starts=0.5, quorum=1)
    prepared = Prepared(asked, budget, GATEWAY, (), Fixed())
    # Without log-probs nothing of the service is asked for a chunk.
    shape = CompletionShape(cast(Serving, None), prepared, Presentation(choices=1, logprobs=False, alternatives=0))
    chunks = [shape.chunk(0, Part("a", (), (), None), one, is_first=True) for one in (asked, answered)]
    assert [chunk["created"] for chunk in chunks] == [1000, 1000]
