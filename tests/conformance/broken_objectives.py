"""Objectives with one mistake each, and the check that is for it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from failing import Broken
from torch import Tensor, nn

from hybridvit import draws
from hybridvit.contracts import Batch, DataSpec, Objective, Prediction, StepOutput, Tokens
from hybridvit.patches import patchify, unpatchify

WHICH = draws.stream("tests.conformance.which")


class Good(Objective):
    """Predict the mean colour of every patch from half of them; the others differ in one place."""

    def __init__(self, *, model: Any, data: DataSpec) -> None:
        super().__init__()
        self.model = model
        self.channels = data.channels
        self.mask_token = nn.Parameter(torch.zeros(1, 1, model.encoder.dim))
        self.head = nn.Linear(model.encoder.dim, data.channels)

    def hide(self, batch: Batch) -> Tensor:
        """(B, N) bool."""
        rank = draws.permutation(batch.key, WHICH, self.count(batch))
        return rank < rank.shape[1] // 2

    def show(self, images: Tensor, hidden: Tensor) -> Tensor:
        patches = patchify(images, self.px)
        filled = torch.where(hidden[:, :, None], 0.5, patches)
        return unpatchify(filled, self.grid(images), self.px)

    def outputs(self, z: Tensor, batch: Batch) -> Tensor:
        x: Tensor = self.head(z)
        return x

    def predict(self, batch: Batch) -> Prediction:
        hidden, grid = self.hide(batch), self.grid(batch.images)
        seen = self.show(batch.images, hidden)
        x = self.model.tokens(seen).x
        x = torch.where(hidden[:, :, None], self.mask_token.to(x.dtype), x)
        z = self.model.encoder(Tokens(x, grid))[:, self.model.encoder.prefix :]
        where = torch.arange(z.shape[1], device=z.device).expand(len(z), -1)
        return Prediction(hidden.unflatten(1, grid), seen, x, self.outputs(z, batch), where)

    def score(self, outputs: Tensor, images: Tensor) -> Tensor:
        wanted = patchify(images[:, : self.channels], self.px).unflatten(2, (self.channels, -1))
        return F.mse_loss(outputs.float(), wanted.mean(dim=-1))

    def forward(self, batch: Batch) -> StepOutput:
        loss = self.score(self.predict(batch).outputs, batch.images)
        return StepOutput(loss, {"loss": loss.detach()})

    @property
    def px(self) -> int:
        return self.model.stem.patch_px

    def grid(self, images: Tensor) -> tuple[int, int]:
        return images.shape[-2] // self.px, images.shape[-1] // self.px

    def count(self, batch: Batch) -> int:
        h, w = self.grid(batch.images)
        return h * w


class TwoViews(Objective):
    """Features of two views should be equal."""

    views = 2

    def __init__(self, *, model: Any, data: DataSpec) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> StepOutput:
        first, second = map(self.model.features, (batch.images, batch.others[0]))
        loss = -F.cosine_similarity(first, second).mean()
        return StepOutput(loss, {"loss": loss.detach()})


class HidesItsModel(Good):
    """Not an attribute that torch knows of."""

    def __init__(self, *, model: Any, data: DataSpec) -> None:
        super().__init__(model=model, data=data)
        del self.model
        object.__setattr__(self, "model", model)


class FreezesTheStem(Good):
    def __init__(self, *, model: Any, data: DataSpec) -> None:
        super().__init__(model=model, data=data)
        model.stem.requires_grad_(False)


class NoObjective(nn.Module):
    def __init__(self, *, model: Any) -> None:
        super().__init__()


class NeedsAnArgument(Good):
    def __init__(self, *, model: Any, data: DataSpec, weight: float) -> None:
        super().__init__(model=model, data=data)


class ForgetsToDeclareViews(TwoViews):
    views = 1


class SecondViewUnused(TwoViews):
    def forward(self, batch: Batch) -> StepOutput:
        return super().forward(dataclasses.replace(batch, others=(1 - batch.images,)))


class LossOfEachImage(Good):
    def score(self, outputs: Tensor, images: Tensor) -> Tensor:
        wanted = patchify(images[:, : self.channels], self.px).unflatten(2, (self.channels, -1))
        return (outputs - wanted.mean(dim=-1)).square().mean(dim=(1, 2))


class DetachedLoss(Good):
    def score(self, outputs: Tensor, images: Tensor) -> Tensor:
        return super().score(outputs, images).detach()


class PlainTuple(Good):
    def forward(self, batch: Batch) -> Any:
        return tuple(super().forward(batch))


class AttachedMetric(Good):
    def forward(self, batch: Batch) -> StepOutput:
        loss, _ = super().forward(batch)
        return StepOutput(loss, {"error": loss.sqrt()})


class NumberAsMetric(Good):
    def forward(self, batch: Batch) -> StepOutput:
        return super().forward(batch)._replace(metrics={"masked": 0.5})  # type: ignore[dict-item]


class ColorOnly(Good):
    """Three channels, whatever the data set has."""

    def __init__(self, *, model: Any, data: DataSpec) -> None:
        super().__init__(model=model, data=data)
        self.head = nn.Linear(model.encoder.dim, 3)

    def score(self, outputs: Tensor, images: Tensor) -> Tensor:
        wanted = patchify(images[:, : self.channels], self.px).unflatten(2, (self.channels, -1))
        return F.mse_loss(outputs.flatten(1), wanted.mean(dim=-1).flatten(1))


class UnusedHead(Good):
    def __init__(self, *, model: Any, data: DataSpec) -> None:
        super().__init__(model=model, data=data)
        self.second = nn.Linear(3, 3)


class TeacherThatLearns(Good):
    """A teacher whose weights wait for gradients."""

    def __init__(self, *, model: Any, data: DataSpec) -> None:
        super().__init__(model=model, data=data)
        self.teacher = copy.deepcopy(model)


class GlobalDraws(Good):
    def hide(self, batch: Batch) -> Tensor:
        rank = torch.rand(len(batch.images), self.count(batch)).argsort(dim=1)
        return rank < rank.shape[1] // 2


class OneMaskForAll(Good):
    def hide(self, batch: Batch) -> Tensor:
        first = dataclasses.replace(batch, key=batch.key[:1])
        return super().hide(first).expand(len(batch.images), -1)


class HidesEmbeddingsOnly(Good):
    """The usual way: a stem that mixes shows the encoder what it has to predict."""

    def show(self, images: Tensor, hidden: Tensor) -> Tensor:
        return images.clone()


class MeanOfAllPixels(Good):
    """The fill knows of what it covers."""

    def show(self, images: Tensor, hidden: Tensor) -> Tensor:
        where = unpatchify(
            hidden[:, :, None].expand(-1, -1, self.px**2), self.grid(images), self.px
        )
        return torch.where(where, images.mean(dim=(2, 3), keepdim=True), images)


class DetachedLeak(Good):
    """No gradient tells of it."""

    def outputs(self, z: Tensor, batch: Batch) -> Tensor:
        return super().outputs(z, batch) + batch.images.detach().mean(dim=(1, 2, 3))[:, None, None]


class HidesByContent(Good):
    """The brightest half: where hidden patches are tells what they hold."""

    def hide(self, batch: Batch) -> Tensor:
        rank = patchify(batch.images, self.px).mean(dim=2).argsort(dim=1).argsort(dim=1)
        return rank < rank.shape[1] // 2


class HidesAll(Good):
    def hide(self, batch: Batch) -> Tensor:
        return torch.ones_like(super().hide(batch))


class HidesNone(Good):
    def hide(self, batch: Batch) -> Tensor:
        return torch.zeros_like(super().hide(batch))


class WrongHidden(Good):
    """True where visible, as floats."""

    def predict(self, batch: Batch) -> Prediction:
        prediction = super().predict(batch)
        return prediction._replace(hidden=(~prediction.hidden).float())


class ShowsNormalised(Good):
    def predict(self, batch: Batch) -> Prediction:
        prediction = super().predict(batch)
        return prediction._replace(seen=(prediction.seen - 0.5) / 0.1)


class PredictsButTrainsOtherwise(Good):
    """What is measured is not what is trained."""

    def forward(self, batch: Batch) -> StepOutput:
        z = self.model.encoder(self.model.tokens(batch.images))[:, self.model.encoder.prefix :]
        loss = self.score(self.head(z) + self.mask_token.mean(), batch.images)
        return StepOutput(loss, {"loss": loss.detach()})


class EvaluatesNothing(Good):
    evaluated = "techer"


class Freezes(Good):
    def after_step(self, step: int) -> None:
        self.head.requires_grad_(False)


class Replaces(Good):
    def after_step(self, step: int) -> None:
        self.mask_token = nn.Parameter(0.9 * self.mask_token.detach())


class PicturesOutOfRange(Good):
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        return {"normalised": (batch.images - 0.5) / 0.2}


class PicturesWithGraph(Good):
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        colors = self.predict(batch).outputs.sigmoid()[:, :, :1].expand(-1, -1, 3 * self.px**2)
        return {"prediction": unpatchify(colors, self.grid(batch.images), self.px)}


class PictureOfPatches(Good):
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        return {"patches": patchify(batch.images, self.px)}


class NoEpsilon(Good):
    """In units of the images' deviation, 0 for one colour."""

    def score(self, outputs: Tensor, images: Tensor) -> Tensor:
        return super().score(outputs, images) / images.var()


