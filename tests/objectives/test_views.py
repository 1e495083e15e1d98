"""What holds for every objective that compares two views: whole runs, costs, compilation."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_batch, make_objective
from PIL import Image

from hybridvit import config
from hybridvit.analysis import cost
from hybridvit.cli import main
from hybridvit.contracts import Batch
from hybridvit.engine import checkpoint
from hybridvit.engine import step as step_module
from hybridvit.engine.run import train
from hybridvit.objectives import simclr

OBJECTIVES = ["simclr", "dino"]
ARGS: dict[str, dict[str, Any]] = {
    "simclr": {"hidden_dim": 32, "output_dim": 16},
    "dino": {"hidden_dim": 32, "bottleneck_dim": 16, "output_dim": 64},
}
RUN = {
    "simclr": "{name: simclr, args: {hidden_dim: 32, output_dim: 16}}",
    # The temperature of the teacher changes in the run, so that a step that is lost shows.
    "dino": "{name: dino, args: {hidden_dim: 32, bottleneck_dim: 16, output_dim: 64, "
    "momentum: 0.9, momentum_steps: 20, teacher_temperature: [0.04, 0.1], temperature_steps: 15}}",
}
YAML = """
extends: [digits.yaml]
data: {augment: {crop: resized, scale: [0.5, 1.0], jitter: 0.5, blur: 0.5, sigma: [0.3, 1.0]}}
encoder: {args: {dim: 16, depth: 2, heads: 2, dropout: 0.1, drop_path: 0.1}}
train: {epochs: 1, log_every: 5, accumulate: 2}
eval: {epochs: 0.5, probes: [knn]}
objective: OBJECTIVE
"""


def write(folder: Path, objective: str) -> Path:
    path = folder / f"{objective}.yaml"
    path.write_text(YAML.replace("OBJECTIVE", RUN[objective]))
    return path


def two_views(count: int = 4, seed: int = 0) -> Batch:
    others = (make_batch(count, seed=seed + 1000).images,)
    return dataclasses.replace(make_batch(count, seed=seed), others=others)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_trains_from_a_file_and_is_probed(
    objective: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", str(write(tmp_path, objective)), f"out={out}"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    record = json.loads((out / "run.json").read_text())
    network = "teacher" if objective == "dino" else "model"
    assert summary["network"] == record["network"] == network
    assert summary["results"].keys() == {"test/knn", "untrained/test/knn"}
    assert summary["results"]["test/knn"] > 0.3  # chance is 0.1
    assert record["model"]["flops"]["forward"] > 0
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(0.05 < line["train/spread"] < 1.5 for line in metrics if "train/spread" in line)
    assert [line["step"] for line in metrics if "val/knn" in line] == [11, 20]
    (picture,) = (out / "figures").iterdir()
    with Image.open(picture) as image:
        assert image.info["rows"] == "first view, second view"
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        assert image.size == (8 * (64 + 4), 2 * (64 + 4))
    rows = pixels.view(2, -1)
    assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_stopped_and_resumed_run_equals_one_in_one_piece(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, objective)
    loaded = config.load(path, ["train.ema=0.9"])
    whole = train(loaded, name="a", out=tmp_path / "whole", show=False)
    original = step_module.seed_step

    def interrupt(seed: int, step: int) -> None:
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        original(seed, step)

    monkeypatch.setattr(step_module, "seed_step", interrupt)
    stopped = train(loaded, name="a", out=tmp_path / "parts", show=False)
    assert "SIGTERM after step 7 of 20" in stopped.message
    monkeypatch.setattr(step_module, "seed_step", original)
    resumed = train(loaded, name="a", out=tmp_path / "parts", show=False)
    for name in (checkpoint.WEIGHTS, checkpoint.EMA):
        one, two = (
            checkpoint.read_weights(run.path / "checkpoints" / "step-00000020", name)
            for run in (whole, resumed)
        )
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one if "_extra_state" not in key)
    results = [json.loads((run.path / "summary.json").read_text()) for run in (whole, resumed)]
    assert results[0]["results"] == results[1]["results"]
    assert results[0]["network"] == f"ema of {'teacher' if objective == 'dino' else 'model'}"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_with_one_view_is_refused(objective: str) -> None:
    made = make_objective(objective, **ARGS[objective])
    with pytest.raises(
        ValueError, match=rf"objective '{objective}' compares 2 augmented views .* holds 1: give"
    ):
        made(make_batch())
    batch = two_views()
    with pytest.raises(ValueError, match="holds 3"):
        made(dataclasses.replace(batch, others=batch.others * 2))
    assert list(made.pictures(batch)) == ["first view", "second view"]
    assert list(made.pictures(make_batch())) == ["first view"]


def test_without_augmentation_the_run_is_refused(tmp_path: Path) -> None:
    loaded = config.load(write(tmp_path, "dino"), ["data.augment.crop=none", *PLAIN])
    with pytest.raises(
        ValueError, match=r"compares 2 views of an image, which data.augment leaves"
    ):
        train(loaded, name="a", out=tmp_path / "a", show=False)


PLAIN = ["data.augment.jitter=0", "data.augment.blur=0"]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("stem", ["linear", "resnet"])
def test_every_trained_parameter_gets_a_gradient(objective: str, stem: str) -> None:
    made = make_objective(objective, stem, **ARGS[objective])
    made(two_views(8)).loss.backward()
    for name, parameter in made.named_parameters():
        frozen = name.startswith("teacher") or name.endswith("weight.original0")
        assert parameter.requires_grad != frozen, name
        assert (parameter.grad is None) == frozen, name
        # GroupNorm gains of 0 stop what comes before them in the block's branch.
        assert frozen or stem == "resnet" or parameter.grad.any(), name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_graph_up_to_lightlys_loss(objective: str) -> None:
    made, batch = make_objective(objective, **ARGS[objective]), two_views()
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(len(graph.graph.nodes))
        return graph

    torch.compiler.reset()
    expected = copy.deepcopy(made)(batch)
    compiled = torch.compile(made, backend=count)
    output = compiled(batch)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.metrics, expected.metrics)
    made.after_step(1)
    compiled(batch)
    assert len(graphs) == 1  # for every step


def trunk_flops() -> int:
    """Forward FLOPs of stem and encoder for one image."""
    counted = cost.measure(make_objective(), (16, 16)).forward_flops
    assert counted is not None
    return counted - 2 * 16 * 10  # without the head of the supervised objective


def test_costs_of_simclr_equal_a_hand_count() -> None:
    made = make_objective("simclr", **ARGS["simclr"])
    batch = 6
    heads = 2 * 2 * (16 * 32 + 32 * 16)
    similarities = 2 * 4 * batch * 16  # an image's row of four products of B x 16 by 16 x B
    counted = cost.measure(made, (16, 16), batch)
    assert counted.forward_flops == 2 * trunk_flops() + heads + similarities
    # Backward: twice as much, but for the stem's gradient with respect to the images.
    stem = 2 * 2 * 16 * 48 * 16
    assert counted.backward_flops == 2 * counted.forward_flops - stem


def test_costs_of_dino_equal_a_hand_count() -> None:
    made = make_objective("dino", **ARGS["dino"])
    heads = 2 * 2 * (16 * 32 + 32 * 32 + 32 * 16 + 16 * 64)
    loss = 2 * 4 * 64  # products of 2 student with 2 teacher outputs
    counted = cost.measure(made, (16, 16), 6)
    assert counted.forward_flops == 2 * (2 * trunk_flops() + heads) + loss
    student, stem = 2 * trunk_flops() + heads, 2 * 2 * 16 * 48 * 16
    assert counted.backward_flops == 2 * student - stem + loss  # none for the teacher


def test_a_torch_that_cannot_count_simclr_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simclr, "fx_config", object())
    made = make_objective("simclr", **ARGS["simclr"])
    assert cost.measure(made, (16, 16)) == cost.Cost(None, None, None)


def test_counting_costs_leaves_torch_as_it_was() -> None:
    cost.measure(make_objective("simclr", **ARGS["simclr"]), (16, 16))
    with pytest.raises(NotImplementedError, match="meta"):
        torch.empty(3, device="meta").nonzero()


def test_micro_batches_split_every_view() -> None:
    batch = two_views(6)
    parts = list(batch.split(len(batch.labels) // 3))
    assert [part.index.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    for column in ("images", "labels", "key"):
        joined = torch.cat([getattr(part, column) for part in parts])
        assert torch.equal(joined, getattr(batch, column))
    assert torch.equal(torch.cat([part.others[0] for part in parts]), batch.others[0])
    assert [len(part.others) for part in parts] == [1, 1, 1]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_autocast_does_not_coarsen_the_loss(objective: str) -> None:
    made, batch = make_objective(objective, **ARGS[objective]), two_views(8)
    seen: dict[str, tuple[torch.Tensor, ...]] = {}
    made.criterion.register_forward_pre_hook(
        lambda module, inputs: seen.update(inputs=inputs, center=copy.deepcopy(module))
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = made(batch).loss
    assert loss.dtype == torch.float32
    made.criterion._forward_pre_hooks.clear()
    seen["center"]._forward_pre_hooks.clear()
    torch.testing.assert_close(loss, seen["center"](*seen["inputs"]))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_spread_tells_a_collapse_from_features_that_point_everywhere(objective: str) -> None:
    from hybridvit.objectives.views import spread

    assert spread(torch.ones(64, 16)) < 1e-6
    isotropic = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert spread(isotropic) == pytest.approx(1, abs=0.02)


def test_an_objective_that_names_no_network_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "typo.py").write_text(
        "from hybridvit.objectives.simclr import SimCLR\n"
        "class Typo(SimCLR):\n"
        "    evaluated = 'techer'\n"
        "def register(parts):\n"
        "    parts.objectives.add('typo', Typo)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = config.load(
        write(tmp_path, "simclr"), ["plugins=['typo:register']", "objective={name: typo}"]
    )
    with pytest.raises(ValueError, match="objective 'typo' declares evaluated='techer', which is"):
        train(loaded, name="a", out=tmp_path / "a", show=False)
