"""Replies in the shape of OpenAI's API: whole objects and the chunks of a stream.

Owns: which candidates become choices, their form, log-probs, usage, and the `bonsai` object beside them. Does not own:
when anything is sent (routes/openai.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from bon_algos.contracts import Candidate, CandidateGroup, FinishReason
from service.best_of_n import candidate_counts, selection_of, warnings_of
from service.serving import Prepared, Serving, ledger_warnings


class Part(NamedTuple):
    """A stretch of one choice: all of it, or what one chunk of a stream carries."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: FinishReason | None


def whole(candidate: Candidate) -> Part:
    return Part(candidate.text, candidate.token_ids, candidate.logprobs, candidate.finish_reason)


class Shape(ABC):
    """One endpoint's words."""

    object: str
    chunk_object: str

    def __init__(self, serving: Serving, prepared: Prepared, *, shows_logprobs: bool) -> None:
        self._serving, self._prepared, self._shows_logprobs = serving, prepared, shows_logprobs

    @abstractmethod
    def choice(self, index: int, part: Part) -> dict[str, Any]:
        """Of a whole reply."""

    @abstractmethod
    def delta(self, part: Part, *, is_first: bool) -> dict[str, Any]:
        """Of a chunk, for choice 0."""

    def reply(self, group: CandidateGroup, count: int) -> dict[str, Any]:
        """The whole reply with the best `count` choices, or as many as finished."""
        served = ranked(group)[:count]
        choices = [self.choice(place, whole(group.candidates[i])) for place, i in enumerate(served)]
        head = self._head(self.object)
        return {**head, "choices": choices, "usage": usage(group, served), "bonsai": self.bonsai(group)}

    def chunk(self, part: Part, *, is_first: bool) -> dict[str, Any]:
        return {**self._head(self.chunk_object), "choices": [{"index": 0, **self.delta(part, is_first=is_first)}]}

    def last_chunk(self, group: CandidateGroup, *, include_usage: bool) -> dict[str, Any]:
        """Without choices: what happened, and what it used if that is wanted."""
        used = {"usage": usage(group, ranked(group)[:1])} if include_usage else {}
        return {**self._head(self.chunk_object), "choices": [], **used, "bonsai": self.bonsai(group)}

    def bonsai(self, group: CandidateGroup) -> dict[str, Any]:
        return {
            "route": group.route,
            "experiment": group.experiment,
            "arm": str(group.arm),
            "arm_reason": group.arm_reason,
            "policy": group.policy_id,
            "candidates": candidate_counts(group),
            "selection": selection_of(group),
            "candidate_tokens": sum(len(candidate.token_ids) for candidate in group.candidates),
            "log_id": group.id,
            "warnings": [*self._prepared.warnings, *warnings_of(group), *ledger_warnings(self._serving)],
        }

    def _head(self, kind: str) -> dict[str, Any]:
        group = self._prepared.group
        return {
            "id": group.id,
            "object": kind,
            "created": int(group.created_at),
            "model": group.policy_id,
            "system_fingerprint": f"fp_{group.settings_digest[:12]}_{group.policy_id.removeprefix('pol-')}",
        }

    def _token_texts(self, part: Part) -> list[str]:
        return [self._serving.tokenizer.decode_token(token) for token in part.token_ids]


class CompletionShape(Shape):
    object = chunk_object = "text_completion"

    def choice(self, index: int, part: Part) -> dict[str, Any]:
        return {"index": index, **self.delta(part, is_first=True)}

    def delta(self, part: Part, *, is_first: bool) -> dict[str, Any]:
        return {"text": part.text, "logprobs": self._logprobs(part), "finish_reason": part.finish_reason}

    def _logprobs(self, part: Part) -> dict[str, Any] | None:
        if not self._shows_logprobs:
            return None
        return {
            "tokens": self._token_texts(part),
            "token_logprobs": list(part.logprobs),
            "top_logprobs": None,
            "text_offset": None,
        }


class ChatShape(Shape):
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, index: int, part: Part) -> dict[str, Any]:
        message = {"role": "assistant", "content": part.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(part),
            "finish_reason": part.finish_reason,
        }

    def delta(self, part: Part, *, is_first: bool) -> dict[str, Any]:
        said = {"content": part.text} if part.text or is_first else {}
        role = {"role": "assistant"} if is_first else {}
        return {"delta": {**role, **said}, "logprobs": self._logprobs(part), "finish_reason": part.finish_reason}

    def _logprobs(self, part: Part) -> dict[str, Any] | None:
        if not self._shows_logprobs:
            return None
        rows = zip(self._token_texts(part), part.logprobs, strict=True)
        content = [
            {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
            for text, logprob in rows
        ]
        return {"content": content, "refusal": None}


def ranked(group: CandidateGroup) -> list[int]:
    """Places of the candidates that may be returned: the served one, then complete before incomplete, higher rewards
    first, earlier ones where they tie."""
    served = cast(int, group.selected)
    others = [i for i, candidate in enumerate(group.candidates) if candidate.reward is not None and i != served]
    others.sort(key=lambda i: (not group.candidates[i].is_complete, -cast(float, group.candidates[i].reward), i))
    return [served, *others]


def usage(group: CandidateGroup, served: Sequence[int]) -> dict[str, int]:
    """Tokens of the prompt and of what is returned; what was drawn in all is in `bonsai.candidate_tokens`."""
    prompt = len(group.prompt_token_ids)
    completion = sum(len(group.candidates[i].token_ids) for i in served)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
