"""Ranks: the processes that torchrun starts to train one run, each on a device of its own.

Each computes its share of every batch, gradients are averaged, so all take the same steps. They
share the images of evaluations, too; whatever else a run does (look at its directory, draw, save)
rank 0 does, while the others wait. A process alone is rank 0 of 1, for which nothing here costs
anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from hybridvit.launcher import wanted

# How long the others wait for rank 0, which may prepare data or fit probes. Where a rank has ended
# they do not wait: torchrun ends them.
PATIENCE = timedelta(days=1)
T = TypeVar("T")
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo's words


def check_launch(gpus: int) -> None:
    """See whether this process and those beside it were started as ranks are.

    Raises:
        ValueError: not by torchrun, or more on this machine than it has GPUs, if it has any.
    """
    if not distributed.is_torchelastic_launched():
        raise ValueError(
            f"WORLD_SIZE={wanted()} asks for several processes; start them by torchrun, or unset "
            "the variable"
        )
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if gpus and here > gpus:
        raise ValueError(
            f"torchrun has started {here} processes here, and this machine has {gpus} GPUs; use "
            f"--nproc-per-node={gpus}"
        )


def check_shares(batch_size: int, accumulate: int, world: int) -> None:
    """See whether ranks get equal shares of a batch, in whole pairs: mixup's partners are
    neighbours 2k and 2k + 1.

    Raises:
        ValueError: they do not.
    """
    parts = 2 * world * accumulate
    if world > 1 and batch_size % parts:
        raise ValueError(
            f"train.batch_size={batch_size} cannot be shared by {world} ranks in whole pairs of "
            f"images, with train.accumulate={accumulate}; use a multiple of {parts}"
        )


def count() -> int:
    """How many ranks there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this process is."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def mean(value: Tensor) -> Tensor:
    """The mean of all ranks' values, equal on all; the host does not wait for a GPU."""
    if count() == 1:
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total / count()


def share(total: int) -> slice:
    """This rank's part of so many things in a row; it may be empty."""
    each = -(-total // count())
    return slice(min(total, rank() * each), min(total, (rank() + 1) * each))


def gathered(part: T | None) -> list[T] | None:
    """The parts of all ranks that have one, in order, on rank 0; None on the others."""
    parts: list[T | None] = [part]
    if count() > 1:
        received: list[T | None] | None = None if rank() else [None] * count()
        distributed.gather_object(part, received)
        if received is None:
            return None
        parts = received
    return [each for each in parts if each is not None]


def take_buffers(module: nn.Module) -> None:
    """Give a module rank 0's buffers: running statistics are those of each rank's own images."""
    if count() > 1:
        for buffer in module.buffers():
            distributed.broadcast(buffer, 0)


def asked(signals: list[str]) -> list[str]:
    """The signal that asks for an end, if any rank has received one: all then end together."""
    if count() == 1:
        return signals[:1]
    received = torch.tensor(len(signals))
    distributed.all_reduce(received)
    return (signals[:1] or ["a signal to another rank"]) if received else []


def lost(error: Exception) -> bool:
    """Whether an error says that another rank has ended."""
    return count() > 1 and any(words in str(error) for words in LOST)


def leave() -> None:
    """End the group, which must be before Python ends, whose threads gloo's would wait for."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def joined() -> Iterator[None]:
    """Where another rank has ended, so does this one, in one line.

    Raises:
        ValueError: in place of what a collective operation raises then.
    """
    try:
        yield
    except RuntimeError as error:
        if not lost(error):
            raise
        raise ValueError(f"rank {rank()} ends, because another rank has") from error
