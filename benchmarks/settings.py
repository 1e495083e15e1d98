"""How each framework is run. What "ours" is at its best stands here and nowhere else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# Overrides of `configs/base.yaml`, by device and case; "any" holds for cases that are not named.
OURS: dict[str, dict[str, list[str]]] = {
    "cpu": {
        "any": ["train.precision=bf16_params", "train.compile=whole"],
        # As one graph, its convolutions are slower than in eager mode.
        "hybrid-224": ["train.precision=bf16", "train.compile=blocks"],
        # A short run, in which compiling would take longer than it saves.
        "whole-fashion-mnist": ["train.precision=bf16_params"],
        "whole-cifar10": ["train.precision=bf16_params"],
    },
    "cuda": {
        "any": ["train.precision=bf16", "train.compile=whole"],
        "whole-fashion-mnist": [],
        "whole-cifar10": [],
    },
}
OURS_FP32 = ["train.precision=fp32"]
OURS_COMPILED = ["train.compile=whole"]  # beside those of the case


def environment() -> dict[str, str]:
    """Of a process: the user's own, with this checkout before all else that Python finds."""
    path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    joined = os.pathsep.join(filter(None, path))
    return os.environ | {"PYTHONPATH": joined}


@dataclass(frozen=True)
class Setting:
    """How a peer is run. `plain_attention`: two matrix products instead of the fused kernel,
    whose backward pass is slow on CPUs and fast on GPUs."""

    bf16: bool = True
    fused_optimizer: bool = False
    compile: bool = False
    plain_attention: bool = False


def ours(case: str, setting: str, device: str) -> list[str]:
    """Our overrides for a case."""
    if setting == "fp32":
        return OURS_FP32
    overrides = OURS[device].get(case, OURS[device]["any"])
    return overrides + OURS_COMPILED if setting == "compiled" else overrides


def peers(setting: str, device: str) -> Setting:
    """A peer's setting by its name."""
    if setting == "best":
        return Setting(fused_optimizer=True, compile=True, plain_attention=device == "cpu")
    return Setting(bf16=setting != "fp32")
