"""Which texts are nearly the same as one of some others.

Owns: word triples, what of them is boilerplate, MinHash to find pairs (Broder, 1997) and the exact measure to judge
them. Pure.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Final
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

SIMILAR: Final = 0.8
"""Jaccard's measure of two texts' triples."""
BANDS: Final = 16
ROWS: Final = 4
"""Of a band: a pair of measure .8 shares one of the bands with 1 − (1 − .8⁴)¹⁶, all but two in ten thousand."""
BOILERPLATE_SHARE: Final = 0.5
"""What stands in more of the texts than this, as a system prompt does, makes no two of them alike."""
LEAST_TEXTS: Final = 8
"""Of fewer none is called boilerplate."""


def near_duplicates(texts: Sequence[str], others: Sequence[str]) -> int:
    """How many of the texts are nearly the same as one of the others at least."""
    triples = _without_boilerplate([_triples(text) for text in (*texts, *others)])
    own, theirs = triples[: len(texts)], triples[len(texts) :]
    by_band: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for place, words in enumerate(theirs):
        for band in _bands(words):
            by_band[band].append(place)
    return sum(_has_twin(words, by_band, theirs) for words in own)


def _has_twin(words: frozenset[int], by_band: dict[tuple[int, bytes], list[int]], theirs: list[frozenset[int]]) -> bool:
    seen: set[int] = set()
    for band in _bands(words):
        for place in by_band.get(band, ()):
            if place not in seen and _jaccard(words, theirs[place]) >= SIMILAR:
                return True
            seen.add(place)
    return False


def _triples(text: str) -> frozenset[int]:
    """Of words, whatever their case and what stands between them; a shorter text is one triple."""
    words = re.findall(r"\w+", text.casefold())
    return frozenset(crc32(" ".join(words[i : i + 3]).encode()) for i in range(max(1, len(words) - 2)))


def _without_boilerplate(triples: list[frozenset[int]]) -> list[frozenset[int]]:
    if len(triples) < LEAST_TEXTS:
        return triples
    counts = Counter(triple for own in triples for triple in own)
    common = {triple for triple, count in counts.items() if count > BOILERPLATE_SHARE * len(triples)}
    return [own - common or own for own in triples]


def _bands(words: frozenset[int]) -> list[tuple[int, bytes]]:
    factor, summand = _hashes()
    hashed = (factor * np.fromiter(words, dtype=np.uint64, count=len(words)) + summand) >> np.uint64(32)
    lowest = hashed.min(axis=1).reshape(BANDS, ROWS)
    return [(band, row.tobytes()) for band, row in enumerate(lowest)]


@cache
def _hashes() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Factors and summands of as many hash functions, always the same ones: the upper half of a·x + b modulo 2⁶⁴, a odd
    (Dietzfelbinger's). Twice (BANDS · ROWS, 1)."""
    drawn = np.random.default_rng(0).integers(0, 2**64 - 1, size=(2, BANDS * ROWS, 1), dtype=np.uint64)
    return drawn[0] | np.uint64(1), drawn[1]


def _jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    return len(one & other) / len(one | other)
