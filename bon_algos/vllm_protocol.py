"""What is said to vLLM and how its answers are read: pure functions over JSON's bytes, no I/O.

Owns: building engine requests field by field (nothing a caller sent travels on by itself) and folding answers
into candidates, checked and finite. Does not own: sockets, deadlines, retries. Checked against vLLM 0.32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final, NamedTuple, cast

import msgspec
from pydantic_core import from_json

from bon_algos.contracts import Alternatives, Candidate, FinishReason, Sampling

CANARY_PRIORITY = -1
LIVE_PRIORITY = 0
ROLLOUT_PRIORITY = 10
"""Lower is served first: a job's rollouts wait for users."""

Json = Mapping[str, Any]


class MalformedReply(ValueError):
    """The engine's answer is not what it must be; the text names the part, never its content."""


def completion_request(
    model: str,
    prompt_token_ids: Sequence[int],
    n: int,
    sampling: Sampling,
    *,
    stream: bool,
    priority: int = LIVE_PRIORITY,
) -> dict[str, Any]:
    """Body of `POST /v1/completions` for n candidates of one prompt in one call.

    Log-probs are the raw ones of the sampled tokens. When streamed with n > 1 each candidate arrives in about two
    chunks (the first token, then the rest): enough to know which candidates had finished when a deadline passes.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt_token_ids),
        "n": n,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "stop": list(sampling.stop),
        "logprobs": sampling.top_logprobs,
        "return_token_ids": True,
        "priority": priority,
        "stream": stream,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.top_logprobs:
        # Alternatives come by their text, and two of them may have the same: their ids do not.
        body["return_tokens_as_token_ids"] = True
    if sampling.json_schema is not None:
        body["structured_outputs"] = {"json": json.loads(sampling.json_schema)}
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    if stream:
        body["stream_interval"] = sampling.max_tokens if n > 1 else 1
    return body


def classify_request(model: str, texts: Sequence[str], *, add_special_tokens: bool) -> dict[str, Any]:
    """Body of `POST /classify`: raw scores of all texts in one call. add_special_tokens: those that the tokenizer
    writes around a text; not where a chat template has written them already."""
    return {
        "model": model,
        "input": list(texts),
        "add_special_tokens": add_special_tokens,
        "use_activation": False,
    }


def forced_token_request(model: str, prefix_token_ids: Sequence[int], token: int) -> dict[str, Any]:
    """Body of `POST /v1/completions` that must answer one given token, and with it the token's raw log-prob.

    `allowed_token_ids` masks the logits after the raw log-probs were taken from them. One request per token, since
    `prompt_logprobs` of an adapter take vLLM 0.32's CPU build down when the batch holds a second request.
    """
    body = completion_request(
        model, prefix_token_ids, 1, Sampling(max_tokens=1), stream=False, priority=ROLLOUT_PRIORITY
    )
    return {**body, "allowed_token_ids": [token]}


def canary_request(model: str) -> dict[str, Any]:
    """Body of `POST /v1/completions` that shows whether an engine still samples: one token after one token."""
    return completion_request(model, [0], 1, Sampling(max_tokens=1), stream=False, priority=CANARY_PRIORITY)


class RefusedReply(MalformedReply):
    """The engine does not take the request: it says so inside its stream, when there is nothing else in it yet."""


class Piece(NamedTuple):
    """What one chunk adds to one candidate."""

    candidate: int
    """Place in drawing order."""
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason | None
    alternatives: tuple[Alternatives, ...] = ()
    """Of each token, where they were asked for."""


Listener = Callable[[Piece], None]

_Natural = Annotated[int, msgspec.Meta(ge=0)]


class _Told(msgspec.Struct, gc=False):
    token_logprobs: tuple[float, ...] = ()
    """Finite: msgspec takes no number that no float holds."""
    top_logprobs: msgspec.Raw = msgspec.Raw(b"null")
    """Comes where nobody asked for it too, and is then not looked at."""


class _Choice(msgspec.Struct, gc=False):
    index: _Natural
    text: str
    token_ids: tuple[_Natural, ...] | None = None
    logprobs: _Told | None = None
    finish_reason: FinishReason | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    error: Any = None


_CHUNK = msgspec.json.Decoder(_Chunk)
_ALTERNATIVES = msgspec.json.Decoder(list[dict[str, float]] | None)
_BLANK: Final = Candidate(text="", token_ids=(), logprobs=())
"""Its copies are not checked again: what they get, the decoder has checked."""


class _Partial:
    """One candidate, as far as it has come."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._alternatives: list[Alternatives] = []
        self.finish_reason: FinishReason | None = None

    def extend(self, choice: _Choice, alternatives: Sequence[Alternatives]) -> None:
        """Raises MalformedReply."""
        ids, logprobs = choice.token_ids or (), _logprobs(choice)
        if self.finish_reason is not None:
            raise MalformedReply(f"candidate {choice.index} goes on after its end")
        if len(ids) != len(logprobs):
            raise MalformedReply("token ids and log-probs of a choice do not match")
        self._text.append(choice.text)
        self._token_ids += ids
        self._logprobs += logprobs
        self._alternatives += alternatives
        self.finish_reason = choice.finish_reason

    def candidate(self) -> Candidate:
        told = {
            "text": "".join(self._text),
            "token_ids": tuple(self._token_ids),
            "logprobs": tuple(self._logprobs),
            "finish_reason": self.finish_reason,
            "failure": None if self.finish_reason is not None else "deadline",
            "alternatives": tuple(self._alternatives),
        }
        return _BLANK.model_copy(update=told)


