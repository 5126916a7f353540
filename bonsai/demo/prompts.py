"""The films the demo asks about: training prompts, and held-out ones that only a benchmark may send.

Owns the titles and the split. Does not own the reviews (`grammar.py`). No title is in both sets.
"""

from functools import cache
from typing import Final

import numpy as np

from bonsai.demo import lexicon

NUM_TRAINING: Final = 640
NUM_HELD_OUT: Final = 128

_FIRST: Final = (
    "Silent Broken Golden Hidden Frozen Scarlet Distant Hollow Burning Crooked Gentle Restless Velvet Bitter Ancient "
    "Wandering Crimson Fading Lonely Marble Northern Paper Quiet Rising Second Stolen Sunken Tangled Winter Wooden"
)
_SECOND: Final = (
    "Harbor Garden Letter Mirror River Lantern Orchard Bridge Castle Engine Forest Station Island Kingdom Market "
    "Meadow Moon Mountain Ocean Palace Piano Railway Season Shadow Signal Stranger Summer Tower Valley Window"
)


def render(genre: str, title: str, opening: str) -> str:
    """The text of a prompt: what the policy continues, or what the user says to it."""
    return f"Review of the {genre} film {title}. {opening}"


@cache
def _split() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Both sets, each title used once: shuffled with a fixed seed, so that they never move."""
    rng = np.random.default_rng(20_260_101)
    titles = [f"The {first} {second}" for first in _FIRST.split() for second in _SECOND.split()]
    genres = list(lexicon.GENRE_WORDS)
    prompts = tuple(
        render(str(rng.choice(genres)), str(title), str(rng.choice(lexicon.OPENINGS)))
        for title in rng.permutation(titles)[: NUM_TRAINING + NUM_HELD_OUT]
    )
    return prompts[:NUM_TRAINING], prompts[NUM_TRAINING:]


def training_prompts() -> tuple[str, ...]:
    """The prompts that traffic and training may use."""
    return _split()[0]


def held_out_prompts() -> tuple[str, ...]:
    """The prompts that nothing but a benchmark may send."""
    return _split()[1]
