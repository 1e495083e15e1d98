"""Patch front ends: images to tokens. One file a stem."""

from collections.abc import Callable

from hybridvit.contracts import Stem
from hybridvit.stems.cct import CCTStem
from hybridvit.stems.conv import ConvStem
from hybridvit.stems.convnext import ConvNeXtStem
from hybridvit.stems.linear import LinearStem
from hybridvit.stems.mlp import MlpStem
from hybridvit.stems.overlap import OverlapStem
from hybridvit.stems.raw import RawStem
from hybridvit.stems.resnet import ResNetStem
from hybridvit.stems.timm import timm_stem

STEMS: dict[str, Callable[..., Stem]] = {
    "linear": LinearStem,
    "mlp": MlpStem,
    "raw": RawStem,
    "resnet": ResNetStem,
    "conv": ConvStem,
    "overlap": OverlapStem,
    "cct": CCTStem,
    "convnext": ConvNeXtStem,
    "timm": timm_stem,
}
