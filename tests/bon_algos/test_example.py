"""What the library's own page shows."""

from __future__ import annotations

import doctest

import bon_algos


def test_the_example_of_the_page_does_what_it_says():
    found = doctest.testmod(bon_algos, raise_on_error=False)
    assert (found.failed, found.attempted > 5) == (0, True)
