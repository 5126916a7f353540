"""A base model and an adapter as one model directory, for programs that know no adapters.

Owns the arithmetic's order: float32, and tied embeddings are parted first where the head has an adapter, for the
adapter is the head's alone. Needs torch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bonsai.model_directory import NAMED_FILES
from worker.durable import staged
from worker.models import unwarned_of_tied_embeddings

WRITTEN_ANEW = ("config.json", "model.safetensors.index.json")


def merge(base: Path, adapter: Path, target: Path) -> None:
    """Write the merged model and the base's tokenizer to `target`, which must not exist. Raises OSError."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    modules = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    part_tied_head(model, modules)
    with unwarned_of_tied_embeddings():
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    with staged(target) as aside:
        merged.save_pretrained(aside)
        for name in set(NAMED_FILES) - set(WRITTEN_ANEW):
            if (base / name).is_file():
                shutil.copyfile(base / name, aside / name)


def part_tied_head(model: PreTrainedModel, modules: list[str]) -> None:
    """Give a head that has an adapter weights of its own."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if module is head}
    if head is None or head.weight is not embeddings.weight or not names & set(modules):
        return
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
