"""Masking inside stems: norms against plain loops, and what every masked stem promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sparse_oracle import batch_norm, check_tokens, group_norm, moments, sparse
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hybridvit.contracts import Stem
from hybridvit.stems import STEMS
from hybridvit.stems.masked import hide, make_norm, normalise

SMALL_RESNET = {"blocks": (1, 1), "strides": (1, 2), "width": 1 / 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # all of stride 8
    "resnet": ("resnet", SMALL_RESNET),
    "resnet_batch": ("resnet", {**SMALL_RESNET, "norm": "batch"}),
    "resnet_patch": ("resnet", {**SMALL_RESNET, "root_pool": False, "patch": 2}),
    "conv": ("conv", {"channels": (6, 8, 10)}),
    "conv_group": ("conv", {"channels": (6, 8, 10), "norm": "group"}),
    "conv_strides": ("conv", {"channels": (6, 4, 6, 8, 4), "strides": (1, 2, 2, 1, 2)}),
    "overlap": ("overlap", {"patch": 8}),
    "cct": ("cct", {"layers": 3, "kernel": 3, "stride": 1, "channels": 6}),
    "cct_no_pool": (
        "cct",
        {"layers": 3, "kernel": 3, "pool_kernel": 1, "pool_stride": 1, "channels": 6},
    ),
    "convnext": ("convnext", {"depths": (1, 2), "channels": (6, 8), "strides": (4, 2)}),
    "convnext_flat": ("convnext", {"depths": (1, 1), "channels": (6, 8), "strides": (8, 1)}),
}


def make(case: str, masked: bool = True) -> Stem:
    """A stem with lively weights: those that start at zero would hide a dependence."""
    torch.manual_seed(0)
    name, options = CASES[case]
    stem = STEMS[name](dim=8, masked=masked, **options)
    with torch.no_grad():
        for parameter in stem.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.5 + torch.rand_like(parameter))
    assert stem.patch_px == 8
    return stem


def data(batch: int = 3, h: int = 4, w: int = 5) -> tuple[Tensor, Tensor]:
    """Images in float64 and a mask that hides about half of their patches, in each other ones."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, 8 * h, 8 * w, generator=generator, dtype=torch.float64)
    visible = torch.rand(batch, h, w, generator=generator) < 0.5
    assert visible.any()
    assert not visible.all()
    return images, visible


def pixels(visible: Tensor, scale: int = 8) -> Tensor:
    """(B, h, w) as (B, 1, H, W)."""
    return visible.repeat_interleave(scale, 1).repeat_interleave(scale, 2)[:, None]


# --- hide ---


@pytest.mark.parametrize("scale", [1, 2, 5])
def test_hide_zeroes_the_pixels_of_hidden_patches_and_no_others(scale: int) -> None:
    _, visible = data()
    x = torch.randn(3, 2, 4 * scale, 5 * scale)
    got = hide(x, visible)
    for b in range(3):
        for i in range(4 * scale):
            for j in range(5 * scale):
                seen = visible[b, i // scale, j // scale]
                expected = x[b, :, i, j] if seen else torch.zeros(2)
                assert torch.equal(got[b, :, i, j], expected)


def test_hide_lets_no_nan_through_forwards_and_backwards() -> None:
    _, visible = data()
    x = torch.randn(3, 2, 8, 10).masked_fill(~pixels(visible, 2), torch.nan).requires_grad_()
    y = hide(x, visible)
    assert y.isfinite().all()
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert (gradient.masked_select(~pixels(visible, 2).expand_as(x)) == 0).all()
    assert hide(x, None) is x


# --- norms ---


def lively(norm: nn.Module) -> Any:
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 2)
    return norm.double()


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("training", [True, False])
def test_group_norm_equals_a_loop_over_visible_positions(groups: int, training: bool) -> None:
    _, visible = data()
    x = 3 * torch.randn(3, 6, 8, 10, dtype=torch.float64) + 1
    norm = lively(nn.GroupNorm(groups, 6)).train(training)
    y = normalise(norm, x, visible)
    check_tokens(y.flatten(2).mT, group_norm(sparse(x, visible), norm))
    assert (y.masked_select(~pixels(visible, 2).expand_as(y)) == 0).all()


