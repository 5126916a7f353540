"""How a policy is trained, whatever the method: which weights, from where, in which numbers, with how much memory.

Owns those choices of a job's author. Does not own a method's parameters (`methods`), nor how many processes train:
devices are the operator's (the worker's settings).
"""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

from bon_algos.contracts.methods import MethodName
from bon_algos.contracts.record import Record

Precision = Literal["float32", "bfloat16"]

OFFLINE_METHODS: Final[tuple[MethodName, ...]] = (
    "offline_bond",
    "token_bond",
    "bonbon",
    "bonbon_consistent",
    "bon_forward_kl",
    "bon_regression",
    "bon_sft",
    "dpo",
    "ipo",
)
"""They learn from logged candidates alone: no engine has to serve the policy while it is trained."""


class TrainingSetup(Record):
    """The `training` of a job."""

    weights: Literal["lora", "full"] = "lora"
    """lora: an adapter that engines load beside the base model. full: all weights, for export: no engine serves them,
    so they are trained by `OFFLINE_METHODS` alone, and evaluated on samples that their own model draws."""
    start_from: str = Field("base", pattern=r"^(base|pol-[0-9a-f]{16})$")
    """A published policy whose adapter is trained further; it must have the method's rank and alpha. An anchor begins
    as the policy does."""
    reference: Literal["base", "start"] = "base"
    """To what KL, quantiles and best-of-n are measured, and whose draws the window's groups are. start: the policy of
    `start_from`, as in a turn of iterated BOND (arXiv:2407.14622, section 4.1): the route draws n of it, and the job
    learns the best of them."""
    precision: Precision | None = None
    """Of the base model's weights and of what passes through its layers; an adapter, the head's log-probs and full
    weights themselves are float32 always. None: float32 on a CPU, bfloat16 on CUDA."""
    gradient_checkpointing: bool = False
    """Layers are computed again for the backward pass instead of kept: less memory, about a third more time."""
    accumulation: int = Field(1, ge=1, le=1024)
    """Micro-batches of an optimiser step, of a prompt at least: less memory, the same step. Where prompts share a
    baseline, log-probs are computed twice."""
