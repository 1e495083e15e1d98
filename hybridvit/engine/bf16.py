"""Training with parameters in bf16 whose float32 masters the optimizer moves."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call

from hybridvit.contracts import Batch, Objective, StepOutput


class Bf16Parameters(nn.Module):
    """An objective that computes with copies of its parameters in bf16, made once a step; those
    of norms, and other single numbers a channel, stay as they are.

    The parameters themselves, their gradients, the optimizer's state, moving averages and
    checkpoints stay in float32: they are the masters (Micikevicius et al. 2018, section 3.1). Under
    autocast alone each layer casts its own, and what a layer adds to the tokens is in float32.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        # What autocast would cast in each layer. Norms on a CPU take no bf16 parameters where
        # tokens are in float32.
        biases = {f"{name}.bias" for name, layer in objective.named_modules() if casts(layer)}
        self.copied = [
            name for name, p in objective.named_parameters() if p.ndim > 1 or name in biases
        ]

    def forward(self, batch: Batch) -> StepOutput:
        parameters = dict(self.objective.named_parameters())
        copies = {name: parameters[name].to(torch.bfloat16) for name in self.copied}
        # Looking for parameters of two names would take as long as all the rest of this; under its
        # other name one stays as it is, and is cast by its layer.
        output: StepOutput = functional_call(self.objective, copies, (batch,), tie_weights=False)
        return output


def casts(layer: nn.Module) -> bool:
    """Whether autocast has a layer compute in bf16."""
    return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
