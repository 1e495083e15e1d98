"""What a GPU would be given, found without one: torch's fake tensors have a device and no content.

An operation on two devices fails, and so does each wait of the host for a number: that a GPU is
kept busy between two log points is not seen in any result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from conftest import STEM_ARGS, make_batch, make_objective
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from hybridvit.config import EvalConfig, OptimConfig, RunConfig, TrainConfig
from hybridvit.contracts import Batch, Objective
from hybridvit.data import crops, policy
from hybridvit.data.augment import Augment, augment, plain
from hybridvit.data.loader import TrainLoader, order
from hybridvit.data.splits import ArraySplit
from hybridvit.encoder.positions import Position
from hybridvit.engine import fit as engine
from hybridvit.engine.average import MovingAverage
from hybridvit.engine.optim import make_optimizer
from hybridvit.engine.step import Trained
from hybridvit.objectives import OBJECTIVES

MASKED = ["resnet", "conv", "overlap", "cct", "convnext"]  # stems that take masked=true
HIDING = ["masked_patch", "mae", "simmim"]
CASES = [(o, s, {}) for o, s in itertools.product(OBJECTIVES, STEM_ARGS)]
CASES += [(o, s, {"masked": True}) for o, s in itertools.product(HIDING, MASKED)]
SMALL: dict[str, dict[str, Any]] = {
    "mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    "simclr": {"hidden_dim": 32, "output_dim": 16},
    "dino": {"hidden_dim": 32, "bottleneck_dim": 16, "output_dim": 64},
}


class Waited(Exception):
    """The host copied from the GPU, for which it waits."""


class NoCopies(TorchDispatchMode):
    """Refuse copies from the GPU, and count those to it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            given = {x.device.type for x in args if isinstance(x, Tensor)}
            if "cuda" in given and made.device.type == "cpu":
                raise Waited(str(func))
            self.sent += made.device.type == "cuda" and given == {"cpu"}
        return made


@contextmanager
def autocast() -> Iterator[None]:
    """bf16 autocast, which torch.autocast itself leaves off where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def on_gpu(given: Tensor) -> Tensor:
    """A fake tensor of the same kind; in a fake mode."""
    return torch.empty(given.shape, dtype=given.dtype, device="cuda")


def module_on_gpu(module: nn.Module) -> None:
    """Parameters and buffers become fake ones; other tensors of a module stay where they are."""
    made: dict[int, nn.Parameter] = {}  # a parameter may be that of two modules
    for each in module.modules():
        for name, parameter in each.named_parameters(recurse=False):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(on_gpu(parameter), parameter.requires_grad)
            each._parameters[name] = made[id(parameter)]
        for name, buffer in each.named_buffers(recurse=False):
            each._buffers[name] = on_gpu(buffer)


def batch_on_gpu(views: int = 1) -> Batch:
    batch = make_batch(4)
    columns = (on_gpu(x) for x in (batch.images, batch.labels, batch.index, batch.key))
    return Batch(*columns, tuple(on_gpu(batch.images) for _ in range(1, views)))


def small(objective: str, stem: str, stem_args: dict[str, object]) -> Objective:
    return make_objective(
        objective, stem, stem_args=stem_args, encoder_args={"depth": 1}, **SMALL.get(objective, {})
    )


@pytest.mark.parametrize(("objective", "stem", "stem_args"), CASES)
def test_an_objective_waits_for_nothing(
    objective: str, stem: str, stem_args: dict[str, object]
) -> None:
    made = small(objective, stem, stem_args)
    # lightly's loss selects by a mask, whose size the host must know.
    waits = pytest.raises(DynamicOutputShapeException) if objective == "simclr" else nullcontext()
    with FakeTensorMode(), waits:
        module_on_gpu(made)
        batch = batch_on_gpu(made.views)
        with NoCopies() as copies, autocast():
            output = made(batch)
            made.after_step(1)
        assert {x.device.type for x in (output.loss, *output.metrics.values())} == {"cuda"}
        assert copies.sent == 0


POSITIONS = [*get_args(Position), "axial"]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("objective", ["supervised", "mae", "simmim"])
def test_positions_wait_for_nothing(objective: str, position: str) -> None:
    """Of all patches, and of those that are visible; masks and biases are made where tokens are."""
    encoder = {"attention": "axial"} if position == "axial" else {"position": position}
    made = make_objective(objective, encoder_args={"depth": 2, **encoder},
                          **SMALL.get(objective, {}))  # fmt: skip
    with FakeTensorMode():
        module_on_gpu(made)
        batch = batch_on_gpu()
        with NoCopies() as copies, autocast():
            output = made(batch)
        assert output.loss.device.type == "cuda"
        assert copies.sent == 0


AUGMENTS = {
    "pad": Augment(crop="pad", flip=True),
    "resized": Augment(crop="resized", flip=True, erase=0.5),
    "rand": Augment(crop="resized", policy="rand"),
    "trivial": Augment(policy="trivial"),
    "contrastive": Augment(crop="resized", flip=True, jitter=0.5, grayscale=0.2, blur=0.5),
}


@pytest.fixture(scope="module")
def mode() -> Iterator[FakeTensorMode]:
    """One for all of these tests: policies and crops keep tables, which are of a mode."""
    kept = (policy._strengths, crops._table)
    for table in kept:
        table.cache_clear()
    yield FakeTensorMode()
    for table in kept:  # a real GPU would be given fake ones
        table.cache_clear()


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("how", AUGMENTS)
def test_augmentation_waits_for_nothing(how: str, size: int, mode: FakeTensorMode) -> None:
    with mode:
        images = torch.empty(8, 3, size, size, dtype=torch.uint8, device="cuda")
        key, fill = torch.empty(8, dtype=torch.int64, device="cuda"), images.new_empty(3)
        augment(images, key, AUGMENTS[how], (32, 32), fill)  # sends what it keeps
        with NoCopies() as copies:
            made = augment(images, key, AUGMENTS[how], (32, 32), fill)
    assert (made.device.type, made.shape, made.dtype) == ("cuda", (8, 3, 32, 32), torch.float32)
    assert copies.sent == 0


class HostDivisors(TorchDispatchMode):
    """Divisions of floats by numbers of the host: GPUs multiply by the reciprocal, whose last bit
    is another. Halves and the like have exact ones."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
            number = args[1] if not isinstance(args[1], Tensor) else 1
            if args[0].is_floating_point() and math.frexp(number)[0] != 0.5:
                self.found.append(f"{func} by {number}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", AUGMENTS)
