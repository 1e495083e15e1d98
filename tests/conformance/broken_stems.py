"""Stems with one mistake each, and the check that is for it."""

from __future__ import annotations

import numpy as np
import torch
from failing import Broken
from torch import Tensor, nn

from hybridvit.contracts import Stem, Tokens
from hybridvit.patches import patchify


class Good(Stem):
    """A convolution of pixels, then a projection of patches; the others differ in one place."""

    def __init__(self, *, dim: int, patch: int = 8) -> None:
        super().__init__()
        self.patch_px, self.dim = patch, dim
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.proj = nn.Conv2d(8, dim, patch, patch)

    def features(self, images: Tensor) -> Tensor:
        x: Tensor = self.proj(torch.relu(self.conv(images)))
        return x

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        x = self.features(images)
        return Tokens(x.flatten(2).mT, (x.shape[-2], x.shape[-1]))


class Local(Stem):
    """A projection of patches alone."""

    is_patch_local = True

    def __init__(self, *, dim: int, patch: int = 8) -> None:
        super().__init__()
        self.patch_px = patch
        self.proj = nn.Linear(3 * patch**2, dim)

    def embed(self, images: Tensor) -> Tensor:
        x: Tensor = self.proj(patchify(images, self.patch_px))
        return x

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        grid = (images.shape[-2] // self.patch_px, images.shape[-1] // self.patch_px)
        return Tokens(self.embed(images), grid)


class Undeclared(Stem):
    """Forgets its stride."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 8, 8)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        x = self.proj(images)
        return Tokens(x.flatten(2).mT, (x.shape[-2], x.shape[-1]))


class NotAStem(nn.Module):
    patch_px = 8

    def __init__(self, *, dim: int) -> None:
        super().__init__()


class NeedsAnArgument(Good):
    def __init__(self, *, dim: int, patch: int) -> None:
        super().__init__(dim=dim, patch=patch)


class HalfTheStride(Good):
    """Declares 8 px, has 4."""

    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim, patch=4)
        self.patch_px = 8


class CroppedHalfStride(HalfTheStride):
    """And cuts its map so that the shape fits."""

    def features(self, images: Tensor) -> Tensor:
        x = super().features(images)
        return x[:, :, : x.shape[2] // 2, : x.shape[3] // 2]


class WithClassToken(Good):
    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        x, grid, _ = super().forward(images)
        return Tokens(torch.cat([x.mean(dim=1, keepdim=True), x], dim=1), grid)


class PlainTensor(Good):
    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(images).x


class ForgetsDim(Good):
    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=64)


class Float64(Good):
    def features(self, images: Tensor) -> Tensor:
        return super().features(images).double()


class OneGridOnly(Good):
    """Learned positions for one image size: both for the encoder, and too few."""

    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)
        self.positions = nn.Parameter(torch.zeros(1, dim, 4, 6))

    def features(self, images: Tensor) -> Tensor:
        return super().features(images) + self.positions


class Transposed(Good):
    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        x = self.features(images)
        return Tokens(x.mT.flatten(2).mT, (x.shape[-2], x.shape[-1]))


class OffByOne(Good):
    def features(self, images: Tensor) -> Tensor:
        return super().features(images).roll(1, dims=3)


class OverlapCalledLocal(Good):
    is_patch_local = True


class NormCalledLocal(Local):
    """Its norm takes statistics over all patches."""

    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)
        self.norm = nn.GroupNorm(1, dim)

    def embed(self, images: Tensor) -> Tensor:
        x: Tensor = self.norm(super().embed(images).mT).mT
        return x


class BatchNormCalledLocal(Local):
    """Local in eval mode only."""

    couples_batch = True

    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)
        self.norm = nn.BatchNorm1d(dim)

    def embed(self, images: Tensor) -> Tensor:
        x: Tensor = self.norm(super().embed(images).mT).mT
        return x


class DetachedLeak(Local):
    """No gradient tells of it."""

    def embed(self, images: Tensor) -> Tensor:
        return super().embed(images) + images.detach().mean(dim=(1, 2, 3))[:, None, None]


class LocalWithPositions(Local):
    def embed(self, images: Tensor) -> Tensor:
        x = super().embed(images)
        return x + torch.arange(x.shape[1], device=x.device).sin()[:, None]


class LocalCalledMixing(Local):
    is_patch_local = False


class UndeclaredBatchNorm(Good):
    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)
        self.norm = nn.BatchNorm2d(dim)

    def features(self, images: Tensor) -> Tensor:
        x: Tensor = self.norm(super().features(images))
        return x


class BatchStatisticsInEval(Good):
    couples_batch = True

    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)
        self.norm = nn.BatchNorm2d(dim, track_running_stats=False)

    def features(self, images: Tensor) -> Tensor:
        x: Tensor = self.norm(super().features(images))
        return x


class CalledCoupled(Good):
    couples_batch = True


class UnusedLayer(Good):
    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)
        self.second = nn.Linear(dim, dim)


class DetachedLayer(Good):
    """Its first layer is never trained."""

    def features(self, images: Tensor) -> Tensor:
        x: Tensor = self.proj(torch.relu(self.conv(images)).detach())
        return x


class HidesTheVisible(Good):
    """Takes True for hidden."""

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        x, grid, _ = super().forward(images)
        return Tokens(x if visible is None else x * ~visible.flatten(1)[:, :, None], grid)


class DividesByVisible(Good):
    """0 / 0 where a patch is hidden."""

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        x, grid, _ = super().forward(images)
        share = 1.0 if visible is None else visible.flatten(1)[:, :, None].float()
        return Tokens(x * share / share, grid)


class OnlyWholeImages(Local):
    """Fails on the strip of kept patches that a masked objective gives to a local stem."""

    def embed(self, images: Tensor) -> Tensor:
        if images.shape[-2] < 16:
            raise ValueError("too small")
        return super().embed(images)


class NoEpsilon(Good):
    """Divides by a patch's deviation, 0 where it has one colour."""

    def features(self, images: Tensor) -> Tensor:
        return super().features(images / images.std(dim=(1, 2, 3), keepdim=True))


class MixedTypes(Good):
    """scatter wants one type; under autocast there are two."""

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        x, grid, _ = super().forward(images)
        order = torch.arange(x.shape[1], device=x.device)[:, None].expand_as(x)
        return Tokens(torch.zeros(x.shape, device=x.device).scatter(1, order, x), grid)


class InPlace(Good):
    def features(self, images: Tensor) -> Tensor:
        return super().features(images.clamp_(-3, 3))


class BranchesOnValues(Good):
    def features(self, images: Tensor) -> Tensor:
        x = super().features(images)
        return x if x.sum() > 0 else 2 * x


class PlainAttribute(Good):
    """A matrix that no checkpoint saves."""

    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)
        self.matrix = torch.randn(dim, dim) * dim**-0.5

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        x, grid, _ = super().forward(images)
        return Tokens(x @ self.matrix.to(x), grid)


