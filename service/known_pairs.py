"""Answers of which one is known to be better, for a reward model to prove itself on.

Owns: what a pair is, an operator's file of them, the built-in ones, and which of a reward model's members are asked
about which. Does not own: the test (reward_test.py).

The built-in pairs (general_pairs.json) are what any reward model of general text should rank rightly: an answer against
gibberish, an insult, a wrong sum. In half of them the better answer is the longer one, so that length is no cue.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from bon_algos.contracts import Message, Record, RewardConfig, VllmMember

NO_PAIRS: Final = "none"
"""Stands for a file where the operator wants no test."""
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


def general_pairs() -> tuple[Pair, ...]:
    """The built-in ones."""
    return _PAIRS.validate_json((files("service") / "general_pairs.json").read_bytes())


class Tested(NamedTuple):
    """What is asked about which pairs."""

    member: int | None
    """Its place among the reward model's members; None for all of the reward model."""
    pairs: tuple[Pair, ...]


def tested(told: Path | Literal["none"] | None, config: RewardConfig) -> tuple[Tested, ...]:
    """The operator's own pairs are about the whole; the built-in ones about each member that reads general text.
    Nothing: the reward model stays untested. Raises ValueError for a file that is none of pairs."""
    if told == NO_PAIRS:
        return ()
    if told is not None:
        return (Tested(None, read_pairs(told)),)
    pairs = general_pairs()
    return tuple(Tested(place, pairs) for place, member in enumerate(config.members) if isinstance(member, VllmMember))


def _readable(told: Path | Literal["none"]) -> Path | Literal["none"]:
    if told != NO_PAIRS:
        read_pairs(Path(told))
    return told


PairsSetting = Annotated[Path | Literal["none"], AfterValidator(_readable)]
"""A file of pairs, which can be read, or the word that there are none."""