def test_divisions_are_a_cpus(how: str, mode: FakeTensorMode) -> None:
    """Or pixels would differ from those of a CPU: by one place of the last bit, or by a whole grey
    value where they are rounded."""
    with mode, HostDivisors() as divisors:
        images = torch.empty(8, 3, 48, 48, dtype=torch.uint8, device="cuda")
        key, fill = torch.empty(8, dtype=torch.int64, device="cuda"), images.new_empty(3)
        crops._table.cache_clear()  # and tables are made on the device
        for size in ((32, 32), (96, 96)):
            augment(images, key, AUGMENTS[how], size, fill)
            plain(images, size)
    assert divisors.found == []


@pytest.mark.parametrize("views", [1, 2])
def test_batches_of_resident_images_wait_for_nothing(views: int, mode: FakeTensorMode) -> None:
    """Over the end of an epoch, whose order is found where the images are."""
    split = ArraySplit(torch.zeros(40, 3, 8, 8, dtype=torch.uint8), torch.arange(40) % 5)
    loader = TrainLoader(
        split, AUGMENTS["pad"], (8, 8), batch_size=16, seed=0, device="cpu", resident=True,
        views=views,
    )  # fmt: skip
    with mode, NoCopies() as copies:
        assert loader.resident is not None
        loader.device = loader._home = torch.device("cuda")
        for kept in (loader, loader.resident):
            for name, value in list(vars(kept).items()):
                if isinstance(value, Tensor):
                    setattr(kept, name, on_gpu(value))
        loader._order = partial(order, 0, n=40, device="cuda")
        batches = list(loader.batches(0, 5))
    assert len(batches) == 5
    assert batches[0].images.device.type == "cuda"
    assert copies.sent == 0


class FakeFabric:
    """Fabric on a fake GPU. Without a real one torch takes no gradients there: they are made."""

    device = torch.device("cuda")
    parameters: list[nn.Parameter]

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Any:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)

    def clip_gradients(self, module: nn.Module, optimizer: Any, **how: Any) -> Tensor:
        norm: Tensor = nn.utils.clip_grad_norm_(
            self.parameters, how["max_norm"], error_if_nonfinite=how["error_if_nonfinite"]
        )
        return norm


@pytest.mark.parametrize("clip_norm", [1.0, None])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_wait_for_nothing_between_log_points(
    clip_norm: float | None, accumulate: int
) -> None:
    """The host first asks at the step that is logged, the fifth: whether all was finite."""
    made = make_objective("dino", **SMALL["dino"])
    average = MovingAverage(made, 0.9)
    config = RunConfig(
        optim=OptimConfig(clip_norm=clip_norm),
        train=TrainConfig(epochs=2, batch_size=4, accumulate=accumulate, log_every=5),
        eval=EvalConfig(epochs=99),
    )
    progress, fabric = engine.Progress(), FakeFabric()
    with FakeTensorMode(), NoCopies() as copies:
        module_on_gpu(made)
        module_on_gpu(average.module)
        optimizer = make_optimizer(made, config.optim)
        fabric.parameters = [p for p in made.parameters() if p.requires_grad]
        wrapped = SimpleNamespace(
            optimizer=optimizer,
            param_groups=optimizer.param_groups,
            step=optimizer.step,
            zero_grad=optimizer.zero_grad,
        )
        batches = itertools.repeat(batch_on_gpu(made.views))
        loader: Any = SimpleNamespace(batches=lambda start, steps: batches)
        nothing: Any = None
        finite = torch.ones((), device=fabric.device)
        trained = Trained(fabric, made, made, wrapped, average, finite)
        with pytest.raises(DataDependentOutputException), autocast():
            engine.fit(trained, loader, 20, config, progress, nothing)
    assert progress.step == 5
    assert copies.sent == 0


def test_what_waits_is_found() -> None:
    """Else the tests above could not fail."""
    with FakeTensorMode(), NoCopies() as copies:
        x = torch.empty(4, device="cuda")
        with pytest.raises(Waited):
            x.cpu()
        with pytest.raises(DataDependentOutputException):
            float(x.sum())
        with pytest.raises(DynamicOutputShapeException):
            x[x > 0]
        with pytest.raises(RuntimeError, match=r"same device|two different devices"):
            x + torch.ones(4)
        torch.ones(4).to("cuda")
    assert copies.sent == 1
