"""What a training step calls: the objective compiled, or recomputing activations, or as it is.

Evaluation, pictures and measurements call the objective itself, which stays as it was.

Compiled code is kept in `compiled/` of the cache folder ($HYBRIDVIT_CACHE, else
~/.cache/hybridvit), by torch under keys of its content: a resumed run, another seed's cell and
another study all start from it. It is not kept in run directories: these may come from strangers,
and reading it runs code. So the folder is the user's alone; in a cache that belongs to another or
that all may write to, torch keeps code in its own place.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hybridvit.config import TrainConfig
from hybridvit.contracts import Batch, Objective, StepOutput
from hybridvit.data import cache
from hybridvit.encoder.block import Block, RunBlock, Survivors, run_block
from hybridvit.encoder.positions import Places
from hybridvit.encoder.vit import Encoder
from hybridvit.engine import ranks
from hybridvit.engine.bf16 import Bf16Parameters

CACHE = "TORCHINDUCTOR_CACHE_DIR"  # torch reads it whenever it compiles
# For CPUs: a product and a sum are one instruction, which rounds once.
OPTIONS: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast"}


def for_training(objective: Objective, train: TrainConfig) -> nn.Module:
    """An objective as training steps call it, by `train.compile`, `train.grad_checkpointing` and
    `train.precision`.

    blocks compiles an encoder's block, once for all that differ in weights alone, and leaves stem
    and objective as they are; whole makes one graph of the objective's forward pass; graphs
    records that as CUDA graphs, so that the host launches one instead of each kernel.
    """
    if train.compile != "none":
        keep_compiled()
        _leave_as_written(train)
    run = recomputed if train.grad_checkpointing else run_block
    called: Any = Bf16Parameters(objective) if train.precision == "bf16_params" else objective
    if train.compile == "blocks":
        # Static: once a decoder has shown a second shape, torch would make all shapes dynamic.
        run = torch.compile(run, dynamic=False, options=OPTIONS)
    elif train.compile == "whole":
        called = torch.compile(called, options=OPTIONS)
    elif train.compile == "graphs":
        called = torch.compile(called, mode="reduce-overhead")
    module: nn.Module = called if run is run_block else WithBlocks(called, run)
    return module


def _leave_as_written(train: TrainConfig) -> None:
    """Switch off what torch does by default to compiled code on GPUs.

    Recomputed dropout would draw from a generator of its own, which each process seeds anew, so
    that a resumed run would drop other places. Under several ranks, code would be compiled in
    parts of a MiB of gradients, to send these earlier: blocks are sent one by one anyway.
    """
    if train.grad_checkpointing:
        functorch.graphsafe_rng_functionalization = False
    if ranks.count() > 1:
        from torch._dynamo import config  # the compiler, which takes as long to import as torch

        config.optimize_ddp = False


def check_compile(train: TrainConfig, device: torch.device) -> None:
    """See whether a device can do what is asked of it.

    Raises:
        ValueError: CUDA graphs without a GPU, or on several; no C++ compiler for the CPU that
            runs, or C compiler for a GPU; or none of Python's headers, which all compiled code
            includes.
    """
    if train.compile == "graphs" and ranks.count() > 1:
        raise ValueError(
            f"train.compile='graphs' is for one GPU, and there are {ranks.count()} ranks; use "
            "'whole' or 'blocks'"
        )
    if train.compile == "graphs" and device.type != "cuda":
        raise ValueError(
            "train.compile='graphs' records CUDA graphs, and there is no GPU here; use 'whole'"
        )
    if train.compile != "none" and device.type == "cpu":
        found = compiler()
        if found is None:
            raise ValueError(
                f"train.compile={train.compile!r} needs a C++ compiler: install "
                f"{_compiler_name()}, name another in the environment variable CXX, or use 'none'"
            )
        if subprocess.run([found, "--version"], capture_output=True).returncode:  # as torch asks
            raise ValueError(
                f"train.compile={train.compile!r} needs a C++ compiler, and {found} is there and "
                "does not run; name another in the environment variable CXX, or use 'none'"
            )
    if train.compile != "none" and device.type == "cuda" and c_compiler() is None:
        raise ValueError(
            f"train.compile={train.compile!r} needs a C compiler, by which Triton starts kernels: "
            "install gcc, name another in the environment variable CC, or use 'none'"
        )
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if train.compile != "none" and not headers.is_file():
        raise ValueError(
            f"train.compile={train.compile!r} needs Python's headers, and there is no {headers}: "
            "install those of this Python (python3-dev, say), or use 'none'"
        )


def c_compiler() -> str | None:
    """The C compiler that Triton takes, if there is one."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    return next(filter(None, map(shutil.which, names)), None)


def compiler() -> str | None:
    """The C++ compiler that torch compiles with on CPUs, if it is there."""
    return shutil.which(_compiler_name())


def keep_compiled() -> None:
    """Have torch keep what it compiles in the cache folder, unless the user chose another or the
    folder is not the user's own."""
    # Those of a graph depend on their arguments alone; torch asks, and would trace them anew.
    functorch.autograd_cache_allow_custom_autograd_functions = True
    folder, chosen = cache.folder(), os.environ.get(CACHE)
    # Torch itself sets the variable when it is imported, to a folder of temporary files.
    if folder is None or (chosen and Path(chosen).parent != Path(tempfile.gettempdir())):
        return
    compiled = folder / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_ours(folder.stat(), stat.S_IWOTH):
            return
        compiled.mkdir(mode=0o700, exist_ok=True)
        if not _is_ours(compiled.lstat(), stat.S_IWOTH | stat.S_IWGRP):
            return
    except OSError:  # torch's own will do
        return
    os.environ[CACHE] = str(compiled)


def _is_ours(found: os.stat_result, others: int) -> bool:
    """Whether a folder is the user's, and others have no right to write there."""
    return found.st_uid == os.getuid() and not found.st_mode & others


class WithBlocks(nn.Module):
    """An objective whose encoders, while it is called, run their blocks by another function."""

    def __init__(self, objective: nn.Module, run: RunBlock) -> None:
        super().__init__()
        self.objective = objective
        self.run = run

    def forward(self, batch: Batch) -> StepOutput:
        with blocks_run_by(self.objective, self.run):
            output: StepOutput = self.objective(batch)
        return output


@contextmanager
def blocks_run_by(objective: nn.Module, run: RunBlock) -> Iterator[None]:
    """Have all encoders of an objective run their blocks by a function inside."""
    encoders = [module for module in objective.modules() if isinstance(module, Encoder)]
    for encoder in encoders:
        encoder.run_block = run
    try:
        yield
    finally:
        for encoder in encoders:
            encoder.run_block = run_block


def recomputed(
    block: Block, z: Tensor, places: Places, survivors: Survivors, read: Tensor | None
) -> Tensor:
    """`run_block`, of which the backward pass keeps the input alone and computes the rest anew.

    With the same random numbers, so that dropout drops the same (Chen et al. 2016).
    """
    after: Tensor = checkpoint(run_block, block, z, places, survivors, read, use_reentrant=False)
    return after


def _compiler_name() -> str:
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
