"""What is said of texts: refusals in so many words, silence about what cannot be told, and distinct-n by hand."""

import pytest

from bon_algos.diversity import distinct_n
from bon_algos.refusals import is_refusal


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I cannot do this for you.",
        "I cannot assist with that request.",
        "Unfortunately, I am unable to provide this information.",
        "As an AI language model, I don't have opinions about films.",
        "I must decline.",
        "I apologize, but I won't write that.",
    ],
)
def test_what_declines_in_so_many_words_is_a_refusal(text):
    assert is_refusal(text) is True


@pytest.mark.parametrize(
    "text",
    [
        "The story is warm and I cannot recommend it enough.",
        "I am sorry that the film ended, it is a delight.",
        "It is a long film. I can't help you love it.",  # only the first sentence is looked at
        "The villain says: you must decline, and the hero does not.",
        "I can't believe how good this was.",
    ],
)
def test_what_answers_is_none(text):
    assert is_refusal(text) is False


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n",
        "No.",
        "42 = 6 × 7",
        "Ich kann dabei leider nicht helfen, das verstößt gegen meine Regeln.",
        "申し訳ありませんが、お手伝いできません。",
        "def f(x): return x",
    ],
)
def test_of_what_is_short_or_not_english_nothing_is_said(text):
    assert is_refusal(text) is None


def test_distinct_n_by_hand():
    """1 2 1 2 and 1 2: unigrams 6, different 2; bigrams 12 21 12 and 12: 4, different 2; trigrams 121, 212."""
    rows = [(1, 2, 1, 2), (1, 2)]
    assert [distinct_n(rows, n) for n in (1, 2, 3)] == [2 / 6, 2 / 4, 2 / 2]


@pytest.mark.parametrize("rows", [[], [()], [(1,), (2,)]])
def test_completions_without_a_bigram_have_no_distinct_2(rows):
    assert distinct_n(rows, 2) is None
