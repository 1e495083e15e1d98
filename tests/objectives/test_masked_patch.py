import pytest
import torch
from conftest import STEM_ARGS, make_batch, make_objective

from hybridvit.contracts import Batch, Tokens
from hybridvit.objectives.masked_patch import MaskedPatch
from hybridvit.objectives.masking import Corruption, bert_corruption
from hybridvit.patches import patchify, take
from hybridvit.targets import TARGETS

STEMS = ["linear", "resnet"]


def make(stem: str = "linear", **args: object) -> MaskedPatch:
    objective = make_objective("masked_patch", stem, **args)
    assert isinstance(objective, MaskedPatch)
    # GroupNorm gains of 0 would hide what a residual branch mixes.
    for name, parameter in objective.named_parameters():
        if name.endswith("norm3.weight"):
            torch.nn.init.ones_(parameter)
    return objective


def test_the_head_has_512_outputs_for_rgb_and_8_for_grey() -> None:
    assert make().decoder.out_features == 512
    assert make(channels=1).decoder.out_features == 8
    assert make(target="downsampled").decoder.out_features == 16 * 512
    assert make(target="pixels").decoder.out_features == 3 * 16


def corruption(batch: Batch) -> Corruption:
    return bert_corruption(batch.key, 16)


@pytest.mark.parametrize("fill", ["mean", "none"])
def test_on_pixels_or_on_embeddings_is_the_same_for_a_patch_local_stem(fill: str) -> None:
    # The paper masks embeddings. For a patch-local stem that is what filling pixels amounts to.
    objective, batch = make("linear", fill=fill).double(), make_batch(6)
    batch.images = batch.images.double()
    corrupted, masked, source = corruption(batch)
    tokens = objective.model.tokens(batch.images)  # of the uncorrupted images
    x = torch.where(masked[:, :, None], objective.mask_token, take(tokens.x, source))
    z = objective.model.encoder(Tokens(x, tokens.grid))[:, 1:]
    expected = objective.decoder(take(z, corrupted))
    found = objective.predict(batch)
    torch.testing.assert_close(found.outputs, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.tokens, x, rtol=1e-10, atol=1e-12)


def test_what_the_stem_sees_equals_a_loop() -> None:
    objective, batch = make(), make_batch(3)
    prediction, (corrupted, masked, source) = objective.predict(batch), corruption(batch)
    assert torch.equal(prediction.where, corrupted)
    mean = torch.tensor([0.4, 0.5, 0.6])
    for b in range(3):
        for n in range(16):
            row, column = 4 * (n // 4), 4 * (n % 4)
            patch = prediction.seen[b, :, row : row + 4, column : column + 4]
            s = int(source[b, n])
            if masked[b, n]:
                expected = mean[:, None, None].expand(3, 4, 4)
            else:
                expected = batch.images[
                    b, :, 4 * (s // 4) : 4 * (s // 4) + 4, 4 * (s % 4) : 4 * (s % 4) + 4
                ]
            assert torch.equal(patch, expected)
            assert bool(prediction.hidden[b, n // 4, n % 4]) == (bool(masked[b, n]) or s != n)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("channels", [1, 3])
def test_every_parameter_gets_a_gradient(stem: str, target: str, channels: int) -> None:
    objective = make(stem, target=target, channels=channels)
    objective(make_batch(8)).loss.backward()
    trained = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    without = [n for n, p in trained if p.grad is None or not p.grad.any()]
    # No class token is read, but the patches attend to it.
    assert without == []


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("stem", sorted(STEM_ARGS))
def test_every_target_with_every_stem(stem: str, target: str) -> None:
    objective = make_objective("masked_patch", stem, target=target)
    output = objective(make_batch(4))
    assert torch.isfinite(output.loss)
    output.loss.backward()
    prediction = objective.predict(make_batch(4))
    assert prediction is not None
    assert prediction.outputs.shape == (4, 8, objective.target.outputs)


def test_pictures_show_predictions_in_place() -> None:
    objective, batch = make(target="pixels"), make_batch(2)
    rows = objective.pictures(batch)
    assert list(rows) == ["original", "seen", "prediction"]
    assert all(row.shape == batch.images.shape for row in rows.values())
    corrupted = objective.predict(batch).where
    untouched = torch.ones(2, 16, dtype=torch.bool).scatter(1, corrupted, False)
    assert torch.equal(
        patchify(rows["prediction"], 4)[untouched], patchify(batch.images, 4)[untouched]
    )


@pytest.mark.parametrize("target", ["hog", "features"])
def test_pictures_show_a_target_that_is_no_image(target: str) -> None:
    objective, batch = make(target=target), make_batch(2)
    rows = objective.pictures(batch)
    assert list(rows) == ["original", "seen", "target", "prediction"]
    assert not torch.equal(rows["target"], rows["original"])
    shown = torch.ones(2, 16, dtype=torch.bool)
    shown = shown.scatter(1, objective.predict(batch).where, False)
    for row in ("target", "prediction"):
        assert torch.equal(patchify(rows[row], 4)[shown], patchify(batch.images, 4)[shown])


def test_grey_pictures_stay_grey() -> None:
    objective, batch = make(channels=1), make_batch(2)
    batch.images = batch.images[:, :1].expand(-1, 3, -1, -1)
    prediction = objective.pictures(batch)["prediction"]
    assert torch.equal(prediction[:, 0], prediction[:, 2])


def test_it_learns_what_can_be_known() -> None:
    # Images of one colour: every hidden patch is known from any visible one.
    objective, batch = make(), make_batch(32)
    colors = torch.rand(32, 3, generator=torch.Generator().manual_seed(1)).round()
    batch.images = colors[:, :, None, None].expand(-1, -1, 16, 16) * 0.9
    optimizer = torch.optim.AdamW(objective.parameters(), lr=5e-3)
    for step in range(120):
        batch.key = torch.arange(32) + 1000 * step
        output = objective(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.metrics["accuracy"] > 0.9
    assert output.metrics["constant_guess_accuracy"] < 0.5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"ratio": 0.0}, r"ratio=0.0 should be in \(0, 1\)"),
        ({"masked": 0.8, "replaced": 0.3}, "at most 1 together"),
        ({"target": "hue"}, "unknown target 'hue'"),
        ({"target": "hog", "target_args": {"bin": 3}}, "has no argument 'bin', did you mean"),
        ({"fill": "learned"}, "fill='learned' would never be trained"),
    ],
)
def test_errors(args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**args)
