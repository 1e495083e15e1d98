"""Lightning's Fabric as runs use it.

It is imported without torchmetrics, of which it reads the version alone: importing that takes
nearly as long as all else that a run imports.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from typing import Any

import torch

from hybridvit.config import Precision
from hybridvit.engine import ranks
from hybridvit.engine.device import chosen_device
from hybridvit.launcher import check_alone, wanted


@contextmanager
def _by_version_alone(package: str) -> Iterator[None]:
    """Have imports of an installed package inside find a module with its version and no more."""
    spec = None if package in sys.modules else find_spec(package)
    if spec is None:
        yield
        return
    module = module_from_spec(spec)  # not executed
    vars(module)["__version__"] = version(package)
    sys.modules[package] = module
    try:
        yield
    finally:
        del sys.modules[package]


with _by_version_alone("torchmetrics"):
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.plugins.precision import MixedPrecision
    from lightning_fabric.strategies.ddp import DDPStrategy

__all__ = ["Fabric", "make_fabric"]

# Fabric's notes on precision and devices are in the record; warnings still show.
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)


class Autocast(MixedPrecision):
    """Autocast alone. Fabric's own also rounds what enters the objective: a masked patch of little
    contrast would then be predicted with as much rounding as content."""

    def convert_input(self, data: Any) -> Any:
        return data


def make_fabric(precision: Precision, *, joins: bool = False) -> Fabric:
    """Fabric for one device, a GPU if there is one, and a precision of `TrainConfig`.

    Convolutions and matrix products are computed in what a precision says: by default torch has
    the former round float32 to 10 bits on GPUs (TF32), so that stems would differ in more than what
    they are, and an environment variable has the latter do so.

    Args:
        joins: the processes that torchrun has started, if it has, each with a device of its own.

    Raises:
        ValueError: a launcher has started several processes, in another way or for what takes one.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    kind = chosen_device().type
    plugins: list[Any] = [] if precision == "fp32" else [Autocast("bf16-mixed", kind)]
    if not joins:
        check_alone()
    if wanted() == 1:
        # Else Fabric would join the tasks of a Slurm job that this one may have.
        return Fabric(accelerator=kind, devices=1, plugins=[*plugins, LightningEnvironment()])
    ranks.check_launch(torch.cuda.device_count())
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    # What ranks tell each other beside gradients is on the host, so that it waits for no GPU.
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    # Heads, poolings or the end of a backbone may be there that an objective does not train.
    strategy = DDPStrategy(
        process_group_backend=backend, timeout=ranks.PATIENCE, find_unused_parameters=True
    )
    nodes = wanted() // here
    fabric = Fabric(
        accelerator=kind, devices=here, num_nodes=nodes, strategy=strategy, plugins=plugins
    )
    fabric.launch()
    atexit.register(ranks.leave)
    return fabric
