"""What stays outside of compiled graphs. Importing this takes a second, for torch's compiler:
objectives import it in their forward pass, and `hybridvit list` does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not type it
def outside(function: Callable[..., T], *args: object) -> T:
    """`function(*args)`, where the graph ends."""
    return function(*args)
