"""The log-probs by which an engine will have to prove that it serves an imported adapter.

Owns that the adapter's tensors are those of the base's own layers, and what is said of which tokens. Does not own the
comparison (service/fingerprint.py). Needs torch.
"""

from __future__ import annotations

from typing import Final

import torch
from safetensors.torch import load_file

from bon_algos.contracts import Fingerprint
from bon_algos.logprobs import TokenGroup
from bonsai.registry.importing import WEIGHTS_FILE, Adapter, AdapterRefused, Base
from worker.models import ADAPTER_NAME, TrainedPolicy, open_policy

NUM_PROMPTS: Final = 8
PROMPT_TOKENS: Final = 8
COMPLETION_TOKENS: Final = 40
"""Together more than a fingerprint must have."""
LEAST_DISTANCE: Final = 1e-3
"""Nats per token between policy and base: below that no engine could tell them apart for certain."""


def fingerprint_of(adapter: Adapter, base: Base) -> Fingerprint:
    """Prompts are drawn at random and continued by the policy itself, the same every time. Raises AdapterRefused."""
    policy = open_policy(
        base.directory,
        base.policy_id,
        rank=adapter.rank,
        alpha=adapter.alpha,
        train_factor_a=True,
        seed=0,
        device=torch.device("cpu"),
    )
    _require_its_layers(adapter, policy)
    policy.load_adapter(adapter.directory)
    groups = _continued(policy)
    own, of_base = policy.token_logprobs(groups, of="policy"), policy.token_logprobs(groups, of="base")
    fingerprint = Fingerprint(
        prompt_token_ids=tuple(tuple(group.prompt_ids) for group in groups),
        completion_token_ids=tuple(tuple(group.completion_ids[0]) for group in groups),
        policy_logprobs=tuple(tuple(rows[0]) for rows in own),
        base_logprobs=tuple(tuple(rows[0]) for rows in of_base),
    )
    _require_distance(fingerprint)
    return fingerprint


def _require_its_layers(adapter: Adapter, policy: TrainedPolicy) -> None:
    """Every tensor is a factor of a layer that the base has, of its shape, and no factor comes alone."""
    own = {name.replace(f".{ADAPTER_NAME}.weight", ".weight"): one.shape for name, one in policy.factors.items()}
    tensors = load_file(adapter.directory / WEIGHTS_FILE)
    for name, tensor in sorted(tensors.items()):
        if name not in own:
            raise AdapterRefused(f"{name} is of no layer of the base that the engine can adapt")
        if tensor.shape != own[name]:
            raise AdapterRefused(f"{name} is {tuple(tensor.shape)}, and the base's layer needs {tuple(own[name])}")
        other = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
        if other not in tensors:
            raise AdapterRefused(f"{name} has no {other}")
        if name.split(".lora_")[0].rsplit(".", 1)[-1] not in adapter.modules:
            raise AdapterRefused(f"{name} is of no module that target_modules names")


@torch.no_grad()
def _continued(policy: TrainedPolicy) -> list[TokenGroup]:
    draw = torch.Generator().manual_seed(0)
    vocabulary = policy.model.get_input_embeddings().num_embeddings
    prompt_BL = torch.randint(vocabulary, (NUM_PROMPTS, PROMPT_TOKENS), generator=draw)
    token_BL, next_BL, cache = prompt_BL, prompt_BL, None
    for _ in range(COMPLETION_TOKENS):
        answer = policy.model(input_ids=next_BL, past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        next_BL = torch.multinomial(answer.logits[:, -1].float().softmax(-1), 1, generator=draw)
        token_BL = torch.cat([token_BL, next_BL], dim=1)
    return [TokenGroup(row[:PROMPT_TOKENS], [row[PROMPT_TOKENS:]]) for row in token_BL.tolist()]


def _require_distance(fingerprint: Fingerprint) -> None:
    own = torch.tensor(fingerprint.policy_logprobs)
    distance = float((own - torch.tensor(fingerprint.base_logprobs)).abs().mean())
    if not distance >= LEAST_DISTANCE:
        raise AdapterRefused(f"the adapter is {distance:.1e} nats per token from its base: it changes nothing")
