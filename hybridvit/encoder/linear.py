"""Linear layers of tokens, as a CPU computes them in bf16."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 1000  # tokens of a part, below which it gains nothing


class Linear(nn.Linear):
    """torch's layer, computed by `linear`."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool = True, *, activated: bool = False
    ) -> None:
        super().__init__(inputs, outputs, bias)
        self.activated = activated

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, activated=self.activated)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, activated: bool = False) -> Tensor:
    """x W^T + b for tokens (..., I), weights (O, I) and a bias (O,): (..., O).

    In bf16 on a CPU it is `Affine`, where it is compiled or oneDNN joins the bias to the product.

    Args:
        activated: whether an activation function follows, see `bias_gradient`.
    """
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    alike = autocast or weight.dtype == dtype  # torch refuses others
    in_bf16 = x.device.type == "cpu" and dtype == torch.bfloat16 and alike
    if not in_bf16 or not (torch.compiler.is_compiling() or joins_bias()):
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.to(dtype)
    y: Tensor = Affine.apply(x.to(dtype), weight.to(dtype), bias, threads(), activated)
    return y


class Affine(torch.autograd.Function):
    """x W^T + b, whose gradient by the weights is computed in parts, one a thread.

    torch's layer copies the bias to the whole result, to which it adds the product. Here the
    compiler adds the bias in its pass over what follows; without it, oneDNN as it writes the
    product.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parts: int, activated: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parts, ctx.activated = parts, activated
        if x.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
            return joined(x, weight, bias)
        product = F.linear(x, weight)
        return product if bias is None else product + bias

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias, *_ = ctx.needs_input_grad
        of_x = gradient @ weight if by_x else None
        of_weight = weight_gradient(x, gradient, ctx.parts) if by_weight else None
        of_bias = bias_gradient(gradient, ctx.activated) if by_bias else None
        return of_x, of_weight, of_bias, None, None


def bias_gradient(gradient: Tensor, activated: bool) -> Tensor:
    """The sum over all tokens of gradients (..., O), (O,).

    The compiler has the sum computed where the gradient is, column by column. An activation
    function's backward pass takes twice as long so; there the sum is a product of its own.
    """
    gradient = gradient.flatten(0, -2)
    if not activated:
        return gradient.sum(dim=0)
    return (gradient.new_ones(1, len(gradient)) @ gradient)[0]


def weight_gradient(x: Tensor, gradient: Tensor, parts: int) -> Tensor:
    """g^T x, summed over all tokens, for tokens (..., I) and gradients (..., O): (O, I).

    It is a small matrix, of which in one product each thread has a part and reads all tokens. As
    a sum of products over some of the tokens, one a thread, each reads its own. Tokens that
    cannot be divided, or are few, have one product. The narrower of the two is the one that is
    transposed, which costs a copy.
    """
    x, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
    if len(x) % parts or len(x) < FEW * parts:
        parts = 1
    x, gradient = x.unflatten(0, (parts, -1)), gradient.unflatten(0, (parts, -1))
    if x.shape[-1] < gradient.shape[-1]:
        return (x.mT @ gradient).sum(dim=0).mT.contiguous()
    return (gradient.mT @ x).sum(dim=0)


def joined(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b by oneDNN, which reads a bias as if its numbers lay side by side."""
    bias = None if bias is None else bias.contiguous()
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


@cache
def joins_bias() -> bool:
    """Whether oneDNN's product with a bias, which torch's compiler takes, too, is here for bf16."""
    try:
        supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return supported and callable(torch.ops.mkldnn._linear_pointwise)
    except AttributeError:  # torch was built without oneDNN
        return False


def threads() -> int:
    """Threads that a product has."""
    return torch.get_num_threads()


# Compiled code cannot ask. torch.compiler.assume_constant_result sets the same, but imports the
# compiler for it, which takes commands that need none as long as torch itself.
threads._dynamo_marked_constant = True  # type: ignore[attr-defined]
