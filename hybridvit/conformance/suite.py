"""What the suites share: how a part is made, made lively, and judged."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from hybridvit import build, draws
from hybridvit.config import PartConfig, RunConfig
from hybridvit.contracts import Batch, DataSpec, Objective
from hybridvit.registry import Parts, Registry

CLASSES = 10
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
ENCODER = {"dim": 64, "depth": 1, "heads": 2}
MODES = {"train": True, "eval": False}


class Failure(AssertionError):
    """What a check found."""


def require(holds: bool | Tensor, reason: str) -> None:
    """Fail a check for a reason that names the value found, what is valid and what to do."""
    __tracebackhide__ = True
    if not holds:
        raise Failure(reason)


def reason_of(error: Exception) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else ""
    return first if isinstance(error, Failure) else f"{type(error).__name__}: {first}".rstrip(": ")


@contextmanager
def on(where: str) -> Iterator[None]:
    """Failures inside say where."""
    try:
        yield
    except Exception as error:  # nothing is lost: it is raised again with the place before it
        raise Failure(f"{where}: {reason_of(error)}") from error


class Suite:
    """The checks of one part: each method `test_*`, for pytest as for `hybridvit check`.

    Set these in a subclass; a check that does not apply is left out by `test_compile = None`.

    Attributes:
        factory: what would be registered.
        args: its arguments, where the defaults are not to be checked.
        plugins: others that it needs by name, as in a config.
        name: what it would be registered as; by default the factory's name.
    """

    factory: Callable[..., Any]
    args: Mapping[str, Any] = MappingProxyType({})
    plugins: Sequence[str] = ()
    name: str = ""

    registry: ClassVar[str]  # attribute of Parts
    gates: ClassVar[tuple[str, ...]]  # checks without which the others tell nothing
    note = ""  # what a check that passes has to say

    def __init_subclass__(cls) -> None:
        factory = vars(cls).get("factory")
        if factory is None:
            return
        if not isinstance(factory, staticmethod):  # or a function would become a method
            cls.factory = staticmethod(factory)
        if "name" not in vars(cls):
            cls.name = getattr(cls.factory, "__name__", cls.__name__)

    @cached_property
    def parts(self) -> Parts:
        """The registries of a run, with the part under its name."""
        parts, _ = build.make_parts(list(self.plugins))
        registry: Registry[Any] = getattr(parts, self.registry)
        if registry.factories.get(self.name) is not self.factory:
            registry.factories.pop(self.name, None)
            registry.add(self.name, self.factory)
        return parts

    def check_arguments(self) -> None:
        """Fail where the part cannot be built without arguments that are not given."""
        registry: Registry[Any] = getattr(self.parts, self.registry)
        missing = [
            name
            for name, p in registry.schema(self.name).items()
            if p.default is p.empty and name not in self.args
        ]
        require(
            not missing,
            f"needs {', '.join(missing)}: give defaults, so that every part can be built and "
            f"compared without knowing it, or set {self.name}.{''.join(missing[:1])}=VALUE here",
        )


def one_objective(
    parts: Parts,
    objective: tuple[str, Mapping[str, Any]],
    stem: tuple[str, Mapping[str, Any]],
    size: tuple[int, int],
    *,
    channels: int = 3,
    seed: int = 0,
) -> Objective:
    """An objective on a stem and a small encoder, as a run would build it."""
    config = RunConfig(
        stem=PartConfig(stem[0], dict(stem[1])),
        encoder=PartConfig("vit", ENCODER),
        objective=PartConfig(objective[0], dict(objective[1])),
        seed=seed,
    )
    return build.make_objective(config, parts, spec(size, channels))


def spec(size: tuple[int, int], channels: int = 3) -> DataSpec:
    """A data set of images (H, W) in 10 classes."""
    mean, std = (MEAN, STD) if channels == 3 else ((0.5,) * 3, (0.25,) * 3)
    return DataSpec(CLASSES, size, channels, mean, std)


def batch(size: tuple[int, int], *, count: int = 4, channels: int = 3, views: int = 1) -> Batch:
    """Images of noise with random labels."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(views, count, channels, *size, generator=generator)
    first, *others = images.expand(-1, -1, 3, -1, -1).contiguous()
    labels = torch.randint(CLASSES, (count,), generator=generator)
    index = torch.arange(count)
    return Batch(first, labels, index, draws.image_keys(0, index * 0, index), tuple(others))


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers, as normalised images are."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def enliven(module: nn.Module) -> None:
    """Make every weight matter: scales, gains and layers that start at 0 hide what depends on
    what."""
    generator = torch.Generator().manual_seed(2)
    for p in module.parameters():
        drawn = torch.rand(p.shape, generator=generator)
        if p.ndim < 2 or max(p.shape) == p.numel():
            p.add_(0.3 + 0.1 * drawn.to(p))
        elif p.abs().max() < 1e-3:
            p.add_((drawn.to(p) - 0.5) * 2 * p[0].numel() ** -0.5)