def test_batch_norm_equals_a_loop_over_visible_positions() -> None:
    _, visible = data()
    norm = lively(nn.BatchNorm2d(4))
    mean, var = [0.0] * 4, [1.0] * 4
    for step in range(3):
        x = 3 * torch.randn(3, 4, 8, 10, dtype=torch.float64) + step
        visible = visible.roll(step, 2)
        y = normalise(norm, x, visible)
        features = sparse(x, visible)
        check_tokens(y.flatten(2).mT, batch_norm(features, norm))
        assert (y.masked_select(~pixels(visible, 2).expand_as(y)) == 0).all()
        for c in range(4):
            n = len(features.at)
            new_mean, new_var = moments([float(v[c]) for v in features.at.values()])
            mean[c] += 0.1 * (new_mean - mean[c])
            var[c] += 0.1 * (new_var * n / (n - 1) - var[c])
    torch.testing.assert_close(norm.running_mean, torch.tensor(mean, dtype=torch.float64))
    torch.testing.assert_close(norm.running_var, torch.tensor(var, dtype=torch.float64))
    assert norm.num_batches_tracked == 3
    # In eval mode the running statistics count, and nothing updates them.
    norm.eval()
    expected = norm(x).masked_fill(~pixels(visible, 2), 0)
    assert torch.equal(normalise(norm, x, visible), expected)
    assert norm.num_batches_tracked == 3


@pytest.mark.parametrize("kind", ["group", "batch"])
def test_norms_with_nothing_hidden_are_torchs(kind: Any) -> None:
    x = (3 * torch.randn(3, 6, 8, 10, dtype=torch.float64) + 1).requires_grad_()
    ours = lively(make_norm(kind, 6, 3 if kind == "group" else None))
    theirs = lively(make_norm(kind, 6, 3 if kind == "group" else None))
    theirs.load_state_dict(ours.state_dict())
    up = torch.randn_like(x)
    y, z = normalise(ours, x, torch.ones(3, 4, 5, dtype=torch.bool)), theirs(x)
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
    inputs = [(x, *norm.parameters()) for norm in (ours, theirs)]
    gradients = [
        torch.autograd.grad((out * up).sum(), i) for out, i in zip((y, z), inputs, strict=True)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


@pytest.mark.parametrize("kind", ["group", "batch"])
def test_an_image_without_visible_positions_gives_zeros_and_counts_for_nothing(kind: Any) -> None:
    _, visible = data()
    visible[1] = False
    x = torch.randn(3, 32, 8, 10, dtype=torch.float64, requires_grad=True)
    norm, alone = lively(make_norm(kind, 32)), lively(make_norm(kind, 32))
    alone.load_state_dict(norm.state_dict())
    y = normalise(norm, x, visible)
    assert (y[1] == 0).all()
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), x)
    assert gradient.isfinite().all()
    others = torch.tensor([0, 2])
    torch.testing.assert_close(y[others], normalise(alone, x[others], visible[others]))
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[key], value)


@pytest.mark.parametrize("count", [0, 1])
def test_batches_of_less_than_two_visible_positions_leave_running_statistics(count: int) -> None:
    norm = lively(nn.BatchNorm2d(4))
    visible = torch.zeros(2, 3, 3, dtype=torch.bool)
    visible.view(-1)[:count] = True
    y = normalise(norm, torch.randn(2, 4, 3, 3, dtype=torch.float64), visible)
    assert y.isfinite().all()
    assert (norm.running_mean == 0).all()
    assert (norm.running_var == 1).all()


def test_default_groups_divide_the_channels() -> None:
    groups = {c: make_norm("group", c).num_groups for c in (48, 96, 64, 20, 7)}
    assert groups == {48: 16, 96: 32, 64: 32, 20: 4, 7: 1}


@pytest.mark.parametrize("kind", ["group", "batch"])
def test_statistics_in_bfloat16_are_those_of_float32(kind: Any) -> None:
    # A mean of 20 and a deviation of 1 leave bfloat16 3 bits for what is normalised; sums of
    # thousands of such values would be off by far more.
    _, visible = data()
    x = (torch.randn(3, 32, 32, 40) + 20).bfloat16()
    norm, exact = make_norm(kind, 32), make_norm(kind, 32)
    y = normalise(norm, x, visible)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), normalise(exact, x.float(), visible), rtol=0.01, atol=0)


@pytest.mark.parametrize("kind", ["group", "batch"])
def test_type_and_memory_layout_stay(kind: Any) -> None:
    _, visible = data()
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(3, 32, 8, 10, dtype=dtype).to(memory_format=torch.channels_last)
        for y in (hide(x, visible), normalise(make_norm(kind, 32).to(dtype), x, visible)):
            assert y.dtype == dtype
            assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["group", "batch"])
