"""DINO against its loss written out as loops, and its teacher against closed forms."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from conftest import make_batch, make_objective
from lightly.models.modules.heads import DINOProjectionHead
from torch import Tensor

from hybridvit import config
from hybridvit.config import OptimConfig
from hybridvit.contracts import Batch
from hybridvit.engine.optim import parameter_groups
from hybridvit.engine.run import train
from hybridvit.evaluation import probes
from hybridvit.objectives.dino import DINO, make_head

SMALL = {"hidden_dim": 32, "bottleneck_dim": 8, "output_dim": 24}


def make(stem: str = "linear", **args: object) -> DINO:
    objective = make_objective("dino", stem, **(SMALL | args))
    assert isinstance(objective, DINO)
    return objective


def two_views(count: int = 5, seed: int = 0) -> Batch:
    others = (make_batch(count, seed=seed + 1000).images.double(),)
    batch = make_batch(count, seed=seed)
    return dataclasses.replace(batch, images=batch.images.double(), others=others)


def softmax(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(x / temperature) for x in logits]
    return [p / sum(powers) for p in powers]


def cross_entropy(
    teacher: list[Tensor], student: list[Tensor], center: Tensor, warm: float, cold: float
) -> float:
    """Caron et al. 2021, algorithm 1, number by number: mean over images and pairs of views."""
    total, terms = 0.0, 0
    for t, s in ((0, 1), (1, 0)):
        for target, output in zip(teacher[t], student[s], strict=True):
            wanted = softmax((target - center).tolist(), warm)
            given = softmax(output.tolist(), cold)
            total -= sum(p * math.log(q) for p, q in zip(wanted, given, strict=True))
            terms += 1
    return total / terms


def outputs(objective: DINO, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Teacher's and student's outputs of each view."""
    views = (batch.images, *batch.others)
    with torch.no_grad():
        teacher = [objective.teacher_head(objective.teacher.features(v)) for v in views]
        return teacher, [objective.head(objective.model.features(v)) for v in views]


def as_float32(number: float) -> float:
    return float(torch.tensor(number))  # lightly keeps the teacher's temperature in it


@pytest.mark.parametrize("stem", ["linear", "resnet"])
def test_the_loss_equals_loops_in_float64(stem: str) -> None:
    objective = make(stem, student_temperature=0.2).double()
    for parameter in objective.teacher.parameters():  # so that it is not the student
        parameter.data += 0.02 * torch.randn_like(parameter)
    center = torch.zeros(24, dtype=torch.float64)
    for seed in range(3):  # the centre moves with each batch
        batch = two_views(seed=seed)
        teacher, student = outputs(objective, batch)
        expected = cross_entropy(teacher, student, center, as_float32(0.04), 0.2)
        assert objective(batch).loss.item() == pytest.approx(expected, rel=1e-9)
        center = 0.9 * center + 0.1 * torch.cat(teacher).mean(dim=0)
        torch.testing.assert_close(objective.criterion.center[0, 0], center)
    assert center.abs().max() > 1e-3


def test_the_teachers_temperature_rises_with_the_steps() -> None:
    objective = make(teacher_temperature=[0.04, 0.08], temperature_steps=5).double()
    batch, zero = two_views(), torch.zeros(24, dtype=torch.float64)
    expected = [0.04, 0.05, 0.06, 0.07, 0.08, 0.08, 0.08]
    for step, temperature in enumerate(expected):
        objective.step = step
        objective.criterion.center.zero_()
        teacher, student = outputs(objective, batch)
        loss = cross_entropy(teacher, student, zero, temperature, 0.1)
        assert objective(batch).loss.item() == pytest.approx(loss, rel=1e-6)


def pairs(objective: DINO) -> list[tuple[Tensor, Tensor]]:
    """Student's and teacher's parameters."""
    student = [*objective.model.parameters(), *objective.head.parameters()]
    teacher = [*objective.teacher.parameters(), *objective.teacher_head.parameters()]
    return list(zip(student, teacher, strict=True))


@pytest.mark.parametrize("schedule", [None, 4])
def test_the_teacher_moves_as_the_momentum_says(schedule: int | None) -> None:
    objective = make(momentum=0.75, momentum_steps=schedule).double()
    assert all(torch.equal(s, t) for s, t in pairs(objective))
    expected = [t.clone() for _, t in pairs(objective)]
    momenta = {None: [0.75] * 6, 4: [0.75, 0.75 + 0.25 / 4, 0.75 + 0.75 / 4, 1.0, 1.0, 1.0]}
    for step, momentum in enumerate(momenta[schedule], start=1):
        for student, _ in pairs(objective):
            student.data += torch.randn_like(student)
        objective.after_step(step)
        expected = [
            momentum * e + (1 - momentum) * s
            for e, (s, _) in zip(expected, pairs(objective), strict=True)
        ]
        for (_, teacher), wanted in zip(pairs(objective), expected, strict=True):
            torch.testing.assert_close(teacher, wanted, rtol=1e-12, atol=1e-12)
            assert not teacher.requires_grad


def test_the_teacher_is_saved_but_not_optimized() -> None:
    objective = make()
    names = {n for group in parameter_groups(objective, OptimConfig()) for n in group["names"]}
    assert not [n for n in names if n.startswith("teacher")]
    assert {n for n in names if n.startswith("model.")} == {
        f"model.{n}" for n, _ in objective.model.named_parameters()
    }
    saved = objective.state_dict()
    for name, _ in objective.teacher.named_parameters():
        assert f"teacher.{name}" in saved
    assert "criterion.center" in saved


