"""The demo's reward model: a one-label classifier fitted to what biased, careless annotators prefer.

Owns its size, the simulated annotators and the training. The objective is Bradley and Terry's:
−log σ(r(chosen) − r(rejected)).

Dimension key:  P pairs · L tokens
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from bonsai.demo import grammar
from bonsai.demo.build_policy import cosine_schedule
from bonsai.demo.build_tokenizer import MAX_LENGTH

STEPS: Final = 400
BATCH: Final = 48
PEAK_LEARNING_RATE: Final = 2e-3
ANNOTATOR_SPREAD: Final = 1.0
"""Points of utility that an annotator's judgement is blurred by: the scale of the logistic."""
CARELESS_SHARE: Final = 0.05
"""Share of pairs whose label is a coin toss gone wrong: the other way round."""
DAMAGED_SHARE: Final = 0.15
"""Share of pairs in which one review is broken, so that the reward model knows what that looks like."""


class Pair(NamedTuple):
    """Two reviews of one film; the annotator preferred the first."""

    prompt: str
    chosen: str
    rejected: str


def annotate(rng: np.random.Generator, prompt: str, left: str, right: str) -> Pair:
    """One annotator's verdict on two reviews."""
    gap = grammar.annotator_utility(prompt, left) - grammar.annotator_utility(prompt, right)
    prefers_left = rng.random() < 1 / (1 + np.exp(-gap / ANNOTATOR_SPREAD))
    if rng.random() < CARELESS_SHARE:
        prefers_left = not prefers_left
    return Pair(prompt, left, right) if prefers_left else Pair(prompt, right, left)


def damage(rng: np.random.Generator, review: str) -> str:
    """A review with its words shuffled, a stretch of them dropped, its end cut off, or one word stuttered."""
    words = review.split()
    start, end = sorted(int(cut) for cut in rng.integers(1, len(words), size=2))
    match int(rng.integers(4)):
        case 0:
            words = [str(word) for word in rng.permutation(words)]
        case 1:
            words = words[:start] + words[end + 1 :]
        case 2:
            words = words[:end]
        case _:
            words = words[:start] + [words[start]] * int(rng.integers(2, 7)) + words[end:]
    return " " + " ".join(words)


def make_pairs(rng: np.random.Generator, reviews: Sequence[tuple[str, str]]) -> list[Pair]:
    """Annotated pairs: each review against a fresh one of the same film."""
    pairs: list[Pair] = []
    for prompt, left in reviews:
        right = grammar.sample_review(rng, prompt)
        if rng.random() < DAMAGED_SHARE:
            right = damage(rng, right)
        pairs.append(annotate(rng, prompt, left, right))
    return pairs


def make_reward_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForSequenceClassification:
    """An untrained reward model of about 0.6 M parameters."""
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=MAX_LENGTH,
            num_labels=1,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def render(tokenizer: PreTrainedTokenizerFast, prompt: str, review: str) -> list[int]:
    """Token ids of the turn the reward model reads: the user's prompt, then the review."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": review}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids: list[int] = tokenizer.encode(text)
    return ids


def score(model: LlamaForSequenceClassification, rows: Sequence[Sequence[int]]) -> Tensor:
    """(P,) rewards of rendered reviews."""
    longest, pad_id = max(len(row) for row in rows), model.config.pad_token_id
    ids_PL = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])
    rewards_P: Tensor = model(input_ids=ids_PL).logits.squeeze(-1)
    return rewards_P


def train_reward_model(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[Pair],
    rng: np.random.Generator,
    report: Callable[[float], None],
) -> None:
    """Bradley–Terry on the annotated pairs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_schedule(step, STEPS))
    chosen = [render(tokenizer, pair.prompt, pair.chosen) for pair in pairs]
    rejected = [render(tokenizer, pair.prompt, pair.rejected) for pair in pairs]
    model.train()
    for step in range(STEPS):
        rows = rng.integers(len(pairs), size=BATCH)
        rewards_2P = score(model, [chosen[row] for row in rows] + [rejected[row] for row in rows])
        loss = -logsigmoid(rewards_2P[:BATCH] - rewards_2P[BATCH:]).mean()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        report((step + 1) / STEPS)


@torch.no_grad()
def accuracy_by_gold(
    model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]
) -> float:
    """Share of pairs with different gold rewards that the reward model orders as gold does."""
    model.train(False)
    rewards_2P = score(
        model,
        [render(tokenizer, pair.prompt, pair.chosen) for pair in pairs]
        + [render(tokenizer, pair.prompt, pair.rejected) for pair in pairs],
    )
    reward_gap_P = (rewards_2P[: len(pairs)] - rewards_2P[len(pairs) :]).numpy()
    gold_gap_P = np.array(
        [
            grammar.gold_reward(pair.prompt, pair.chosen) - grammar.gold_reward(pair.prompt, pair.rejected)
            for pair in pairs
        ]
    )
    differ = gold_gap_P != 0
    return float(np.mean((reward_gap_P > 0)[differ] == (gold_gap_P > 0)[differ]))
