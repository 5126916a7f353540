"""A vLLM plugin: adapters on CPUs, each row with its own adapter or with none.

In vLLM 0.32's CPU build a row without an adapter carries slot −1, which PyTorch reads as the last slot: as soon as that
one is filled, the base policy's answers in a batch with a distilled one's are silently another policy's (vllm-project/
vllm, pull request 48421). And every row copies its whole adapter at every token, which makes an adapter's rank decide
what a sample costs. Here rows are taken adapter by adapter, in place.

Owns the three operations that all others call. Does not own the choice of slots, which is vLLM's. vLLM finds this
through the entry point `vllm.general_plugins`; with a GPU it changes nothing. Decision 0003.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

NO_ADAPTER = -1


def register() -> None:
    """Take the place of vLLM's own operations, in every process of an engine that runs on CPUs."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for operation in (bgmv_shrink, bgmv_expand, bgmv_expand_slice):
        for module in (lora_ops, punica_cpu):  # each holds the names for itself
            assert hasattr(module, operation.__name__), f"{module.__name__} has no {operation.__name__}"
            setattr(module, operation.__name__, operation)


def bgmv_shrink(
    inputs: Tensor, lora_b_weights: Tensor, output_tensor: Tensor, lora_indices_tensor: Tensor, scaling: float = 1.0
) -> None:
    """output[b, :r] = scaling · A[slot of b] @ inputs[b]; zero where b has no adapter.

    inputs (b, i) · weights (slots, r, i), or (slots, 1, r, i) · output (b, ≥ r) · slots (b,), −1 for none.
    """
    weights = _stacked(lora_b_weights)
    columns = output_tensor[:, : weights.shape[1]]
    columns.zero_()
    for slot, rows in _rows_of_slots(lora_indices_tensor, len(inputs)):
        factor = weights[slot].to(output_tensor.dtype)
        columns[rows] = inputs[rows].to(output_tensor.dtype) @ factor.T * scaling


def bgmv_expand(
    inputs: Tensor, lora_b_weights: Tensor, output_tensor: Tensor, lora_indices_tensor: Tensor, add_inputs: bool = True
) -> None:
    """output[b] += B[slot of b] @ inputs[b], over the columns both have; nothing where b has no adapter."""
    common = min(_stacked(lora_b_weights).shape[1], output_tensor.shape[1])
    _expand(inputs, lora_b_weights, output_tensor[:, :common], lora_indices_tensor, add_inputs)


def bgmv_expand_slice(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """`bgmv_expand` into the columns from `slice_offset` on."""
    columns = output_tensor[:, slice_offset : slice_offset + slice_size]
    _expand(inputs, lora_b_weights, columns, lora_indices_tensor, add_inputs)


def _expand(inputs: Tensor, lora_b_weights: Tensor, columns: Tensor, slots: Tensor, add_inputs: bool) -> None:
    weights = _stacked(lora_b_weights)
    if not add_inputs:
        columns.zero_()
    for slot, rows in _rows_of_slots(slots, len(inputs)):
        factor = weights[slot, : columns.shape[1]].to(columns.dtype)
        columns[rows] += inputs[rows].to(columns.dtype) @ factor.T


def _rows_of_slots(slots: Tensor, num_rows: int) -> Iterator[tuple[int, slice | Tensor]]:
    """(slot, its rows) for every slot in use; all rows as a slice, which copies nothing, where there is one slot.

    A single slot may stand for all rows. ValueError when it is unclear whose a row is.
    """
    used = set(slots.tolist())
    if len(used) == 1:
        yield from ((slot, slice(0, num_rows)) for slot in used - {NO_ADAPTER})
        return
    if len(slots) != num_rows:
        raise ValueError(f"{num_rows} rows, but {len(slots)} adapter slots")
    for slot in sorted(used - {NO_ADAPTER}):
        yield slot, (slots == slot).nonzero()[:, 0]


def _stacked(weights: Tensor) -> Tensor:
    return weights.squeeze(1) if weights.ndim == 4 else weights
