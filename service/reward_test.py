"""Before a reward model chooses anything: does it know better from worse?

Owns: known pairs, scoring them once its engine answers, the verdict and what it means for requests. Does not own: the
reward model (reward.py), telling operators (routes/health.py).

A reward model behind the wrong chat template, or whose number is not the one it was trained to give, answers politely
and chooses badly. With pairs that an operator knows the answer to it is found out before anybody is served by it.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from bon_algos.contracts import Message, Record
from service.best_of_n import Scorer
from service.errors import GatewayError, RewardModelUnavailable

AGAIN_SECONDS: Final = 1.0
TEST_SECONDS: Final = 60.0
log = logging.getLogger("bonsai.reward")
Text = Annotated[str, Field(min_length=1, max_length=100_000)]


class Pair(Record):
    """Two answers of which one is known to be better."""

    prompt: Text | None = None
    messages: tuple[Message, ...] | None = Field(None, min_length=1)
    better: Text
    worse: Text

    @model_validator(mode="after")
    def one_prompt(self) -> Pair:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("exactly one of prompt and messages is required")
        return self


_PAIRS: Final = TypeAdapter(Annotated[tuple[Pair, ...], Field(min_length=1, max_length=1000)])


def read_pairs(file: Path) -> tuple[Pair, ...]:
    """A JSON list of pairs. ValueError, in words, when it cannot be read or holds something else."""
    try:
        return _PAIRS.validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"])
        raise ValueError(f"{file}{place and f', {place}'}: {fault['msg']}") from None


class RewardModelRefused(RewardModelUnavailable):
    default_code = "reward_model_refused"
    retry_after = 60


class RewardTest:
    """One test of one reward model."""

    def __init__(self, scorer: Scorer, pairs: tuple[Pair, ...]) -> None:
        self._scorer = scorer
        self._pairs = pairs
        self._wrong: int | None = None if pairs else 0

    @property
    def state(self) -> str:
        """For an operator: passed, no pairs, waiting for the engine, or what is wrong."""
        if not self._pairs:
            return "no pairs"
        if self._wrong is None:
            return "waiting"
        return "passed" if self._wrong == 0 else self._refusal

    @property
    def may_choose(self) -> bool:
        return self._wrong == 0

    def require_passed(self) -> None:
        """Raises RewardModelUnavailable while the test waits, RewardModelRefused when it was not passed."""
        if self._wrong is None:
            raise RewardModelUnavailable("the reward model has not been tested on its known pairs yet")
        if self._wrong:
            raise RewardModelRefused(self._refusal)

    async def run(self) -> None:
        """Test as soon as the engine answers; then there is a verdict."""
        while self._wrong is None:
            try:
                async with asyncio.timeout(TEST_SECONDS):
                    self._wrong = await self._count_wrong()
            except (GatewayError, TimeoutError) as error:
                log.info("the reward model's test waits: %s", error)
                await asyncio.sleep(AGAIN_SECONDS)
        log.log(logging.ERROR if self._wrong else logging.INFO, "the reward model's test: %s", self.state)

    async def _count_wrong(self) -> int:
        wrong = 0
        for pair in self._pairs:
            scores = await self._scorer.score(pair.prompt or "", pair.messages, [pair.better, pair.worse])
            better, worse = (score.reward for score in scores)
            wrong += better is None or worse is None or better <= worse
        return wrong

    @property
    def _refusal(self) -> str:
        return (
            f"the reward model ranks {self._wrong} of {len(self._pairs)} known pairs wrongly, so that it chooses and "
            "measures nothing: is its chat template the one it was trained with, its score taken before any "
            "activation, and higher better?"
        )
