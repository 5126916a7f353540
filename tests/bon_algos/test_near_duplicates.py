"""Texts that are nearly the same, by hand and against the measure taken of every pair."""

import random

from bon_algos.near_duplicates import near_duplicates

WORDS = [f"word{i}" for i in range(500)]


def test_case_and_what_stands_between_words_make_no_difference():
    assert near_duplicates(["Tell me, of the SEA!"], ["tell me of the sea"]) == 1
    assert near_duplicates(["Tell me of the sea"], ["tell me of the land and its people"]) == 0


def test_one_word_of_many_makes_a_near_duplicate_and_of_few_does_not():
    """Of 40 words one other changes 3 of 38 triples: 35/41 = .85. Of 10 words: 5/11 = .45."""
    long, short = WORDS[:40], WORDS[:10]
    assert near_duplicates([" ".join(long)], [" ".join([*long[:20], "other", *long[21:]])]) == 1
    assert near_duplicates([" ".join(short)], [" ".join([*short[:5], "other", *short[6:]])]) == 0


def test_a_system_prompt_makes_no_two_prompts_alike():
    """Forty words before every question of six."""
    generator = random.Random(0)
    asked = [" ".join(WORDS[:40] + generator.sample(WORDS[40:], 6)) for _ in range(30)]
    assert near_duplicates(asked[:10], asked[10:]) == 0
    assert near_duplicates([*asked[:10], asked[20]], asked[10:]) == 1


def test_what_every_pair_says_is_found():
    generator = random.Random(1)
    texts = [generator.sample(WORDS, 60) for _ in range(100)]
    copies = [[*text[: i % 60], "other", *text[i % 60 :]] for i, text in enumerate(texts)]
    found = near_duplicates([" ".join(copy) for copy in copies], [" ".join(text) for text in texts])
    assert found == 100  # one word more: at least 56 of 61 triples


def test_nothing_is_like_nothing():
    assert near_duplicates([], ["a"]) == near_duplicates(["a"], []) == 0
