"""A policy all of whose weights train: for export, since engines load adapters and no second model.

Owns what its reference is, and its files: a model directory of transformers. Does not own log-probs, training or
publishing: it is a `TrainedPolicy` to all of them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bon_algos.contracts import Precision
from worker.durable import staged
from worker.models import TrainedPolicy, open_base
from worker.ranks import ALONE, Ranks
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
