"""What a run leaks: hidden content that reaches tokens and predictions, against brute force."""

from __future__ import annotations

import pytest
import torch
from conftest import make_batch, make_objective
from stems_that_mix import Net, overlapping
from torch import Tensor, nn

from hybridvit.analysis.leakage import Leakage, leakage, mixing
from hybridvit.contracts import Batch, Objective, Prediction, Stem, StepOutput, Tokens
from hybridvit.encoder.model import Encoder, HybridViT
from hybridvit.stems.linear import LinearStem


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