class OwnRunningMean(Good):
    """Statistics as a number of Python's."""

    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)
        self.mean = 0.0

    def features(self, images: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * float(images.mean())
            return super().features(images)
        return super().features(images - self.mean)


class Remembers(Good):
    """The last images' brightness is in the next images' tokens."""

    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)
        self.register_buffer("last", torch.zeros(()))
        self.last: Tensor

    def features(self, images: Tensor) -> Tensor:
        x = super().features(images) + self.last
        self.last.copy_(images.detach().mean())
        return x


def one_layer_for_all() -> type[Stem]:
    shared = nn.Conv2d(3, 64, 8, 8)

    class SharedLayer(Good):
        """A default that is made once."""

        def __init__(self, *, dim: int) -> None:
            super().__init__(dim=dim)
            self.shared = shared

        def features(self, images: Tensor) -> Tensor:
            return super().features(images) + self.shared(images).mean(dim=1, keepdim=True)

    return SharedLayer


class KeepsTheGraph(Good):
    def features(self, images: Tensor) -> Tensor:
        self.seen = super().features(images)
        return self.seen


class Closure(Good):
    """A copy of it computes with the original's layers."""

    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)
        self.steps = [lambda images: self.proj(torch.relu(self.conv(images)))]

    def features(self, images: Tensor) -> Tensor:
        x: Tensor = self.steps[0](images)
        return x


class NoiseInEval(Good):
    def features(self, images: Tensor) -> Tensor:
        x = super().features(images)
        return x + 1e-3 * torch.randn_like(x)


class NumpyNoise(Good):
    def features(self, images: Tensor) -> Tensor:
        x = super().features(images)
        return x * float(np.random.uniform(0.9, 1.1)) if self.training else x


class UnseededWeights(Good):
    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)
        weight = np.random.default_rng().normal(size=self.proj.weight.shape)
        self.proj.weight = nn.Parameter(torch.from_numpy(weight).float() / 20)