class InPlace(Good):
    def forward(self, batch: Batch) -> StepOutput:
        batch.images.clamp_(0.1, 0.9)
        return super().forward(batch)


class MixedTypes(Good):
    """scatter wants one type; under autocast there are two."""

    def outputs(self, z: Tensor, batch: Batch) -> Tensor:
        x = super().outputs(z, batch)
        order = torch.arange(x.shape[1], device=x.device)[:, None].expand_as(x)
        return torch.zeros(x.shape, device=x.device).scatter(1, order, x)


class OwnState(Good):
    """A teacher in a list, which no checkpoint saves."""

    def __init__(self, *, model: Any, data: DataSpec) -> None:
        super().__init__(model=model, data=data)
        self.teachers = [copy.deepcopy(self.head)]

    def outputs(self, z: Tensor, batch: Batch) -> Tensor:
        return super().outputs(z, batch) + self.teachers[0](z).detach()


class KeepsTheGraph(Good):
    def score(self, outputs: Tensor, images: Tensor) -> Tensor:
        self.last = super().score(outputs, images)
        return self.last


class Closure(Good):
    """A copy of it computes with the original's head."""

    def __init__(self, *, model: Any, data: DataSpec) -> None:
        super().__init__(model=model, data=data)
        self.steps = [lambda z: self.head(z)]

    def outputs(self, z: Tensor, batch: Batch) -> Tensor:
        x: Tensor = self.steps[0](z)
        return x


