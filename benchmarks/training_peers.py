"""One optimiser step on one group of candidates: ours in several layouts, and trl's.

Owns the model, the data and the steps. Does not own how they are measured (`train_step`). Everybody gets the same
model, data and optimiser: full fine-tuning of a random Llama in float32, no checkpointing, candidates as a ledger holds
them.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bon_algos.logprobs import TokenGroup, sequence_logprobs
from bon_algos.regression import log_quantile_regression

Step = Callable[[], None]


class Shape(NamedTuple):
    """Of one group."""

    prompt: int
    completion: int
    candidates: int
    vocabulary: int


class Data(NamedTuple):
    group: TokenGroup
    log_tilts: Tensor
    """(1, N); what a regression aims at, nats."""
    reference_logprobs: Tensor
    """(1, N); as a ledger has them."""


def steps_of(names: Sequence[str], directory: Path, shape: Shape) -> dict[str, Step]:
    data = random_data(shape)
    return {name: STEPS[name](directory, data) for name in names}


def random_data(shape: Shape) -> Data:
    generator = np.random.default_rng(0)
    prompt = generator.integers(3, shape.vocabulary, shape.prompt).tolist()
    completions = generator.integers(3, shape.vocabulary, (shape.candidates, shape.completion)).tolist()
    values = generator.normal(size=(2, 1, shape.candidates))
    return Data(TokenGroup(prompt, completions), torch.tensor(values[0]), torch.tensor(values[1]))


def _own(directory: Path, data: Data, logprobs: Callable[[Any, TokenGroup], Tensor], with_reference: bool) -> Step:
    model, reference = _load(directory), _load(directory) if with_reference else None
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        reference_1N = data.reference_logprobs
        if reference is not None:
            with torch.no_grad():
                reference_1N = logprobs(reference, data.group)[None]
        logprob_1N = logprobs(model, data.group)[None]
        loss = log_quantile_regression(logprob_1N, reference_1N.to(logprob_1N), data.log_tilts).mean()
        _descend(loss, model, optimiser)

    return step


def _shared(model: Any, group: TokenGroup) -> Tensor:
    return sequence_logprobs(model, [group])[0]


def _separate(model: Any, group: TokenGroup) -> Tensor:
    """Groups of one candidate share nothing: they stand in rows of their own."""
    return torch.cat(sequence_logprobs(model, [TokenGroup(group.prompt_ids, [one]) for one in group.completion_ids]))


def _naive(model: Any, group: TokenGroup) -> Tensor:
    """Rows of their own with all logits, as a textbook has it."""
    rows = torch.tensor([[*group.prompt_ids, *completion] for completion in group.completion_ids])
    logprob_NLV = model(input_ids=rows, use_cache=False).logits[:, len(group.prompt_ids) - 1 : -1].log_softmax(-1)
    found: Tensor = logprob_NLV.gather(-1, rows[:, len(group.prompt_ids) :, None])[..., 0].sum(-1)
    return found


def _grpo_trainer(directory: Path, num_candidates: int) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    settings = GRPOConfig(
        output_dir=str(directory / "trl"),
        beta=0.04,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=num_candidates,
        num_generations=num_candidates,
        gradient_checkpointing=False,
        report_to=[],
    )
    return GRPOTrainer(
        model=str(directory),
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        args=settings,
        train_dataset=datasets.Dataset.from_list([{"prompt": "0"}]),
        processing_class=_tokenizer(),
    )


def _grpo(directory: Path, data: Data) -> Step:
    trainer = _grpo_trainer(directory, len(data.group.completion_ids))
    trainer.model.eval()
    trainer.current_gradient_accumulation_steps = 1
    optimiser = torch.optim.AdamW(trainer.model.parameters(), lr=1e-5)
    completion = torch.tensor(data.group.completion_ids)
    prompt = torch.tensor([data.group.prompt_ids]).expand(len(completion), -1)
    ids = torch.cat([prompt, completion], dim=1)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "advantages": data.log_tilts[0].float(),
        "num_items_in_batch": torch.tensor(completion.numel()),
    }

    def step() -> None:
        with torch.no_grad():
            reference, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.ref_model, ids, torch.ones_like(ids), completion.shape[1]
            )
        loss = trainer.compute_loss(trainer.model, {**inputs, "ref_per_token_logps": reference})
        _descend(loss, trainer.model, optimiser)

    return step


def _dpo(directory: Path, data: Data) -> Step:
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        output_dir=str(directory / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        max_length=None,
    )
    trainer = DPOTrainer(
        model=str(directory),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": "0", "chosen": "1", "rejected": "2"}]),
        processing_class=_tokenizer(),
    )
    trainer.model.eval()
    optimiser = torch.optim.AdamW(trainer.model.parameters(), lr=1e-5)
    ids = torch.tensor([[*data.group.prompt_ids, *completion] for completion in data.group.completion_ids])
    completion_mask = torch.ones_like(ids)
    completion_mask[:, : len(data.group.prompt_ids)] = 0
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion_mask}

    def step() -> None:
        _descend(trainer.compute_loss(trainer.model, dict(inputs)), trainer.model, optimiser)

    return step


STEPS: Mapping[str, Callable[[Path, Data], Step]] = {
    "grpo": _grpo,
    "dpo": _dpo,
    "naive": lambda directory, data: _own(directory, data, _naive, with_reference=True),
    "separate": lambda directory, data: _own(directory, data, _separate, with_reference=True),
    "shared": lambda directory, data: _own(directory, data, _shared, with_reference=True),
    "shared_logged": lambda directory, data: _own(directory, data, _shared, with_reference=False),
}
NAMES = {
    "grpo": "trl GRPO, reference pass, head compacted",
    "dpo": "trl DPO, as many pairs, head compacted",
    "naive": "separate rows, all logits, reference pass",
    "separate": "separate rows, head in chunks, reference pass",
    "shared": "prompt shared, reference pass",
    "shared_logged": "prompt shared, reference from the ledger",
}


def _descend(loss: Tensor, model: torch.nn.Module, optimiser: torch.optim.Optimizer) -> None:
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()


def _load(directory: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    return model.eval()


@contextlib.contextmanager
def random_llama(vocabulary: int) -> Iterator[Path]:
    """A directory with it: 8 layers, hidden size 256."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    with tempfile.TemporaryDirectory() as directory:
        LlamaForCausalLM(config).save_pretrained(directory)
        yield Path(directory)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({str(index): index for index in range(8)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1", unk_token="0")


def quiet() -> None:
    """One thread for everybody, and no more words from libraries than errors."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")
    datasets.disable_progress_bars()
    import trl.trainer.utils

    # Its head scores valid positions alone where Triton is; here, too. The kernel itself stays torch's.
    trl.trainer.utils._use_triton = lambda device: True
