"""What the numbers hold for: machine, versions, code."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any

from hybridvit.engine.runlog import environment

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")


def describe() -> dict[str, Any]:
    """Date, machine, packages and commit, for a line of results."""
    found = environment()
    return {
        "date": found["started"],
        "machine": {**found["hardware"], "flags": flags()},
        "code": found["code"],
        "python": found["python"],
        "packages": {**found["packages"], "transformers": version("transformers")},
    }


def name(machine: dict[str, Any]) -> str:
    """A short name of the device, for the file of its results: cpu-2-cores, or h200."""
    if machine["gpu"] is None:
        return f"cpu-{machine['cores']}-cores"
    return re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower().removeprefix("nvidia ")).strip("-")


def flags() -> list[str]:
    """Instruction sets that matter for matrix products."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    known = set(text.partition("flags")[2].partition("\n")[0].split())
    return [flag for flag in FLAGS if flag in known]


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
