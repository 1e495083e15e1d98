"""The meter against dense Jacobians, brute force, and figures of other implementations."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import make_batch, make_objective
from torch import Tensor, nn

from hybridvit.analysis.leakage import Leakage, _places, leakage, mixing
from hybridvit.contracts import Batch, Objective, Prediction, Stem, StepOutput, Tokens
from hybridvit.encoder.model import Encoder, HybridViT
from hybridvit.stems.linear import LinearStem
from hybridvit.stems.mlp import MlpStem
from hybridvit.stems.resnet import Bottleneck, ResNetStem
from hybridvit.stems.timm import FeatureMapStem


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


class Net(Stem):
    """Any network to a feature map as a stem of stride 4."""

    patch_px = 4

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        x = self.net(images)
        return Tokens(x.flatten(2).mT, (x.shape[-2], x.shape[-1]))


def overlapping(dim: int = 1) -> Net:
    """Stride 4 and a kernel of 12 px: a token sees its own and the eight patches around it."""
    torch.manual_seed(0)
    return Net(nn.Conv2d(3, dim, 12, 4, 4))


def grid_distances(place: int, h: int, w: int) -> list[int]:
    return [max(abs(place // w - i // w), abs(place % w - i % w)) for i in range(h * w)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stem", [LinearStem(dim=6, patch=4), MlpStem(dim=6, patch=4, hidden=9)])
def test_patch_local_stems_mix_exactly_nothing(stem: Stem, training: bool) -> None:
    found = mixing(stem, picture(2, 3, 20, 28).float(), training=training)
    assert found.tokens == 35
    assert found.moved == pytest.approx(1 / 35)
    assert (found.change, found.jacobian_outside) == (0.0, 0.0)
    assert found.moved_by_distance == found.jacobian_by_distance == (1.0, *[0.0] * 6)
    changed = {(r, c) for r, row in enumerate(found.picture) for c, x in enumerate(row) if x}
    assert changed == {(5 // 2, 7 // 2)}


def test_every_token_within_reach_moves_and_no_other() -> None:
    stem, (h, w) = overlapping(dim=5).double(), (5, 7)
    found = mixing(stem, picture(1, 3, 4 * h, 4 * w))
    assert found.moved_by_distance == (1.0, 1.0, *[0.0] * 5)
    moved = [[x > 0.01 for x in row] for row in found.picture]
    reach = grid_distances(h // 2 * w + w // 2, h, w)
    assert moved == [[reach[r * w + c] <= 1 for c in range(w)] for r in range(h)]


def test_changes_are_relative_to_the_tokens_norm() -> None:
    # Tokens of norm 100 that an edit moves by less than 1; of norm 0.001, by more than itself.
    stem = LinearStem(dim=1, patch=4).double()
    with torch.no_grad():
        stem.proj.bias.fill_(100)
        stem.proj.weight.fill_(0.1 / 48**0.5)
    assert mixing(stem, picture(1, 3, 16, 16)).moved == 0
    with torch.no_grad():
        stem.proj.bias.fill_(0.001)
    found = mixing(stem, torch.zeros(1, 3, 16, 16).double())
    assert found.moved == 1 / 16
    assert max(map(max, found.picture)) == 1.0


def test_the_jacobian_is_the_dense_one_where_one_number_is_a_token() -> None:
    # With D = 1 the random signs drop out.
    stem, (h, w) = overlapping().double(), (4, 5)
    images = picture(1, 3, 4 * h, 4 * w)
    dense = torch.autograd.functional.jacobian(lambda x: stem(x).x[0, :, 0], images)
    squares = dense[:, 0].square().sum(1).unflatten(2, (w, 4)).unflatten(1, (h, 4)).sum((2, 4))
    share = squares.flatten(1) / squares.sum((1, 2))[:, None]
    found = mixing(stem, images)
    # Middle and corner are probed for sure; recover all four from the meter's own choice.
    places = _places(h, w)
    assert places[:2] == [2 * w + 2, 0]
    assert len(set(places)) == 4
    assert found.jacobian_outside == pytest.approx(
        sum(float(1 - share[k, k]) for k in places) / 4, rel=1e-9
    )
    expected = [0.0] * w
    for k in places:
        for i, d in enumerate(grid_distances(k, h, w)):
            expected[d] += float(share[k, i]) / 4
    assert found.jacobian_by_distance == pytest.approx(expected, abs=1e-12)


def test_random_signs_estimate_the_jacobian_of_many_numbers() -> None:
    stem, (h, w) = overlapping(dim=400).double(), (4, 4)
    images = picture(1, 3, 16, 16)
    weight = stem.net.weight.detach().square().sum((0, 1))  # (12, 12)
    blocks = weight.unflatten(1, (3, 4)).unflatten(0, (3, 4)).sum((1, 3))
    expected = 0.0
    for k in _places(h, w):
        rows = [r for r in range(3) if 0 <= k // w + r - 1 < h]
        columns = [c for c in range(3) if 0 <= k % w + c - 1 < w]
        inside = sum(float(blocks[r, c]) for r in rows for c in columns)
        expected += 1 - float(blocks[1, 1]) / inside
    assert mixing(stem, images).jacobian_outside == pytest.approx(expected / 4, rel=0.1)


def test_what_cancels_in_a_tokens_sum_still_counts() -> None:
    class Opposite(Stem):
        patch_px = 4

        def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
            mean = F.avg_pool2d(images, 4).sum(1)  # (B, h, w)
            neighbour = mean.roll(1, 2)
            x = torch.stack([mean + neighbour, mean - neighbour] * 50, dim=-1)
            return Tokens(x.flatten(1, 2), (mean.shape[1], mean.shape[2]))

    assert 0.01 < mixing(Opposite(), picture(1, 3, 16, 16)).jacobian_outside < 0.99


def test_only_the_first_image_is_edited() -> None:
    class Sums(LinearStem):
        def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
            tokens = super().forward(images)
            return tokens._replace(x=tokens.x + images[1:].sum())

    assert mixing(Sums(dim=6, patch=4), picture(2, 3, 16, 16)).moved == 1 / 16


def test_a_detached_leak_moves_tokens_without_a_gradient() -> None:
    class Detached(Stem):
        patch_px = 4

        def __init__(self) -> None:
            super().__init__()
            self.local = LinearStem(dim=6, patch=4)

        def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
            tokens = self.local(images)
            return tokens._replace(x=tokens.x + images.detach().sum())

    found = mixing(Detached(), picture(1, 3, 16, 16))
    assert found.jacobian_outside == 0
    assert found.moved == 1


def test_tokens_without_any_gradient_and_without_norm() -> None:
    class Constant(Net):
        def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
            tokens = super().forward(images)
            return tokens._replace(x=torch.zeros_like(tokens.x))

    found = mixing(Constant(nn.Conv2d(3, 5, 4, 4)), picture(1, 3, 16, 16))
    assert (found.moved, found.change, found.jacobian_outside) == (0.0, 0.0, 0.0)


def test_broken_numbers_count_as_moved() -> None:
    class Broken(Net):
        def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
            tokens = super().forward(images)
            return tokens._replace(x=tokens.x * math.nan)

    assert mixing(Broken(nn.Conv2d(3, 5, 4, 4)), picture(1, 3, 16, 16)).moved == 1


def test_batch_norm_mixes_in_training_mode_only() -> None:
    torch.manual_seed(0)
    stem = Net(nn.Sequential(nn.Conv2d(3, 5, 4, 4), nn.BatchNorm2d(5))).double()
    images = picture(2, 3, 16, 16)
    assert mixing(stem, images, training=False).moved == 1 / 16
    trained = mixing(stem, images, training=True, threshold=1e-6)
    assert trained.moved == 1
    # Pixels of the other image are outside, too, but at no distance.
    own, *others = trained.jacobian_by_distance
    assert trained.jacobian_outside == pytest.approx(1 - own)
    assert sum(others) < 0.9 * trained.jacobian_outside
    assert sum(mixing(stem, images).jacobian_by_distance) == pytest.approx(1)


def test_the_stem_and_the_random_state_stay_as_they_are() -> None:
    stem = Net(nn.Sequential(nn.Conv2d(3, 5, 4, 4), nn.BatchNorm2d(5), nn.Dropout(0.5)))
    stem.net[1].eval()
    before = {key: value.clone() for key, value in stem.state_dict().items()}
    state = torch.get_rng_state()
    mixing(stem, picture(2, 3, 16, 16), training=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert stem.training
    assert not stem.net[1].training
    assert all(torch.equal(before[k], v) for k, v in stem.state_dict().items())
    assert all(p.grad is None for p in stem.parameters())


def test_measuring_twice_gives_the_same_whatever_was_drawn_between() -> None:
    stem = Net(nn.Sequential(nn.Conv2d(3, 5, 4, 4), nn.GroupNorm(1, 5), nn.Dropout(0.3)))
    images = picture(1, 3, 16, 16)
    first = mixing(stem, images, training=True)
    torch.rand(7)
    assert mixing(stem, images, training=True) == first


def test_dropout_is_no_mixing() -> None:
    stem = Net(nn.Sequential(nn.Conv2d(3, 50, 4, 4), nn.Dropout(0.5)))
    assert mixing(stem, picture(1, 3, 16, 16), training=True).moved == 1 / 16


def test_large_grids_show_their_middle() -> None:
    found = mixing(LinearStem(dim=2, patch=2), picture(1, 3, 80, 12).float())
    assert (len(found.picture), len(found.picture[0])) == (16, 6)
    assert [(r, c) for r in range(16) for c in range(6) if found.picture[r][c]] == [(8, 3)]
    assert len(found.moved_by_distance) <= 40


def test_one_patch_is_a_grid() -> None:
    found = mixing(overlapping(), picture(1, 3, 4, 4))
    assert (found.tokens, found.moved, found.change) == (1, 1.0, 0.0)


def test_images_that_the_stride_does_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="a stride of 4 px does not divide"):
        mixing(overlapping(), picture(1, 3, 18, 16))


# What a reading of the peers' stems found at 224 px: random weights, eval mode, residual gains 1.
SIZE = (1, 3, 224, 224)


def test_a_linear_stem_moves_1_of_196() -> None:
    found = mixing(LinearStem(dim=192), picture(*SIZE).float())
    assert round(found.moved * found.tokens) == 1
    assert found.tokens == 196


@pytest.mark.parametrize(
    ("blocks", "tokens", "others"), [((3, 4, 9), 196, 0.33), ((2, 2, 2, 2), 49, None)]
)
def test_group_norm_resnets_move_every_token(
    blocks: tuple[int, ...], tokens: int, others: float | None
) -> None:
    torch.manual_seed(0)
    stem = ResNetStem(dim=192, blocks=blocks)
    for module in stem.modules():
        if isinstance(module, Bottleneck):
            nn.init.ones_(module.norm3.weight)
    found = mixing(stem, picture(*SIZE).float())
    assert found.tokens == tokens
    assert found.moved == 1.0
    if others:  # "mean 33 % on other tokens", of other weights and another edit
        assert found.change == pytest.approx(others, abs=0.1)


def test_batch_norm_resnet_in_eval_and_training_mode() -> None:
    # 43 of 196 of timm's resnet50d at stride 16 in eval mode, of other weights; all in training.
    torch.manual_seed(0)
    net = timm.create_model("resnet50d", features_only=True, out_indices=(3,), zero_init_last=False)
    stem = FeatureMapStem(net, nn.Conv2d(1024, 64, 1))
    images = picture(*SIZE).float()
    still = mixing(stem, images)
    of_middle = sum(x > 0.01 for row in still.picture for x in row)
    assert 20 <= of_middle <= 80
    assert still.moved_by_distance[-1] == 0
    assert mixing(stem, images, training=True).moved == 1.0


# Leakage of a run: a tiny masked objective, with its protection on or off.


class Masked(Objective):
    """Hide the left half; predict it from all tokens' mean and its own mask token."""

    def __init__(self, stem: Stem, *, fill: bool) -> None:
        super().__init__()
        self.model = HybridViT(
            stem, Encoder(grid=(4, 4), dim=6, depth=1, heads=1), mean=(0.5,) * 3, std=(0.3,) * 3
        )
        self.fill = fill
        self.mask_token = nn.Parameter(torch.randn(6))
        self.decoder = nn.Linear(6, 5)

    def forward(self, batch: Batch) -> StepOutput:
        raise NotImplementedError

    def predict(self, batch: Batch) -> Prediction:
        hidden = torch.zeros(len(batch.images), 4, 4, dtype=torch.bool)
        hidden[:, :, :2] = True
        pixels = hidden.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
        seen = torch.where(pixels, 0.5, batch.images) if self.fill else batch.images
        tokens = self.model.tokens(seen)
        x = torch.where(hidden.flatten(1)[..., None], self.mask_token.to(tokens.x), tokens.x)
        z = x + x.mean(1, keepdim=True)
        where = hidden.flatten(1).nonzero()[:, 1].view(len(x), -1)
        outputs = self.decoder(z.gather(1, where[..., None].expand(-1, -1, 6)))
        return Prediction(hidden, seen, x, outputs, where)


