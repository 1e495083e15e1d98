"""MlpStem against loops over patches, and its budget against the formulas of its docstring."""

from __future__ import annotations

import pytest
import torch
from conftest import make_objective
from torch import Tensor

from hybridvit.analysis.cost import measure
from hybridvit.stems.mlp import MlpStem
from hybridvit.stems.resnet import ResNetStem


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


@pytest.mark.parametrize("depth", [1, 3])
def test_equals_a_loop_over_patches(depth: int) -> None:
    torch.manual_seed(0)
    stem = MlpStem(dim=5, patch=4, hidden=9, depth=depth).double()
    images = torch.randn(2, 3, 8, 12).double()
    tokens = stem(images)
    state = stem.state_dict()
    layers = sorted({int(key.split(".")[1]) for key in state})
    assert len(layers) == depth + 1
    assert tokens.grid == (2, 3)
    for b in range(2):
        for i in range(6):
            row, column = divmod(i, 3)
            cut = images[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            x = cut.reshape(-1)
            for layer in layers:
                x = state[f"layers.{layer}.weight"] @ x + state[f"layers.{layer}.bias"]
                if layer != layers[-1]:
                    x = gelu(x)
            torch.testing.assert_close(tokens.x[b, i], x, rtol=1e-12, atol=1e-12)


def test_is_not_linear() -> None:
    stem = MlpStem(dim=5, patch=4).double()
    a, b = (torch.randn(1, 3, 8, 8).double() for _ in range(2))
    gap = stem(a).x + stem(b).x - stem(a + b).x - stem(torch.zeros_like(a)).x
    assert gap.abs().max() > 0.01


def size(stem: torch.nn.Module) -> int:
    return sum(p.numel() for p in stem.parameters())


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_parameters_follow_the_formula(depth: int) -> None:
    n, dim, hidden = 3 * 8**2, 24, 50
    expected = hidden * (n + dim + 1) + dim + (depth - 1) * (hidden**2 + hidden)
    assert size(MlpStem(dim=dim, patch=8, hidden=hidden, depth=depth)) == expected


def test_hidden_hits_the_parameters_of_a_convolutional_stem() -> None:
    dim, patch = 192, 16
    target = size(ResNetStem(dim=dim))
    step = 3 * patch**2 + dim + 1
    hidden = round((target - dim) / step)
    gap = abs(size(MlpStem(dim=dim, patch=patch, hidden=hidden)) - target)
    assert gap <= step / 2
    assert gap / target < 1e-3


def test_flops_follow_the_formula() -> None:
    def forward(hidden: int) -> int:
        made = make_objective(stem="mlp", stem_args={"patch": 4, "hidden": hidden})
        flops = measure(made, (16, 16)).forward_flops
        assert flops is not None
        return flops

    tokens, n, dim = 16, 48, 16
    assert forward(100) - forward(60) == 2 * tokens * 40 * (n + dim)


@pytest.mark.parametrize("options", [{"patch": 0}, {"hidden": 0}, {"depth": 0}])
def test_wrong_sizes_end_in_one_line(options: dict[str, int]) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"stem 'mlp': .*{name}={value}.* must be at least 1"):
        MlpStem(dim=8, **options)