class OnTheCpu(Good):
    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        x, grid, _ = super().forward(images)
        return Tokens(x + torch.arange(x.shape[1]).cos()[:, None], grid)


BROKEN = [
    Broken(Undeclared, "builds", "declares patch_px=None: set self.patch_px"),
    Broken(NotAStem, "builds", "is NotAStem: derive it from Stem"),
    Broken(NeedsAnArgument, "builds", "needs patch: give defaults"),
    Broken(
        HalfTheStride,
        "tokens",
        "declares patch_px=8, hence a grid of (4, 6) for 32 x 48 px, but gives grid (8, 12)",
    ),
    Broken(CroppedHalfStride, "order_of_tokens", "is patch_px=8 the true stride?"),
    Broken(WithClassToken, "tokens", "gives x (2, 25, 64): no class token"),
    Broken(PlainTensor, "tokens", "gives Tensor: return Tokens(x, (h, w))"),
    Broken(ForgetsDim, "tokens", "for dim=96, but gives x (2, 24, 64)"),
    Broken(Float64, "tokens", "gives torch.float64 for torch.float32 images"),
    Broken(
        OneGridOnly,
        "other_image_sizes",
        "32 x 32 px: RuntimeError: The size of tensor",
        ("order_of_tokens",),
    ),
    Broken(Transposed, "order_of_tokens", "editing patch (1, 6) of 6 x 8 moves tokens around ("),
    Broken(OffByOne, "order_of_tokens", "patches beside theirs on average"),
    Broken(
        OverlapCalledLocal,
        "patch_locality",
        "declares is_patch_local=True, but in train mode",
        ("position_independence",),
    ),
    Broken(
        NormCalledLocal,
        "patch_locality",
        "editing one patch moves 24 of 24 tokens",
        ("position_independence",),
    ),
    Broken(BatchNormCalledLocal, "patch_locality", "in train mode editing one patch"),
    Broken(
        DetachedLeak,
        "patch_locality",
        "0.0% of a token's squared gradient",
        ("position_independence",),
    ),
    Broken(LocalWithPositions, "position_independence", "another token at another place"),
    Broken(LocalCalledMixing, "patch_locality", "declare True"),
    Broken(UndeclaredBatchNorm, "batch_coupling", "declares couples_batch=False, but in train"),
    Broken(BatchStatisticsInEval, "batch_coupling", "in eval mode an image's tokens change"),
    Broken(CalledCoupled, "batch_coupling", "do not change with the other images (0.0%)"),
    Broken(UnusedLayer, "gradients", "parameter 'second.weight' gets no gradient"),
    Broken(DetachedLayer, "gradients", "parameter 'conv.weight' gets no gradient"),
    Broken(HidesTheVisible, "visible", "True stands for a patch that is shown"),
    Broken(
        DividesByVisible,
        "visible",
        "half of the patches visible, train mode: gives tokens",
        ("hidden_pixels",),
    ),
    Broken(
        OnlyWholeImages,
        "hidden_pixels",
        "mae, train mode: ValueError: too small",
        ("position_independence",),
    ),
    Broken(NoEpsilon, "constant_images", "tokens of constant images are not finite in train"),
    Broken(MixedTypes, "bf16", "bf16 autocast: RuntimeError: scatter(): Expected"),
    Broken(InPlace, "input_is_kept", "changes its input in place", ("patch_locality",)),
    Broken(BranchesOnValues, "compile", "torch.compile(fullgraph=True): "),
    Broken(PlainAttribute, "checkpoint", "neither all in parameters nor in buffers"),
    Broken(OwnRunningMean, "checkpoint", "neither all in parameters nor in buffers"),
    Broken(Remembers, "determinism", "keep nothing of an image between calls"),
    Broken(one_layer_for_all(), "checkpoint", "shares weights with another instance"),
    Broken(
        KeepsTheGraph, "copy", "keep no tensor with a graph as an attribute", ("hidden_pixels",)
    ),
    Broken(Closure, "copy", "computes with the original's weights"),
    Broken(NoiseInEval, "determinism", "draw nothing at random there"),
    Broken(
        NumpyNoise, "determinism", "global generator of NumPy in train mode", ("hidden_pixels",)
    ),
    Broken(UnseededWeights, "determinism", "built twice with one seed, it differs"),
    Broken(OnTheCpu, "device", "pass device=images.device"),
]