def test_statistics_do_not_shift_with_the_mask_ratio(kind: Any) -> None:
    # Independent features of variance 4 and mean 1: the deviation by which a norm divides stays,
    # where the zeros of a fill would change it to sqrt(4 (1 - r) + r (1 - r)).
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(8, 32, 64, 64, generator=generator) + 1
    for ratio in (0.0, 0.25, 0.5, 0.75, 0.9):
        visible = torch.rand(8, 16, 16, generator=generator) >= ratio
        seen = pixels(visible, 4).expand_as(x)
        filled = x * seen
        masked = normalise(make_norm(kind, 32), filled, visible)[seen]
        plain = make_norm(kind, 32)(filled)[seen]
        kept = 1 - ratio
        assert masked.std().item() == pytest.approx(1, rel=0.02)
        assert masked.mean().item() == pytest.approx(0, abs=0.02)
        expected = 2 / (4 * kept + ratio * kept) ** 0.5
        assert plain.std().item() == pytest.approx(expected, rel=0.05)
        assert plain.mean().item() == pytest.approx(ratio * expected / 2, rel=0.05, abs=0.02)


# --- every masked stem ---


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_with_nothing_hidden_a_masked_stem_is_the_plain_one(case: str, training: bool) -> None:
    images, _ = data()
    plain = make(case, masked=False).double().train(training)
    expected = plain(images).x
    for visible in (None, torch.ones(3, 4, 5, dtype=torch.bool)):
        stem = make(case).double().train(training)
        torch.testing.assert_close(stem(images, visible).x, expected, rtol=1e-9, atol=1e-9)
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(stem.state_dict()[key], value)


@pytest.mark.parametrize("case", CASES)
def test_a_stem_without_masking_ignores_the_mask(case: str) -> None:
    images, visible = data()
    stem = make(case, masked=False).double().eval()
    assert torch.equal(stem(images, visible).x, stem(images).x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_tokens_depend_on_no_hidden_pixel(case: str, training: bool) -> None:
    images, visible = data()
    hidden = ~pixels(visible).expand_as(images)
    stem = make(case).double().train(training)
    images.requires_grad_()
    x = stem(images, visible).x
    (gradient,) = torch.autograd.grad(x.pow(3).sum(), images)
    assert (gradient[hidden] == 0).all()
    assert (F.max_pool2d(gradient.abs().amax(1), 8)[visible] > 0).all()  # every visible patch
    for content in (1e30 * torch.randn_like(images), torch.tensor(torch.nan).double()):
        other = torch.where(hidden, content, images)
        stem = make(case).double().train(training)
        assert torch.equal(stem(other, visible).x, x)


@pytest.mark.parametrize("case", CASES)
def test_without_masking_hidden_pixels_reach_visible_tokens(case: str) -> None:
    images, visible = data()
    stem = make(case, masked=False).double().eval()
    seen = visible.flatten(1)
    other = torch.where(pixels(visible), images, torch.randn_like(images))
    assert not torch.equal(stem(other, visible).x[seen], stem(images, visible).x[seen])


class HiddenInputs(TorchFunctionMode):
    """Notes, for each convolution and pooling, whether its input is zero where hidden."""

    def __init__(self, visible: Tensor) -> None:
        super().__init__()
        self.visible = visible
        self.padded: list[Tensor] = []  # checked before they were padded
        self.zero: list[bool] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("pad", "conv2d", "max_pool2d", "boolean_dispatch", "_max_pool2d"):
            x = args[0]
            if not any(x is p for p in self.padded):
                scale = x.shape[-1] // self.visible.shape[-1]
                assert x.shape[-1] == scale * self.visible.shape[-1]
                hidden = ~pixels(self.visible, scale).expand_as(x)
                self.zero.append(bool((x[hidden] == 0).all()))
            if name == "pad":
                self.padded.append(out)
        return out


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_hidden_positions_are_zero_at_the_input_of_all_that_mixes(
    case: str, training: bool
) -> None:
    images, visible = data()
    stem = make(case).double().train(training)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in stem.modules())
    pools = {"resnet": 1, "resnet_batch": 1, "cct": 3, "cct_no_pool": 3}.get(case, 0)
    with HiddenInputs(visible) as inputs:
        stem(images, visible)
    assert len(inputs.zero) == convolutions + pools
    assert all(inputs.zero)
    # It can fail: the plain stem has other than zero everywhere.
    with HiddenInputs(visible) as inputs:
        make(case, masked=False).double().train(training)(images, visible)
    assert not any(inputs.zero)


