"""GELU as polynomials: beside float64's erf, of all numbers that bf16 has."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from numpy.polynomial import chebyshev
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from hybridvit.encoder.gelu import GELU, LIMIT, SLOPE, VALUE, Polynomial
from hybridvit.encoder.mlp import make_activation

DOUBLE = torch.float64


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    """x Phi(x) and its derivative Phi(x) + x phi(x), in float64."""
    x = x.to(DOUBLE)
    phi = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    below = torch.special.erfc(-x / math.sqrt(2)) / 2
    return x * below, below + x * phi


def polynomial(x: Tensor) -> tuple[Tensor, Tensor]:
    """What `Polynomial` gives for them."""
    x = x.requires_grad_()
    y = Polynomial.apply(x)
    return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]


def every_bf16_number() -> Tensor:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(torch.bfloat16)
    return numbers[numbers.isfinite()]


def test_values_and_slopes_are_as_exact_as_float32_needs() -> None:
    near = torch.linspace(-2 * LIMIT, 2 * LIMIT, 400_001)
    x = torch.cat([near, every_bf16_number().float()])
    (value, slope), (true_value, true_slope) = polynomial(x.clone()), exact(x)
    assert ((value - true_value).abs() / x.abs().clamp(min=1)).max() < 5e-7
    assert (slope - true_slope).abs().max() < 1e-6


def test_of_every_bf16_number_it_is_what_rounding_leaves() -> None:
    x = every_bf16_number()
    for found, true in zip(polynomial(x.clone()), exact(x), strict=True):
        assert found.dtype == torch.bfloat16
        half_a_unit = true.abs() * 2**-8  # at the most
        assert ((found.to(DOUBLE) - true).abs() <= half_a_unit + 1e-6).all()


def test_nan_stays_and_infinities_have_their_limits() -> None:
    value, slope = polynomial(torch.tensor([math.nan, math.inf, -math.inf]))
    torch.testing.assert_close(value, torch.tensor([math.nan, math.inf, 0.0]), equal_nan=True)
    torch.testing.assert_close(slope, torch.tensor([math.nan, 1.0, 0.0]), equal_nan=True)


@pytest.mark.parametrize(("coefficients", "of_slope"), [(VALUE, False), (SLOPE, True)])
def test_coefficients_are_those_of_least_squares(
    coefficients: tuple[float, ...], of_slope: bool
) -> None:
    points = np.cos(np.pi * (np.arange(400) + 0.5) / 400)
    x = torch.from_numpy(LIMIT * np.sqrt((points + 1) / 2))
    value, slope = exact(x)
    wanted = ((slope if of_slope else value / x) - 0.5) / x
    fitted = chebyshev.cheb2poly(chebyshev.chebfit(points, wanted.numpy(), len(coefficients) - 1))
    assert np.abs(fitted - coefficients).max() < 1e-8


def operators(precision: torch.dtype) -> set[str]:
    """Operators of an encoder's compiled GELU, forward and backward."""
    called: set[str] = set()

    def note(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        called.update(str(n.target).removeprefix("aten.").partition(".")[0] for n in nodes)
        return make_boxed_func(graph)

    torch.compiler.reset()
    gelu = make_activation("gelu")
    compiled = torch.compile(gelu, backend=aot_autograd(fw_compiler=note), fullgraph=True)
    compiled(torch.randn(4, 8, dtype=precision, requires_grad=True)).sum().backward()
    return called


def test_polynomials_are_for_compiled_bf16() -> None:
    assert "clamp" in operators(torch.bfloat16)
    assert not operators(torch.bfloat16) & {"gelu", "gelu_backward", "erf", "exp"}
    assert operators(torch.float32) >= {"gelu", "gelu_backward"}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_not_compiled_it_is_torchs_bit_by_bit(precision: torch.dtype) -> None:
    x = torch.randn(64, 32, dtype=precision)
    assert torch.equal(GELU()(x), F.gelu(x))
