"""Patch front ends: images to tokens. One file a stem."""

from collections.abc import Callable

from hybridvit.contracts import Stem
from hybridvit.stems.linear import LinearStem
from hybridvit.stems.resnet import ResNetStem
from hybridvit.stems.timm import timm_stem

STEMS: dict[str, Callable[..., Stem]] = {
    "linear": LinearStem,
    "resnet": ResNetStem,
    "timm": timm_stem,
}
