"""A world small enough to train in a test: a random Llama, its own samples, and a reward that can be read off.

Owns the making of groups, ledger entries and the tiny model. The model is drawn from a seed in the test: nothing
is downloaded, and its log-probs are computed here by transformers directly, not by the code under test.
"""

import zlib
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bon_algos.contracts import (
    LEDGER_STREAM,
    Arm,
    Candidate,
    CandidateGroup,
    Outcome,
    RewardConfig,
    Sampling,
    VllmMember,
)

BASE = "pol-" + "b" * 16
REWARD_MODEL = "rm-" + "c" * 16
TEMPLATE = "template-digest"
VOCABULARY = 32
MAX_TOKENS = 6
END = 1


def candidate(token_ids=(5, END), logprobs=None, reward=0.0, text="word", finish_reason="stop"):
    return Candidate(
        text=text,
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs) if logprobs is not None else (-1.0,) * len(token_ids),
        finish_reason=finish_reason,
        reward=reward,
    )


def group(identity, prompt_ids, rewards=(0.0, 1.0), candidates=None, **fields):
    """A fit group unless a field says otherwise."""
    drawn = tuple(candidates) if candidates is not None else tuple(candidate(reward=reward) for reward in rewards)
    sampling = fields.pop("sampling", Sampling(max_tokens=MAX_TOKENS))
    values = {
        "id": identity,
        "created_at": 1000.0,
        "route": "default",
        "arm": Arm(policy=BASE, n=len(drawn)),
        "arm_reason": "default",
        "policy_id": BASE,
        "reward_model_id": REWARD_MODEL,
        "reward_template_digest": TEMPLATE,
        "policy_template_digest": TEMPLATE,
        "settings_digest": "s",
        "prompt": " ".join(map(str, prompt_ids)),
        "prompt_token_ids": tuple(prompt_ids),
        "sampling": sampling,
        "requested": len(drawn),
        "candidates": drawn,
        "selected": 0,
        "status": "ok",
    } | fields
    return CandidateGroup(**values)


def outcome(of, rewards, **fields):
    values = {
        "id": f"outcome-{of.id}",
        "created_at": of.created_at,
        "group_id": of.id,
        "route": of.route,
        "experiment": None,
        "arm": of.arm,
        "arm_reason": of.arm_reason,
        "reward_model_id": of.reward_model_id,
        "rewards": tuple(rewards),
    } | fields
    return Outcome(**values)


def deliver(client, *records):
    """As the gateway's drainer does: one entry per record."""
    for record in records:
        data = zlib.compress(record.model_dump_json().encode())
        client.xadd(LEDGER_STREAM, {"kind": record.kind, "id": record.id, "data": data})


def reward_model(url: str, directory: Path) -> RewardConfig:
    """One vLLM server behind the tokenizer of this directory."""
    return RewardConfig(members=(VllmMember(url=url, model=REWARD_MODEL, directory=directory, window=64),))


def save_tiny_policy(directory: Path, seed: int = 0):
    """A random Llama of two layers, saved as the worker opens it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=END,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    return model


@torch.no_grad()
def draw(model, prompt_ids, generator):
    """One completion at temperature 1, and the log-prob of each of its tokens."""
    tokens, logprobs = list(prompt_ids), []
    for _ in range(MAX_TOKENS):
        law = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        token = int(torch.multinomial(law.exp(), 1, generator=generator))
        tokens.append(token)
        logprobs.append(float(law[token]))
        if token == END:
            break
    return tokens[len(prompt_ids) :], logprobs


def sampled_groups(model, *, num_prompts, n, seed=0):
    """Groups of the model's own draws; the reward is the mean token id, so longer words are not simply better."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for number in range(num_prompts):
        prompt_ids = [0, 2 + number % 30, 2 + number // 30]
        drawn = []
        for _ in range(n):
            token_ids, logprobs = draw(model, prompt_ids, generator)
            ended = "stop" if token_ids[-1] == END else "length"
            reward = sum(token_ids) / len(token_ids)
            drawn.append(candidate(token_ids, logprobs, reward, finish_reason=ended))
        groups.append(group(f"g{number}", prompt_ids, candidates=drawn, created_at=1000.0 + number))
    return groups
