"""How fast a config trains on this machine, what its steps spend, and how far that is from the
machine's limit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hybridvit import build
from hybridvit.analysis import cost
from hybridvit.config import RunConfig
from hybridvit.engine.device import device_name, matrix_peak, memory_used, wait_for_device
from hybridvit.engine.fabric import make_fabric
from hybridvit.engine.idle import alone, check_unused
from hybridvit.engine.runlog import RunDirectory
from hybridvit.engine.session import Session
from hybridvit.engine.step import take_step

WARMUP = 3  # steps that are not counted
LEAST = 5  # steps that are, however long they take
UNBROKEN = 10  # steps at least that a GPU is given at once
PHASES = ("data", "forward", "backward", "optimizer")
WORDS = {
    "compiled, fused": ("CompiledF", "Torch-Compiled", "triton_"),
    "resizing": ("upsample",),
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_linear", "_scaled_mm"),
    "convolutions": ("conv",),
    "attention": ("scaled_dot_product", "flash_attention", "softmax"),
    "normalisation": ("layer_norm", "batch_norm", "group_norm"),
    "activation functions": ("gelu", "relu", "silu", "tanh", "sigmoid"),
    "copies and casts": ("copy_", "to", "_to_copy", "clone", "contiguous", "cat"),
    "optimizer": ("_fused_adamw_", "_fused_sgd_", "_foreach", "optimizer"),
    "indexing": ("index", "gather", "scatter", "take", "select", "sort"),
}


class Steps:
    """Training steps of a config, one phase at a time."""

    def __init__(self, config: RunConfig) -> None:
        parts, _ = build.make_parts(config.plugins)
        config = build.resolve(config, parts)
        if config.train.threads is not None:
            torch.set_num_threads(config.train.threads)
        nowhere = RunDirectory(Path("unused"))  # nothing is written there
        session = Session(config, parts, nowhere, make_fabric(config.train.precision), show=False)
        self.session, self.config, self.fabric = session, config, session.fabric
        self.trained = session.prepare()
        self.batches = session.loader.batches(0, 2**31)
        self.step = 0

    def run(self, phase: Callable[[str], None]) -> None:
        """One step; `phase` is called with the name of what was just done."""
        self.step += 1
        batch = next(self.batches)
        phase("data")
        rates = [group["lr"] for group in self.trained.optimizer.param_groups]
        take_step(self.trained, self.config, batch, self.step, rates, phase)


def bench(config: RunConfig, *, seconds: float = 10.0, beside_load: bool = False) -> dict[str, Any]:
    """Measure the training steps of a config.

    Returns:
        images a second (median over steps, with quartiles), milliseconds a step by phase, FLOPs an
        image, FLOPs a second beside the peak of a matrix product on this device, and memory.

    Raises:
        ValueError: other processes use the machine, which would be measured instead.
    """
    if not beside_load:
        check_unused()  # before all is built
    steps = Steps(config)
    images = steps.config.train.batch_size
    warm_up(steps)
    taken, whole = alone(lambda: both_ways(steps, seconds), beside_load)
    rates = sorted(images / spent for spent in whole)
    memory = memory_used(steps.fabric.device)  # before the products below take theirs
    spec = steps.session.dataset.spec()
    micro_batch = steps.config.train.micro_batch
    counted = cost.measure(steps.session.objective, spec.image_size, micro_batch)
    peak = matrix_peak(steps.fabric.device, steps.config.train.precision)
    forward, backward = counted.forward_flops, counted.backward_flops
    flops = None if forward is None or backward is None else forward + backward
    reached = None if flops is None else median(rates) * flops
    return {
        "images_per_second": median(rates),
        "quartiles": [rates[len(rates) // 4], rates[3 * len(rates) // 4]],
        "steps": len(taken),
        "batch_size": images,
        "milliseconds": {p: 1000 * median(spent[p] for spent in taken) for p in PHASES},
        "flops_per_image": flops,
        "flops_per_second": reached,
        "peak_flops_per_second": peak,
        "share_of_peak": None if reached is None else reached / peak,
        "memory_bytes": memory,
        "threads": torch.get_num_threads(),
        "device": device_name(steps.fabric.device),
    }


def warm_up(steps: Steps, count: int = WARMUP) -> None:
    """Steps in which all is compiled and tuned."""
    for _ in range(count):
        steps.run(lambda _: None)


def timed_steps(steps: Steps, seconds: float, *, least: int = LEAST) -> list[dict[str, float]]:
    """Seconds of each step by phase, for so long, but `least` steps.

    Resident images of several steps are augmented together: each step has its share of that.
    """
    taken: list[dict[str, float]] = []
    started = time.perf_counter()
    while len(taken) < least or time.perf_counter() - started < seconds:
        taken.append(_timed(steps))
    if steps.session.loader.resident is not None:
        share = resident_batch(steps)
        taken = [{**spent, "data": share} for spent in taken]
    return taken


def resident_batch(steps: Steps) -> float:
    """Seconds that a batch of resident images takes, of as many as are augmented together."""
    loader, taken = steps.session.loader, []
    for _ in range(3):
        wait_for_device()
        started = time.perf_counter()
        for _ in loader.batches(0, loader.together):
            pass
        wait_for_device()
        taken.append((time.perf_counter() - started) / loader.together)
    return median(taken)


def both_ways(
    steps: Steps, seconds: float, *, least: int = LEAST
) -> tuple[list[dict[str, float]], list[float]]:
    """Seconds of steps by phase, and of whole ones."""
    by_phase = timed_steps(steps, seconds, least=least)
    return by_phase, whole_steps(steps, by_phase, seconds)


def whole_steps(steps: Steps, by_phase: list[dict[str, float]], seconds: float) -> list[float]:
    """Seconds of a step. On a GPU, whose work overlaps with the host's, of many without waiting
    in between; else those that were measured by phase."""
    if steps.fabric.device.type != "cuda":
        return [sum(spent.values()) for spent in by_phase]
    together = steps.session.loader.together
    count = -(-UNBROKEN // together) * together
    taken: list[float] = []
    started = time.perf_counter()
    while len(taken) < LEAST or time.perf_counter() - started < seconds:
        wait_for_device()
        before = time.perf_counter()
        for _ in range(count):
            steps.run(lambda _: None)
        wait_for_device()
        taken.append((time.perf_counter() - before) / count)
    return taken


def _timed(steps: Steps) -> dict[str, float]:
    spent = dict.fromkeys(PHASES, 0.0)
    mark = time.perf_counter()

    def phase(name: str) -> None:
        nonlocal mark
        wait_for_device()
        now = time.perf_counter()
        spent[name] += now - mark
        mark = now

    steps.run(phase)
    return spent


def bench_text(found: dict[str, Any]) -> str:
    """The measurement as lines."""
    low, high = found["quartiles"]
    total = sum(found["milliseconds"].values())
    lines = [
        f"{found['images_per_second']:,.1f} images/s (quartiles {low:,.1f} to {high:,.1f}), "
        f"{found['steps']} steps of {found['batch_size']} images on {found['device']}, "
        f"{found['threads']} threads"
    ]
    for phase, spent in found["milliseconds"].items():
        lines.append(f"  {phase:10} {spent:9.2f} ms  {100 * spent / total:4.1f} %")
    if found["flops_per_image"] is None:
        lines.append(f"FLOPs cannot be counted: {cost.UNCOUNTED}")
    else:
        lines.append(
            f"{found['flops_per_image'] / 1e9:.4g} GFLOPs an image, "
            f"{found['flops_per_second'] / 1e9:,.0f} GFLOP/s: "
            f"{100 * found['share_of_peak']:.1f} % of a matrix product's "
            f"{found['peak_flops_per_second'] / 1e9:,.0f}"
        )
    lines.append(f"memory at the most {found['memory_bytes'] / 2**30:.2f} GiB")
    return "\n".join(lines)


def profile(
    config: RunConfig, out: Path, *, count: int = 5, beside_load: bool = False
) -> list[tuple[str, float, str]]:
    """Trace a few training steps into `out`/trace.json (for chrome://tracing or Perfetto).

    Returns:
        the ten largest costs: operator, its share of the time, and what kind of work it is.

    Raises:
        ValueError: other processes use the machine, which would be traced instead.
    """
    if not beside_load:
        check_unused()
    steps = Steps(config)
    warm_up(steps)
    on_gpu = steps.fabric.device.type == "cuda"
    trace = alone(lambda: traced(steps, count), beside_load)
    out.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(out / "trace.json"))
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    # Operators have the time of their kernels, but no operator starts those of a CUDA graph.
    kind = "CUDA" if config.train.compile == "graphs" else "CPU"
    events = [
        (e.key, float(getattr(e, time_of)))
        for e in trace.key_averages()
        if e.device_type.name == kind and not getattr(e, "is_user_annotation", False)
    ]
    total = sum(spent for _, spent in events)
    events.sort(key=lambda event: -event[1])
    costs = [(name, spent / total, kind_of(name)) for name, spent in events[:10]]
    (out / "costs.json").write_text(json.dumps(costs, indent=1) + "\n")
    return costs


def traced(steps: Steps, count: int) -> torch.profiler.profile:
    """The profile of some steps."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if steps.fabric.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    trace: torch.profiler.profile
    with torch.profiler.profile(activities=activities) as trace:
        for _ in range(count):
            steps.run(lambda _: None)
    return trace


def kind_of(operator: str) -> str:
    """What kind of work an operator of torch is, in words."""
    name = operator.removeprefix("aten::")
    for kind, marks in WORDS.items():
        if any(name == mark or (len(mark) > 3 and mark in name) for mark in marks):
            return kind
    return "other"
