"""The policy in training: a base model whose weights never move, and a LoRA adapter that does.

Owns loading, which weights train, log-probs under the policy, its anchor and its reference, and the adapter's
files. Does not own log-prob arithmetic (`bon_algos.logprobs`) nor the anchor's motion (`bon_algos.anchor`).

There is one copy of the base model. The reference is the same weights with LoRA's B at zero, which adds exactly
nothing, or with the factors that training began with; the anchor is the same weights with its own B. They are worn for
the length of a call.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from bon_algos.contracts import Precision
from bon_algos.logprobs import TokenGroup, completion_states, sequence_logprobs, token_logprobs
from bon_algos.prefix_values import PrefixCritic, RankLaw
from bon_algos.token_bond import GuidedTerms, guided_terms, said_laws
from bon_algos.token_kl import TokenTerms, token_terms
from worker.durable import staged
from worker.ranks import ALONE, Ranks, together
from worker.sharding import layers_of, like, local, shard, whole

Whose = Literal["policy", "reference", "base"]
ADAPTER_NAME = "default"
SERVED_HEADS = ("llama", "qwen3")
"""Families on whose heads vLLM serves adapters; it refuses them on others (its `embedding_modules`)."""
MOST_SERVED_VOCABULARY = 258_048
"""Of an adapter on a head, in vLLM."""
ROWS_TOKENS = 16_384
"""Tokens, padding included, of one forward pass without gradients."""


class TrainedPolicy:
    """A base model with one adapter in training. All parameters that train are float32."""

    is_adapter: ClassVar = True
    """Whether an engine can load it beside the base model."""

    def __init__(
        self,
        model: PeftModel,
        base_policy_id: str,
        *,
        rank: int,
        alpha: float,
        train_factor_a: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        """ranks: that the model's weights are spread over."""
        self.model = model
        self.ranks = ranks
        self._base_policy_id = base_policy_id
        self._rank, self._alpha = rank, alpha
        self._start: dict[str, Tensor] | None = None
        self._factors = {name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self._factors and (train_factor_a or ".lora_B." in name))

    @property
    def rank(self) -> int:
        """Of the adapter."""
        return self._rank

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """By name, what the optimiser moves."""
        return {name: parameter for name, parameter in self._factors.items() if parameter.requires_grad}

    @property
    def matrices(self) -> list[str]:
        """By name, what the optimiser moves and maps states to states: no vectors, nor tables of tokens."""
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        tables = {id(end.weight) for end in ends}
        return [name for name, one in self.trained.items() if one.ndim == 2 and id(one) not in tables]

    @property
    def factors(self) -> dict[str, Tensor]:
        """A and B of every layer, copied: the adapter's whole state."""
        return {name: whole(parameter.detach()).clone() for name, parameter in self._factors.items()}

    @torch.no_grad()
    def load_factors(self, factors: Mapping[str, Tensor]) -> None:
        """Take up a saved state. KeyError when a factor is missing."""
        for name, parameter in self._factors.items():
            local(parameter).copy_(local(like(parameter, factors[name])))

    def load_adapter(self, directory: Path) -> None:
        """Take up the adapter of `save_adapter`; a layer that had none gets one that adds nothing. KeyError for factors
        of a layer that has none here."""
        tensors = load_file(directory / "adapter_model.safetensors")
        names = {name: _file_name(name) for name in self._factors}
        if unknown := tensors.keys() - names.values():
            raise KeyError(min(unknown))
        self.load_factors(
            {name: tensors.get(file_name, torch.zeros_like(self._factors[name])) for name, file_name in names.items()}
        )

    def refer_to_start(self) -> None:
        """From here on the reference is the policy as it is now, whole on every rank."""
        self._start = self.factors

    @property
    def start(self) -> Mapping[str, Tensor] | None:
        """Factors of the reference; None: it is the base."""
        return self._start

    @torch.no_grad()
    def interpolate(self, share: float) -> None:
        """Go back towards the reference. Of the base: what the adapter adds to every weight becomes `share` of it. Of
        another start both factors do, which is the same to first order in what was learned."""
        for name, parameter in self._factors.items():
            if self._start is not None:
                local(parameter).lerp_(local(like(parameter, self._start[name])), 1 - share)
            elif ".lora_B." in name:
                parameter.mul_(share)

    def logprobs(self, groups: Sequence[TokenGroup]) -> list[Tensor]:
        """log π of completions; differentiable. For each group (N,), nats."""
        return sequence_logprobs(self.model, groups)

    @together
    def reference_logprobs(self, groups: Sequence[TokenGroup]) -> list[Tensor]:
        """log π_ref of completions, no gradient. For each group (N,), nats."""
        return self.logprobs_wearing(self._reference(), groups)

    @together
    def base_logprobs(self, groups: Sequence[TokenGroup]) -> list[Tensor]:
        """log-probs of completions under the base model, no gradient. For each group (N,), nats."""
        return self.logprobs_wearing(self._base(), groups)

    @together
    def sequence_features(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """What the reference makes of each sequence of tokens: its last hidden state at the last one. (number of them,
        hidden size)."""
        groups = [TokenGroup(sequence, [[0]]) for sequence in sequences]  # whatever follows, its end predicts it
        with torch.no_grad(), self._wearing(self._reference()):
            return torch.cat([completion_states(self.model, groups[p]).hidden_TD for p in parts_by_tokens(groups)])

    def token_terms(self, groups: Sequence[TokenGroup]) -> list[TokenTerms]:
        """What policy and reference say of every token; differentiable."""
        return token_terms(self.model, groups, lambda: self._wearing(self._reference()))

    def said_laws(self, critic: PrefixCritic, groups: Sequence[TokenGroup]) -> list[RankLaw]:
        """What a critic makes of the reference's way along completions; differentiable in the critic."""
        return said_laws(self.model, groups, lambda: self._wearing(self._reference()), critic)

    def guided_terms(self, critic: PrefixCritic, n: int, groups: Sequence[TokenGroup]) -> list[GuidedTerms]:
        """How far the policy is, at every token, from best-of-n of its reference as a critic has it; differentiable."""
        return guided_terms(self.model, groups, lambda: self._wearing(self._reference()), critic, n)

    @property
    def device(self) -> torch.device:
        """Of the head, and of all that is asked of it."""
        device: torch.device = self.model.get_output_embeddings().weight.device
        return device

    @property
    def hidden_size(self) -> int:
        """D, of the states before the head."""
        size: int = self.model.config.get_text_config().hidden_size
        return size

    def logprobs_wearing(self, factors: Mapping[str, Tensor], groups: Sequence[TokenGroup]) -> list[Tensor]:
        """log-probs with some factors replaced, no gradient. For each group (N,), nats."""
        with torch.no_grad(), self._wearing(factors):
            return [
                logprob_N
                for part in parts_by_tokens(groups)
                for logprob_N in sequence_logprobs(self.model, groups[part])
            ]

    @together
    def token_logprobs(self, groups: Sequence[TokenGroup], *, of: Whose) -> list[list[list[float]]]:
        """log-prob of every token of every completion, under the policy, its reference or the base model; nats."""
        worn = {} if of == "policy" else self._reference() if of == "reference" else self._base()
        with torch.no_grad(), self._wearing(worn):
            return [
                [logprob_L.tolist() for logprob_L in group]
                for part in parts_by_tokens(groups)
                for group in token_logprobs(self.model, groups[part])
            ]

    def _reference(self) -> dict[str, Tensor]:
        """What the reference has in the place of factors: this rank's part."""
        if self._start is None:
            return self._base()
        return {name: local(like(p, self._start[name])) for name, p in self._factors.items()}

    def _base(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(local(p)) for name, p in self._factors.items() if ".lora_B." in name}

    @contextmanager
    def _wearing(self, factors: Mapping[str, Tensor]) -> Iterator[None]:
        # Through .data: a graph that is waiting for its backward pass holds the parameters themselves, and a
        # write into them would spoil it; by the time it runs they are what they were. It holds no parts of what is
        # spread over ranks, which cannot be exchanged: those are written into.
        spread = [name for name in factors if isinstance(self._factors[name], DTensor)]
        parts = {name: local(self._factors[name]).clone() for name in spread}
        own = {name: self._factors[name].data for name in factors if name not in parts}
        try:
            for name in parts:
                local(self._factors[name].detach()).copy_(factors[name])
            for name, data in own.items():
                self._factors[name].data = factors[name].to(data)
            yield
        finally:
            for name, part in parts.items():
                local(self._factors[name].detach()).copy_(part)
            for name, data in own.items():
                self._factors[name].data = data

    def save_adapter(self, directory: Path, replaced: Mapping[str, Tensor] | None = None) -> None:
        """Write the adapter in PEFT's format; `replaced` overrides factors (the anchor's B).

        The same factors give the same bytes: no path, time or order of a set finds its way in.
        """
        factors = {**self.factors, **(replaced or {})}
        with staged(directory) as aside:
            tensors = {_file_name(name): tensor.contiguous().cpu() for name, tensor in factors.items()}
            save_file(tensors, aside / "adapter_model.safetensors", metadata={"format": "pt"})
            (aside / "adapter_config.json").write_text(json.dumps(self._config(), indent=2, sort_keys=True))

    def _config(self) -> dict[str, object]:
        modules = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in self._factors}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self._base_policy_id,
            "r": self._rank,
            "lora_alpha": self._alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "modules_to_save": None,
            "use_dora": False,
            "use_rslora": False,
            "target_modules": sorted(modules),
        }


