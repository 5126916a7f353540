"""The demo's policy: a small Llama taught from scratch to write the grammar's reviews.

Owns its size and its training. Does not own the reviews (`grammar.py`) or the directory it ends in (`build.py`).

Dimension key:  B reviews · L tokens
"""

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bonsai.demo.build_tokenizer import ASSISTANT, END, MAX_LENGTH, USER

STEPS: Final = 640
BATCH: Final = 40
PEAK_LEARNING_RATE: Final = 3e-3
WARM_UP_STEPS: Final = 40
CHAT_SHARE: Final = 0.6
"""Share of reviews shown as an assistant's turn; the rest simply continue the prompt."""
IGNORED: Final = -100


def make_policy(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained policy of about 2.8 M parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def cosine_schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: a linear warm-up, then half a cosine down to 2 %."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    done = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def train_policy(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    reviews: Sequence[tuple[str, str]],
    rng: np.random.Generator,
    report: Callable[[float], None],
) -> float:
    """Maximum likelihood on the reviews, prompts not counted. Returns the last 50 steps' loss, nats per token."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_schedule(step, STEPS))
    encoded = [_encode(tokenizer, prompt, review, rng.random() < CHAT_SHARE) for prompt, review in reviews]
    losses: list[float] = []
    policy.train()
    for step in range(STEPS):
        rows = rng.integers(len(encoded), size=BATCH)
        ids_BL, labels_BL = _pad([encoded[row] for row in rows], _id(tokenizer.pad_token_id))
        loss = policy(input_ids=ids_BL, labels=labels_BL).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        report((step + 1) / STEPS)
    return sum(losses[-50:]) / len(losses[-50:])


def _id(token_id: object) -> int:
    """A special token's id, which this tokenizer always has."""
    assert isinstance(token_id, int)
    return token_id


def _encode(tokenizer: PreTrainedTokenizerFast, prompt: str, review: str, as_chat: bool) -> tuple[list[int], list[int]]:
    """Token ids and labels of one review, in one of the two forms the policy must continue."""
    before = f"{USER}{prompt}{END}{ASSISTANT}" if as_chat else prompt
    prompt_ids: list[int] = tokenizer.encode(before)
    review_ids: list[int] = tokenizer.encode(review + END)
    return prompt_ids + review_ids, [IGNORED] * len(prompt_ids) + review_ids


def _pad(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(B, L) token ids and labels, padded on the right: causal attention never looks there."""
    longest = max(len(ids) for ids, _ in rows)
    ids_BL = torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids, _ in rows])
    labels_BL = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows])
    return ids_BL, labels_BL
