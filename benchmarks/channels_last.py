"""Channels first or last in convolutional stems on one core of a CPU, forward and backward: what
`hybridvit.encoder.layout.prefers_channels_last` rests on.

    python benchmarks/channels_last.py [STEM ...]            # prints a table

Only the images are laid out: features follow them, and weights stay as they are. Times are the
core's own, and both kinds take turns, so that other processes disturb them little.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hybridvit.contracts import Stem
from hybridvit.encoder.layout import prefers_channels_last
from hybridvit.encoder.vit import Encoder
from hybridvit.engine.idle import check_idle
from hybridvit.stems.cct import CCTStem
from hybridvit.stems.conv import ConvStem
from hybridvit.stems.convnext import ConvNeXtStem
from hybridvit.stems.masked import Norm
from hybridvit.stems.overlap import OverlapStem
from hybridvit.stems.resnet import ResNetStem
from hybridvit.stems.timm import timm_stem

DIM, DEPTH, HEADS = 192, 4, 3  # of the encoder of a whole step
BATCH = {32: 32, 96: 16}  # images of a size in pixels
ROUNDS = 7
LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def conv(size: int, norm: Norm, masked: bool = False) -> Stem:
    if size == 32:
        channels, strides = (32, 64, 128), (2, 2, 1)
        return ConvStem(dim=DIM, channels=channels, strides=strides, norm=norm, masked=masked)
    return ConvStem(dim=DIM, norm=norm, masked=masked)


def resnet(size: int, norm: Norm) -> Stem:
    root = {"root_kernel": 3, "root_stride": 1, "root_pool": False} if size == 32 else {}
    blocks, strides = ((2, 2), (2, 2)) if size == 32 else ((2, 2, 2), (1, 2, 2))
    return ResNetStem(dim=DIM, blocks=blocks, strides=strides, width=0.5, norm=norm, **root)


def cct(size: int, masked: bool = False) -> Stem:
    if size == 32:
        return CCTStem(dim=DIM, layers=1, kernel=3, stride=2, masked=masked)
    return CCTStem(dim=DIM, masked=masked)


def convnext(size: int) -> Stem:
    stages = 2 if size == 32 else 3
    strides = (2, 2) if size == 32 else None
    return ConvNeXtStem(
        dim=DIM, depths=(2,) * stages, channels=(48, 96, 192)[:stages], strides=strides
    )


STEMS: dict[str, Callable[[int], Stem]] = {
    "conv, batch": lambda size: conv(size, "batch"),
    "conv, group": lambda size: conv(size, "group"),
    "overlap": lambda size: OverlapStem(dim=DIM, patch=4 if size == 32 else 16),
    "cct": lambda size: cct(size),
    "convnext": lambda size: convnext(size),
    "resnet, group": lambda size: resnet(size, "group"),
    "resnet, batch": lambda size: resnet(size, "batch"),
    "conv, batch, masked": lambda size: conv(size, "batch", masked=True),
    "cct, masked": lambda size: cct(size, masked=True),
    "timm resnet26d": lambda size: timm_stem(dim=DIM, level=1 if size == 32 else 3),
}


class Whole(nn.Module):
    """A stem, an encoder and a classifier of 10 classes."""

    def __init__(self, stem: Stem, size: int) -> None:
        super().__init__()
        grid = (size // stem.patch_px,) * 2
        self.stem = stem
        self.encoder = Encoder(grid=grid, dim=DIM, depth=DEPTH, heads=HEADS)
        self.head = nn.Linear(DIM, 10)

    def forward(self, images: Tensor, visible: Tensor) -> Tensor:
        scores: Tensor = self.head(self.encoder.features(self.stem(images, visible)))
        return scores


def seconds(model: Whole, images: Tensor, dtype: torch.dtype, stem_alone: bool) -> float:
    """The core's time for one forward and backward pass."""
    model.zero_grad()
    visible = torch.rand(len(images), *model.encoder.grid) < 0.5  # for stems that mask
    started = time.thread_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = model.stem(images, visible).x if stem_alone else model(images, visible)
    out.float().square().mean().backward()
    return time.thread_time() - started


def compare(kind: str, size: int, dtype: torch.dtype) -> list[float]:
    """Medians in ms: the stem alone, channels first and last, and the whole step likewise."""
    torch.manual_seed(0)
    images = torch.randn(BATCH[size], 3, size, size)
    model = Whole(STEMS[kind](size), size)
    medians = []
    for stem_alone in (True, False):
        taken: dict[torch.memory_format, list[float]] = {way: [] for way in LAYOUTS.values()}
        for _ in range(ROUNDS):
            for layout, times in taken.items():
                given = images.contiguous(memory_format=layout)
                times.append(seconds(model, given, dtype, stem_alone))
        medians += [1000 * statistics.median(times[1:]) for times in taken.values()]
    return medians


def main() -> None:
    """Time each stem, size and dtype, in ms."""
    check_idle()
    torch.set_num_threads(1)
    print("| stem | px | dtype | chosen | stem first | last | ratio | step first | last | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for kind in sys.argv[1:] or STEMS:
        for size in BATCH:
            last = prefers_channels_last(STEMS[kind](size), torch.device("cpu"))
            choice = "last" if last else "first"
            for name, dtype in DTYPES.items():
                a, b, c, d = compare(kind, size, dtype)
                times = f"{a:.1f} | {b:.1f} | {a / b:.2f} | {c:.1f} | {d:.1f} | {c / d:.2f}"
                print(f"| {kind} | {size} | {name} | {choice} | {times} |", flush=True)


if __name__ == "__main__":
    main()
