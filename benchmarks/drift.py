"""KL of a served policy to its reference, from completions it served.

Owns the log-probs under base and adapter, computed by transformers and peft. Does not own how the completions
were drawn. Imports torch, so it is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from bon_algos.contracts import Interval
from bon_algos.logprobs import TokenGroup, sequence_logprobs
from bon_algos.order import mean_interval
from bonsai.generation_replies import Choice
from worker.models import unwarned_of_tied_embeddings

PROMPTS_AT_ONCE = 8


class Drift(NamedTuple):
    kl_policy_reference: Interval
    """KL(policy ‖ reference) per completion, nats, on the policy's own completions."""
    engine_difference: float
    """Mean |log-prob at the engine − log-prob here| per token, nats: near 0, or the adapter here is another."""
    retokenised: float
    """Share of completions whose text gives back the tokens that were drawn; only these count."""


def drift_of(base: Path, adapter: Path, prompts: Sequence[str], candidates: Sequence[Sequence[Choice]]) -> Drift:
    """Drift of the policy `base` + `adapter`. ValueError when fewer than two prompts keep a completion."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    groups, kept = [], []
    for prompt, choices in zip(prompts, candidates, strict=True):
        ids = [_completion_ids(tokenizer, choice) for choice in choices]
        mine = [(one, choice) for one, choice in zip(ids, choices, strict=True) if len(one) == choice.tokens]
        if mine:
            groups.append(TokenGroup(tokenizer.encode(prompt), [one for one, _ in mine]))
            kept.append([choice.logprob or 0.0 for _, choice in mine])
    policy_of, reference_of = _logprobs(base, adapter, groups)
    ratio_B = [float((policy - reference).mean()) for policy, reference in zip(policy_of, reference_of, strict=True)]
    away = sum(float(np.abs(policy - np.array(engine)).sum()) for policy, engine in zip(policy_of, kept, strict=True))
    tokens = sum(len(one) for group in groups for one in group.completion_ids)
    share = sum(map(len, kept)) / sum(map(len, candidates))
    return Drift(mean_interval(ratio_B), away / tokens, share)


def _completion_ids(tokenizer: PreTrainedTokenizerBase, choice: Choice) -> list[int]:
    ids: list[int] = tokenizer.encode(choice.text, add_special_tokens=False)
    return [*ids, tokenizer.eos_token_id] if choice.finish_reason == "stop" else ids


@torch.no_grad()
def _logprobs(base: Path, adapter: Path, groups: Sequence[TokenGroup]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """log π and log π_ref of every completion; for each group (N,)."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    parts = [groups[start : start + PROMPTS_AT_ONCE] for start in range(0, len(groups), PROMPTS_AT_ONCE)]
    reference = [one.numpy() for part in parts for one in sequence_logprobs(model, part)]
    with unwarned_of_tied_embeddings():
        policy_model = PeftModel.from_pretrained(model, adapter)
    policy = [one.numpy() for part in parts for one in sequence_logprobs(policy_model, part)]
    return policy, reference
