"""Training with parameters in bf16 whose float32 masters the optimizer moves."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call

from hybridvit.contracts import Batch, Objective, StepOutput


class Bf16Parameters(nn.Module):
    """An objective that computes with copies of its parameters in bf16, made once a step; those
    of norms, and biases, stay as they are.

    The parameters themselves, their gradients, the optimizer's state, moving averages and
    checkpoints stay in float32: they are the masters (Micikevicius et al. 2018, section 3.1). Under
    autocast alone each layer casts its own, and what a layer adds to the tokens is in float32.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch) -> StepOutput:
        parameters = self.objective.named_parameters()
        # Norms on a CPU take no bf16 parameters where tokens are in float32.
        copies = {n: p.to(torch.bfloat16) for n, p in parameters if p.ndim > 1}
        output: StepOutput = functional_call(self.objective, copies, (batch,))
        return output