class CompletionStream:
    """Folds the chunks of one streamed completion call into n candidates, whatever their order of arrival."""

    def __init__(self, n: int, hear: Listener | None = None, *, has_alternatives: bool = False) -> None:
        """hear: told each piece as it is taken. has_alternatives: whether they were asked for; they come in another
        form where nobody did."""
        self._partial = [_Partial() for _ in range(n)]
        self._hear = hear
        self._has_alternatives = has_alternatives
        self.finished = 0
        """Candidates."""

    def feed(self, chunk: bytes) -> None:
        """Take one chunk's JSON. Raises MalformedReply."""
        for choice in _choices(chunk):
            if choice.index >= len(self._partial):
                raise MalformedReply(f"an index is above {len(self._partial) - 1}")
            alternatives = _alternatives(choice) if self._has_alternatives else ()
            self._partial[choice.index].extend(choice, alternatives)
            self.finished += choice.finish_reason is not None
            if self._hear is not None:
                self._hear(_piece(choice, alternatives))

    @property
    def is_complete(self) -> bool:
        return self.finished == len(self._partial)

    def candidates(self) -> list[Candidate]:
        """All n in drawing order; one that never finished has failure `deadline`."""
        return [partial.candidate() for partial in self._partial]


def parse_completion(body: bytes, n: int) -> list[Candidate]:
    """The n candidates of an answer that was not streamed. Raises MalformedReply."""
    stream = CompletionStream(n)
    stream.feed(body)
    if not stream.is_complete:
        raise MalformedReply(f"{stream.finished} of {n} candidates came back finished")
    return stream.candidates()


def parse_classify(body: Json, count: int) -> list[float]:
    """Raw scores in the order of the request, matched by index. Raises MalformedReply when a score is missing,
    doubled or no single number; a score that is not finite is returned as NaN and for the caller to refuse."""
    data = body.get("data")
    if not isinstance(data, list) or len(data) != count:
        raise MalformedReply(f"the reward model did not return {count} scores")
    scores: dict[int, float] = {}
    for entry in data:
        probs = entry.get("probs") if isinstance(entry, dict) else None
        if not isinstance(probs, list) or len(probs) != 1 or isinstance(probs[0], bool):
            raise MalformedReply("a score of the reward model is not one number: is it a one-label classifier?")
        scores[_index(entry.get("index"), count)] = (
            as_float(probs[0]) if isinstance(probs[0], int | float) else math.nan
        )
    if len(scores) != count:
        raise MalformedReply("the reward model scored one sequence twice")
    return [scores[i] for i in range(count)]


def parse_forced_token(body: bytes, token: int) -> float:
    """Log-prob of the token that had to come, nats. Raises MalformedReply when another one came."""
    candidate = parse_completion(body, 1)[0]
    if candidate.token_ids != (token,):
        raise MalformedReply("the engine answered another token than the only one allowed")
    return candidate.logprobs[0]


def as_float(number: int | float) -> float:
    """JSON's integers have no bound: one that no float holds is infinite."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def json_object(data: bytes) -> dict[str, Any]:
    """Half a surrogate pair, which could not be written anywhere, is refused with all else that is no JSON. Raises
    MalformedReply."""
    try:
        body = from_json(data)
    except ValueError:
        raise MalformedReply("it is not JSON") from None
    if not isinstance(body, dict):
        raise MalformedReply("it is not a JSON object")
    return cast(dict[str, Any], body)


def _choices(chunk: bytes) -> list[_Choice]:
    try:
        body = _CHUNK.decode(chunk)
    except msgspec.ValidationError as error:
        raise MalformedReply(f"in it: {error}") from None
    except ValueError:
        raise MalformedReply("it is not JSON") from None
    if body.error is not None:
        if isinstance(body.error, dict) and body.error.get("code") == 400:
            raise RefusedReply("it is a refusal")
        raise MalformedReply("the engine reports an error inside its answer")
    if body.choices is None:
        raise MalformedReply("the engine's answer has no list of choices")
    return body.choices


def _index(index: object, count: int) -> int:
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < count:
        raise MalformedReply(f"an index is not in 0..{count - 1}")
    return index


def _logprobs(choice: _Choice) -> tuple[float, ...]:
    return () if choice.logprobs is None else choice.logprobs.token_logprobs


def _piece(choice: _Choice, alternatives: tuple[Alternatives, ...]) -> Piece:
    ids = choice.token_ids or ()
    return Piece(choice.index, choice.text, ids, _logprobs(choice), choice.finish_reason, alternatives)


_TOKEN_ID = "token_id:"


def _alternatives(choice: _Choice) -> tuple[Alternatives, ...]:
    """Of each token, from objects with `token_id:N`: log-prob."""
    try:
        rows = None if choice.logprobs is None else _ALTERNATIVES.decode(choice.logprobs.top_logprobs)
    except ValueError:
        raise MalformedReply("the alternatives to its tokens are no list of JSON objects with numbers") from None
    if not rows or not next(iter(rows[0]), "").startswith(_TOKEN_ID):
        return ()
    if len(rows) != len(choice.token_ids or ()):
        raise MalformedReply("tokens and their alternatives do not match")
    return tuple(tuple(sorted(map(_alternative, row.items()), key=lambda one: -one[1])) for row in rows)


def _alternative(entry: tuple[str, float]) -> tuple[int, float]:
    token = entry[0].removeprefix(_TOKEN_ID)
    if not (token.isascii() and token.isdigit()) or not math.isfinite(entry[1]):
        raise MalformedReply("an alternative to a token is no token with a finite log-prob")
    return int(token), entry[1]
