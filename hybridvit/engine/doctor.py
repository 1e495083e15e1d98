"""Is this machine fit to train? Versions, threads, compiler, GPU, products and disk."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import torch

from hybridvit.config import Precision
from hybridvit.data.dataset import data_root
from hybridvit.engine.compile import c_compiler, compiler
from hybridvit.engine.device import SLOW, chosen_device, matrix_peak
from hybridvit.engine.runlog import environment

MIN_FREE_GB = 2
PRECISIONS: tuple[Precision, Precision] = ("fp32", "bf16")


def checks() -> list[tuple[str, bool, str]]:
    """(name, whether it is fine, what was found) of each check."""
    found = environment()
    missing = [name for name, version in found["packages"].items() if version is None]
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    gpu = found["hardware"]["gpu"]
    root = os.environ.get("HYBRIDVIT_DATA")
    return [
        ("python", True, platform.python_version()),
        ("packages", not missing, ", ".join(f"{k} {v}" for k, v in found["packages"].items())),
        ("torchvision", *_torchvision()),
        ("cpu", True, f"{found['hardware']['cpu']}, {found['hardware']['cores']} cores"),
        ("threads", True, f"{torch.get_num_threads()} in torch"),
        ("compiler", True, _compiler()),
        ("gpu", True, gpu or "none: runs use the CPU"),
        ("products", *_products()),
        ("disk", free > MIN_FREE_GB, f"{free:.0f} GiB free in {Path.cwd()}"),
        ("data", not root or data_root(None).is_dir(), root or "HYBRIDVIT_DATA is not set: data/"),
    ]


def _compiler() -> str:
    """The one that train.compile takes on the device that runs compute on."""
    if chosen_device().type == "cuda":
        return c_compiler() or "none: train.compile will not work on the GPU"
    return compiler() or "none: train.compile will not work on the CPU"


def _products() -> tuple[bool, str]:
    """How fast the device that runs compute on multiplies in each precision."""
    device = chosen_device()
    size = 512 if device.type == "cpu" else None  # where bf16 is emulated, more would take long
    try:
        fp32, bf16 = (matrix_peak(device, p, size) / 1e9 for p in PRECISIONS)
    except RuntimeError as error:  # a GPU that others have filled
        return False, str(error).splitlines()[0]
    advice = "; set train.precision=fp32, bf16 is emulated" if fp32 > SLOW * bf16 else ""
    return True, f"{fp32:,.0f} GFLOP/s in fp32, {bf16:,.0f} in bf16{advice}"


def _torchvision() -> tuple[bool, str]:
    # A torchvision built for another torch imports, but without its operators.
    try:
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError, AttributeError) as error:
        return False, f"does not match this torch ({str(error).splitlines()[0]})"
    return True, "matches torch"
