"""What masked objectives predict of a patch. One file a kind of target."""

from collections.abc import Callable

from hybridvit.contracts import Target
from hybridvit.targets.colors import downsampled, mean_color
from hybridvit.targets.features import FeatureTarget
from hybridvit.targets.hog import HogTarget
from hybridvit.targets.pixels import PixelTarget

TARGETS: dict[str, Callable[..., Target]] = {
    "mean_color": mean_color,
    "downsampled": downsampled,
    "pixels": PixelTarget,
    "hog": HogTarget,
    "features": FeatureTarget,
}
