from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, make_objective
from scipy import stats
from torchvision.transforms import v2

from hybridvit.objectives import supervised
from hybridvit.objectives.supervised import Supervised


def make(**args: object) -> Supervised:
    objective = make_objective("supervised", **args)
    assert isinstance(objective, Supervised)
    for parameter in objective.model.head.parameters():
        torch.nn.init.normal_(parameter)
    return objective


def test_loss_equals_torchs_cross_entropy_with_smoothing() -> None:
    objective, batch = make(label_smoothing=0.1), make_batch(8)
    logits = objective.model(batch.images)
    expected = F.cross_entropy(logits, batch.labels, label_smoothing=0.1)
    torch.testing.assert_close(objective(batch).loss, expected)


def test_loss_of_soft_labels_equals_its_definition() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64)
    targets = torch.rand(5, 7, dtype=torch.float64).softmax(1)
    smoothed = 0.8 * targets + 0.2 / 7
    expected = -(smoothed * logits.log_softmax(1)).sum(1).mean()
    got = supervised.classification_loss(logits, targets, "softmax", 0.2)
    torch.testing.assert_close(got, expected)


def test_sigmoid_loss_equals_its_definition() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64)
    targets = F.one_hot(torch.arange(5), 7).double()
    p = logits.sigmoid()
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(1).mean()
    torch.testing.assert_close(
        supervised.classification_loss(logits, targets, "sigmoid", 0.0), expected
    )


def test_mixing_is_for_training_only() -> None:
    objective, batch = make(mixup=1.0), make_batch(8)
    plain = F.cross_entropy(objective.model(batch.images), batch.labels)
    torch.testing.assert_close(objective.eval()(batch).loss, plain)
    assert not torch.allclose(objective.train()(batch).loss, plain)


def test_mixup_blends_neighbours_and_their_labels_alike() -> None:
    batch = make_batch(8)
    targets = F.one_hot(batch.labels, 10).float()
    images, mixed = make(mixup=0.5).mix(batch.images, targets, batch.key)
    for k in range(0, 8, 2):
        a, b = batch.images[k], batch.images[k + 1]
        share = ((images[k] - b) * (a - b)).sum() / (a - b).square().sum()
        torch.testing.assert_close(images[k], share * a + (1 - share) * b)
        torch.testing.assert_close(images[k + 1], share * b + (1 - share) * a)
        torch.testing.assert_close(mixed[k], share * targets[k] + (1 - share) * targets[k + 1])
        torch.testing.assert_close(mixed[k + 1], share * targets[k + 1] + (1 - share) * targets[k])


def test_cutmix_pastes_one_box_and_counts_its_pixels() -> None:
    batch = make_batch(64)
    targets = F.one_hot(batch.labels, 10).float()
    images, mixed = make(cutmix=1.0).mix(batch.images, targets, batch.key)
    other = batch.images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    from_other = (images == other).all(dim=1)
    from_own = (images == batch.images).all(dim=1)
    assert (from_other ^ from_own).all()
    for k in range(64):
        rows, columns = from_other[k].any(1), from_other[k].any(0)
        assert torch.equal(from_other[k], rows[:, None] & columns[None])  # a product of intervals
        for line in (rows, columns):
            where = line.nonzero()[:, 0]
            assert len(where) == 0 or int(where[-1] - where[0]) + 1 == len(where)
        share = 1 - from_other[k].float().mean()
        partner = targets[k + 1 - 2 * (k % 2)]
        torch.testing.assert_close(mixed[k], share * targets[k] + (1 - share) * partner)
    assert from_other.any()