class OnTheCpu(Good):
    def outputs(self, z: Tensor, batch: Batch) -> Tensor:
        return super().outputs(z, batch) + torch.arange(z.shape[1]).cos()[:, None]


class BranchesOnValues(Good):
    """Right, but slow to compile, and its cost cannot be counted."""

    def outputs(self, z: Tensor, batch: Batch) -> Tensor:
        x = super().outputs(z, batch)
        return x if x.sum() > 0 else 2 * x


ON_MIXING = "on a stem that mixes patches, train mode: "
BROKEN = [
    Broken(HidesItsModel, "builds", "the model's ['stem.proj.weight'] is no parameter of it"),
    Broken(FreezesTheStem, "builds", "freezes the model's stem.proj.weight"),
    Broken(NoObjective, "builds", "is NoObjective: derive it from Objective"),
    Broken(NeedsAnArgument, "builds", "needs weight: give defaults"),
    Broken(ForgetsToDeclareViews, "views", "a batch of 1 view(s), as declared: IndexError"),
    Broken(SecondViewUnused, "views", "the loss does not depend on view 2"),
    Broken(LossOfEachImage, "loss", "loss has shape (4,): take its mean"),
    Broken(DetachedLoss, "loss", "loss has no gradient"),
    Broken(PlainTuple, "loss", "gives tuple: return StepOutput(loss, metrics)"),
    Broken(AttachedMetric, "loss", "metric 'error' carries a gradient"),
    Broken(NumberAsMetric, "loss", "metric 'masked' is 0.5: give a tensor ()"),
    Broken(ColorOnly, "loss", "on grey images, train mode: ", everywhere=True),
    Broken(UnusedHead, "gradients", "parameter 'second.weight' gets no gradient"),
    Broken(TeacherThatLearns, "gradients", "requires_grad=False where it is not to be trained"),
    Broken(
        GlobalDraws,
        "draws",
        "changes with the global seed: draw from batch.key",
        ("neighbours", "device"),
    ),
    Broken(OneMaskForAll, "neighbours", "`hidden` of an image changes with its neighbours"),
    Broken(HidesEmbeddingsOnly, "hidden_pixels", ON_MIXING, everywhere=True),
    Broken(MeanOfAllPixels, "hidden_pixels", ON_MIXING, everywhere=True),
    Broken(
        DetachedLeak, "hidden_pixels", "100% of the predictions change with hidden pixels, 0.00%"
    ),
    Broken(HidesByContent, "hidden_pixels", "100% of the tokens"),
    Broken(HidesAll, "prediction", "leaves no patch of an image visible", ("gradients",)),
    Broken(HidesNone, "prediction", "hides no patch of any image", ("gradients",)),
    Broken(
        WrongHidden,
        "prediction",
        "torch.float32: it should be (4, 4, 4) torch.bool",
        ("hidden_pixels",),
    ),
    Broken(ShowsNormalised, "prediction", "before the model normalises them, in [0, 1]"),
    Broken(PredictsButTrainsOtherwise, "trains_what_it_predicts", "let forward call predict"),
    Broken(
        EvaluatesNothing,
        "evaluated",
        "declares evaluated='techer', which is NoneType",
        ("checkpoint", "copy"),
    ),
    Broken(Freezes, "after_step", "after_step replaces, freezes or frees parameters"),
    Broken(Replaces, "after_step", "change values in place"),
    Broken(PicturesOutOfRange, "pictures", "picture 'normalised' reaches from -2.5"),
    Broken(PicturesWithGraph, "pictures", "picture 'prediction' carries a gradient"),
    Broken(PictureOfPatches, "pictures", "it should be as the images, (4, 3, 32, 32)"),
    Broken(NoEpsilon, "constant_images", "images of one colour: loss is inf, not finite"),
    Broken(InPlace, "batch_is_kept", "changes batch.images in place", ("trains_what_it_predicts",)),
    Broken(MixedTypes, "bf16", "bf16 autocast: RuntimeError: scatter(): Expected"),
    Broken(OwnState, "checkpoint", "neither all in parameters nor in buffers"),
    Broken(KeepsTheGraph, "copy", "keep no tensor with a graph as an attribute"),
    Broken(Closure, "copy", "computes with the original's weights"),
    Broken(OnTheCpu, "device", "pass device=images.device"),
]
