"""The demo's world: film reviews drawn from a small grammar, whose worth is known exactly.

Owns how a review is drawn (`sample_review`), what it is worth (`gold_reward`) and how the simulated annotators
see it (`annotator_utility`). Does not own the words (`lexicon.py`), the prompts (`prompts.py`) or the models
trained on all this (`build.py`). Standard library and numpy only.

Why a best-of-n demo needs this much: the annotators value enthusiasm for its own sake, the gold reward is
satisfied at some point and then charges for exaggeration. A reward model trained on the annotators is therefore a
good guide for moderate n and a bad one for large n, as real ones are (arXiv:2210.10760).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise, product
from typing import Final

import numpy as np

from bonsai.demo import lexicon

ENOUGH: Final = 5.0
"""Merit beyond this many points earns nothing more."""
TOLERATED_GUSH: Final = 1
"""Marks of enthusiasm that the gold reward lets pass."""
GUSH_PRICE: Final = 1.0
"""Points per squared mark of enthusiasm beyond the tolerated ones."""
BREAK_PRICE: Final = 1.0
"""Points per break of coherence: two words the grammar never puts together, a repetition, a wrong genre."""
UNFINISHED_PRICE: Final = 1.0
JUDGES_NOTHING_PRICE: Final = 6.0
GUSH_CHARM: Final = 1.0
"""Points by which an annotator overrates each mark of enthusiasm."""

_WORD = re.compile(r"[a-z']+|[.,!?]")
_SLOT = re.compile(r"\{(\w+)\}")
_DEGREES: Final = lexicon.MEASURED_DEGREES | lexicon.GUSHING_DEGREES
_JUDGEMENTS: Final = lexicon.ADJECTIVES | lexicon.NOUNS | lexicon.SUPERLATIVES
_START: Final = "<start>"


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks of a text, in order."""
    return _WORD.findall(text.lower())


def genre_of(prompt: str) -> str | None:
    """The first genre a prompt names, or None."""
    return next((word for word in words(prompt) if word in lexicon.GENRE_WORDS), None)


def _valence(word: str, genre: str | None) -> float | None:
    """Points of one word, None where it judges nothing."""
    if genre is not None:
        if word in lexicon.GENRE_WORDS[genre]:
            return lexicon.FITTING
        if any(word in fitting for fitting in lexicon.GENRE_WORDS.values()):
            return lexicon.MISPLACED
    return _JUDGEMENTS.get(word)


def _judgements(text: Sequence[str], genre: str | None) -> list[tuple[int, float]]:
    """Position and points of every judging word, its degree word applied."""
    found: list[tuple[int, float]] = []
    for position, word in enumerate(text):
        valence = _valence(word, genre)
        if valence is not None:
            degree = _DEGREES.get(text[position - 1], 1.0) if position else 1.0
            found.append((position, degree * valence))
    return found


def merit(prompt: str, completion: str) -> float:
    """Σ degree · valence over the different judging words of a review. Points; unknown words are neutral.

    What is said again counts as it was said the first time, once.
    """
    text = words(completion)
    said_last_to_first = reversed(_judgements(text, genre_of(prompt)))
    return sum({text[position]: points for position, points in said_last_to_first}.values())


def gush(completion: str) -> int:
    """Marks of enthusiasm: gushing degree words and scopes, and exclamation marks."""
    text = words(completion)
    scopes = sum(completion.lower().count(f"of {scope}") for scope in lexicon.GUSHING_SCOPES)
    return scopes + sum(word == "!" or word in lexicon.GUSHING_DEGREES for word in text)


def breaks(prompt: str, completion: str) -> int:
    """How often a review loses its thread.

    Counts neighbouring words that the grammar knows and never puts together, judging words used twice, and genres
    named that are not the prompt's.
    """
    text = words(completion)
    pairs, known, genre = allowed_pairs(), vocabulary(), genre_of(prompt)
    strange = sum(
        right in known and (left in known or left == _START) and (left, right) not in pairs
        for left, right in pairwise([_START, *text])
    )
    found = _judgements(text, genre)
    repeated = len(found) - len({text[position] for position, _ in found})
    named = [word for word in text if word in lexicon.GENRE_WORDS]
    misnamed = sum(word != genre for word in named) if genre is not None else 0
    return strange + repeated + misnamed


