import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, make_objective

from hybridvit.evaluation import probes


def clusters(count: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.eye(3, 8)
    return centres[labels] + spread * torch.randn(count, 8, generator=generator), labels


def brute_force_knn(
    train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor], k: int
) -> float:
    """Weighted vote by cosine similarity, one test image at a time."""
    hits = 0
    for x, label in zip(*test, strict=True):
        similarity = torch.cosine_similarity(x[None], train[0])
        votes = torch.zeros(3)
        for i in similarity.argsort(descending=True)[:k]:
            votes[train[1][i]] += torch.exp(similarity[i] / 0.1)
        hits += int(votes.argmax() == label)
    return hits / len(test[1])


Labelled = tuple[torch.Tensor, torch.Tensor]


def knn_accuracy(train: Labelled, test: Labelled) -> float:
    return float((probes.knn(train, test[0], 3) == test[1]).double().mean())


def linear_accuracy(train: Labelled, test: Labelled) -> float:
    return float((probes.linear(train, test[0]) == test[1]).double().mean())


@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_knn_equals_a_loop(spread: float) -> None:
    train, test = clusters(90, spread, 0), clusters(60, spread, 1)
    assert knn_accuracy(train, test) == brute_force_knn(train, test, probes.NEIGHBOURS)


def test_knn_says_what_lightlys_does() -> None:
    from lightly.utils.benchmarking.knn import knn_predict

    train, test = clusters(900, 1.0, 0), clusters(3000, 1.0, 1)
    theirs = knn_predict(
        F.normalize(test[0], dim=1), F.normalize(train[0], dim=1).mT, train[1], 3, 20, 0.1
    )
    assert torch.equal(probes.knn(train, test[0], 3), theirs[:, 0])
    assert 0.5 < knn_accuracy(train, test) < 0.9


def test_of_classes_that_tie_the_first_one_wins() -> None:
    same = torch.ones(2, 4)
    for labels in ([2, 1], [1, 2]):
        assert probes.knn((same, torch.tensor(labels)), same[:1], 3).tolist() == [1]


def test_knn_is_exact_where_training_is_not() -> None:
    """Features whose common part is large: in bf16 all would be equally similar."""
    train, test = (
        (features + 20, labels) for features, labels in (clusters(90, 0.3, 0), clusters(60, 0.3, 1))
    )
    exact = probes.knn(train, test[0], 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(probes.knn(train, test[0], 3), exact)


def test_knn_with_fewer_images_than_neighbours() -> None:
    train, test = clusters(6, 0.1, 0), clusters(9, 0.1, 1)
    assert knn_accuracy(train, test) == brute_force_knn(train, test, 6)


def test_linear_probe_separates_what_is_separable_and_guesses_what_is_not() -> None:
    assert linear_accuracy(clusters(90, 0.05, 0), clusters(60, 0.05, 1)) == 1.0
    noise = torch.Generator().manual_seed(2)
    train = (torch.randn(90, 8, generator=noise), torch.arange(90) % 3)
    test = (torch.randn(600, 8, generator=noise), torch.arange(600) % 3)
    assert linear_accuracy(train, test) == pytest.approx(1 / 3, abs=0.1)


def test_linear_probe_does_not_see_the_scale_of_features() -> None:
    train, test = clusters(90, 0.5, 0), clusters(300, 0.5, 1)
    scale = torch.logspace(-3, 3, 8)
    scaled = linear_accuracy((train[0] * scale, train[1]), (test[0] * scale, test[1]))
    assert scaled == pytest.approx(linear_accuracy(train, test), abs=0.01)


def test_a_constant_feature_does_no_harm() -> None:
    train, test = clusters(90, 0.05, 0), clusters(60, 0.05, 1)
    train[0][:, 7] = test[0][:, 7] = 5.0
    assert linear_accuracy(train, test) == 1.0


def test_features_are_those_of_the_frozen_model() -> None:
    model = make_objective().model.train()
    batches = [make_batch(4, seed=1), make_batch(3, seed=2)]
    features, labels = probes.extract(model, batches)
    assert model.training
    expected = torch.cat([model.eval().features(b.images) for b in batches])
    torch.testing.assert_close(features, expected.detach())
    assert torch.equal(labels, torch.cat([b.labels for b in batches]))


def test_nearest_pixels_equals_a_loop() -> None:
    train, test = clusters(30, 0.6, 0), clusters(20, 0.6, 1)
    hits = 0
    for x, label in zip(*test, strict=True):
        near = (train[0] - x).square().sum(1).argsort()[:5]
        hits += int(train[1][near].bincount(minlength=3).argmax() == label)
    arrays = [tuple(np.asarray(part) for part in split) for split in (train, test)]
    predicted = probes.nearest_pixels(arrays[0], arrays[1][0])
    assert (predicted == arrays[1][1]).mean() == hits / 20


def test_probes_of_tiny_training_sets() -> None:
    one = (torch.randn(1, 8), torch.tensor([2]))
    alike = (torch.randn(6, 8), torch.full((6,), 2))
    for train in (one, alike):
        assert probes.linear(train, torch.randn(5, 8)).tolist() == [2] * 5
        arrays = (train[0].numpy(), train[1].numpy())
        assert probes.nearest_pixels(arrays, np.zeros((5, 8))).tolist() == [2] * 5
