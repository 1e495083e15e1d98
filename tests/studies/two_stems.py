"""A tiny study of two stems on digits, for planning."""

from __future__ import annotations

from pathlib import Path

from hybridvit.studies.facts import Facts
from hybridvit.studies.grid import Study, read_study

STUDY = """
title: T
question: Q
config: digits.yaml
axes:
  stem:
    linear: {}
    resnet:
      stem:
        name: resnet
        args:
          {width: 0.25, blocks: [1], strides: [2], root_kernel: 3, root_stride: 1, root_pool: false}
seeds: [0]
"""
TINY = [
    "encoder.args.dim=16",
    "encoder.args.depth=1",
    "encoder.args.heads=1",
    "train.epochs=8",
    "eval.epochs=100",
    "optim.warmup_epochs=0.5",
]
FACTS = Facts(
    data="digits",
    images=1000,
    tokens=16,
    patch_px=2,
    parameters=1000,
    compared=1000,
    flops=10**6,
    memory=10**6,
    seconds_per_step=0.1,
)


def read(
    folder: Path, match: str, text: str = STUDY, seeds: int | None = None, over: list[str] = TINY
) -> Study:
    folder.mkdir(exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(f"{text}match: {match}\n")
    return read_study(path, over, seeds)