@pytest.mark.parametrize("case", CASES)
def test_wholly_hidden_images_and_batches_stay_finite(case: str) -> None:
    images, visible = data()
    for hidden in (slice(1, 2), slice(None)):
        visible[hidden] = False
        stem = make(case).double()
        x = stem(images, visible).x
        assert x.isfinite().all()
        x.square().sum().backward()
        for key, parameter in stem.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), key
        assert all(b.isfinite().all() for b in stem.buffers())


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_every_parameter_of_a_masked_stem(case: str) -> None:
    images, visible = data()
    stem = make(case).double()
    stem(images, visible).x.pow(3).sum().backward()
    for key, parameter in stem.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("case", ["resnet", "resnet_batch", "conv", "conv_group"])
def test_images_of_a_batch_meet_in_batch_norm_alone(case: str) -> None:
    images, visible = data()
    stem = make(case).double()
    other = images.clone()
    other[1:] = torch.randn_like(other[1:])
    same = torch.allclose(stem(images, visible).x[0], stem(other, visible).x[0], rtol=1e-9)
    assert same != stem.couples_batch
    stem.eval()
    assert torch.allclose(stem(images, visible).x[0], stem(other, visible).x[0], rtol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_masked_stems_run_in_bfloat16(case: str) -> None:
    images, visible = data()
    stem = make(case)
    exact = stem(images.float(), visible).x
    stem = make(case)
    with torch.autocast("cpu", torch.bfloat16):
        x = stem(images.float(), visible).x
    x.square().mean().backward()
    seen = visible.flatten(1)
    assert (x.float() - exact)[seen].norm() < 0.1 * exact[seen].norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in stem.parameters())
    assert all(b.dtype in (torch.float32, torch.int64) for b in stem.buffers())


@pytest.mark.parametrize("case", CASES)
def test_masked_stems_run_on_the_meta_device(case: str) -> None:
    with torch.device("meta"):
        name, options = CASES[case]
        stem = STEMS[name](dim=8, masked=True, **options)
        tokens = stem(torch.empty(2, 3, 32, 40), torch.empty(2, 4, 5, dtype=torch.bool))
    assert tokens.x.shape == (2, 20, 8)
    assert tokens.grid == (4, 5)


@pytest.mark.parametrize("case", ["resnet", "resnet_batch", "conv", "overlap", "cct", "convnext"])
def test_masked_stems_compile_as_one_graph(case: str) -> None:
    images, visible = data()
    ours, theirs = make(case).double(), make(case).double()
    torch.compiler.reset()
    compiled: Callable[..., Any] = torch.compile(theirs, fullgraph=True, backend="eager")
    for mask in (visible, ~visible):
        torch.testing.assert_close(compiled(images, mask).x, ours(images, mask).x)
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[key], value)


class ReluInputs(TorchFunctionMode):
    """Keeps what ReLU is given: the outputs of norms."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "relu":
            self.seen.append(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("case", "norms"),
    [("conv", nn.BatchNorm2d), ("conv_group", nn.GroupNorm), ("resnet", nn.GroupNorm)],
)
def test_first_norm_of_a_stem_does_not_shift_with_the_mask_ratio(
    case: str, norms: type[nn.Module]
) -> None:
    # The size of visible positions after the first norm, beside what it is with nothing hidden: a
    # fill by zeros (the mean) doubles it. What remains with masking is the border: convolutions at
    # the edge of a visible patch see zeros, too, which tells most for a 7x7 kernel and 8 px.
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(8, 3, 64, 64, generator=generator)
    order = torch.rand(8, 64, generator=generator).argsort(1)

    def size(masked: bool, hidden: int) -> float:
        visible = (order >= hidden).view(8, 8, 8)
        stem = make(case, masked=masked)
        first: Any = next(m for m in stem.modules() if isinstance(m, norms))
        with ReluInputs() as inputs:
            stem(images.masked_fill(~pixels(visible), 0), visible)
        x = (inputs.seen[0] - first.bias[:, None, None]) / first.weight[:, None, None]
        x = x.unflatten(2, (8, -1)).unflatten(4, (8, -1))[..., 1:3, :, 1:3]  # inside the patches
        inside = x.permute(0, 2, 4, 1, 3, 5)[visible]
        return inside.square().mean().sqrt().item()

    whole = size(True, 0)
    assert size(False, 0) == pytest.approx(whole, rel=1e-4)
    assert size(True, 48) == pytest.approx(whole, rel=0.15)
    assert size(False, 48) > 1.6 * whole
