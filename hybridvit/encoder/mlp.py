"""The two-layer networks of a block, and their activations."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from hybridvit.encoder.gelu import GELU
from hybridvit.encoder.linear import Linear

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]


class Mlp(nn.Module):
    """Two layers with an activation between."""

    def __init__(self, dim: int, hidden: int, activation: nn.Module, dropout: float) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden, activated=True)
        self.act = activation
        self.fc2 = Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))
        return out


class GatedMlp(nn.Module):
    """act(x W) * (x V) followed by a linear layer (Shazeer 2020); W and V are one matrix."""

    def __init__(self, dim: int, hidden: int, activation: nn.Module, dropout: float) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 2 * (hidden // 2))
        self.act = activation
        self.fc2 = Linear(hidden // 2, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        out: Tensor = self.dropout(self.fc2(self.dropout(self.act(gate) * value)))
        return out


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of CLIP's models."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def make_activation(name: Activation) -> nn.Module:
    """The activation module of a name."""
    return {
        "gelu": GELU(),
        "gelu_tanh": nn.GELU(approximate="tanh"),
        "quick_gelu": QuickGELU(),
        "relu": nn.ReLU(),
        "silu": nn.SiLU(),
    }[name]


def make_mlp(
    kind: Literal["mlp", "swiglu"], dim: int, hidden: int, activation: Activation, dropout: float
) -> nn.Module:
    """A block's MLP; `swiglu` is gated by SiLU whatever the activation."""
    if kind == "swiglu":
        return GatedMlp(dim, hidden, nn.SiLU(), dropout)
    return Mlp(dim, hidden, make_activation(activation), dropout)