class GlobalMax(Stem):
    """A patch-local map plus what no gradient shows: where the brightest pixel is."""

    patch_px = 4

    def __init__(self) -> None:
        super().__init__()
        self.local = LinearStem(dim=6, patch=4)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        tokens = self.local(images)
        brightest = images.flatten(1).argmax(1)[:, None, None]
        return tokens._replace(x=tokens.x + brightest / images[0].numel())


MIXING: list[tuple[str, Stem]] = [
    ("overlap", overlapping(dim=6)),
    ("group norm", Net(nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.GroupNorm(1, 6)))),
    ("batch norm", Net(nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.BatchNorm2d(6)))),
    ("argmax", GlobalMax()),
]
NOTHING = Leakage(tokens=0.0, outputs=0.0, gradient=0.0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "stem"), MIXING, ids=[n for n, _ in MIXING])
def test_what_is_filled_before_a_mixing_stem_leaks_nothing(
    name: str, stem: Stem, training: bool
) -> None:
    found = leakage(Masked(stem, fill=True), make_batch(3), training=training)
    assert found == NOTHING
    assert found.is_zero


def test_without_the_fill_each_stem_leaks_what_it_mixes() -> None:
    found = {
        name: leakage(Masked(stem, fill=False), make_batch(3), training=True)
        for name, stem in MIXING
    }
    # Of 4 columns two are hidden; the third is next to them, and half of the tokens are visible.
    assert found["overlap"].tokens == 4 / 16
    assert found["group norm"].tokens == found["batch norm"].tokens == 8 / 16
    assert found["argmax"].tokens == 8 / 16
    assert all(x.outputs == 1 and not x.is_zero for x in found.values())
    assert found["argmax"].gradient == 0
    assert all(found[name].gradient > 1e-6 for name in ("overlap", "group norm", "batch norm"))


