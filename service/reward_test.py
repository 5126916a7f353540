"""Before a reward model chooses anything: does it know better from worse?

Owns: scoring known pairs once the engines answer, the verdict and what it means for requests. Does not own: the pairs
(known_pairs.py), the reward model (reward.py), telling operators (routes/health.py).

A reward model behind the wrong chat template, or whose number is not the one it was trained to give, answers politely
and chooses badly. With pairs that the answer is known of it is found out before anybody is served by it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple

from bon_algos.contracts import Message
from bon_algos.scoring import Score
from service.errors import GatewayError, RewardModelUnavailable
from service.known_pairs import Pair

AGAIN_SECONDS: Final = 1.0
PAIR_SECONDS: Final = 60.0
WAITING: Final = "waiting"
PASSED: Final = "passed"
UNTESTED: Final = "untested"
MAY_CHOOSE: Final = (PASSED, UNTESTED)
log = logging.getLogger("bonsai.reward")


class RewardModelRefused(RewardModelUnavailable):
    default_code = "reward_model_refused"
    retry_after = 60


class PairTest(NamedTuple):
    """Who is asked about which pairs."""

    score: Callable[[str, Sequence[Message] | None, Sequence[str]], Awaitable[list[Score]]]
    """As `Scorer.score`."""
    pairs: tuple[Pair, ...]
    title: str = "the reward model"
    is_general: bool = False
    """The pairs are the built-in ones: half of them are enough, and what is too long for the window says nothing. An
    operator's own must all be ranked rightly."""


class PairCounts(NamedTuple):
    """How many pairs were ranked how."""

    right: int
    alike: int
    wrong: int
    unscored: int
    """One of the two answers has no finite reward."""

    @property
    def total(self) -> int:
        return sum(self)


class RewardTest:
    """One test of one reward model, on pairs for all of it or for each of its members; without any it is untested."""

    def __init__(self, tests: Sequence[PairTest]) -> None:
        self._tests = tests
        self.state: str = WAITING if tests else UNTESTED
        """For an operator: passed, untested, waiting for the engines, or what is wrong."""

    @property
    def may_choose(self) -> bool:
        return self.state in MAY_CHOOSE

    def require_passed(self) -> None:
        """Raises RewardModelUnavailable while the test waits, RewardModelRefused when it was not passed."""
        if self.state == WAITING:
            raise RewardModelUnavailable("the reward model has not been tested on its known pairs yet")
        if not self.may_choose:
            raise RewardModelRefused(self.state)

    async def run(self) -> None:
        """Test as soon as the engines answer; then there is a verdict."""
        while self.state == WAITING:
            try:
                self.state = verdict([(test, await _counted(test)) for test in self._tests])
            except (GatewayError, TimeoutError) as error:
                log.info("the reward model's test waits: %s", error)
                await asyncio.sleep(AGAIN_SECONDS)
        if self.state == UNTESTED:
            log.warning("the reward model is untested; BONSAI_REWARD_PAIRS takes pairs of which you know the better")
        else:
            log.log(logging.INFO if self.may_choose else logging.ERROR, "the reward model's test: %s", self.state)


def verdict(counted: Sequence[tuple[PairTest, PairCounts]]) -> str:
    """The state that the tests lead to: the first refusal, in words, if there is one."""
    refusals = [_refusal(test, counts) for test, counts in counted if _fails(test, counts)]
    if refusals:
        return refusals[0]
    return PASSED if any(counts.total for _, counts in counted) else UNTESTED


def _fails(test: PairTest, counts: PairCounts) -> bool:
    if not counts.total:
        return False
    if not test.is_general or counts.alike == counts.total:
        return counts.right < counts.total
    return counts.right + counts.alike / 2 < counts.total / 2


async def _counted(test: PairTest) -> PairCounts:
    right = alike = wrong = unscored = 0
    for pair in test.pairs:
        async with asyncio.timeout(PAIR_SECONDS):
            scores = await test.score(pair.prompt or "", pair.messages, [pair.better, pair.worse])
        if test.is_general and any(score.failure == "too_long" for score in scores):
            continue
        better, worse = (score.reward for score in scores)
        if better is None or worse is None:
            unscored += 1
        else:
            right, alike, wrong = right + (better > worse), alike + (better == worse), wrong + (better < worse)
    return PairCounts(right, alike, wrong, unscored)


def _refusal(test: PairTest, counts: PairCounts) -> str:
    """What it did, what follows, and the usual causes."""
    pairs = f"{counts.total} {'built-in' if test.is_general else 'known'} pairs"
    if counts.unscored == counts.total:
        did = f"has no finite reward for any of {pairs}"
        causes = (
            "is its window long enough, does its chat template take these, are its weights whole and its precision the "
            "one it was trained in?"
        )
    elif counts.alike == counts.total:
        did = f"gives both answers the same reward in all of {pairs}"
        causes = (
            "a constant ranks nothing; is its score taken before any activation (of one label a softmax is always 1), "
            "and does its chat template write the answer?"
        )
    else:
        alike = f" and {counts.alike} alike" if counts.alike else ""
        did = f"ranks {counts.wrong + counts.unscored} of {pairs} wrongly{alike}"
        causes = (
            "is its chat template the one it was trained with, its score taken before any activation, and higher "
            "better?"
        )
    own = " If it is meant to do so: BONSAI_REWARD_PAIRS (--reward-pairs) takes pairs of your own, or none."
    return f"{test.title} {did}, so that it chooses and measures nothing: {causes}{own if test.is_general else ''}"
