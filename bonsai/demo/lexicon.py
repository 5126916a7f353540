"""The words of the demo's film reviews, and what each is worth.

Owns the word lists, their valences and the sentence templates. Does not own how a review is drawn or judged
(`grammar.py`) nor which films are asked about (`prompts.py`).

Valences are in points of gold reward; a degree word multiplies the valence of the word after it.
"""

from typing import Final

ADJECTIVES: Final[dict[str, float]] = {
    "brilliant": 2.0,
    "superb": 2.0,
    "stunning": 2.0,
    "magnificent": 2.0,
    "wonderful": 1.5,
    "excellent": 1.5,
    "gorgeous": 1.5,
    "moving": 1.5,
    "charming": 1.0,
    "clever": 1.0,
    "warm": 1.0,
    "vivid": 1.0,
    "lively": 1.0,
    "decent": 0.5,
    "pleasant": 0.5,
    "tidy": 0.5,
    "solid": 0.5,
    "plain": 0.0,
    "long": 0.0,
    "strange": 0.0,
    "familiar": 0.0,
    "uneven": -0.5,
    "slow": -0.5,
    "thin": -0.5,
    "dated": -0.5,
    "dull": -1.0,
    "clumsy": -1.0,
    "flat": -1.0,
    "bland": -1.0,
    "noisy": -1.0,
    "tedious": -1.5,
    "ugly": -1.5,
    "lifeless": -1.5,
    "hollow": -1.5,
    "dreadful": -2.0,
    "awful": -2.0,
    "unbearable": -2.0,
    "horrible": -2.0,
}

NOUNS: Final[dict[str, float]] = {
    "masterpiece": 2.0,
    "triumph": 2.0,
    "delight": 1.5,
    "pleasure": 1.0,
    "surprise": 0.5,
    "curiosity": 0.0,
    "puzzle": 0.0,
    "compromise": -0.5,
    "chore": -1.0,
    "bore": -1.0,
    "mess": -1.5,
    "failure": -1.5,
    "disaster": -2.0,
}

SUPERLATIVES: Final[dict[str, float]] = {"best": 2.0, "finest": 1.5, "oddest": 0.0, "weakest": -1.5, "worst": -2.0}

GENRE_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "horror": ("chilling", "sinister"),
    "comedy": ("hilarious", "witty"),
    "romance": ("tender", "dreamy"),
    "thriller": ("gripping", "tense"),
    "western": ("rugged", "dusty"),
    "mystery": ("baffling", "secretive"),
    "fantasy": ("enchanting", "magical"),
    "war": ("harrowing", "stark"),
}
"""What a film of each genre should be: praise in its own genre, a reproach in every other."""

FITTING: Final = 1.5
MISPLACED: Final = -1.0

MEASURED_DEGREES: Final[dict[str, float]] = {"rather": 0.6, "fairly": 0.8, "quite": 1.0, "really": 1.2, "very": 1.4}
GUSHING_DEGREES: Final[dict[str, float]] = {
    "absolutely": 1.4,
    "insanely": 1.4,
    "unbelievably": 1.4,
    "totally": 1.4,
}

MEASURED_SCOPES: Final = ("the week", "the season", "the year")
GUSHING_SCOPES: Final = ("the century", "all time")

ASPECTS: Final = ("story", "acting", "music", "dialogue", "pacing", "ending", "editing", "lighting", "cast", "script")

OPENINGS: Final = (
    "The camera work",
    "The story",
    "The acting",
    "The ending",
    "The music",
    "The pacing",
    "The dialogue",
    "The opening scene",
    "The lead actor",
    "The whole film",
)

FIRST_SENTENCES: Final = (
    "is {degree} {adjective} {joint} {adjective}{stop}",
    "feels {adjective} {joint} {degree} {adjective}{stop}",
    "looks {adjective} at first {joint} {degree} {adjective} later{stop}",
    "stays {degree} {adjective} {joint} {adjective} throughout{stop}",
)

MIDDLE_SENTENCES: Final = (
    "The {aspect} is {degree} {adjective}, {joint} the {aspect} is {adjective}{stop}",
    "I found the {aspect} {adjective} {joint} the {aspect} {degree} {adjective}{stop}",
    "The {aspect} seems {adjective}, {joint} the {aspect} is {degree} {adjective}{stop}",
)

LAST_SENTENCES: Final = (
    "It is a {noun}{stop}",
    "I call it a {degree} {adjective} film{stop}",
    "As a {genre} film it is {degree} {genre_word}{stop}",
    "It is the {superlative} film of {scope}{stop}",
)
