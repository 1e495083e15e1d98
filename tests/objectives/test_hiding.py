"""Hidden means hidden, for every registered stem and masked objective, a plug-in's among them."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import replace

import pytest
import torch
from conftest import OWN_PARTS, STEM_ARGS, make_batch, make_objective
from torch import Tensor

from hybridvit import build
from hybridvit.contracts import Batch, DataSpec, Objective, Prediction, Stem, Tokens
from hybridvit.objectives.hiding import Fill, with_mask_tokens
from hybridvit.patches import as_pixels
from hybridvit.stems.linear import LinearStem

PARTS, _ = build.make_parts([OWN_PARTS])
STEMS, OBJECTIVES = PARTS.stems.factories, PARTS.objectives.factories
FILLS = ["mean", "visible_mean", "noise"]
MASKED = [
    name for name, objective in OBJECTIVES.items() if objective.predict is not Objective.predict
]
SMALL = {"mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "ratio": 0.5}}
MASKABLE = [name for name, made in STEMS.items() if "masked" in inspect.signature(made).parameters]
SIZE = 32


def test_these_objectives_mask() -> None:
    assert MASKED == ["masked_patch", "mae", "simmim", "upper_half"]
    assert set(STEMS) == set(STEM_ARGS)
    assert set(MASKABLE) == {"resnet", "conv", "overlap", "cct", "convnext"}


def make(objective: str, stem: str, *, fill: str = "mean", **stem_args: object) -> Objective:
    """An objective whose every weight matters: gains and scales of 0 would hide what leaks."""
    torch.manual_seed(0)
    made = make_objective(objective, stem, SIZE, stem_args=stem_args, fill=fill,
                          **SMALL.get(objective, {}))  # fmt: skip
    return enliven(made)


def enliven(objective: Objective) -> Objective:
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 + 0.1 * torch.rand_like(parameter))
    return objective


def predict(objective: Objective, batch: Batch, images: Tensor) -> Prediction:
    prediction = objective.predict(dataclasses.replace(batch, images=images))
    assert prediction is not None
    return prediction


def gradient_of_hidden_pixels(objective: Objective, batch: Batch) -> tuple[float, float]:
    """Largest gradient of predictions and tokens by a hidden and by a visible pixel."""
    images = batch.images.clone().requires_grad_()
    prediction = predict(objective, batch, images)
    total = prediction.outputs.float().square().sum() + prediction.tokens.float().square().sum()
    (gradient,) = torch.autograd.grad(total, images)
    hidden = as_pixels(prediction.hidden, images).expand_as(images)
    return float(gradient[hidden].abs().max()), float(gradient[~hidden].abs().max())


def outputs_change(objective: Objective, batch: Batch) -> bool:
    """Whether predictions or tokens differ when hidden pixels of all images do."""
    before = predict(objective, batch, batch.images)
    hidden = as_pixels(before.hidden, batch.images)
    other = torch.rand(batch.images.shape, generator=torch.Generator().manual_seed(9))
    changed = torch.where(hidden, other, batch.images)
    assert not torch.equal(changed, batch.images)
    after = predict(objective, batch, changed)
    return not (
        torch.equal(before.outputs, after.outputs) and torch.equal(before.tokens, after.tokens)
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("objective", MASKED)
@pytest.mark.parametrize("stem", sorted(STEMS))
def test_nothing_depends_on_hidden_pixels(stem: str, objective: str, training: bool) -> None:
    made, batch = make(objective, stem).train(training), make_batch(3, SIZE)
    by_hidden, by_visible = gradient_of_hidden_pixels(made, batch)
    assert by_hidden == 0
    assert by_visible > 0
    assert not outputs_change(made, batch)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("objective", MASKED)
@pytest.mark.parametrize("stem", MASKABLE)
def test_nor_inside_masked_convolutions(stem: str, objective: str, training: bool) -> None:
    made, batch = make(objective, stem, masked=True).train(training), make_batch(3, SIZE)
    by_hidden, by_visible = gradient_of_hidden_pixels(made, batch)
    assert by_hidden == 0
    assert by_visible > 0
    assert not outputs_change(made, batch)


@pytest.mark.parametrize("objective", MASKED)
@pytest.mark.parametrize("stem", sorted(STEMS))
def test_without_protection_the_checks_fail_on_a_stem_that_mixes(stem: str, objective: str) -> None:
    made, batch = make(objective, stem, fill="none"), make_batch(3, SIZE)
    by_hidden, _ = gradient_of_hidden_pixels(made, batch)
    mixes = not made.model.stem.is_patch_local
    assert (by_hidden > 0) == mixes
    assert outputs_change(made, batch) == mixes


class DetachedLeak(LinearStem):
    """Adds the image's brightness to each token, in a way that gradients do not see."""

    is_patch_local = False

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        tokens = super().forward(images, visible)
        return tokens._replace(x=tokens.x + images.detach().mean(dim=(1, 2, 3))[:, None, None])


@pytest.mark.parametrize("objective", MASKED)
def test_a_detached_leak_is_seen_by_changed_outputs_alone(objective: str) -> None:
    for fill, leaks in (("none", True), ("mean", False)):
        made, batch = make(objective, "linear", fill=fill), make_batch(3, SIZE)
        made.model.stem = DetachedLeak(dim=16, patch=4)
        assert gradient_of_hidden_pixels(made, batch)[0] == 0
        assert outputs_change(made, batch) == leaks


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("objective", MASKED)
def test_every_fill_hides(fill: str, objective: str) -> None:
    made, batch = make(objective, "resnet", fill=fill), make_batch(3, SIZE)
    assert gradient_of_hidden_pixels(made, batch)[0] == 0
    assert not outputs_change(made, batch)