def test_batch_norm_in_eval_mode_leaks_nothing_even_without_the_fill() -> None:
    stem = Net(nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.BatchNorm2d(6)))
    assert leakage(Masked(stem, fill=False), make_batch(3), training=False) == NOTHING


def test_a_patch_local_stem_needs_no_fill() -> None:
    objective = Masked(LinearStem(dim=6, patch=4), fill=False)
    assert leakage(objective, make_batch(3)) == NOTHING


def test_kernels_that_differ_with_and_without_gradients_are_no_leak() -> None:
    class Rounds(LinearStem):
        def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
            tokens = super().forward(images)
            return tokens if torch.is_grad_enabled() else tokens._replace(x=tokens.x + 1e-6)

    assert leakage(Masked(Rounds(dim=6, patch=4), fill=True), make_batch(2)) == NOTHING


def test_a_straight_through_gradient_is_a_leak() -> None:
    class Passes(Masked):
        def predict(self, batch: Batch) -> Prediction:
            found, total = super().predict(batch), batch.images.sum()
            zero = (total - total.detach()) * 0.1
            return found._replace(tokens=found.tokens + zero)

    found = leakage(Passes(LinearStem(dim=6, patch=4), fill=True), make_batch(2))
    assert (found.tokens, found.outputs) == (0.0, 0.0)
    assert found.gradient > 0.01
    assert not found.is_zero


