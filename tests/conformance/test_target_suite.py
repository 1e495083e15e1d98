"""Targets with one mistake each: the check that is for it fails, and says why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from failing import Broken, check_broken, failures, on_the_linear_stem
from torch import Tensor, nn

from hybridvit.conformance import TargetConformance
from hybridvit.contracts import DataSpec, Target
from hybridvit.patches import patchify
from hybridvit.targets import TARGETS


class Good(Target):
    """The mean colour of a patch; the others differ in one place."""

    def __init__(self, *, model: Any, data: DataSpec) -> None:
        super().__init__()
        self.px, self.channels = model.stem.patch_px, data.channels
        self.outputs = data.channels

    def encode(self, images: Tensor) -> Tensor:
        patches = patchify(images[:, : self.channels], self.px)
        x: Tensor = patches.unflatten(2, (self.channels, -1)).mean(dim=-1)
        return x

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(outputs.flatten(1), target.flatten(1))

    def decode(self, outputs: Tensor, images: Tensor, index: Tensor) -> Tensor:
        return outputs.clamp(0, 1)[..., None, None].expand(-1, -1, -1, self.px, self.px)


class Undeclared(Good):
    def __init__(self, *, model: Any, data: DataSpec) -> None:
        super().__init__(model=model, data=data)
        self.outputs = 3.0  # type: ignore[assignment]


class NeedsAnArgument(Good):
    def __init__(self, *, model: Any, data: DataSpec, bins: int) -> None:
        super().__init__(model=model, data=data)


class WrongOutputs(Good):
    def __init__(self, *, model: Any, data: DataSpec) -> None:
        super().__init__(model=model, data=data)
        self.outputs = 5


class ColorOnly(Good):
    """Three channels, whatever the data set has."""

    def __init__(self, *, model: Any, data: DataSpec) -> None:
        super().__init__(model=model, data=data)
        self.channels = 3


class OneForAnImage(Good):
    def encode(self, images: Tensor) -> Tensor:
        return super().encode(images).mean(dim=1)


class Transposed(Good):
    def encode(self, images: Tensor) -> Tensor:
        return super().encode(images.mT)


class LossOfEachPatch(Good):
    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs - target).square().mean(dim=(0, 2))


class WithoutGradient(Good):
    """Counts, which nothing can learn."""

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs.argmax(-1) == target.argmax(-1)).float().mean()


class IgnoresOutputs(Good):
    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        return super().loss(0 * outputs, target)


class AttachedMetric(Good):
    """The target is not detached where it comes from a network that is trained."""

    def __init__(self, *, model: Any, data: DataSpec) -> None:
        super().__init__(model=model, data=data)
        self.scale = nn.Parameter(torch.ones(()))

    def encode(self, images: Tensor) -> Tensor:
        return self.scale * super().encode(images)

    def metrics(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"error": self.loss(outputs, target)}


class WrongPictures(Good):
    def decode(self, outputs: Tensor, images: Tensor, index: Tensor) -> Tensor:
        return super().decode(outputs, images, index)[..., :2]


class PicturesOutOfRange(Good):
    def decode(self, outputs: Tensor, images: Tensor, index: Tensor) -> Tensor:
        return outputs[..., None, None].expand(-1, -1, -1, self.px, self.px)


class NoEpsilon(Good):
    def encode(self, images: Tensor) -> Tensor:
        x = super().encode(images)
        return x / x.std(dim=1, keepdim=True)


class InPlace(Good):
    def encode(self, images: Tensor) -> Tensor:
        return super().encode(images.clamp_(0.1, 0.9))


class UnusedLayer(Good):
    def __init__(self, *, model: Any, data: DataSpec) -> None:
        super().__init__(model=model, data=data)
        self.layer = nn.Linear(3, 3)


class GlobalDraws(Good):
    def encode(self, images: Tensor) -> Tensor:
        return super().encode(images) + 0.1 * torch.rand((), device=images.device)


class OwnState(Good):
    """A teacher in a list, which no checkpoint saves."""

    def __init__(self, *, model: Any, data: DataSpec) -> None:
        super().__init__(model=model, data=data)
        self.teachers = [copy.deepcopy(model.stem)]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        x: Tensor = self.teachers[0](images).x[:, :, : self.channels]
        return x


class FreezesTheModel(Good):
    def after_step(self, model: Any) -> None:
        model.requires_grad_(False)


BROKEN = [
    Broken(Undeclared, "builds", "declares outputs=3.0: how many numbers are predicted"),
    Broken(NeedsAnArgument, "builds", "needs bins: give defaults"),
    Broken(WrongOutputs, "loss", "RuntimeError: The size of tensor a (15)"),
    Broken(ColorOnly, "loss", "on grey images: RuntimeError: ", everywhere=True),
    Broken(OneForAnImage, "encode", "encode gives (4, 3) for 4 images of 4 x 4 patches"),
    Broken(Transposed, "order_of_patches", "editing patch (0, 3) of 4 x 4 changes other targets"),
    Broken(LossOfEachPatch, "loss", "loss has shape (3,): take its mean"),
    Broken(WithoutGradient, "loss", "loss has no gradient"),
    Broken(IgnoresOutputs, "loss", "the loss does not depend on the outputs"),
    Broken(AttachedMetric, "loss", "metric 'error' carries a gradient"),
    Broken(
        WrongPictures,
        "decode",
        "decode gives (4, 3, 3, 8, 2): it should be",
        ("pictures", "input_is_kept"),
    ),
    Broken(PicturesOutOfRange, "decode", "clamp to [0, 1]", ("pictures",)),
    Broken(NoEpsilon, "constant_images", "images of one colour: loss is nan, not finite"),
    Broken(InPlace, "input_is_kept", "changes batch.images in place"),
    Broken(UnusedLayer, "gradients", "parameter 'target.layer.weight' gets no gradient"),
    Broken(GlobalDraws, "draws", "the loss of a batch changes with the global seed"),
    Broken(OwnState, "checkpoint", "neither all in parameters nor in buffers", ("device",)),
    Broken(FreezesTheModel, "after_step", "after_step replaces, freezes or frees parameters"),
]


@pytest.mark.parametrize("broken", BROKEN, ids=[b.factory.__name__ for b in BROKEN])
def test_a_broken_target_fails_for_the_right_reason(
    broken: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not broken.everywhere:
        on_the_linear_stem(monkeypatch)
    check_broken(TargetConformance, broken)


def test_what_they_are_derived_from_passes() -> None:
    assert failures(TargetConformance, Good) == {}


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_built_in_targets_pass(name: str) -> None:
    assert failures(TargetConformance, TARGETS[name], slow=False) == {}


def test_a_timm_teacher_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_linear_stem(monkeypatch)
    args = {"teacher": "test_vit", "pretrained": False}
    assert failures(TargetConformance, TARGETS["features"], slow=False, **args) == {}