def open_base(
    directory: Path, device: torch.device, dtype: torch.dtype, *, gradient_checkpointing: bool = False
) -> PreTrainedModel:
    """The base model from a local directory. Layers that are checkpointed are computed again in the backward pass."""
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    # Some models bring dropout; log-probs of a policy are those that an engine computes.
    base.to(device).eval()
    if gradient_checkpointing:
        # transformers' own switch works in training mode alone.
        for layer in layers_of(base.get_decoder()):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return base


def dtype_of(precision: Precision | None, device: torch.device) -> torch.dtype:
    """Of the base model's weights, where a job may have asked for one."""
    if precision is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.float32 if precision == "float32" else torch.bfloat16


def open_policy(
    directory: Path,
    base_policy_id: str,
    *,
    rank: int,
    alpha: float,
    train_factor_a: bool,
    seed: int,
    device: torch.device,
    precision: Precision | None = None,
    gradient_checkpointing: bool = False,
    ranks: Ranks = ALONE,
) -> TrainedPolicy:
    """The base model with a new adapter on every linear layer that the engine can adapt.

    The seed settles A; B is zero, so the policy begins as its reference. The adapter is float32 whatever the base's
    precision. ranks: over which the base's weights are spread.
    """
    is_spread = ranks.size > 1
    base = open_base(
        directory,
        torch.device("cpu") if is_spread else device,
        dtype_of(precision, device),
        gradient_checkpointing=gradient_checkpointing,
    )
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=adapted_layers(base), task_type="CAUSAL_LM")
    with unwarned_of_tied_embeddings():
        model = get_peft_model(base, config, adapter_name=ADAPTER_NAME)
    model.eval()
    policy = TrainedPolicy(model, base_policy_id, rank=rank, alpha=alpha, train_factor_a=train_factor_a, ranks=ranks)
    if is_spread:
        shard(model, ranks.size, device)
    return policy


