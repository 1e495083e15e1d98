"""What `Target` promises, as checks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hybridvit.conformance.objectives import SETTINGS, ObjectiveConformance
from hybridvit.conformance.outputs import check_loss, check_metrics
from hybridvit.conformance.suite import (
    Suite,
    batch,
    noise,
    on,
    one_objective,
    require,
    seeded,
    spec,
)
from hybridvit.contracts import Target
from hybridvit.encoder.model import HybridViT
from hybridvit.patches import take


class TargetConformance(Suite):
    """A target's checks, by itself and in the objective `masked_patch`.

    `class TestMine(TargetConformance): factory = MyTarget` runs them in pytest.
    """

    registry = "targets"
    gates = ("test_builds", "test_encode", "test_loss")

    def test_builds(self) -> None:
        self.check_arguments()
        for where, target, _, _ in self.everywhere():
            with on(where):
                require(
                    isinstance(target, Target),
                    f"is {type(target).__name__}: derive it from Target",
                )
                outputs = getattr(target, "outputs", None)
                require(
                    type(outputs) is int and outputs >= 1,
                    f"declares outputs={outputs!r}: how many numbers are predicted for a patch",
                )

    def test_encode(self) -> None:
        for where, target, model, images in self.everywhere():
            with on(where):
                encoded, (h, w) = target.encode(images), model.encoder.grid
                require(
                    encoded.ndim == 3 and tuple(encoded.shape[:2]) == (len(images), h * w),
                    f"encode gives {tuple(encoded.shape)} for {len(images)} images of {h} x {w} "
                    f"patches: it should be ({len(images)}, {h * w}, any)",
                )
                require(encoded.isfinite().all(), "encode gives targets that are not finite")

    def test_loss(self) -> None:
        for where, target, _, images in self.everywhere():
            with on(where):
                outputs, wanted = some_outputs(target, images)
                loss = target.loss(outputs.requires_grad_(), wanted)
                check_loss(loss)
                (gradient,) = torch.autograd.grad(loss, outputs, allow_unused=True)
                require(
                    gradient is not None and bool(gradient.any()),
                    "the loss does not depend on the outputs",
                )
                assert gradient is not None
                require(gradient.isfinite().all(), "the loss's gradient is not finite")
                check_metrics(target.metrics(outputs.detach(), wanted))

    def test_order_of_patches(self) -> None:
        """Editing a patch changes its own target more than those of the other patches."""
        for where, target, model, images in self.everywhere():
            (h, w), p = model.encoder.grid, model.stem.patch_px
            for i, j in ((0, w - 1), (1, 2), (h - 1, 1)):
                edited = images.clone()
                edited[..., i * p : (i + 1) * p, j * p : (j + 1) * p] = (
                    0.3 * noise(3, p, p).sigmoid()
                )
                with on(where), torch.no_grad():
                    change = target.encode(edited).double() - target.encode(images).double()
                    of_patches = change.abs().mean(dim=(0, 2))  # (N,)
                    require(
                        of_patches[i * w + j] > of_patches.mean(),
                        f"editing patch ({i}, {j}) of {h} x {w} changes other targets more than "
                        "its own: encode in row-major order (hybridvit.patches.patchify)",
                    )

    def test_decode(self) -> None:
        for where, target, model, images in self.everywhere():
            with on(where), torch.no_grad():
                outputs, _ = some_outputs(target, images)
                for scale in (1, 100):
                    decoded = target.decode(scale * outputs, images, positions(images))
                    if decoded is None:
                        self.note = "gives no pictures"
                        return
                    check_decoded(decoded, len(images), model.stem.patch_px)

    def test_gradients(self) -> None:
        self.inside("test_gradients")

    def test_draws(self) -> None:
        self.inside("test_draws")

    def test_after_step(self) -> None:
        self.inside("test_after_step")

    def test_pictures(self) -> None:
        self.inside("test_pictures")

    def test_constant_images(self) -> None:
        self.inside("test_constant_images")

    def test_input_is_kept(self) -> None:
        self.inside("test_batch_is_kept")

    def test_bf16(self) -> None:
        self.inside("test_bf16")

    def test_compile(self) -> None:
        self.inside("test_compile")

    def test_checkpoint(self) -> None:
        self.inside("test_checkpoint")

    def test_copy(self) -> None:
        self.inside("test_copy")

    def test_device(self) -> None:
        self.inside("test_device")

    def inside(self, check: str) -> None:
        """A check of the objective `masked_patch` with this target."""
        objective = MaskedPatchWith(self)
        getattr(objective, check)()
        self.note = objective.note

    def everywhere(self) -> Iterator[tuple[str, Target, HybridViT, Tensor]]:
        """In each setting: where that is, the target, its model, and images."""
        for where, (stem, stem_args, size, channels) in SETTINGS.items():
            on_stem = one_objective(
                self.parts, ("supervised", {}), (stem, stem_args), size, channels=channels
            )
            given = {"model": on_stem.model, "data": spec(size, channels)}
            with on(where), seeded(0):
                target: Target = self.parts.targets.build(self.name, dict(self.args), **given)
            yield where, target, on_stem.model, batch(size, channels=channels).images


class MaskedPatchWith(ObjectiveConformance):
    """The checks of the objective `masked_patch` with a target."""

    def __init__(self, target: TargetConformance) -> None:
        self.name, self.parts = "masked_patch", target.parts
        self.args = {"target": target.name, "target_args": dict(target.args)}


def positions(images: Tensor) -> Tensor:
    """(B, M) of three patches."""
    return torch.tensor([1, 3, 2]).expand(len(images), -1)


def some_outputs(target: Target, images: Tensor) -> tuple[Tensor, Tensor]:
    """Random outputs (B, M, outputs) for three patches, and the targets of these (B, M, T)."""
    wanted = take(target.encode(images), positions(images))
    return noise(*wanted.shape[:2], target.outputs), wanted


def check_decoded(decoded: Tensor, count: int, p: int) -> None:
    """Pictures of three patches of `count` images."""
    require(
        decoded.ndim == 5
        and decoded.shape[:2] == (count, 3)
        and decoded.shape[2] in (1, 3)
        and decoded.shape[3:] == (p, p),
        f"decode gives {tuple(decoded.shape)}: it should be ({count}, 3, 1 or 3, {p}, {p})",
    )
    require(
        bool(decoded.min() >= 0) and bool(decoded.max() <= 1),
        f"decode gives values from {decoded.min():.2f} to {decoded.max():.2f}: clamp to [0, 1]",
    )
