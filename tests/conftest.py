"""What several tests share: a tiny model on tiny images, and where real data lie."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hybridvit import build
from hybridvit.config import PartConfig, RunConfig
from hybridvit.contracts import Batch, DataSpec, Objective

# One thread a worker where several share the cores: more would wait for each other.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))

TINY_ENCODER = {"dim": 16, "depth": 2, "heads": 2}


def make_batch(count: int = 4, size: int = 16, classes: int = 10, seed: int = 0) -> Batch:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(count)
    return Batch(
        torch.rand(count, 3, size, size, generator=generator),
        torch.randint(classes, (count,), generator=generator),
        index,
        index * 7919 + seed,
    )


def make_objective(
    objective: str = "supervised",
    stem: str = "linear",
    size: int = 16,
    *,
    stem_args: dict[str, object] | None = None,
    encoder_args: dict[str, object] | None = None,
    channels: int = 3,
    seed: int = 0,
    **args: object,
) -> Objective:
    """A small objective on images of `size` px with 10 classes."""
    config = RunConfig(
        stem=PartConfig(stem, STEM_ARGS[stem] | (stem_args or {})),
        encoder=PartConfig("vit", TINY_ENCODER | (encoder_args or {})),
        objective=PartConfig(objective, args),
        seed=seed,
    )
    parts, _ = build.make_parts([OWN_PARTS])
    spec = DataSpec(10, (size, size), channels, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    return build.make_objective(config, parts, spec)


# Stride 4 without a pool: the grid of a 4-px patch.
SMALL_RESNET: dict[str, object] = {
    "width": 0.125,
    "blocks": [1, 1],
    "strides": [2, 2],
    "root_kernel": 3,
    "root_stride": 1,
    "root_pool": False,
}

OWN_PARTS = "own_parts:register"  # a third party's

# Every built-in stem and a third party's, small, with stride 4.
STEM_ARGS: dict[str, dict[str, object]] = {
    "linear": {"patch": 4},
    "mlp": {"patch": 4, "hidden": 8},
    "raw": {"patch": 4},
    "resnet": SMALL_RESNET,
    "conv": {"channels": [4, 8]},
    "overlap": {"patch": 4},
    "cct": {"layers": 1, "channels": 8},
    "convnext": {"depths": [1, 1], "channels": [4, 8], "strides": [2, 2]},
    "timm": {"backbone": "test_resnet", "level": 1},
    "blur": {},
}


@pytest.fixture(scope="session", autouse=True)
def compiled_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What torch compiles is kept for all tests of a session, under keys of its content."""
    base = tmp_path_factory.getbasetemp()
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(session / "compiled"))
        yield


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Decoded images are kept in a folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HYBRIDVIT_CACHE", str(folder))
    return folder


@pytest.fixture
def data_root() -> Path:
    """The folder of real data sets."""
    root = os.environ.get("HYBRIDVIT_DATA")
    if not root:
        pytest.skip("HYBRIDVIT_DATA is not set")
    return Path(root)