def test_a_checkpoint_holds_centre_and_step() -> None:
    args = {"teacher_temperature": [0.04, 0.4], "temperature_steps": 10}
    objective, batch = make(**args).double(), two_views()
    objective(batch)
    objective.after_step(5)
    restored = make(**args).double()
    restored.load_state_dict(objective.state_dict())
    assert restored.step == 5
    assert torch.equal(restored(batch).loss, objective(batch).loss)
    restored.step = 0
    assert not torch.isclose(restored(batch).loss, objective(batch).loss)


NOISE = {"dropout": 0.5, "attention_dropout": 0.5, "drop_path": 0.5}


@pytest.mark.parametrize("pool", ["mean", "map"])
def test_the_teacher_has_no_noise_but_the_student_has(pool: str) -> None:
    objective = make_objective("dino", encoder_args={**NOISE, "pool": pool}, **SMALL).train()
    assert isinstance(objective, DINO)
    images = make_batch(8).images
    # Whoever probes it leaves it in the mode of its own flag.
    probes.extract(objective.teacher, [make_batch()])
    noisy = objective.model.features(images)
    assert not torch.equal(noisy, objective.model.features(images))
    first = objective.teacher.features(images)
    assert torch.equal(first, objective.teacher.features(images))
    objective.eval()
    assert torch.equal(first, objective.teacher.features(images))
    assert torch.equal(first, objective.model.features(images))


def test_batch_norm_of_the_teachers_stem_takes_the_batchs_statistics() -> None:
    from conftest import SMALL_RESNET

    args = {**SMALL_RESNET, "norm": "batch"}
    objective = make_objective("dino", "resnet", stem_args=args, **SMALL)
    assert isinstance(objective, DINO)
    batch = two_views()
    batch = dataclasses.replace(
        batch, images=batch.images.float(), others=(batch.others[0].float(),)
    )
    objective(batch)
    means = [n for n, _ in objective.teacher.named_buffers() if n.endswith("running_mean")]
    assert means
    for name in means:
        own = objective.teacher.get_buffer(name)
        assert own.any()
        # Equal weights have seen equal batches.
        torch.testing.assert_close(own, objective.model.get_buffer(name))


def test_the_head_is_lightlys() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(3)
        theirs = DINOProjectionHead(16, 32, 8, 24)
    torch.manual_seed(3)
    own = make_head(16, 32, 8, 24)
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(own(x), theirs(x))
    weights = torch.randn(6, 24)
    for head in (own, theirs):
        (head(x) * weights).sum().backward()
    new = {"weight_g": "parametrizations.weight.original0"}
    new["weight_v"] = "parametrizations.weight.original1"
    for name, parameter in theirs.named_parameters():
        for old, renamed in new.items():
            name = name.replace(old, renamed)
        mine = own.get_parameter(name)
        assert torch.equal(mine, parameter)
        assert mine.requires_grad == parameter.requires_grad
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, parameter.grad)
    assert len(list(own.parameters())) == len(list(theirs.parameters()))


def test_it_can_be_copied_after_a_step() -> None:
    objective = make().double()
    objective(two_views()).loss.backward()
    copied = copy.deepcopy(objective)
    assert torch.equal(copied(two_views()).loss, objective(two_views()).loss)


def test_probes_look_at_the_teacher(tmp_path: Path) -> None:
    # With a momentum of 1 the teacher stays the untrained network, whatever the student learns.
    overrides = [
        "objective={name: dino, args: {momentum: 1.0, hidden_dim: 32, output_dim: 64}}",
        "data.augment={crop: resized, flip: true}",
        "encoder.args={dim: 16, depth: 1, heads: 2, pool: mean}",
        "train={epochs: 1, batch_size: 64}",
        "eval={epochs: 1, probes: [knn]}",
    ]
    loaded = config.load("digits.yaml", overrides)
    outcome = train(loaded, name="a", out=tmp_path / "a", show=False)
    results = json.loads((outcome.path / "summary.json").read_text())["results"]
    assert results["test/knn"] == results["untrained/test/knn"]


def test_it_learns_without_collapse() -> None:
    objective = make(momentum=0.95).float()
    generator = torch.Generator().manual_seed(0)
    colors = torch.rand(16, 3, 1, 1, generator=generator)
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    for step in range(1, 101):
        light = 0.7 + 0.3 * torch.rand(2, 16, 1, 1, 1, generator=generator)
        views = (colors * light).expand(-1, -1, -1, 16, 16)
        output = objective(dataclasses.replace(make_batch(16), images=views[0], others=(views[1],)))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        objective.after_step(step)
    assert output.loss < 0.8 * math.log(24)  # the loss of knowing nothing
    assert output.metrics["spread"] > 0.1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"momentum": 1.5}, r"momentum=1.5 should be in \[0, 1\]"),
        ({"center_momentum": -0.1}, r"center_momentum=-0.1 should be in \[0, 1\]"),
        ({"student_temperature": 0.0}, "should be above 0, e.g."),
        ({"teacher_temperature": [0.04]}, r"should be list \[float, float\]"),
        ({"teacher_temperature": [0.04, 0.0]}, "the two of teacher_temperature should be"),
        ({"temperature_steps": -1}, "temperature_steps and momentum_steps should be at least 0"),
        ({"output_dim": 0}, "output_dim should be at least 1"),
    ],
)
def test_errors(args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(**args)
    assert "\n" not in str(caught.value)