def gold_reward(prompt: str, completion: str) -> float:
    """What a review is really worth, for any text. Points; about -10 to `ENOUGH`.

    min(merit, ENOUGH) − GUSH_PRICE · max(0, gush − TOLERATED_GUSH)² − BREAK_PRICE · breaks, less
    UNFINISHED_PRICE where the text does not end with a stop and JUDGES_NOTHING_PRICE where no word judges.
    """
    text = words(completion)
    excess = max(0, gush(completion) - TOLERATED_GUSH)
    reward = min(merit(prompt, completion), ENOUGH)
    reward -= GUSH_PRICE * excess**2 + BREAK_PRICE * breaks(prompt, completion)
    if not text or text[-1] not in (".", "!"):
        reward -= UNFINISHED_PRICE
    if not _judgements(text, genre_of(prompt)):
        reward -= JUDGES_NOTHING_PRICE
    return reward


def annotator_utility(prompt: str, completion: str) -> float:
    """What an annotator sees: merit without limit, enthusiasm overrated, coherence as it is. Points."""
    return merit(prompt, completion) + GUSH_CHARM * gush(completion) - BREAK_PRICE * breaks(prompt, completion)


def _joint(left: float, right: float) -> str:
    """The conjunction between two judgements: "but" where their signs oppose."""
    return "but" if left * right < 0 else "and"


MOOD_SPREAD: Final = 0.25
"""How strongly a reviewer's mood, standard normal, tilts the choice of words: log-odds per point of valence."""
EXCITABLE: Final = (0.08, 0.15, 0.4)
EXCITABLE_SHARES: Final = (0.5, 0.35, 0.15)
"""Chance of a mark of enthusiasm wherever one fits, for the three tempers of reviewers, and their shares."""


def _tilted(rng: np.random.Generator, points: Mapping[str, float], mood: float) -> str:
    """One word, drawn with log-odds proportional to mood times points."""
    logits = MOOD_SPREAD * mood * np.array(list(points.values()))
    weights = np.exp(logits - logits.max())
    return str(rng.choice(list(points), p=weights / weights.sum()))


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


def _slot_words(slot: str) -> list[str]:
    """Everything a slot can hold."""
    return list(
        {
            "adjective": lexicon.ADJECTIVES,
            "joint": ("and", "but"),
            "degree": _DEGREES,
            "scope": lexicon.MEASURED_SCOPES + lexicon.GUSHING_SCOPES,
            "stop": (".", "!"),
            "aspect": lexicon.ASPECTS,
            "noun": lexicon.NOUNS,
            "superlative": lexicon.SUPERLATIVES,
            "genre": lexicon.GENRE_WORDS,
            "genre_word": [word for fitting in lexicon.GENRE_WORDS.values() for word in fitting],
        }[slot]
    )


@cache
def vocabulary() -> frozenset[str]:
    """Every word a review can hold, lower case."""
    return frozenset(word for pair in allowed_pairs() for word in pair) - {_START}


@cache
def allowed_pairs() -> frozenset[tuple[str, str]]:
    """Every two neighbouring words, lower case, that the grammar can produce."""
    pairs: set[tuple[str, str]] = set()
    openers = {words(template)[0] for template in (*lexicon.MIDDLE_SENTENCES, *lexicon.LAST_SENTENCES)}
    pairs |= set(product((".", "!"), openers))
    pairs |= {(_START, words(template)[0]) for template in lexicon.FIRST_SENTENCES}
    for template in (*lexicon.FIRST_SENTENCES, *lexicon.MIDDLE_SENTENCES, *lexicon.LAST_SENTENCES):
        pieces = re.findall(r"\{\w+\}|[A-Za-z]+|,", template)
        choices = [[words(w) for w in _slot_words(p[1:-1])] if p[0] == "{" else [words(p)] for p in pieces]
        pairs |= {(a, b) for choice in choices for inner in choice for a, b in pairwise(inner)}
        pairs |= {(a[-1], b[0]) for left, right in pairwise(choices) for a, b in product(left, right)}
    return frozenset(pairs)
