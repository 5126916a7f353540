"""Builds the demo's policy and reward model from nothing: `bonsai models build-demo`.

Owns the order of the work and the directory it ends in. The same seed and thread count give the same files on the
same CPU. Everything is measured after the round trip through bf16, which is how the models are shipped and loaded.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from transformers import LlamaForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from bonsai.demo import grammar, lexicon, prompts
from bonsai.demo.build_policy import make_policy, train_policy
from bonsai.demo.build_reward import Pair, accuracy_by_gold, make_pairs, make_reward_model, train_reward_model
from bonsai.demo.build_tokenizer import build_tokenizer

NUM_REVIEWS: Final = 24_000
INVENTED_TITLE_SHARE: Final = 0.05
"""Share of reviews whose film has a title of random letters, so that a visitor's own title derails nothing."""
NUM_FRESH_PAIRS: Final = 1_000


@dataclass(frozen=True)
class BuildReport:
    """What was built, measured on the files as shipped."""

    seconds: float
    total_bytes: int
    policy_parameters: int
    policy_loss: float
    """Nats per token of a review, mean of the last training steps."""
    reward_model_parameters: int
    reward_model_accuracy: float
    """Share of fresh pairs of reviews that the reward model orders as the gold reward does."""


def build_demo_models(directory: Path, *, seed: int, report: Callable[[str, float], None]) -> BuildReport:
    """Train both models and write them to `directory`/policy and `directory`/reward.

    `report` is told what is being done and the share of it that is done, 0 to 1. Sets torch's global seed.
    """
    started = time.monotonic()
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    reviews = _draw_reviews(rng, lambda share: report("writing reviews", share))
    tokenizer = build_tokenizer(text for prompt, review in reviews for text in (prompt, prompt + review))

    policy = make_policy(tokenizer)
    loss = train_policy(policy, tokenizer, reviews, rng, lambda share: report("training the policy", share))
    _save(policy, tokenizer, directory / "policy")

    reward_model = make_reward_model(tokenizer)
    pairs = make_pairs(rng, reviews)
    train_reward_model(reward_model, tokenizer, pairs, rng, lambda share: report("training the reward model", share))
    _save(reward_model, tokenizer, directory / "reward")

    return BuildReport(
        seconds=time.monotonic() - started,
        total_bytes=sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
        policy_parameters=policy.num_parameters(),
        policy_loss=loss,
        reward_model_parameters=reward_model.num_parameters(),
        reward_model_accuracy=_shipped_accuracy(directory / "reward", rng),
    )


def _draw_reviews(rng: np.random.Generator, report: Callable[[float], None]) -> list[tuple[str, str]]:
    """Prompts and reviews; of the films with a real title, only training ones."""
    films = prompts.training_prompts()
    reviews: list[tuple[str, str]] = []
    for index in range(NUM_REVIEWS):
        prompt = films[int(rng.integers(len(films)))] if rng.random() >= INVENTED_TITLE_SHARE else _invent(rng)
        reviews.append((prompt, grammar.sample_review(rng, prompt)))
        report((index + 1) / NUM_REVIEWS)
    return reviews


def _invent(rng: np.random.Generator) -> str:
    """A prompt about a film whose title is made of random letters."""
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789éüß")
    title = " ".join(
        "".join(rng.choice(letters, size=int(rng.integers(2, 9)))).capitalize() for _ in range(rng.integers(1, 4))
    )
    genre = str(rng.choice(list(lexicon.GENRE_WORDS)))
    return prompts.render(genre, title, str(rng.choice(lexicon.OPENINGS)))


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Weights as bf16, with the tokenizer and its template beside them."""
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory, save_jinja_files=False)


def _shipped_accuracy(directory: Path, rng: np.random.Generator) -> float:
    """The reward model's accuracy on fresh pairs, from the files."""
    model = LlamaForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    films = prompts.training_prompts()
    chosen = [films[int(row)] for row in rng.integers(len(films), size=NUM_FRESH_PAIRS)]
    pairs = [Pair(prompt, grammar.sample_review(rng, prompt), grammar.sample_review(rng, prompt)) for prompt in chosen]
    return accuracy_by_gold(model, tokenizer, pairs)
