"""Sample, score, choose: every small world is enumerated, the clock is the event loop's own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import product

import pytest

from bon_algos.contracts import Candidate, CandidateGroup
from bon_algos.scoring import Score
from service.best_of_n import Answer, Budget, best_of_n, candidate_counts, choose
from service.errors import DeadlineExceeded, EngineBroken, InvalidField, RewardModelUnavailable
from tests.service.records import group

WHOLE = Candidate(text="ab", token_ids=(1, 2), logprobs=(-1.0, -2.0), finish_reason="stop", reward=1.0)
STATES = {
    "whole": WHOLE,
    "cut": WHOLE.model_copy(update={"finish_reason": "length", "reward": 2.0}),
    "empty": WHOLE.model_copy(update={"text": " ", "reward": None, "failure": "empty"}),
    "not finite": WHOLE.model_copy(update={"reward": None, "failure": "reward_not_finite"}),
    "late": WHOLE.model_copy(update={"finish_reason": None, "reward": None, "failure": "deadline"}),
}


def of(states: Sequence[str]) -> CandidateGroup:
    candidates = tuple(STATES[state] for state in states)
    return group([(None, 1)] * len(states), selected=None).model_copy(update={"candidates": candidates})


@pytest.mark.parametrize("quorum", [1, 2, 3])
def test_every_group_of_three(quorum):
    """5^3 groups: who wins, and what it is called."""
    for states in product(STATES, repeat=3):
        answer = choose(of(states), quorum)
        scored = [i for i, state in enumerate(states) if state in ("whole", "cut")]
        whole = [i for i in scored if states[i] == "whole"]
        if len(scored) >= (quorum if "late" in states else 1):
            assert answer.failure is None
            # All whole ones have one reward and all cut ones another: the earliest wins.
            assert answer.group.selected == (whole or scored)[0]
            expected = "deadline" if "late" in states else "ok" if len(scored) == 3 else "partial"
            assert answer.group.status == expected
        else:
            assert answer.group.selected is None
            assert isinstance(answer.failure, EngineBroken)
            assert answer.group.status == "reward_failed"


def test_a_reward_that_is_too_long_to_score_is_the_callers_affair():
    too_long = WHOLE.model_copy(update={"reward": None, "failure": "too_long"})
    filled = of(["whole", "whole"]).model_copy(update={"candidates": (too_long, too_long)})
    assert isinstance(choose(filled, 1).failure, InvalidField)


class Drawn:
    """A policy that gives these candidates at once."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self.candidates = [c.model_copy(update={"reward": None, "failure": None}) for c in candidates]

    async def sample(self, policy, prompt_token_ids, n, sampling, window, hear=None) -> list[Candidate]:
        assert len(self.candidates) == n
        return self.candidates


class Scored:
    """A reward model that gives these scores, or does not."""

    def __init__(self, *scores: Score, error: Exception | None = None, is_mute: bool = False) -> None:
        self.scores, self.error, self.is_mute = scores, error, is_mute
        self.seen: list[Sequence[str]] = []

    async def score(self, prompt, messages, completions) -> list[Score]:
        self.seen.append(completions)
        if self.is_mute:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        return list(self.scores)


def answered(candidates: Sequence[Candidate], scorer: Scored, *, wait_for_reward: bool = False) -> Answer:
    async def run() -> Answer:
        now = asyncio.get_running_loop().time()
        budget = Budget(started=now, deadline=now + 0.1, scoring_starts=now + 0.05, quorum=1)
        empty = of(["whole"] * len(candidates)).model_copy(update={"candidates": ()})
        return await best_of_n(empty, budget, Drawn(candidates), scorer, wait_for_reward=wait_for_reward)

    return asyncio.run(run())


def test_rewards_go_to_the_candidates_they_were_asked_for():
    """The second is empty and is not scored: the two scores belong to the first and the third."""
    scorer = Scored(Score(0.5), Score(0.25))
    texts = [WHOLE.model_copy(update={"text": text}) for text in ("one", "", "three")]
    filled = answered(texts, scorer).group
    assert scorer.seen == [["one", "three"]]
    assert [candidate.reward for candidate in filled.candidates] == [0.5, None, 0.25]
    assert [candidate.failure for candidate in filled.candidates] == [None, "empty", None]
    assert (filled.selected, filled.status) == (0, "partial")


def test_counts_add_up():
    filled = of(["whole", "cut", "empty", "not finite", "late"]).model_copy(update={"requested": 5})
    assert candidate_counts(filled) == {
        "requested": 5,
        "finished": 4,
        "scored": 2,
        "failed": {"empty": 1, "reward_not_finite": 1, "deadline": 1},
    }


@pytest.mark.parametrize(
    ("scorer", "failure", "status", "reason"),
    [
        (Scored(error=RewardModelUnavailable("away")), RewardModelUnavailable, "reward_failed", "reward_error"),
        (Scored(error=EngineBroken("broken")), EngineBroken, "reward_failed", "reward_error"),
        (Scored(is_mute=True), DeadlineExceeded, "deadline", "not_scored"),
    ],
)
def test_without_rewards_nobody_wins(scorer, failure, status, reason):
    answer = answered([WHOLE, WHOLE], scorer)
    assert isinstance(answer.failure, failure)
    assert (answer.group.selected, answer.group.status) == (None, status)
    assert {candidate.failure for candidate in answer.group.candidates} == {reason}


def test_a_single_sample_is_served_whatever_becomes_of_its_score():
    for scorer in (Scored(error=RewardModelUnavailable("away")), Scored(is_mute=True)):
        answer = answered([WHOLE], scorer, wait_for_reward=True)
        assert answer.failure is None
        assert (answer.group.selected, answer.group.status) == (0, "reward_failed")
    unasked = Scored(Score(1.0))
    answer = answered([WHOLE], unasked)
    assert (answer.group.selected, answer.group.status, unasked.seen) == (0, "single", [])
    answer = answered([WHOLE], Scored(Score(1.0)), wait_for_reward=True)
    assert (answer.group.candidates[0].reward, answer.group.status) == (1.0, "single")
