"""SimCLR against its loss written out as loops."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import make_batch, make_objective
from torch import Tensor

from hybridvit.contracts import Batch
from hybridvit.engine.fabric import Fabric
from hybridvit.engine.step import accumulate
from hybridvit.objectives.simclr import SimCLR

SMALL = {"hidden_dim": 32, "output_dim": 16}


def make(stem: str = "linear", **args: object) -> SimCLR:
    objective = make_objective("simclr", stem, **(SMALL | args))
    assert isinstance(objective, SimCLR)
    return objective


def two_views(count: int, seed: int = 0) -> Batch:
    others = (make_batch(count, seed=seed + 1000).images.double(),)
    batch = make_batch(count, seed=seed)
    return dataclasses.replace(batch, images=batch.images.double(), others=others)


def nt_xent(one: Tensor, two: Tensor, temperature: float) -> float:
    """Chen et al. 2020, algorithm 1, number by number."""
    z = [row.tolist() for pair in zip(one, two, strict=True) for row in pair]  # 2k, 2k + 1: views
    similar = [
        [sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y) for y in z]
        for x in z
    ]
    total = 0.0
    for i, row in enumerate(similar):
        partner = i + 1 if i % 2 == 0 else i - 1
        others = sum(math.exp(s / temperature) for k, s in enumerate(row) if k != i)
        total -= math.log(math.exp(row[partner] / temperature) / others)
    return total / len(z)


def projections(objective: SimCLR, batch: Batch) -> tuple[Tensor, Tensor]:
    """Both views' projections, BatchNorm over all of them."""
    z = objective.head(objective.model.features(torch.cat([batch.images, *batch.others])))
    return z[: len(batch.images)], z[len(batch.images) :]


@pytest.mark.parametrize("stem", ["linear", "resnet"])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("layers", [2, 3])
def test_the_loss_equals_loops_in_float64(stem: str, temperature: float, layers: int) -> None:
    objective = make(stem, temperature=temperature, layers=layers).double()
    batch = two_views(5)
    expected = nt_xent(*projections(objective, batch), temperature)
    assert objective(batch).loss.item() == pytest.approx(expected, rel=1e-10)


def test_views_of_one_image_are_the_positives() -> None:
    # With the same image twice the partner is as near as can be; with views swapped it is not.
    objective, batch = make(temperature=0.1).double(), two_views(8)
    same = dataclasses.replace(batch, others=(batch.images,))
    moved = dataclasses.replace(batch, others=(batch.images.roll(1, 0),))
    assert objective(same).loss < objective(moved).loss - 1


def test_accumulation_keeps_negatives_within_a_micro_batch() -> None:
    objective, batch = make(batch_norm=False).double(), two_views(8)
    fabric = Fabric(accelerator="cpu", devices=1)
    objective.train()
    wrapped = fabric.setup_module(objective)
    one, two = projections(objective, batch)
    halves = [nt_xent(one[rows], two[rows], 0.5) for rows in (slice(0, 4), slice(4, 8))]
    metrics = accumulate(fabric, wrapped, batch, 2)
    assert float(metrics["loss"]) == pytest.approx(sum(halves) / 2, rel=1e-6)
    assert float(metrics["loss"]) < nt_xent(one, two, 0.5) - 0.1  # fewer negatives
    gradient = objective.head.layers[0].weight.grad.clone()
    objective.zero_grad()
    parts = [
        Batch(*(getattr(batch, c)[rows] for c in ("images", "labels", "index", "key")),
              (batch.others[0][rows],))
        for rows in (slice(0, 4), slice(4, 8))
    ]  # fmt: skip
    (sum(objective(part).loss for part in parts) / 2).backward()
    torch.testing.assert_close(objective.head.layers[0].weight.grad, gradient)


def test_it_learns_to_tell_images_apart() -> None:
    # Images of one colour, of which each view is another brightness.
    objective = make(temperature=0.2).float()
    generator = torch.Generator().manual_seed(0)
    colors = torch.rand(16, 3, 1, 1, generator=generator)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=5e-3)
    for _ in range(60):
        light = 0.7 + 0.3 * torch.rand(2, 16, 1, 1, 1, generator=generator)
        images = (colors * light).expand(-1, -1, -1, 16, 16)
        output = objective(
            dataclasses.replace(make_batch(16), images=images[0], others=(images[1],))
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.loss < 0.5 * math.log(31)  # the loss of knowing nothing
    assert output.metrics["spread"] > 0.3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"temperature": 0.0}, r"temperature=0.0 should be above 0, e.g. 0.5"),
        ({"layers": 1}, "layers=1 at least 2"),
        ({"hidden_dim": 0}, "hidden_dim=0 and output_dim=16 should be at least 1"),
        ({"temprature": 0.1}, "did you mean 'temperature'"),
    ],
)
def test_errors(args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(**args)
    assert "\n" not in str(caught.value)


def test_one_image_has_no_negatives() -> None:
    with pytest.raises(ValueError, match=r"1 image has no negatives; set train.batch_size to at"):
        make().double()(two_views(1))
