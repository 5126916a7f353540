"""How the demo's film reviews are written: a mood, a temper, three sentences.

Owns the drawing of a review. Does not own the words (`lexicon.py`) or what a review is worth (`grammar.py`).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np

from bonsai.demo import lexicon
from bonsai.demo.grammar import genre_of

_SLOT = re.compile(r"\{(\w+)\}")

MOOD_SPREAD: Final = 0.25
"""How strongly a reviewer's mood, standard normal, tilts the choice of words: log-odds per point of valence."""
EXCITABLE: Final = (0.08, 0.16, 0.8)
EXCITABLE_SHARES: Final = (0.5, 0.48, 0.02)
"""Chance of a mark of enthusiasm wherever one fits, for the three tempers of reviewers, and their shares."""


def _tilted(rng: np.random.Generator, points: Mapping[str, float], mood: float) -> str:
    """One word, drawn with log-odds proportional to mood times points."""
    logits = MOOD_SPREAD * mood * np.array(list(points.values()))
    weights = np.exp(logits - logits.max())
    return str(rng.choice(list(points), p=weights / weights.sum()))


def _joint(left: float, right: float) -> str:
    """The conjunction between two judgements: "but" where their signs oppose."""
    return "but" if left * right < 0 else "and"


class _Reviewer:
    """One reviewer's mood and temper, and the words not used up yet."""

    def __init__(self, rng: np.random.Generator, genre: str) -> None:
        self._rng, self._genre = rng, genre
        self._mood = float(rng.normal())
        self._excitement = float(rng.choice(EXCITABLE, p=EXCITABLE_SHARES))
        self._adjectives = dict(lexicon.ADJECTIVES)
        self._aspects = list(lexicon.ASPECTS)

    def write(self, template: str) -> str:
        """One sentence: every slot filled, left to right."""
        adjectives = [self._take_adjective() for _ in range(template.count("{adjective}"))]
        joint = _joint(*(lexicon.ADJECTIVES[word] for word in adjectives)) if len(adjectives) == 2 else ""
        left = iter(adjectives)
        return _SLOT.sub(lambda slot: self._fill(slot[1], left, joint), template)

    def _fill(self, slot: str, adjectives: Iterator[str], joint: str) -> str:
        gushes = self._rng.random() < self._excitement
        match slot:
            case "adjective":
                return next(adjectives)
            case "joint":
                return joint
            case "degree":
                return str(self._rng.choice(list(lexicon.GUSHING_DEGREES if gushes else lexicon.MEASURED_DEGREES)))
            case "scope":
                return str(self._rng.choice(lexicon.GUSHING_SCOPES if gushes else lexicon.MEASURED_SCOPES))
            case "stop":
                return "!" if gushes else "."
            case "aspect":
                return self._aspects.pop(int(self._rng.integers(len(self._aspects))))
            case "noun":
                return _tilted(self._rng, lexicon.NOUNS, self._mood)
            case "superlative":
                return _tilted(self._rng, lexicon.SUPERLATIVES, self._mood)
            case "genre":
                return self._genre
            case "genre_word":
                return _tilted(self._rng, _genre_points(self._genre), self._mood)
        raise ValueError(f"no such slot: {slot}")

    def _take_adjective(self) -> str:
        word = _tilted(self._rng, self._adjectives, self._mood)
        del self._adjectives[word]
        return word


def _genre_points(genre: str) -> dict[str, float]:
    """Points of every genre word in a film of this genre."""
    return {
        word: lexicon.FITTING if own == genre else lexicon.MISPLACED
        for own, fitting in lexicon.GENRE_WORDS.items()
        for word in fitting
    }


def sample_review(rng: np.random.Generator, prompt: str) -> str:
    """One review that continues the prompt: three sentences, with the space that joins them to it."""
    genre = genre_of(prompt)
    if genre is None:
        raise ValueError(f"the prompt names no known genre: {prompt!r}")
    reviewer = _Reviewer(rng, genre)
    kinds = (lexicon.FIRST_SENTENCES, lexicon.MIDDLE_SENTENCES, lexicon.LAST_SENTENCES)
    return "".join(" " + reviewer.write(str(rng.choice(kind))) for kind in kinds)
