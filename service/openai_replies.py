"""Replies in the shape of OpenAI's API: whole objects and the chunks of a stream.

Owns: which candidates become choices, their form, log-probs, usage, and the `bonsai` object beside them. Does not own:
when anything is sent (routes/openai.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

from bon_algos.contracts import Alternatives, Candidate, CandidateGroup, FinishReason
from bon_algos.tool_calls import Call, Spoken, read_calls, sayable
from service.best_of_n import candidate_counts, selection_of, warnings_of
from service.openai_bodies import Presentation
from service.serving import Prepared, Serving, ledger_warnings


class Part(NamedTuple):
    """A stretch of one choice: all of it, or what one chunk of a stream carries."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: FinishReason | None
    alternatives: Sequence[Alternatives] = ()


def whole(candidate: Candidate) -> Part:
    return Part(
        candidate.text, candidate.token_ids, candidate.logprobs, candidate.finish_reason, candidate.alternatives
    )


class Shape(ABC):
    """One endpoint's words."""

    object: str
    chunk_object: str

    def __init__(self, serving: Serving, prepared: Prepared, shown: Presentation) -> None:
        self._serving, self._prepared, self._shown = serving, prepared, shown

    @abstractmethod
    def choice(self, index: int, part: Part) -> dict[str, Any]:
        """Of a whole reply."""

    @abstractmethod
    def delta(self, index: int, part: Part, *, is_first: bool) -> dict[str, Any]:
        """Of a chunk. The parts of one choice come in their order, and one choice behind the other."""

    @abstractmethod
    def end(self, candidate: Candidate) -> dict[str, Any]:
        """Of the chunk that ends a choice, and says nothing else."""

    def reply(self, group: CandidateGroup) -> dict[str, Any]:
        served = self._returned(group)
        choices = [self.choice(place, whole(group.candidates[i])) for place, i in enumerate(served)]
        head = self._head(self.object, group)
        return {**head, "choices": choices, "usage": usage(group, served), "bonsai": self.bonsai(group)}

    def chunk(self, index: int, part: Part, group: CandidateGroup, *, is_first: bool) -> dict[str, Any]:
        """A stretch of a choice, which does not end with it. group: as far as it is filled."""
        said = {"index": index, **self.delta(index, part, is_first=is_first), "finish_reason": None}
        return {**self._head(self.chunk_object, group), "choices": [said]}

    def rest(
        self, group: CandidateGroup, unsaid: Callable[[int], Iterable[Part]], *, include_usage: bool
    ) -> Iterator[dict[str, Any]]:
        """The chunks of an answer that is there, one choice behind the other. unsaid: of the candidate at a place, what
        is still to be said.

        The last one has `bonsai`. A chunk without choices is sent only to who asked for usage: everybody's loop over
        a stream reads `choices[0]`.
        """
        head, bonsai = self._head(self.chunk_object, group), {"bonsai": self.bonsai(group)}
        served = self._returned(group)
        for index, place in enumerate(served):
            for said, part in enumerate(unsaid(place)):
                yield self.chunk(index, part, group, is_first=said == 0)
            is_last = index + 1 == len(served) and not include_usage
            end = {"index": index, **self.end(group.candidates[place])}
            yield {**head, "choices": [end], **(bonsai if is_last else {})}
        if include_usage:
            yield {**head, "choices": [], "usage": usage(group, served), **bonsai}

    def in_one_piece(self, group: CandidateGroup, *, include_usage: bool) -> list[dict[str, Any]]:
        """The chunks that say at once all that a stream says piece by piece."""
        anew = type(self)(self._serving, self._prepared, self._shown)
        return list(anew.rest(group, lambda place: [whole(group.candidates[place])], include_usage=include_usage))

    def bonsai(self, group: CandidateGroup) -> dict[str, Any]:
        return {
            "route": group.route,
            "experiment": group.experiment,
            "arm": str(group.arm),
            "arm_reason": group.arm_reason,
            "policy": group.answered_by,
            "candidates": candidate_counts(group),
            "selection": selection_of(group),
            "candidate_tokens": sum(len(candidate.token_ids) for candidate in group.candidates),
            "log_id": group.id,
            "warnings": [*self._prepared.warnings, *warnings_of(group), *ledger_warnings(self._serving)],
        }

    def _returned(self, group: CandidateGroup) -> list[int]:
        """Places of the choices: as many as are wanted, or as finished."""
        return ranked(group)[: self._shown.choices]

    def _head(self, kind: str, group: CandidateGroup) -> dict[str, Any]:
        return {
            "id": group.id,
            "object": kind,
            "created": int(self._prepared.group.created_at),  # not the answer's: the chunks of a stream agree
            "model": group.answered_by,
            "system_fingerprint": f"fp_{group.settings_digest[:12]}_{group.answered_by.removeprefix('pol-')}",
        }

    def _text_of(self, token: int) -> str:
        return self._serving.tokenizer.decode_token(token)


