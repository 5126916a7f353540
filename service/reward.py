"""The reward model: a number for each completion, or the reason why it has none.

Owns: rendering in the reward model's own chat template, what is too long for it, one batched call, refusing
numbers that are not finite. Does not own: the wire format (bon_algos/vllm_protocol.py), deadlines, choosing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from math import isfinite
from typing import Final, NamedTuple

from bon_algos.chat import ChatTokenizer, TemplateRefused, reward_token_ids
from bon_algos.contracts import CandidateFailure, Message
from bon_algos.vllm_protocol import classify_request, parse_classify
from service.engine_http import EngineHttp
from service.errors import InvalidField, RewardModelUnavailable
from service.vllm import LIST_SECONDS, model_names

LONG_CHARACTERS: Final = 100_000
"""From here on tokenising would hold up other requests, and is done in a thread."""


class Score(NamedTuple):
    """A finite reward, or why there is none."""

    reward: float | None
    failure: CandidateFailure | None = None


class RewardModel:
    """One vLLM pooling server with a classifier of one label."""

    def __init__(self, url: str, model: str, tokenizer: ChatTokenizer, max_tokens: int) -> None:
        """model: its served name. max_tokens: its window."""
        self._http = EngineHttp(
            url,
            title="reward model",
            unavailable=RewardModelUnavailable,
            not_served=RewardModelUnavailable,
            broken_code="reward_model_broken",
        )
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self.model = model
        self.template_digest = tokenizer.template_digest

    async def close(self) -> None:
        await self._http.close()

    async def models(self) -> list[str]:
        """Names the engine serves."""
        return model_names(await self._http.get("/v1/models", LIST_SECONDS))

    def require_room(self, prompt: str, messages: Sequence[Message] | None) -> None:
        """Refuse what could not be scored whatever is completed. Raises InvalidField."""
        param = "prompt" if messages is None else "messages"
        try:
            taken = len(reward_token_ids(self._tokenizer, prompt, messages, ""))
        except TemplateRefused as error:
            raise InvalidField(f"the reward model's chat template refuses {param}: {error}", param=param) from None
        if taken >= self._max_tokens:
            raise InvalidField(
                f"{param} takes {taken} tokens of the reward model's window of {self._max_tokens}", param=param
            )

    async def score(self, prompt: str, messages: Sequence[Message] | None, completions: Sequence[str]) -> list[Score]:
        """One score for each completion, in order, by one call. Too long is a failure, never cut; so is a
        conversation that the model's template refuses.

        Raises RewardModelUnavailable (503) and EngineBroken (502).
        """
        try:
            sequences = await self._encoded(prompt, messages, completions)
        except TemplateRefused:
            return [Score(None, "reward_error")] * len(completions)
        fitting = [i for i, ids in enumerate(sequences) if len(ids) <= self._max_tokens]
        scores = [Score(None, "too_long")] * len(completions)
        if not fitting:
            return scores
        request = classify_request(self.model, [sequences[i] for i in fitting])
        with self._http.translated():
            rewards = parse_classify(await self._http.post("/classify", request), len(fitting))
        for i, reward in zip(fitting, rewards, strict=True):
            scores[i] = Score(reward) if isfinite(reward) else Score(None, "reward_not_finite")
        return scores

    async def _encoded(
        self, prompt: str, messages: Sequence[Message] | None, completions: Sequence[str]
    ) -> list[list[int]]:
        def encode() -> list[list[int]]:
            return [reward_token_ids(self._tokenizer, prompt, messages, text) for text in completions]

        characters = len(prompt) + sum(len(message.content) for message in messages or ())
        is_short = characters * len(completions) < LONG_CHARACTERS
        return encode() if is_short else await asyncio.to_thread(encode)