def test_leakage_across_the_images_of_a_batch_is_seen() -> None:
    class Neighbour(Masked):
        """Fills its own hidden pixels, and adds the next image's to its tokens."""

        def predict(self, batch: Batch) -> Prediction:
            found = super().predict(batch)
            return found._replace(tokens=found.tokens + batch.images.roll(1, 0).mean())

    found = leakage(Neighbour(LinearStem(dim=6, patch=4), fill=True), make_batch(2))
    assert (found.tokens, found.outputs) == (1.0, 0.0)
    assert found.gradient > 0


def test_a_choice_that_depends_on_hidden_content_leaks_all() -> None:
    class Brightest(Masked):
        """Hides the brighter half of the image."""

        def predict(self, batch: Batch) -> Prediction:
            found = super().predict(batch)
            left = batch.images[..., :8].mean((1, 2, 3)) < batch.images[..., 8:].mean((1, 2, 3))
            flipped = torch.where(left[:, None, None], found.hidden.flip(2), found.hidden)
            return found._replace(hidden=flipped)

    batch = make_batch(2)
    batch.images[..., 8:] = batch.images[..., 8:] * 0.1 + 0.45
    batch.images[..., :8] = batch.images[..., :8] * 0.01 + 0.47
    found = leakage(Brightest(LinearStem(dim=6, patch=4), fill=True), batch)
    assert (found.tokens, found.outputs) == (1.0, 1.0)


