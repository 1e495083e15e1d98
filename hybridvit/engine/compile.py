"""What the training loop calls for an objective."""

from __future__ import annotations

from typing import Any

import torch

from hybridvit.config import TrainConfig
from hybridvit.contracts import Objective
from hybridvit.engine.bf16 import Bf16Parameters


def for_training(objective: Objective, train: TrainConfig) -> Any:
    """The objective as it is trained: with parameters in bf16, compiled, or as it is."""
    called = Bf16Parameters(objective) if train.precision == "bf16_params" else objective
    return torch.compile(called) if train.compile else called
