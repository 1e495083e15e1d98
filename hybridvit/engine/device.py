"""The device that runs compute on: which it is, what it has used, how fast it multiplies."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import torch

from hybridvit.config import Precision
from hybridvit.engine.runlog import cores

SLOW = 4  # times float32's time; CPUs with AVX-512 that only convert operands take less


def chosen_device() -> torch.device:
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


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a GPU or of the machine is used up."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    told = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # of CUDA, cuBLAS, cuDNN
    if any(words in str(error) for words in told):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and out_of_memory(cause)


def device_name(device: torch.device) -> str:
    """What the numbers hold for."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU, {cores()} cores"


def matrix_peak(
    device: torch.device, precision: Precision, size: int | None = None, seconds: float = 2.0
) -> float:
    """FLOPs a second of the best of the square matrix products that fit into the time; on a GPU of
    twenty at once, because it slows down under a load that lasts, as training's does.

    Args:
        size: rows and columns; by default so many that a device is busy.
    """
    n = size or (8192 if device.type == "cuda" else 2048)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    count = 20 if device.type == "cuda" else 1
    taken: list[float] = []
    while len(taken) < 2 or sum(taken[1:]) < seconds:  # the first one also loads libraries
        wait_for_device()
        started = time.perf_counter()
        for _ in range(count):
            torch.mm(a, b)
        wait_for_device()
        taken.append(time.perf_counter() - started)
    return count * 2 * n**3 / min(taken)


def bf16_slowdown() -> float | None:
    """How many times as long as in float32 this machine's CPU takes for products in bf16, if that
    is far longer: without instructions for it by a factor of about a hundred. None on a GPU.

    GPUs are not asked: it would take some of their memory from the cells of a study.
    """
    if chosen_device().type != "cpu":
        return None
    # Small, and yet large enough to tell one that has to be emulated.
    fp32 = matrix_peak(torch.device("cpu"), "fp32", size=256, seconds=0.05)
    bf16 = matrix_peak(torch.device("cpu"), "bf16", size=256, seconds=0.05)
    return fp32 / bf16 if fp32 > SLOW * bf16 else None
