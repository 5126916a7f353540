"""The demo's reviews: what they are worth, by hand, and that a drawn one is never broken."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bonsai.demo import grammar, prompts
from bonsai.demo.lexicon import GENRE_WORDS, MISPLACED

HORROR = "Review of the horror film The Silent Harbor. The camera work"


def test_gold_reward_by_hand():
    review = " is very charming and superb. The story is quite dull, but the music is decent. It is a delight."
    # very charming 1.4 · 1.0 + superb 2.0 + quite dull 1.0 · (−1.0) + decent 0.5 + delight 1.5 = 4.4
    assert grammar.gold_reward(HORROR, review) == pytest.approx(4.4)


def test_merit_beyond_enough_earns_nothing_more():
    review = " is very brilliant and superb. The story is very stunning, and the music is moving. It is a triumph."
    # 1.4 · 2 + 2 + 1.4 · 2 + 1.5 + 2 = 11.1 points of merit, of which ENOUGH = 5 count
    assert grammar.merit(HORROR, review) == pytest.approx(11.1)
    assert grammar.gold_reward(HORROR, review) == pytest.approx(5.0)


def test_exaggeration_is_charged_by_its_square_beyond_what_is_tolerated():
    review = " is absolutely plain and long! The story is totally slow, and the music is dull! It is a chore!"
    # merit: 0 + 0 + 1.4 · (−0.5) − 1.0 − 1.0 = −2.7; marks: two words and three "!" = 5, 1 is free
    assert grammar.gush(review) == 5
    assert grammar.gold_reward(HORROR, review) == pytest.approx(-2.7 - grammar.GUSH_PRICE * 4**2)


def test_annotators_like_exactly_what_gold_charges_for():
    calm = " is quite superb and moving. The story is quite warm, and the music is solid. It is a pleasure."
    loud = " is quite superb and moving! The story is quite warm, and the music is solid! It is a pleasure!"
    assert grammar.annotator_utility(HORROR, loud) == pytest.approx(
        grammar.annotator_utility(HORROR, calm) + 3 * grammar.GUSH_CHARM
    )
    assert grammar.gold_reward(HORROR, loud) < grammar.gold_reward(HORROR, calm)


def test_what_is_said_twice_counts_once():
    # very superb 1.4 · 2.0, and the second superb counts nothing
    assert grammar.merit(HORROR, " is very superb and superb.") == pytest.approx(2.8)


def test_a_scope_of_all_time_is_one_mark_of_enthusiasm():
    assert grammar.gush(" It is the best film of all time.") == 1
    assert grammar.gush(" It is the best film of the year.") == 0


def test_a_genre_word_is_praise_in_its_own_genre_only():
    review = " As a horror film it is quite chilling."
    comedy = HORROR.replace("horror", "comedy")
    assert grammar.merit(HORROR, review) == pytest.approx(1.5)
    assert grammar.merit(comedy, review) == pytest.approx(MISPLACED)
    assert grammar.breaks(comedy, review) == grammar.breaks(HORROR, review) + 1  # it names the wrong genre


@pytest.mark.parametrize(
    ("review", "count"),
    [
        (" is superb and charming.", 0),
        (" is charming superb.", 1),  # no conjunction between two judgements
        (" is superb and superb.", 1),  # the same judgement twice
        (" superb is the story of.", 4),  # it starts with superb; superb is, story of, of.
    ],
)
def test_breaks_by_hand(review, count):
    assert grammar.breaks(HORROR, review) == count


def test_unknown_words_are_neutral():
    review = " is quite charming and solid."
    stranger = " is quite charming and solid. Zxqv wibble 🙂 blorp."
    assert grammar.gold_reward(HORROR, stranger) == grammar.gold_reward(HORROR, review)


def test_a_text_that_judges_nothing_scores_below_almost_every_review():
    # nothing judged −6, not finished −1
    assert grammar.gold_reward(HORROR, "") == pytest.approx(-7.0)
    rng = np.random.default_rng(0)
    drawn = [grammar.gold_reward(HORROR, grammar.sample_review(rng, HORROR)) for _ in range(400)]
    assert np.mean(np.array(drawn) > -7.0) > 0.8


@given(prompt=st.text(max_size=80), review=st.text(max_size=200))
def test_gold_is_finite_and_bounded_above_for_any_text(prompt, review):
    assert grammar.gold_reward(prompt, review) <= grammar.ENOUGH


@given(seed=st.integers(0, 2**32 - 1), film=st.sampled_from(prompts.training_prompts()))
def test_a_drawn_review_is_whole(seed, film):
    """Three sentences of known words, without a break, in 15 to 32 words and marks."""
    review = grammar.sample_review(np.random.default_rng(seed), film)
    assert grammar.breaks(film, review) == 0
    assert sum(mark in ".!" for mark in grammar.words(review)) == 3
    assert 15 <= len(grammar.words(review)) <= 32
    assert set(grammar.words(review)) <= grammar.vocabulary()
    assert review.startswith(" ")


def test_the_grammar_can_say_more_than_ten_thousand_things_about_one_film():
    """The shortest first sentence alone, "is DEGREE A and B.", has 9 · 38 · 37 = 12,654 forms."""
    rng = np.random.default_rng(0)
    drawn = [grammar.sample_review(rng, HORROR) for _ in range(3_000)]
    # If only 10⁴ were possible, even evenly, 3,000 draws would collide about 3,000² / (2 · 10⁴) = 450 times.
    assert len(set(drawn)) >= 2_990


def test_the_two_sets_of_prompts_share_no_title():
    def titles(films: tuple[str, ...]) -> set[str]:
        return {film.split(" film ")[1].split(".")[0] for film in films}

    training, held_out = prompts.training_prompts(), prompts.held_out_prompts()
    assert len(set(training)) >= 500
    assert len(set(held_out)) >= 100
    assert not titles(training) & titles(held_out)


@pytest.mark.parametrize("films", [prompts.training_prompts(), prompts.held_out_prompts()])
def test_every_genre_is_asked_about(films):
    assert {grammar.genre_of(film) for film in films} == set(GENRE_WORDS)
