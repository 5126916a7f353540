"""How different completions are from each other: distinct-n (Li et al., arXiv:1510.03055).

On token ids, so that it needs no language. It falls with the number and the length of completions: compare
equally many.
"""

from __future__ import annotations

from collections.abc import Sequence


def distinct_n(completions: Sequence[Sequence[int]], n: int) -> float | None:
    """Different n-grams divided by all n-grams of some completions; in (0, 1]. None where there is no n-gram."""
    grams = [tuple(tokens[i : i + n]) for tokens in completions for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None