@contextmanager
def unwarned_of_tied_embeddings() -> Iterator[None]:
    """Without peft's warning: the head's adapter is meant to leave tied embeddings alone, in the engine as here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*tie_word_embeddings", category=UserWarning)
        yield


def adapted_layers(base: PreTrainedModel) -> list[str]:
    """Names of the linear layers that get an adapter: all, and the head where the engine serves one on it.

    The head matters most where the vocabulary is what a reward is about: imitation of the demo's best-of-16 stops at
    .81 of win rate without it and reaches .89 with it (docs/log.md). On tied embeddings its adapter leaves the input
    side alone.
    """
    head = base.get_output_embeddings()
    is_head_served = base.config.model_type in SERVED_HEADS and base.config.vocab_size <= MOST_SERVED_VOCABULARY
    layers = [(name, layer) for name, layer in base.named_modules() if isinstance(layer, nn.Linear)]
    return sorted({name.rsplit(".", 1)[-1] for name, layer in layers if layer is not head or is_head_served})


def parts_by_tokens(groups: Sequence[TokenGroup], max_tokens: int = ROWS_TOKENS) -> Iterator[slice]:
    """Consecutive parts whose padded rows stay within `max_tokens`; a group larger than that is one by itself."""
    start = rows = longest = 0
    for index, group in enumerate(groups):
        length = len(group.prompt_ids) + max(len(completion) for completion in group.completion_ids)
        longest, rows = max(longest, length), rows + len(group.completion_ids)
        if index > start and longest * rows > max_tokens:
            yield slice(start, index)
            start, rows, longest = index, len(group.completion_ids), length
    yield slice(start, len(groups))


def _file_name(parameter_name: str) -> str:
    """`base_model.model.….lora_B.default.weight` stands in files without the adapter's name."""
    return parameter_name.replace(f".{ADAPTER_NAME}.weight", ".weight")