@torch.no_grad()
def shift(module: nn.Module) -> None:
    """Move all weights."""
    for p in module.parameters():
        p.add_(1)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All global generators seeded inside, as they were outside."""
    states = global_states()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states["torch"])
        random.setstate(states["Python"])
        np.random.set_state(states["NumPy"])


def global_states() -> dict[str, Any]:
    """The states of the global random generators."""
    return {
        "torch": torch.get_rng_state(),
        "Python": random.getstate(),
        "NumPy": np.random.get_state(),
    }


def generators_moved(since: dict[str, Any]) -> list[str]:
    """Which global generators have been drawn from."""
    now = global_states()
    moved = [] if torch.equal(since["torch"], now["torch"]) else ["torch"]
    moved += [] if since["Python"] == now["Python"] else ["Python"]
    before, after = since["NumPy"], now["NumPy"]
    same = np.array_equal(before[1], after[1]) and before[2:] == after[2:]
    return moved if same else [*moved, "NumPy"]


def relative(a: Tensor, b: Tensor) -> float:
    """Length of a - b in units of b's."""
    difference = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
    return float(difference)


def check_gradients(module: nn.Module, *, reached: bool = True) -> None:
    """Every trainable parameter has a finite gradient, and with `reached` one that is not 0."""
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        if reached:
            require(
                p.grad is not None and bool(p.grad.any()),
                f"parameter {name!r} gets no gradient: use it, or set requires_grad=False where "
                "it is not to be trained",
            )
        require(
            p.grad is None or bool(p.grad.isfinite().all()),
            f"parameter {name!r} gets a gradient that is not finite",
        )


def check_meta(run: Callable[[], object]) -> str:
    """A note where shapes alone do not tell the cost; a failure where the code assumes a device."""
    try:
        run()
    except RuntimeError as error:  # what meta tensors refuse; all else is raised again
        text = reason_of(error)
        require(
            "expected device" not in text,
            f"makes tensors on the CPU that meet those of the images ({text}), which fails on a "
            "GPU: pass device=images.device",
        )
        if "meta" not in text.lower():
            raise
        return f"shapes depend on values ({text}), so that FLOPs cannot be counted"
    return ""


def check_state(trained: nn.Module, fresh: nn.Module, look: Callable[[Any], Tensor]) -> None:
    """What a module shows survives a checkpoint, loaded into an instance made with another seed,
    and no two instances share their weights."""
    shown = look(trained)
    not_tensors = [k for k, v in trained.state_dict().items() if not isinstance(v, Tensor)]
    require(
        not not_tensors,
        f"state_dict holds {not_tensors}, which are no tensors: checkpoints are safetensors",
    )
    state = {k: v.detach().clone().contiguous() for k, v in trained.state_dict().items()}
    fresh.load_state_dict(load(save(state)))
    again = look(fresh)
    require(
        again.shape == shown.shape and relative(again, shown) < 1e-5,
        "shows something else once its state_dict is loaded into a fresh instance: what it "
        "computes with is neither all in parameters nor in buffers (register_buffer)",
    )
    shift(fresh)
    require(
        torch.equal(look(trained), shown),
        "shares weights with another instance: make all layers in __init__",
    )


def check_copy(original: nn.Module, look: Callable[[Any], Tensor]) -> None:
    """copy.deepcopy gives a module of its own, also after a backward pass."""
    try:
        copied = copy.deepcopy(original)
    except RuntimeError as error:  # what torch raises for tensors that carry a graph
        raise Failure(
            f"cannot be copied after a backward pass ({reason_of(error)}), as moving averages and "
            "teachers are: keep no tensor with a graph as an attribute"
        ) from error
    shown = look(original)
    require(relative(look(copied), shown) < 1e-5, "a copy.deepcopy shows something else")
    shift(original)
    require(
        relative(look(copied), shown) < 1e-5,
        "a copy.deepcopy computes with the original's weights: hold no closures or bound methods "
        "of the layers",
    )
