"""Parameters, floating-point operations and memory of an objective, counted on the meta device."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hybridvit.contracts import Batch, Objective


@dataclass(frozen=True)
class Cost:
    """What one training image costs.

    FLOPs count 2 per multiply-add, in matrix products and convolutions, of the objective's whole
    step (all views, heads, decoders and teachers included). `activation_bytes` are kept for the
    backward pass, per image in float32. All are None where shapes depend on the data.
    """

    forward_flops: int | None
    backward_flops: int | None
    activation_bytes: int | None


def parameters(objective: Objective) -> dict[str, int]:
    """Trainable and frozen parameters by part; the head counts as the objective's."""
    model = objective.model
    stem = sum(p.numel() for p in model.stem.parameters())
    encoder = sum(p.numel() for p in model.encoder.parameters())
    total = sum(p.numel() for p in objective.parameters())
    return {
        "stem": stem,
        "encoder": encoder,
        "objective": total - stem - encoder,
        "total": total,
    }


def measure(objective: Objective, image_size: tuple[int, int], images: int = 2) -> Cost:
    """Cost of one image in a training step on a batch of `images`.

    Nothing is computed, only shapes, so that a whole batch costs no more than one image and
    shows whether the objective takes it.
    """
    meta = copy.deepcopy(objective).to("meta").train()
    integers = torch.zeros(images, dtype=torch.int64, device="meta")
    first, *others = torch.empty(meta.views, images, 3, *image_size, device="meta").unbind()
    batch = Batch(first, integers, integers, integers, tuple(others))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        alive.append(tensor)  # so that no storage's id is used twice
        return tensor

    alive: list[Tensor] = []
    weights = {id(p.untyped_storage()) for p in meta.parameters()}
    try:
        with (
            FlopCounterMode(display=False) as forward,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        ):
            loss = meta(batch).loss
        convolution = torch.ops.aten.convolution_backward
        mapping = {convolution: _convolution_backward}
        with FlopCounterMode(display=False, custom_mapping=mapping) as backward:
            loss.backward()
    except RuntimeError as error:  # NotImplementedError is one
        # x[mask], .item() and the like need values, which meta tensors have not. Any other error
        # is the objective's own, and better seen before a run than in it.
        if "meta" not in str(error).lower():
            raise
        return Cost(None, None, None)
    activations = sum(size for storage, size in kept.items() if storage not in weights)
    return Cost(
        forward.get_total_flops() // images,
        backward.get_total_flops() // images,
        activations // images,
    )


def _convolution_backward(
    grad_shape: list[int],
    x_shape: list[int],
    weight_shape: list[int],
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    wanted: list[bool],
    *,
    out_shape: Any,
) -> int:
    """As many for each gradient, of input and weight, as the convolution took forward.

    torch's own formula takes the weight of a convolution in groups for a whole one: a depthwise
    convolution of C channels would cost C times too much.
    """
    positions = x_shape if transposed else grad_shape
    once = 2 * positions[0] * math.prod(positions[2:]) * math.prod(weight_shape)
    return once * sum(wanted[:2])


def memory_bytes(parameters: int, activations: int, *, ema: bool) -> int:
    """Estimate for training in float32 with AdamW: weights, gradients, two moments, and with EMA
    a second set of weights; beside them the activations' bytes."""
    return (20 if ema else 16) * parameters + activations
