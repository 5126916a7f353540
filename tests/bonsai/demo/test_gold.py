"""The gold reward as a reward function says what the grammar says, of texts and of conversations."""

from bonsai.demo.gold import reward
from bonsai.demo.grammar import gold_reward
from bonsai.demo.prompts import training_prompts

REVIEWS = [" is really brilliant and warm. It is a delight.", " is awful!", ""]


def test_a_text_and_a_conversation_that_ends_with_it_are_judged_alike():
    prompt = training_prompts()[0]
    expected = [gold_reward(prompt, review) for review in REVIEWS]
    assert reward(prompt, REVIEWS) == expected
    assert (
        reward([{"role": "system", "content": "You review films."}, {"role": "user", "content": prompt}], REVIEWS)
        == expected
    )