def test_a_mixed_pair_is_torchvisions() -> None:
    """Which mixes each image of a batch with the one before: in a pair with its partner."""
    batch = make_batch(400)
    targets = F.one_hot(batch.labels, 10).float()
    images, mixed = make(mixup=1.0, cutmix=1.0).mix(batch.images, targets, batch.key)
    kinds = set()
    for k in range(0, 400, 2):
        pair, labels, ours = (x[k : k + 2] for x in (batch.images, targets, images))
        changed = (ours != pair).any(dim=1)[0]
        share = float(changed.float().mean())
        if kind := share == 1:  # a box that covers all is drawn with probability 0
            blend = (ours - pair.flip(0))[0] / (pair - pair.flip(0))[0]
            params: dict[str, Any] = {"lam": float(blend.median())}
        else:
            rows, columns = (changed.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
            corner = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if rows else (0, 0, 0, 0)
            params = {"box": corner, "lam_adjusted": 1 - share}
        transform = v2.MixUp(num_classes=10) if kind else v2.CutMix(num_classes=10)
        params |= {"labels": labels, "batch_size": 2}
        assert (ours - transform.transform(pair, params)).abs().mean() < 0.01 / 255
        torch.testing.assert_close(mixed[k : k + 2], transform.transform(labels, params))
        kinds.add(kind)
    assert kinds == {True, False}


@pytest.mark.parametrize("size", [(32, 32), (20, 64)])
def test_cutmix_boxes_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    transform, picture = v2.CutMix(num_classes=2), [torch.zeros(2, 3, *size)]
    boxes = [transform.make_params(picture)["box"] for _ in range(4000)]
    theirs = np.array([[y, x, bottom - y, right - x] for x, y, right, bottom in boxes])
    share = supervised.lookup(supervised.beta_quantiles(1.0), torch.rand(4000))
    inside = supervised.box(1 - share, torch.arange(4000), torch.Size(size))
    # Where a box begins, and its sides; boxes without a pixel begin nowhere.
    sides = [inside.any(2), inside.any(1)]
    ours = [side.int().argmax(1) for side in sides] + [side.sum(1) for side in sides]
    some = inside.any(2).any(1).numpy(), (theirs[:, 2:] > 0).all(1)
    assert stats.fisher_exact([[m.sum(), (~m).sum()] for m in some]).pvalue > 1e-3
    mine = torch.stack(ours, dim=1).numpy()[some[0]]
    for mix in ([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 1, 1], [2, 0, 1, 0]):
        assert stats.ks_2samp(mine @ mix, theirs[some[1]] @ mix).pvalue > 1e-3, mix


def test_cutmix_covers_the_area_it_draws_before_clipping() -> None:
    # A box that lies inside covers `area` of the image to rounding.
    keys = torch.arange(4000)
    inside = supervised.box(torch.full((4000,), 0.25), keys, torch.Size([64, 64]))
    assert inside.float().mean(dim=(1, 2)).max() == pytest.approx(0.25, abs=0.02)
    # A side s = 1/2 around a uniform centre keeps s - s^2/4 of the image on average.
    assert float(inside.float().mean()) == pytest.approx((1 / 2 - 1 / 16) ** 2, abs=0.004)


def test_with_both_each_pair_draws_one() -> None:
    batch = make_batch(400)
    targets = F.one_hot(batch.labels, 10).float()
    images, _ = make(mixup=1.0, cutmix=1.0).mix(batch.images, targets, batch.key)
    other = batch.images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    pasted = ((images == other) | (images == batch.images)).flatten(1).all(dim=1)
    assert torch.equal(pasted[0::2], pasted[1::2])
    assert stats.binomtest(int(pasted[0::2].sum()), 200).pvalue > 1e-4


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_shares_are_beta_distributed(alpha: float) -> None:
    u = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    shares = supervised.lookup(supervised.beta_quantiles(alpha), u)
    # In bins, because float32 cannot tell shares beyond 1 - 6e-8, of which small alphas have many.
    edges = [0, 1e-4, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999, 1]
    expected = 20000 * np.diff(stats.beta(alpha, alpha).cdf(edges))
    assert stats.chisquare(np.histogram(shares, edges)[0], expected).pvalue > 1e-3


def test_an_odd_batch_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="a batch of 3 images is odd"):
        make(mixup=1.0).train()(make_batch(3))


def test_the_papers_head_has_one_tanh_layer() -> None:
    head = make(head="mlp").model.head
    assert [type(m).__name__ for m in head] == ["Linear", "Tanh", "Linear"]


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("stem", ["linear", "resnet"])
def test_every_parameter_gets_a_gradient(head: str, stem: str) -> None:
    objective = make(head=head, stem=stem)
    for name, parameter in objective.named_parameters():
        if name.endswith("norm3.weight"):
            torch.nn.init.ones_(parameter)
    objective(make_batch(8)).loss.backward()
    assert [n for n, p in objective.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 should be in \[0, 1\)"),
        ({"mixup": -1.0}, "mixup=-1.0, cutmix=0.0 should be at least 0"),
        ({"head": "deep"}, "head='deep' should be"),
    ],
)
def test_errors(args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**args)
