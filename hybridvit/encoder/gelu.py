"""GELU (Hendrycks & Gimpel 2016), as a CPU computes it in bf16."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Coefficients of p in 1/2 + x p(t), t = 2 (x / LIMIT)^2 - 1, by least squares in Chebyshev points:
# VALUE for the normal distribution's Phi(x), SLOPE for the derivative of x Phi(x).
LIMIT = 5.5  # beyond it they are 0 or 1
VALUE = (
    1.28551930e-01,
    -6.41723126e-02,
    4.77377959e-02,
    -3.87937948e-02,
    3.20672244e-02,
    -2.60361508e-02,
    2.03848071e-02,
    -1.50625240e-02,
    1.01642124e-02,
    -6.65067835e-03,
    4.72356984e-03,
    -2.65870243e-03,
    6.39906502e-04,
    -3.56754608e-04,
    6.56236662e-04,
    -2.85676302e-04,
)
SLOPE = (
    1.28759131e-01,
    -6.57396019e-02,
    5.36746792e-02,
    -5.37485667e-02,
    6.01187199e-02,
    -6.85841218e-02,
    7.57919401e-02,
    -7.43501857e-02,
    5.92208020e-02,
    -4.92696501e-02,
    5.18635660e-02,
    -3.32375877e-02,
    2.29077833e-03,
    -2.53702491e-03,
    1.26771703e-02,
    -6.02092175e-03,
)


class GELU(nn.GELU):
    """x Phi(x), computed by `Polynomial` where it is compiled in bf16 for a CPU."""

    def __init__(self) -> None:
        super().__init__(approximate="none")

    def forward(self, x: Tensor) -> Tensor:
        in_bf16 = x.device.type == "cpu" and x.dtype == torch.bfloat16
        if not (torch.compiler.is_compiling() and in_bf16):
            return F.gelu(x)
        y: Tensor = Polynomial.apply(x)
        return y


class Polynomial(torch.autograd.Function):
    """GELU and its gradient, in float32 inside, without exp and division.

    The error is below 5e-7 (of x, where that is larger than 1), and 1e-6 in the derivative: what
    float32 leaves of a sum with 1/2. From -5 down torch's own values are off by a tenth, too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide = x.float()
        return (wide.clamp(min=-LIMIT) * half_plus(wide, VALUE)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (gradient.float() * half_plus(x.float(), SLOPE)).to(gradient.dtype)


def half_plus(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """1/2 + x p(t), for 2^n coefficients of p."""
    x = x.clamp(-LIMIT, LIMIT)
    power = x * x * (2 / LIMIT**2) - 1
    terms: list[Any] = list(coefficients)
    while len(terms) > 1:  # pairs first, so that no sum waits for all before it (Estrin's scheme)
        pairs = zip(terms[::2], terms[1::2], strict=True)
        terms = [high * power + low for low, high in pairs]
        power = power * power
    half: Tensor = x * terms[0] + 0.5
    return half
