"""Limits: large bf16 matrix products, and the products of a training step without all else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cases import Training
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from turns import Turns, device, memory_used, ready

from hybridvit.engine.bench import Steps
from hybridvit.engine.device import matrix_peak

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten.convolution_backward.default,
}


def product() -> Turns:
    """The best product in each turn."""

    peak = partial(matrix_peak, device(), "bf16", None)
    peak(0)
    return Turns(peak, memory_used)


def products(job: Training, overrides: list[str]) -> Turns:
    """The matrix products and convolutions of our step alone, forward and backward, on operands
    that lie ready: no step that consists of them is faster."""
    import ours

    steps = Steps(ours.training_config(job, [*overrides, "train.compile=none"]))
    recorded = recorded_products(steps)

    def step() -> int:
        for call in recorded.calls:
            call()
        return job.batch

    return ready(step, flops_per_image=ours.flops_per_image(steps.session.objective, job))


def recorded_products(steps: Steps) -> Products:
    """Those of a step as it is compiled: that splits products which an eager one does not."""
    recorded = Products()

    def compile_(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def run(*operands: Any) -> Any:
            with recorded:
                return graph(*operands)

        return make_boxed_func(run)

    backend = aot_autograd(fw_compiler=compile_)
    steps.trained.called = torch.compile(steps.trained.called, backend=backend)
    steps.run(lambda _: None)
    return recorded


class Products(TorchDispatchMode):
    """Keeps the products that are computed inside, to be computed again on other operands of the
    same shape, order and type."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []
        self.operands: dict[Any, Tensor] = {}

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # A product with a single row of ones is a sum, for a bias.
        if operator in PRODUCTS and args[0].shape != (1, args[1].shape[0]):
            mine, named = tree_map_only(Tensor, self.operand, (args, kwargs))
            self.calls.append(lambda: operator(*mine, **named))
        return operator(*args, **kwargs)

    def operand(self, like: Tensor) -> Tensor:
        """A tensor of its own, one for all of a kind."""
        kind = (like.shape, like.stride(), like.dtype, like.device)
        if kind not in self.operands:
            empty = torch.empty_strided(*kind[:2], dtype=like.dtype, device=like.device)
            self.operands[kind] = empty.copy_(torch.randn(like.shape))
        return self.operands[kind]
