"""The reward model: a number for each completion, or the reason why it has none.

Owns: asking every member at once, over HTTP; one that fails fails all, for an ensemble of fewer is another reward
model; that nothing is drawn for one whose last calls failed. Does not own: what is said and how it is read
(bon_algos/scoring.py), deadlines, choosing.

A call that is given up, at its caller's deadline or because he left, has failed where the model had answered nobody for
so long as an engine may be silent (silence.py); else it counts as nothing, for a deadline may be a millisecond.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any, Final, TypeVar

from bon_algos.contracts import Message, RewardConfig
from bon_algos.scoring import Asked, Call, Completion, Reader, Score, combined, template_digest_of
from service.breaker import Breaker
from service.engine_http import EngineHttp
from service.errors import EngineBroken, EngineRefused, GatewayError, InvalidField, RewardModelUnavailable
from service.silence import Silence
from service.vllm import LIST_SECONDS, model_names

LONG_CHARACTERS: Final = 100_000
"""From here on tokenising would hold up other requests, and is done in a thread."""
HUNG_AFTER_SECONDS: Final = 30.0
FAILING: Final = "the reward model fails"
T = TypeVar("T")
log = logging.getLogger("bonsai.reward")


class RewardModel:
    """One member or several. Must be made inside a running event loop and closed."""

    def __init__(
        self, config: RewardConfig, readers: Sequence[Reader], *, hung_after: float = HUNG_AFTER_SECONDS
    ) -> None:
        """readers: one for each member. hung_after: seconds of waiting without any answer from which on a call that is
        given up has failed."""
        self._config = config
        self._readers = readers
        is_alone = len(config.members) == 1
        self._http = [
            EngineHttp(
                member.url,
                title="reward model" if is_alone else f"reward model {member.id}",
                unavailable=RewardModelUnavailable,
                not_served=RewardModelUnavailable,
                broken_code="reward_model_broken",
            )
            for member in config.members
        ]
        self.model = config.id
        self.template_digest = template_digest_of(readers)
        self._breaker = Breaker(monotonic)
        self._silence, self._hung_after = Silence(monotonic), hung_after

    async def close(self) -> None:
        for http in self._http:
            await http.close()

    async def state(self) -> str:
        """ok, or in a few words why not. When the pause after failures is over it may be ok again, so that requests
        come: the first of them finds out."""
        if self._breaker.state == "open" and monotonic() < self._breaker.probe_at:
            return FAILING
        states = await _all(self._state_of(i) for i in range(len(self._http)))
        return next((state for state in states if state != "ok"), "ok")

    async def _state_of(self, i: int) -> str:
        try:
            served = model_names(await self._http[i].get("/v1/models", LIST_SECONDS))
        except GatewayError as error:
            return error.message
        if self._config.members[i].model in served:
            return "ok"
        return "serves another model" + (f" than {self._config.members[i].id}" if len(self._http) > 1 else "")

    def require_up(self) -> None:
        """Refuse what would be drawn for nothing. Raises RewardModelUnavailable."""
        if not self._breaker.admits:
            error = RewardModelUnavailable(f"{FAILING} of late: it is tried again soon")
            error.retry_after = max(1, math.ceil(self._breaker.probe_at - monotonic()))
            raise error

    def require_room(self, prompt: str, messages: Sequence[Message] | None) -> None:
        """Refuse what could not be scored whatever is completed. Raises InvalidField."""
        for reader in self._readers:
            if (refusal := reader.refusal(prompt, messages)) is not None:
                raise InvalidField(refusal, param="prompt" if messages is None else "messages")

    async def score(self, prompt: str, messages: Sequence[Message] | None, completions: Sequence[str]) -> list[Score]:
        """One score for each completion, in order; every member is asked at once.

        Raises RewardModelUnavailable (503) and EngineBroken (502).
        """
        asked = [Completion(prompt, messages, text) for text in completions]
        with self._counted():
            scores = combined(self._config, await _all(self._scores_of(i, asked) for i in range(len(self._http))))
        if reason := next((score.reason for score in scores if score.reason), ""):
            missing = sum(score.reward is None for score in scores)
            log.warning("%d of %d completions have no reward: %s", missing, len(scores), reason)
        return scores

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """The first call after a pause is the probe. What the model refuses it has read."""
        epoch, is_probe = self._breaker.epoch, self._breaker.try_probe()
        self._silence.call_begins()
        try:
            yield
        except EngineRefused:
            self._worked(epoch)
            raise
        except (RewardModelUnavailable, EngineBroken):
            self._failed(epoch, is_probe=is_probe)
            raise
        except BaseException:
            # Given up, most likely by the caller or at its deadline, which alone tells nothing of the model.
            if self._silence.seconds >= self._hung_after:
                self._failed(epoch, is_probe=is_probe)
            elif is_probe:
                self._breaker.give_up()
            raise
        else:
            self._worked(epoch)
        finally:
            self._silence.call_ends()

    def _worked(self, epoch: int) -> None:
        self._silence.broken()
        self._breaker.close()
        self._breaker.count(epoch, failed=False)

    def _failed(self, epoch: int, *, is_probe: bool) -> None:
        self._breaker.count(epoch, failed=True)
        if is_probe:
            self._breaker.trip()
        if self._breaker.state == "open":
            self._silence.broken()  # the next probe is not judged by what was waited before

    async def score_of_member(
        self, i: int, prompt: str, messages: Sequence[Message] | None, completions: Sequence[str]
    ) -> list[Score]:
        """As `score`, of one member alone and not scaled."""
        return await self._scores_of(i, [Completion(prompt, messages, text) for text in completions])

    async def _scores_of(self, i: int, completions: Sequence[Completion]) -> list[Score]:
        scores, calls = await _read(self._readers[i], completions)
        answers = await _all(self._answer(self._http[i], call) for call in calls)
        for call, found in zip(calls, answers, strict=True):
            for place, score in zip(call.places, found, strict=True):
                scores[place] = score
        return scores

    async def _answer(self, http: EngineHttp, call: Call) -> list[Score]:
        with http.translated():
            return call.read(await http.post(call.path, call.body))


async def _read(reader: Reader, completions: Sequence[Completion]) -> Asked:
    characters = sum(
        len(one.prompt) + sum(len(message.content) for message in one.messages or ()) for one in completions
    )
    is_short = characters < LONG_CHARACTERS
    return reader.ask(completions) if is_short else await asyncio.to_thread(reader.ask, completions)


async def _all(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order, or the first failure; then the others are left."""
    coroutines = list(calls)
    if len(coroutines) == 1:
        return [await coroutines[0]]
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
