"""Checkpoints: safetensors weights, optimizer state, and a manifest that proves them whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybridvit.data.files import one_line

WEIGHTS = "weights.safetensors"
EMA = "ema.safetensors"
OPTIMIZER = "optimizer.pt"
MANIFEST = "manifest.json"


def save(
    folder: Path,
    step: int,
    *,
    weights: dict[str, Tensor],
    ema: dict[str, Tensor] | None,
    optimizer: dict[str, Any],
    progress: dict[str, Any],
) -> Path:
    """Write `folder/step-N` whole or not at all, then remove older checkpoints."""
    target = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(_copied(weights), temporary / WEIGHTS)
        if ema is not None:
            save_file(_copied(ema), temporary / EMA)
        torch.save(optimizer, temporary / OPTIMIZER)
    except (SafetensorError, RuntimeError) as error:  # each has its own for a full disk
        raise OSError(f"checkpoint {target} cannot be written ({one_line(error)})") from None
    files = {p.name: _sha256(p) for p in sorted(temporary.iterdir())}
    manifest = {"schema": 1, "step": step, "progress": progress, "sha256": files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (*temporary.iterdir(), temporary):
        _fsync(path)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    _fsync(folder)
    for old in folder.glob("step-*"):
        if old != target:
            shutil.rmtree(old)
    return target


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run, if any."""
    found = (p for p in folder.glob("step-*") if (p / MANIFEST).is_file())
    return max((p for p in found if p.name[5:].isdecimal()), default=None, key=step_of)


def step_of(path: Path | None) -> int:
    """The step after which a checkpoint was written; 0 without one."""
    return int(path.name.removeprefix("step-")) if path else 0


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, after every file's SHA-256 was compared.

    Raises:
        ValueError: a file is missing or altered.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        digests = dict(manifest["sha256"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path / MANIFEST} is no manifest of a checkpoint; remove {path} to start anew"
        ) from None
    for name, expected in digests.items():
        file = path / Path(name).name
        if not file.is_file() or _sha256(file) != expected:
            raise ValueError(
                f"checkpoint {file} is damaged (its SHA-256 is not the manifest's); "
                f"remove {path} to start anew"
            )
    return manifest


def read_weights(path: Path, name: str = WEIGHTS) -> dict[str, Tensor]:
    """The tensors of a checkpoint."""
    return load_file(path / name)


def read_optimizer(path: Path) -> dict[str, Any]:
    """The optimizer's state; never runs code from the file."""
    state: dict[str, Any] = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    return state


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each with memory of its own: safetensors takes no tensor that has two names, as shared
    weights do."""
    whole = torch.contiguous_format
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=whole)
        for name, tensor in tensors.items()
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
