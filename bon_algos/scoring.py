"""Completions to rewards: what each member of a reward model is asked, and how its answers become scores.

Owns: rendering for each kind of member, what is too long for it, one score from several members. Pure; gateway and
worker score through this one module, so a reward has one meaning in both. Does not own: sockets, deadlines, reading
model directories.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final, NamedTuple, Protocol

from bon_algos.chat import ChatTokenizer, TemplateRefused, encode_reward_texts, reward_writer
from bon_algos.contracts import CandidateFailure, HttpMember, Message, RewardConfig, VllmMember
from bon_algos.reward_protocol import parse_score, score_request
from bon_algos.vllm_protocol import classify_request, json_object, parse_classify

SEQUENCES_PER_CALL: Final = 256
"""Of one `/classify`; a prompt with more candidates takes several."""
AS_IT_IS: Final = hashlib.sha256(b"bonsai: prompt, messages and completion as they are").hexdigest()[:16]
"""Stands for a template where a member gets texts, not tokens."""


class Score(NamedTuple):
    """A finite reward, or why there is none."""

    reward: float | None
    failure: CandidateFailure | None = None
    disagreement: float | None = None
    """Standard deviation between members; None with one."""
    reason: str = ""
    """In the member's own words, where it gave any."""


_BEGIN: Final = "<think>"
_BEGUN: Final = (_BEGIN, f"{_BEGIN}\n")
"""How the prompt ends where its template has begun the reasoning."""
_END: Final = "</think>"
_TOO_LONG: Final = Score(None, "too_long")


class Completion(NamedTuple):
    """What is to be scored."""

    prompt: str
    messages: Sequence[Message] | None
    text: str

    @property
    def answer(self) -> str:
        """The text behind its reasoning, which the policy or its template began; empty where that never ends. Reward
        models judge answers: they were shown no reasoning when they were made."""
        if not self.prompt.endswith(_BEGUN) and not self.text.lstrip().startswith(_BEGIN):
            return self.text
        return self.text.partition(_END)[2].lstrip()


class Call(NamedTuple):
    """One POST and how its answer is read."""

    path: str
    body: dict[str, Any]
    places: Sequence[int]
    """Which completions it is about."""
    read: Callable[[bytes], list[Score]]
    """One score for each place. Raises MalformedReply."""


class Asked(NamedTuple):
    """How a member is asked for the scores of some completions."""

    scores: list[Score]
    """Of each completion; those that a call is about are still to be filled in."""
    calls: list[Call]


class Reader(Protocol):
    """How one member is asked."""

    template_digest: str
    """Groups with different digests were not read in the same way."""

    def refusal(self, prompt: str, messages: Sequence[Message] | None) -> str | None:
        """Why nothing could be scored whatever is completed, in words that name `prompt` or `messages`; None when
        something could."""

    def ask(self, completions: Sequence[Completion]) -> Asked: ...


class VllmReader:
    """A classifier behind vLLM reads token ids in its own chat template."""

    def __init__(self, member: VllmMember, tokenizer: ChatTokenizer) -> None:
        self._member = member
        self._tokenizer = tokenizer
        self.template_digest = tokenizer.template_digest

    def refusal(self, prompt: str, messages: Sequence[Message] | None) -> str | None:
        param, window = "prompt" if messages is None else "messages", self._member.window
        try:
            text = reward_writer(self._tokenizer, prompt, messages)("")
        except TemplateRefused as error:
            return f"the reward model's chat template refuses {param}: {error}"
        if self._tokenizer.surely_fits(text, window - 1):
            return None
        taken = len(encode_reward_texts(self._tokenizer, [text])[0])
        return f"{param} takes {taken} tokens of the reward model's window of {window}" if taken >= window else None

    def ask(self, completions: Sequence[Completion]) -> Asked:
        """Too long is a failure, never cut; so is a conversation that the model's template refuses.

        What surely fits goes out as text, and the engine makes the same tokens of it: to count them here as well would
        cost as much as all the rest of a request (docs/decisions/0014).
        """
        scores, texts = [], {}
        for (prompt, messages), same_prompt in groupby(enumerate(completions), key=lambda one: one[1][:2]):
            write = reward_writer(self._tokenizer, prompt, messages)
            for place, completion in same_prompt:
                try:
                    texts[place] = write(completion.answer)
                    scores.append(_TOO_LONG)
                except TemplateRefused as error:
                    scores.append(Score(None, "reward_error", reason=str(error)))
        fitting = self._fitting(texts)
        parts = [fitting[i : i + SEQUENCES_PER_CALL] for i in range(0, len(fitting), SEQUENCES_PER_CALL)]
        return Asked(scores, [self._call(part) for part in parts])

    def _fitting(self, texts: Mapping[int, str]) -> list[tuple[int, str]]:
        """Those that are no longer than the window; by place."""
        window = self._member.window
        unsure = [place for place, text in texts.items() if not self._tokenizer.surely_fits(text, window)]
        encoded = encode_reward_texts(self._tokenizer, [texts[place] for place in unsure]) if unsure else []
        too_long = {place for place, ids in zip(unsure, encoded, strict=True) if len(ids) > window}
        return [(place, text) for place, text in texts.items() if place not in too_long]

    def _call(self, part: Sequence[tuple[int, str]]) -> Call:
        texts = [text for _, text in part]
        body = classify_request(self._member.model, texts, add_special_tokens=not self._tokenizer.has_template)
        return Call("/classify", body, [place for place, _ in part], lambda answer: _classified(answer, len(part)))


