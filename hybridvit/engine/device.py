"""The device that runs compute on: which it is, what it has used, how fast it multiplies."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import torch

from hybridvit.config import Precision
from hybridvit.engine.runlog import cores

SIZES = {"cuda": 8192, "cpu": 2048}  # rows and columns, by device
REPEATS = 8
SLOW = 4  # times float32's time: with instructions, or rounding alone, a product takes less


def device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait_for_device() -> None:
    """Let a GPU finish what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory_used(device: torch.device) -> int:
    """Bytes at the most: allocated on a GPU, else resident of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:  # getrusage counts the process that started this one, too
        text = Path("/proc/self/status").read_text()
        return 1024 * int(text.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_name(device: torch.device) -> str:
    """What the numbers hold for."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU, {cores()} cores"


def matrix_peak(
    device: torch.device, precision: Precision, size: int | None = None, seconds: float = 2.0
) -> float:
    """FLOPs a second of the best of several square matrix products, as many as the time allows.

    Args:
        size: rows and columns; by default so many that a device is busy.
    """
    n = size or SIZES[device.type]
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    taken: list[float] = []
    # The first one also loads libraries.
    while len(taken) < 2 or (len(taken) < REPEATS and sum(taken[1:]) < seconds):
        wait_for_device()
        started = time.perf_counter()
        torch.mm(a, b)
        wait_for_device()
        taken.append(time.perf_counter() - started)
    return 2 * n**3 / min(taken)


def slow_precision(precision: Precision) -> str | None:
    """What to tell the user of a CPU that multiplies far slower than in float32: those without
    instructions for bf16 do, by a factor of a hundred. None if it does not.

    GPUs are not asked: a study, which runs nothing itself, would start CUDA for it.
    """
    if precision == "fp32" or device().type != "cpu":
        return None
    # Small, and yet large enough to tell one that has to be emulated.
    fp32, chosen = (matrix_peak(device(), p, size=256, seconds=0.1) for p in ("fp32", precision))
    if fp32 < SLOW * chosen:
        return None
    return (
        f"train.precision={precision} makes matrix products {fp32 / chosen:.0f} times as slow as "
        "fp32 on this CPU, which has no instructions for it; set train.precision=fp32"
    )