def test_predictions_of_another_shape_have_changed() -> None:
    class Counts(Masked):
        """As many predictions as there are bright pixels."""

        def predict(self, batch: Batch) -> Prediction:
            found = super().predict(batch)
            count = 1 + int((batch.images > 0.5).sum()) % 7
            return found._replace(outputs=found.outputs[:, :count], where=found.where[:, :count])

    batch = make_batch(2)
    batch.images[:] = 0.4
    found = leakage(Counts(LinearStem(dim=6, patch=4), fill=True), batch)
    assert (found.tokens, found.outputs) == (0.0, 1.0)


def test_a_choice_of_what_to_predict_is_no_secret_way() -> None:
    class Sorts(Masked):
        """Predicts the same of every patch, in an order that their brightness gives."""

        def predict(self, batch: Batch) -> Prediction:
            found = super().predict(batch)
            order = batch.images[:, 0, ::4, :8:4].flatten(1).argsort(1)
            outputs = torch.zeros_like(found.outputs)
            return found._replace(outputs=outputs, where=found.where.gather(1, order))

    found = leakage(Sorts(LinearStem(dim=6, patch=4), fill=True), make_batch(2))
    assert found.tokens == 0
    assert found.outputs > 0


def test_contrast_leaks_also_where_images_are_flat() -> None:
    class Contrast(Masked):
        def predict(self, batch: Batch) -> Prediction:
            found = super().predict(batch)
            return found._replace(outputs=found.outputs + batch.images[:, 0, :2, :2].std())

    batch = make_batch(2)
    batch.images[:] = 0.5
    found = leakage(Contrast(LinearStem(dim=6, patch=4), fill=True), batch)
    assert (found.tokens, found.outputs) == (0.0, 1.0)


def test_the_gradient_on_hidden_pixels_is_a_share() -> None:
    class Mean(Masked):
        """Predicts three times the image's mean: as much of each pixel."""

        def predict(self, batch: Batch) -> Prediction:
            found = super().predict(batch)
            mean = 3 * batch.images.mean((1, 2, 3)).view(-1, 1, 1)
            same = mean.expand_as(found.outputs)
            return found._replace(tokens=found.tokens.detach(), outputs=same)

    found = leakage(Mean(LinearStem(dim=6, patch=4), fill=True), make_batch(2))
    assert found.gradient == pytest.approx(0.5)


def test_gradients_are_taken_wherever_the_meter_is_called() -> None:
    objective = Masked(overlapping(dim=6), fill=False)
    with torch.no_grad():
        found = leakage(objective, make_batch(2))
        mixed = mixing(objective.model.stem, make_batch(1).images)
    assert found == leakage(objective, make_batch(2))
    assert found.gradient > 0
    assert mixed.jacobian_outside > 0


def test_objectives_that_hide_nothing_have_no_leakage() -> None:
    class Plain(Masked):
        def predict(self, batch: Batch) -> None:
            return None

    assert leakage(Plain(LinearStem(dim=6, patch=4), fill=True), make_batch(2)) is None


def test_the_objective_and_the_random_state_stay_as_they_are() -> None:
    stem = Net(nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.BatchNorm2d(6), nn.Dropout(0.4)))
    objective = Masked(stem, fill=True).eval()
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    batch, state = make_batch(2), torch.get_rng_state()
    images = batch.images.clone()
    assert leakage(objective, batch, training=True) == NOTHING  # dropout alone changes nothing
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batch.images, images)
    assert not batch.images.requires_grad
    assert not objective.training
    assert all(torch.equal(before[k], v) for k, v in objective.state_dict().items())
    assert all(p.grad is None for p in objective.parameters())


def test_state_that_moves_in_training_is_no_leak() -> None:
    made = make_objective("mae", "linear", decoder_dim=16, decoder_depth=1, decoder_heads=2)
    torch.nn.utils.parametrizations.spectral_norm(made.model.stem.proj)
    found = leakage(made, make_batch(2), training=True)
    assert found is not None
    assert found.is_zero
    stem = made.model.stem
    assert mixing(stem, torch.randn(1, 3, 16, 16), training=True).moved == 1 / 16