@pytest.mark.parametrize("objective", MASKED)
def test_a_learned_fill_is_trained_and_hides(objective: str) -> None:
    made, batch = make(objective, "resnet", fill="learned"), make_batch(3, SIZE)
    assert gradient_of_hidden_pixels(made, batch)[0] == 0
    made(batch).loss.backward()
    color = made.get_parameter("fill.color")
    assert color.grad is not None
    assert color.grad.abs().min() > 0


@pytest.mark.parametrize("objective", MASKED)
@pytest.mark.parametrize("stem", sorted(STEMS))
def test_every_parameter_is_trained(stem: str, objective: str) -> None:
    made, batch = make(objective, stem), make_batch(8, SIZE)
    made(batch).loss.backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("objective", ["mae", "simmim"])
@pytest.mark.parametrize("stem", [name for name in sorted(STEMS) if name != "timm"])
def test_a_patch_local_stem_computes_visible_patches_only(
    stem: str, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, batch = make(objective, stem), make_batch(2, SIZE)
    sizes = []
    forward = type(made.model.stem).forward

    def spy(self: Stem, images: Tensor, visible: Tensor | None = None) -> Tokens:
        sizes.append(images.shape[-2] * images.shape[-1])
        return forward(self, images, visible)

    monkeypatch.setattr(type(made.model.stem), "forward", spy)
    prediction = predict(made, batch, batch.images)
    shown = int((~prediction.hidden[0]).sum()) * made.model.stem.patch_px**2
    assert sizes == [shown if made.model.stem.is_patch_local else SIZE**2]


def test_kept_tokens_are_those_of_the_whole_image() -> None:
    model = make("mae", "linear").model
    images = torch.rand(2, 3, SIZE, SIZE)
    keep = torch.tensor([[3, 0, 63], [7, 7, 1]])
    tokens, everything = model.tokens(images, keep=keep), model.tokens(images)
    assert tokens.grid == (8, 8)
    for b in range(2):
        for k in range(3):
            expected = everything.x[b, keep[b, k]]
            torch.testing.assert_close(tokens.x[b, k], expected, rtol=1e-5, atol=1e-6)


def test_mask_tokens_stand_where_nothing_is_given() -> None:
    x, mask_token = torch.rand(2, 2, 3), torch.full((1, 1, 3), -1.0)
    index = torch.tensor([[1, 3], [2, 0]])
    full = with_mask_tokens(Tokens(x, (2, 2), index), mask_token)
    for b in range(2):
        for n in range(4):
            row = index[b].tolist()
            expected = x[b, row.index(n)] if n in row else mask_token[0, 0]
            assert torch.equal(full[b, n], expected)


DATA = DataSpec(10, (8, 8), 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
HIDDEN = torch.tensor([[[True, False], [False, True]], [[False, True], [False, False]]])


def filled(kind: str, images: Tensor) -> Tensor:
    fill = Fill(kind, make("mae", "resnet").model.stem, DATA)  # type: ignore[arg-type]
    seen: Tensor = fill(images, HIDDEN, torch.tensor([5, 6]))
    where = as_pixels(HIDDEN, images).expand_as(images)
    assert torch.equal(seen[~where], images[~where])
    return seen


def test_the_mean_of_the_visible_pixels_equals_a_loop() -> None:
    images = torch.rand(2, 3, 8, 8)
    images[0, :, :4, :4] = torch.nan  # hidden: must not reach the mean
    seen = filled("visible_mean", images)
    for b in range(2):
        for c in range(3):
            values = [
                float(images[b, c, row, column])
                for row in range(8)
                for column in range(8)
                if not HIDDEN[b, row // 4, column // 4]
            ]
            for row in range(8):
                for column in range(8):
                    if HIDDEN[b, row // 4, column // 4]:
                        mean = sum(values) / len(values)
                        assert float(seen[b, c, row, column]) == pytest.approx(mean, rel=1e-5)


def test_noise_has_the_mean_and_std_of_the_data() -> None:
    images = torch.zeros(400, 3, 16, 16)
    fill = Fill("noise", make("mae", "resnet").model.stem, DATA)
    hidden = torch.ones(400, 4, 4, dtype=torch.bool)
    seen = fill(images, hidden, torch.arange(400))
    for channel in range(3):
        assert float(seen[:, channel].mean()) == pytest.approx(DATA.mean[channel], abs=0.005)
        assert float(seen[:, channel].std()) == pytest.approx(DATA.std[channel], abs=0.005)
    assert torch.equal(seen[7:8], fill(images[7:8], hidden[7:8], torch.tensor([7])))


def test_noise_of_grey_images_is_grey() -> None:
    grey = replace(DATA, channels=1, mean=(0.4,) * 3, std=(0.2,) * 3)
    fill = Fill("noise", make("mae", "resnet").model.stem, grey)
    hidden = torch.ones(2, 4, 4, dtype=torch.bool)
    seen = fill(torch.zeros(2, 3, 16, 16), hidden, torch.arange(2))
    assert torch.equal(seen, seen[:, :1].expand(-1, 3, -1, -1))
    assert seen[:, 0].std() > 0.1
