"""Rewards that can be checked: 1.0 where a completion is right, 0.0 where it is not.

Each function here makes a reward function from its parameters. A file of two lines is a reward model:

    from bonsai.verifiable import exact_answer
    reward = exact_answer("answers.jsonl")        # bonsai up --reward-function rewards:reward

Owns: what counts as a match, as JSON of a form, as the same answer. Does not own how functions are called.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation."""
Reward = Callable[[Prompt, list[str]], list[float | None]]

_FENCED: Final = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?```", re.DOTALL)
_NUMBER: Final = re.compile(r"[-+]?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?")
_BOXED: Final = "\\boxed{"
MOST_DIGITS: Final = 100


def matches(pattern: str, *, whole: bool = False) -> Reward:
    """1.0 where the regular expression is found; whole: where it is all of the completion, blanks around it apart."""
    compiled = re.compile(pattern)

    def reward(prompt: Prompt, completions: list[str]) -> list[float | None]:
        found = (compiled.fullmatch(text.strip()) if whole else compiled.search(text) for text in completions)
        return [float(one is not None) for one in found]

    return reward


def json_conforms(schema: Mapping[str, Any]) -> Reward:
    """1.0 where the completion, or its last fenced block, is JSON that the JSON Schema accepts. ValueError for a
    schema that is none."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"no JSON Schema: {error.message}") from None
    validator = Draft202012Validator(schema)

    def conforms(text: str) -> bool:
        fenced = _FENCED.findall(text)
        try:
            return bool(validator.is_valid(json.loads(fenced[-1] if fenced else text)))
        except (ValueError, RecursionError):
            return False

    def reward(prompt: Prompt, completions: list[str]) -> list[float | None]:
        return [float(conforms(text)) for text in completions]

    return reward


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt: str
    answer: str


def exact_answer(answers: str | Path) -> Reward:
    """1.0 where a completion's final answer is the known one; no reward where a prompt's answer is not known.

    answers: a file of lines {"prompt": …, "answer": …}. The prompt is the plain one, or the last message of a
    conversation. ValueError, in words, when the file holds something else.
    """
    return _ExactAnswer(Path(answers))


class _ExactAnswer:
    """A reward function whose id also depends on its answers."""

    def __init__(self, file: Path) -> None:
        content = file.read_bytes()
        self.identity = sha256(content).hexdigest()
        self._answers: dict[str, str] = {}
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                known = _Answer.model_validate_json(line)
            except ValidationError as error:
                fault = error.errors(include_input=False, include_url=False)[0]
                raise ValueError(f"{file}, line {number}: {fault['msg']}") from None
            self._answers[known.prompt] = known.answer

    def __call__(self, prompt: Prompt, completions: list[str]) -> list[float | None]:
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        known = self._answers.get(asked)
        if known is None:
            return [None] * len(completions)
        return [float(same_answer(final_answer(text), known)) for text in completions]


def final_answer(text: str) -> str:
    r"""What a text comes to: what is in its last \boxed{}, else its last number, else all of it."""
    if (boxed := _last_boxed(text)) is not None:
        return boxed
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else text


def same_answer(one: str, other: str) -> bool:
    """As numbers where both are (1,000 is 1000 and 0.5 is 1/2), else as texts without case, blanks at the ends and
    the full stop."""
    first, second = _number(one), _number(other)
    return first == second if first is not None and second is not None else _plain(one) == _plain(other)


def _last_boxed(text: str) -> str | None:
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth, begin = 1, start + len(_BOXED)
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return None


def _number(text: str) -> Fraction | None:
    digits = _plain(text).replace(",", "").replace(" ", "").strip("$")
    try:
        return Fraction(digits) if len(digits) <= MOST_DIGITS else None
    except (ValueError, ZeroDivisionError):
        return None


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".")
