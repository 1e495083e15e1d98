"""FLOPs of full and axial attention by image size and patch: `python lengths.py > lengths.csv`.

Two encoders: the small variant's (width 64, depth 2) and S/16's (width 384, depth 12). GFLOPs are
forward and backward of one image, as a dry run counts them; nothing is trained.
"""

from __future__ import annotations

from pathlib import Path

from hybridvit import build, config
from hybridvit.analysis import cost
from hybridvit.contracts import DataSpec

SMALL = str(Path(__file__).parent / "config_small.yaml")
LARGE = "imagenet_plain_vit.yaml"
CASES = {
    (SMALL, 64, 2, 10): [(28, 14), (28, 7), (28, 4), (28, 2), (32, 8), (32, 4), (32, 2), (32, 1)],
    (LARGE, 384, 12, 1000): [
        *[(32, 4), (32, 2)],
        *[(224, 32), (224, 16), (224, 8), (224, 4)],
        *[(384, 32), (384, 16), (384, 8)],
    ],
}


def gflops(path: str, size: int, patch: int, attention: str, depth: int, classes: int) -> float:
    """Of one image's training step, for images of `size` px."""
    parts, _ = build.make_parts([])
    overrides = [f"stem.args.patch={patch}", f"encoder.args.attention={attention}"]
    loaded = config.load(path, [*overrides, f"encoder.args.depth={depth}"])
    spec = DataSpec(classes, (size, size), 3, (0.5,) * 3, (0.5,) * 3)
    objective = build.make_objective(build.resolve(loaded, parts), parts, spec)
    counted = cost.measure(objective, (size, size))
    assert counted.forward_flops is not None
    assert counted.backward_flops is not None
    return (counted.forward_flops + counted.backward_flops) / 1e9


def main() -> None:
    """Print one line a case."""
    print("width,depth,image px,patch px,tokens,full,axial,axial twice the depth")
    for (path, width, depth, classes), cases in CASES.items():
        for size, patch in cases:
            found = (
                gflops(path, size, patch, "full", depth, classes),
                gflops(path, size, patch, "axial", depth, classes),
                gflops(path, size, patch, "axial", 2 * depth, classes),
            )
            tokens = (size // patch) ** 2
            print(width, depth, size, patch, tokens, *(f"{x:.4g}" for x in found), sep=",")


if __name__ == "__main__":
    main()