class HttpReader:
    """A program that speaks our own schema reads texts; one call is about one prompt."""

    template_digest = AS_IT_IS

    def __init__(self, member: HttpMember) -> None:
        self._member = member

    def refusal(self, prompt: str, messages: Sequence[Message] | None) -> str | None:
        """It says for itself what it cannot read."""
        return None

    def ask(self, completions: Sequence[Completion]) -> Asked:
        calls = []
        for _, same_prompt in groupby(range(len(completions)), key=lambda place: completions[place][:2]):
            places = list(same_prompt)
            prompt, messages, _ = completions[places[0]]
            body = score_request(self._member.model, prompt, messages, [completions[place].answer for place in places])
            calls.append(Call(self._member.path, body, places, _scored(len(places))))
        return Asked([Score(None, "not_scored")] * len(completions), calls)


def open_readers(config: RewardConfig, tokenizer_of: Callable[[VllmMember], ChatTokenizer]) -> list[Reader]:
    """One for each member."""
    return [
        VllmReader(member, tokenizer_of(member)) if isinstance(member, VllmMember) else HttpReader(member)
        for member in config.members
    ]


def template_digest_of(readers: Sequence[Reader]) -> str:
    """Of all members together; with one it is that one's."""
    digests = [reader.template_digest for reader in readers]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]


def combined(config: RewardConfig, by_member: Sequence[Sequence[Score]]) -> list[Score]:
    """One score for each completion from those of each member: mean − λ · standard deviation of the scaled rewards.

    A completion that one member has no reward for has none: what the others say of it is another reward model's.
    by_member: in the order of the members, all equally long.
    """
    scales = [member.scale for member in config.members]
    if scales == [1.0]:
        return list(by_member[0])
    return [_of_one(own, scales, config.caution) for own in zip(*by_member, strict=True)]


def _of_one(scores: Sequence[Score], scales: Sequence[float], caution: float) -> Score:
    rewards = []
    for score, scale in zip(scores, scales, strict=True):
        if score.reward is None:
            return score
        rewards.append(scale * score.reward)
    if len(rewards) == 1:
        return _finite(Score(rewards[0]))
    # Not by the exact fractions of `statistics`, which know no infinity.
    mean = sum(rewards) / len(rewards)
    disagreement = math.hypot(*(reward - mean for reward in rewards)) / math.sqrt(len(rewards))
    return _finite(Score(mean - caution * disagreement, disagreement=disagreement))


def _finite(score: Score) -> Score:
    is_finite = math.isfinite(score.reward or 0.0) and math.isfinite(score.disagreement or 0.0)
    return score if is_finite else Score(None, "reward_not_finite")


def _classified(answer: bytes, count: int) -> list[Score]:
    return [_finite(Score(reward)) for reward in parse_classify(json_object(answer), count)]


def _scored(count: int) -> Callable[[bytes], list[Score]]:
    def read(answer: bytes) -> list[Score]:
        return [
            Score(None, "reward_error", reason=said.reason) if said.reward is None else _finite(Score(said.reward))
            for said in parse_score(json_object(answer), count)
        ]

    return read
