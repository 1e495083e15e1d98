"""Parameters, floating-point operations and memory of an objective, counted on the meta device."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hybridvit.contracts import Batch, Objective

UNCOUNTED = "shapes depend on the data, or an operator is not torch's own"


@dataclass(frozen=True)
class Cost:
    """What one training image costs.

    FLOPs count 2 per multiply-add, in matrix products and convolutions, of the objective's whole
    step (all views, heads, decoders and teachers included); they are None where an operator is
    not torch's own, so that what it computes is not known. `activation_bytes` are kept for the
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
    foreign = _Foreign()
    weights = {id(p.untyped_storage()) for p in meta.parameters()}
    try:
        with (
            FlopCounterMode(display=False, custom_mapping=FORMULAS) as forward,
            foreign,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        ):
            loss = meta(batch).loss
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as backward, foreign:
            loss.backward()
    except RuntimeError as error:  # NotImplementedError is one
        # x[mask], .item() and the like need values, which meta tensors have not. Any other error
        # is the objective's own, and better seen before a run than in it.
        if "meta" not in str(error).lower():
            raise
        return Cost(None, None, None)
    activations = sum(size for storage, size in kept.items() if storage not in weights)
    if foreign.met:
        return Cost(None, None, activations // images)
    return Cost(
        forward.get_total_flops() // images,
        backward.get_total_flops() // images,
        activations // images,
    )


class _Foreign(TorchDispatchMode):
    """Whether an operator is met that is another library's."""

    def __init__(self) -> None:
        # torch leaves its constructor without types.
        super().__init__()  # type: ignore[no-untyped-call]
        self.met = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.met = self.met or func.namespace not in ("aten", "prim", "prims")
        return func(*args, **(kwargs or {}))


def _vector_product(*shapes: Any, out_shape: Any, **_: Any) -> int:
    """Of a vector with a matrix or with another, and perhaps added to a third operand."""
    return 2 * max(math.prod(shape) for shape in shapes if isinstance(shape, torch.Size))


def _bilinear(*given: Any, out_shape: Any, **_: Any) -> int:
    """Of `aten._trilinear`: three operands, to which sides of 1 are added at given places."""
    operands = [list(shape) for shape in given[:3]]
    for shape, places in zip(operands, given[3:6], strict=True):
        for place in places:
            shape.insert(place, 1)
    multiplied: int = math.prod(map(max, zip(*operands, strict=True)))
    return 2 * multiplied


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


# What torch's counter leaves out, or counts otherwise.
FORMULAS = {
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten._trilinear: _bilinear,
    **dict.fromkeys((torch.ops.aten.mv, torch.ops.aten.addmv, torch.ops.aten.dot), _vector_product),
}


def memory_bytes(parameters: int, activations: int, *, ema: bool) -> int:
    """Estimate for training in float32 with AdamW: weights, gradients, two moments, and with EMA
    a second set of weights; beside them the activations' bytes."""
    return (20 if ema else 16) * parameters + activations
