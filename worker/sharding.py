"""A model whose weights are spread over ranks (FSDP): sharded in place, and its tensors in part and as a whole.

Owns which weights are spread and how one is read and written. Does not own the model, the ranks nor the optimiser.
Every function takes an ordinary tensor for what it is: one process needs no other code.

Spread are the decoder's. The head is not: log-probs take its weight chunk by chunk without calling it, so no hook would
gather it; nor are adapters, which are small.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer


def shard(model: Any, size: int, device: torch.device) -> None:
    """Spread the decoder's weights over the ranks, and put the rest on the device. Gradients of what is spread are
    summed by the backward pass. `model` is transformers' or PEFT's around it."""
    mesh = init_device_mesh(device.type, (size,))
    decoder = model.get_decoder()
    kept = {*model.get_output_embeddings().parameters()}
    kept |= {parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    for module in [*layers_of(decoder), decoder]:
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
        sharded.set_gradient_divide_factor(1.0)  # the loss is normalised over all ranks' prompts
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    for tensor in [*kept, *model.buffers()]:
        tensor.data = tensor.data.to(device)


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    return [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]


def local(tensor: Tensor) -> Tensor:
    """This rank's part, to be read or written."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All parts; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor where the parameter is, spread as it is; every rank must ask where it is spread."""
    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor.to(parameter.device)


def part_like(parameter: Tensor, part: Tensor) -> Tensor:
    """This rank's part of a tensor that is spread as the parameter is."""
    if isinstance(parameter, DTensor):
        shape, stride = parameter.shape, parameter.stride()
        return DTensor.from_local(part, parameter.device_mesh, parameter.placements, shape=shape, stride=stride)
    return part


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors)


@torch.no_grad()
def clip_to_norm(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` where some parameters are spread and others are not: the norm of the whole
    gradient."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    squared = {flag: torch.zeros((), dtype=torch.float64) for flag in (True, False)}
    for gradient in gradients:
        squared[isinstance(gradient, DTensor)] += local(gradient).double().square().sum().cpu()
    torch.distributed.all_reduce(squared[True])
    norm = (squared[True] + squared[False]).sqrt()
    for gradient in gradients:
        local(gradient).mul_(min(1.0, most / (float(norm) + 1e-6)))
    return norm
