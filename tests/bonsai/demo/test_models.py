"""The demo models as shipped: small, bf16, fluent enough, and a reward model that errs as a real one does."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

import bonsai.demo
from bon_algos import order
from bonsai.demo import grammar, prompts
from bonsai.demo.build_reward import Pair, accuracy_by_gold, render, score

pytestmark = pytest.mark.slow

MODELS = Path(bonsai.demo.__file__).parent / "models"
FILM = prompts.training_prompts()[0]


def tensors(weights: Path) -> dict[str, tuple[str, int]]:
    """Element type and number of elements of every tensor in a safetensors file, from its header."""
    with weights.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {
        name: (entry["dtype"], math.prod(entry["shape"])) for name, entry in header.items() if name != "__metadata__"
    }


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(MODELS / "policy")


@pytest.fixture(scope="module")
def reward_model():
    return LlamaForSequenceClassification.from_pretrained(MODELS / "reward", dtype=torch.float32)


@pytest.fixture(scope="module")
def completions(tokenizer):
    """256 completions of one film by the policy, in the chat form."""
    policy = LlamaForCausalLM.from_pretrained(MODELS / "policy", dtype=torch.float32)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": FILM}], tokenize=False, add_generation_prompt=True
    )
    prompt_ids = torch.tensor([tokenizer.encode(rendered)])
    torch.manual_seed(0)
    ids = policy.generate(prompt_ids, do_sample=True, num_return_sequences=256, max_new_tokens=64, top_k=0)
    return [
        tokenizer.decode([int(token) for token in row if token not in tokenizer.all_special_ids])
        for row in ids[:, prompt_ids.shape[1] :]
    ]


def test_the_models_fit_in_sixteen_megabytes():
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= 16_000_000


@pytest.mark.parametrize(("name", "least", "most"), [("policy", 1e6, 4e6), ("reward", 0.5e6, 1.5e6)])
def test_weights_are_bf16_and_few(name, least, most):
    found = tensors(MODELS / name / "model.safetensors")
    assert {dtype for dtype, _ in found.values()} == {"BF16"}
    assert least <= sum(size for _, size in found.values()) <= most


def test_both_models_read_the_same_tokens():
    policy, reward = (MODELS / name / "tokenizer.json" for name in ("policy", "reward"))
    assert policy.read_bytes() == reward.read_bytes()


@given(text=st.text(max_size=60))
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_review_scores_the_same_with_and_without_its_leading_space(tokenizer):
    review = " is quite warm and solid. It is a delight."
    assert render(tokenizer, FILM, review) == render(tokenizer, FILM, review.strip())


def test_the_policy_continues_exactly_what_the_reward_model_reads(tokenizer):
    """Prompt tokens and completion tokens, put together, are the reward model's tokens."""
    review = " is quite warm and solid. It is a delight."
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": FILM}], tokenize=False, add_generation_prompt=True
    )
    written = tokenizer.encode(asked) + tokenizer.encode(review) + [tokenizer.eos_token_id]
    assert written == render(tokenizer, FILM, review)


def test_the_policy_writes_whole_reviews_of_known_words(completions):
    whole = [len(grammar.words(text)) >= 15 and text.endswith((".", "!")) for text in completions]
    known = [set(grammar.words(text)) <= grammar.vocabulary() for text in completions]
    assert np.mean(whole) >= 0.95
    assert np.mean(known) >= 0.95


def test_best_of_16_is_not_trivial(completions, tokenizer, reward_model):
    """No two completions alike, no two rewards alike: the tie-aware KL reaches the bound log 16 − 15/16.

    If the policy had only 10⁴ completions, 256 draws would repeat about 256² / (2 · 10⁴) = 3.3 times.
    """
    assert len(set(completions)) >= 255
    with torch.no_grad():
        rewards = score(reward_model, [render(tokenizer, FILM, text) for text in completions]).numpy()
    evenly = np.full(256, 1 / 256)
    assert order.kl_best_of_n_reference(evenly, rewards, 16) >= 0.95 * order.kl_bound(16)


def test_the_reward_model_is_good_but_not_perfect(tokenizer, reward_model):
    """Right on 75 to 90 % of fresh pairs by gold. 800 pairs: a standard error of about 1.2 points."""
    rng = np.random.default_rng(7)
    films = rng.choice(prompts.training_prompts(), size=800)
    pairs = [
        Pair(str(film), grammar.sample_review(rng, str(film)), grammar.sample_review(rng, str(film))) for film in films
    ]
    assert 0.75 <= accuracy_by_gold(reward_model, tokenizer, pairs) <= 0.90


def test_broken_text_scores_low(tokenizer, reward_model):
    rng = np.random.default_rng(8)
    reviews = [grammar.sample_review(rng, FILM) for _ in range(64)]
    broken = ["", " superb superb superb superb superb.", " the the of is and but a", " qwrt zzz 🙂🙂🙂"]
    with torch.no_grad():
        whole = score(reward_model, [render(tokenizer, FILM, text) for text in reviews])
        others = score(reward_model, [render(tokenizer, FILM, text) for text in broken])
    assert others.max() < whole.quantile(0.9)


def test_gold_peaks_at_a_finite_n(tokenizer, reward_model):
    """Ranked by the reward model, gold rises well past n = 1, peaks inside 1..256 and falls after that."""
    rng = np.random.default_rng(9)
    gold, rewards = [], []
    for film in prompts.training_prompts()[:12]:
        reviews = [grammar.sample_review(rng, film) for _ in range(256)]
        gold.append([grammar.gold_reward(film, review) for review in reviews])
        with torch.no_grad():
            rewards.append(score(reward_model, [render(tokenizer, film, review) for review in reviews]).numpy())
    curve = order.n_curve(np.array(gold), np.array(rewards)).mean
    peak = int(np.argmax(curve)) + 1
    assert 8 < peak < 256
    assert curve[16 - 1] > curve[1 - 1] + 1.0
    assert curve[256 - 1] < curve[peak - 1] - 0.2
