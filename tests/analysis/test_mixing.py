"""What a stem mixes, against dense Jacobians, brute force, and figures of other implementations."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from stems_that_mix import Net, grid_distances, overlapping, picture
from torch import Tensor, nn

from hybridvit.analysis.leakage import _places, mixing
from hybridvit.contracts import Stem, Tokens
from hybridvit.stems.linear import LinearStem
from hybridvit.stems.mlp import MlpStem
from hybridvit.stems.resnet import Bottleneck, ResNetStem
from hybridvit.stems.timm import FeatureMapStem


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
