"""A policy all of whose weights train: for export, since engines load adapters and no second model.

Owns what its reference is, its files, a model directory of transformers, and sampling it, which no engine does. Does
not own log-probs, training or publishing: it is a `TrainedPolicy` to all of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from bon_algos.contracts import Precision
from worker.durable import staged
from worker.models import TrainedPolicy, open_base
from worker.ranks import ALONE, Ranks, together
from worker.sharding import local, shard

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
"""Of the base model's directory; those that are there belong to the exported model."""
SHARD_SIZE = "5GB"


class FullPolicy(TrainedPolicy):
    """All weights in training, in float32; the reference is a copy of them."""

    is_adapter = False

    def __init__(self, model: PreTrainedModel, ranks: Ranks = ALONE) -> None:
        self.model = model
        self.ranks = ranks
        self._rank = 0
        self._start = None
        self._factors = dict(model.named_parameters())
        self._before = {name: local(parameter.detach()).clone() for name, parameter in self._factors.items()}

    def _base(self) -> dict[str, Tensor]:
        return self._before

    @torch.no_grad()
    def interpolate(self, share: float) -> None:
        for name, parameter in self._factors.items():
            local(parameter).lerp_(self._before[name], 1 - share)

    @property
    def end_ids(self) -> Sequence[int]:
        """The tokens that end a sequence."""
        said = self.model.config.eos_token_id
        return said if isinstance(said, list) else [] if said is None else [said]

    @together
    def sampled(self, prompts: Sequence[Sequence[int]], n: int, max_tokens: int, *, seed: int) -> list[list[list[int]]]:
        """n completions of each prompt at temperature 1, from all of the law: (B, n, at most max_tokens) token ids, of
        which those behind an end mean nothing. Where the weights are spread, every rank draws the same."""
        torch.manual_seed(seed)
        pad, longest = self.end_ids[0] if self.end_ids else 0, max(map(len, prompts))
        device = self.model.get_output_embeddings().weight.device
        rows = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        seen = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        law = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, num_return_sequences=n,
            max_new_tokens=max_tokens, eos_token_id=list(self.end_ids) or None, pad_token_id=pad,
        )  # fmt: skip
        with torch.no_grad():
            drawn = self.model.generate(
                torch.tensor(rows, device=device),
                attention_mask=torch.tensor(seen, device=device),
                generation_config=law,
                synced_gpus=self.ranks.size > 1,
            )
        completions = drawn[:, longest:].tolist()
        return [completions[place : place + n] for place in range(0, len(completions), n)]

    def save(self, directory: Path, base_directory: Path) -> None:
        """Write a model directory that transformers opens, with the base model's tokenizer; the same weights give the
        same bytes."""
        with self.ranks.tells("factors"):
            weights = self.factors
        with staged(directory) as aside:
            self.model.save_pretrained(aside, state_dict=weights, max_shard_size=SHARD_SIZE)
            for name in TOKENIZER_FILES:
                if (base_directory / name).is_file():
                    shutil.copyfile(base_directory / name, aside / name)


def open_full_policy(
    directory: Path,
    *,
    device: torch.device,
    precision: Precision | None,
    gradient_checkpointing: bool,
    ranks: Ranks = ALONE,
) -> FullPolicy:
    """The base model, all of it to be trained. Weights are float32: an update is smaller than what bfloat16 can tell
    apart. In bfloat16 is what passes through its layers.

    ranks: over which the weights are spread.
    """
    is_spread = ranks.size > 1
    start = torch.device("cpu") if is_spread else device
    model = open_base(directory, start, torch.float32, gradient_checkpointing=gradient_checkpointing)
    if precision == "bfloat16" or (precision is None and device.type == "cuda"):
        decoder = model.get_decoder()
        decoder.forward = torch.autocast(device.type, torch.bfloat16)(decoder.forward)
    if is_spread:
        shard(model, ranks.size, device)
    return FullPolicy(model, ranks)
