"""Linear layers of tokens, as a CPU computes them in bf16."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 1000  # tokens of a part, below which it gains nothing
WIDE = 4  # times as many outputs as inputs: the first layer of an MLP


class Linear(nn.Linear):
    """torch's layer, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b for tokens (..., I), weights (O, I) and a bias (O,): (..., O).

    Compiled in bf16 for a CPU, the product is a `Product` and the bias is added apart from it, in
    the pass over what follows; the product would copy it to its whole result beforehand.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    in_bf16 = x.device.type == "cpu" and dtype == torch.bfloat16
    if not (torch.compiler.is_compiling() and in_bf16):
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.to(dtype)
    product: Tensor = Product.apply(x.to(dtype), weight.to(dtype), bias, threads())
    return product


class Product(torch.autograd.Function):
    """x W^T + b, whose gradient by the weights is computed in parts, one a thread."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parts: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parts = parts
        product = F.linear(x, weight)
        return product if bias is None else product + bias

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias, _ = ctx.needs_input_grad
        of_x = gradient @ weight if by_x else None
        of_weight = weight_gradient(x, gradient, ctx.parts) if by_weight else None
        widens = gradient.shape[-1] >= WIDE * x.shape[-1]
        of_bias = bias_gradient(gradient, as_product=widens) if by_bias else None
        return of_x, of_weight, of_bias, None


def bias_gradient(gradient: Tensor, *, as_product: bool) -> Tensor:
    """The sum over all tokens of gradients (..., O), (O,).

    The compiler has the sum computed where the gradient is, column by column. Where that is an
    activation function's, the first layer of an MLP, it takes twice as long as without the sum;
    so this one is a product of its own.
    """
    gradient = gradient.flatten(0, -2)
    if not as_product:
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


def threads() -> int:
    """Threads that a product has."""
    return torch.get_num_threads()


# Compiled code cannot ask. torch.compiler.assume_constant_result sets the same, but imports the
# compiler for it, which takes commands that need none as long as torch itself.
threads._dynamo_marked_constant = True  # type: ignore[attr-defined]
