"""Is this machine fit to train? Versions, threads, compiler, GPU and disk."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import torch

from hybridvit.engine.compile import compiler
from hybridvit.engine.runlog import environment

MIN_FREE_GB = 2


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
        ("compiler", True, compiler() or "none: train.compile will not work on the CPU"),
        ("gpu", True, gpu or "none: runs use the CPU"),
        ("disk", free > MIN_FREE_GB, f"{free:.0f} GiB free in {Path.cwd()}"),
        ("data", root is None or Path(root).is_dir(), root or "HYBRIDVIT_DATA is not set: data/"),
    ]


def _torchvision() -> tuple[bool, str]:
    # A torchvision built for another torch imports, but without its operators.
    try:
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError, AttributeError) as error:
        return False, f"does not match this torch ({str(error).splitlines()[0]})"
    return True, "matches torch"