class CompletionShape(Shape):
    object = chunk_object = "text_completion"

    def choice(self, index: int, part: Part) -> dict[str, Any]:
        return {"index": index, **self.delta(index, part, is_first=True), "finish_reason": part.finish_reason}

    def delta(self, index: int, part: Part, *, is_first: bool) -> dict[str, Any]:
        return {"text": part.text, "logprobs": self._logprobs(part)}

    def end(self, candidate: Candidate) -> dict[str, Any]:
        return {"text": "", "logprobs": None, "finish_reason": candidate.finish_reason}

    def _logprobs(self, part: Part) -> dict[str, Any] | None:
        if not self._shown.logprobs:
            return None
        top = [{self._text_of(token): logprob for token, logprob in row} for row in part.alternatives]
        return {
            "tokens": [self._text_of(token) for token in part.token_ids],
            "token_logprobs": list(part.logprobs),
            "top_logprobs": top or None,
            "text_offset": None,
        }


class ChatShape(Shape):
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, serving: Serving, prepared: Prepared, shown: Presentation) -> None:
        super().__init__(serving, prepared, shown)
        self._written = ""
        """Of the choice that is being streamed, by the policy."""
        self._sent = 0
        """Characters of it that the client has."""

    def choice(self, index: int, part: Part) -> dict[str, Any]:
        spoken = self._read(part.text)
        calls = {"tool_calls": self._call_objects(spoken.calls, index)} if spoken.calls else {}
        content = None if spoken.calls and not spoken.text else spoken.text
        return {
            "index": index,
            "message": {"role": "assistant", "content": content, "refusal": None, **calls},
            "logprobs": self._logprobs(part),
            "finish_reason": _finish_reason(part.finish_reason, spoken),
        }

    def delta(self, index: int, part: Part, *, is_first: bool) -> dict[str, Any]:
        if is_first:
            self._written, self._sent = "", 0
        spoken = self._released(part)
        role = {"role": "assistant"} if is_first else {}
        said = {"content": spoken.text} if spoken.text or (is_first and not spoken.calls) else {}
        calls = [{"index": i, **call} for i, call in enumerate(self._call_objects(spoken.calls, index))]
        return {
            "delta": {**role, **said, **({"tool_calls": calls} if calls else {})},
            "logprobs": self._logprobs(part),
        }

    def end(self, candidate: Candidate) -> dict[str, Any]:
        reason = _finish_reason(candidate.finish_reason, self._read(candidate.text))
        return {"delta": {}, "logprobs": None, "finish_reason": reason}

    def _call_objects(self, calls: Sequence[Call], choice: int) -> list[dict[str, Any]]:
        """Their ids follow from the reply's, so that a stream that is told again has the same."""
        name = f"{self._prepared.group.id.replace('resp_', 'call_')}_{choice}"
        return [{"id": f"{name}_{i}", "type": "function", "function": call._asdict()} for i, call in enumerate(calls)]

    def _read(self, text: str) -> Spoken:
        form = self._shown.calls
        return Spoken(text, ()) if form is None else read_calls(text, form, is_parallel=self._shown.parallel_calls)

    def _released(self, part: Part) -> Spoken:
        """What is to be sent: words as soon as they cannot be part of a call, calls when all is written."""
        form = self._shown.calls
        if form is None:
            return Spoken(part.text, ())
        self._written += part.text
        if part.finish_reason is None:
            spoken = Spoken(self._written[: sayable(self._written, form)], ())
        else:
            spoken = self._read(self._written)
        text, self._sent = spoken.text[self._sent :], max(self._sent, len(spoken.text))
        return spoken._replace(text=text)

    def _logprobs(self, part: Part) -> dict[str, Any] | None:
        if not self._shown.logprobs:
            return None
        rows = zip(part.token_ids, part.logprobs, part.alternatives or [()] * len(part.token_ids), strict=True)
        content = [
            {
                **self._token(token, logprob),
                "top_logprobs": [self._token(*one) for one in top[: self._shown.alternatives]],
            }
            for token, logprob, top in rows
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text_of(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _finish_reason(reason: FinishReason | None, spoken: Spoken) -> str | None:
    return "tool_calls" if spoken.calls and reason == "stop" else reason


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
