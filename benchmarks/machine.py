"""What the numbers hold for: machine, versions, code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from hybridvit.engine.runlog import environment, version

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")


def describe() -> dict[str, Any]:
    """Date, machine, packages and commit, for a line of results."""
    found = environment()
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None  # of attention
    return {
        "date": found["started"],
        "machine": {**found["hardware"], "generation": generation(), "flags": flags()},
        "code": found["code"],
        "python": found["python"],
        "packages": {**found["packages"], "transformers": version("transformers"), "cudnn": cudnn},
    }


def name(machine: dict[str, Any]) -> str:
    """A short name of the device, for the file of its results: cpu-2-cores-family-6-model-143, or
    h200."""
    if machine["gpu"] is None:
        return "-".join([f"cpu-{machine['cores']}-cores", *machine["generation"].split()])
    return re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower().removeprefix("nvidia ")).strip("-")


def generation() -> str:
    """Which CPU of its name: "family 6 model 143", or nothing where that is unknown."""
    found = {
        name: re.search(rf"(?m)^{key}\s*: (\d+)$", cpuinfo())
        for name, key in (("family", "cpu family"), ("model", "model"))
    }
    return " ".join(f"{name} {match[1]}" for name, match in found.items() if match)


def flags() -> list[str]:
    """Instruction sets that matter for matrix products."""
    known = set(cpuinfo().partition("flags")[2].partition("\n")[0].split())
    return [flag for flag in FLAGS if flag in known]


def cpuinfo() -> str:
    """What Linux says of its CPUs; nothing elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
