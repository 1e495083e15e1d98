"""The exponential moving average of an objective's weights, which evaluation looks at."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from hybridvit.contracts import Objective


class MovingAverage:
    """A copy of an objective whose parameters follow it: a <- a + (1 - decay) (p - a).

    The first update takes the parameters as they are; buffers are always those of the objective.
    torch's AveragedModel does the same but keeps its count in a tensor, which it copies to the
    device at every update: the host then waits for a GPU.
    """

    def __init__(self, objective: Objective, decay: float) -> None:
        self.module = copy.deepcopy(objective)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, objective: Objective) -> None:
        """Follow the objective, which is on the same device, by one step."""
        averages: list[Tensor] = list(self.module.parameters())
        values: list[Tensor] = list(objective.parameters())
        weight = 1 - self.decay if self.updates else 1.0
        torch._foreach_lerp_(averages, values, weight)
        if kept := list(self.module.buffers()):  # at once: a GPU would be given one by one
            torch._foreach_copy_(kept, list(objective.buffers()))
        self.updates += 1
