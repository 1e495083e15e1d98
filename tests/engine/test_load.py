"""Finished runs as networks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import OWN_PARTS, TINY_ENCODER

import hybridvit
from hybridvit import build
from hybridvit.config import load
from hybridvit.data.loader import eval_batches
from hybridvit.engine import checkpoint
from hybridvit.engine.run import train
from hybridvit.objectives import OBJECTIVES

SMALL = {
    "mae": "objective.args={decoder_dim: 16, decoder_depth: 1, decoder_heads: 1}",
    "dino": "objective.args={hidden_dim: 16, bottleneck_dim: 8, output_dim: 32}",
    "simclr": "objective.args={hidden_dim: 16, output_dim: 8}",
}
TINY = [f"encoder.args={json.dumps(TINY_ENCODER)}", "train.epochs=0.5"]


def trained(out: Path, *overrides: str) -> Path:
    outcome = train(load("digits.yaml", [*TINY, *overrides]), name="a", out=out, show=False)
    assert outcome.status == "complete"
    return out


def predictions(run: Path, key: str) -> list[int]:
    found: list[int] = json.loads((run / "predictions.json").read_text())["predicted"][key]
    return found


@pytest.mark.parametrize("ema", ["null", "0.9"])
def test_it_predicts_what_the_run_predicted(tmp_path: Path, ema: str) -> None:
    run = trained(tmp_path / "run", f"train.ema={ema}")
    model = hybridvit.load_run(run)
    assert not model.training
    test = build.make_dataset(load("digits.yaml", TINY), build.make_parts([])[0]).test
    images = torch.cat([b.images for b in eval_batches(test, (8, 8), 512, torch.device("cpu"))])
    with torch.no_grad():
        assert model(images).argmax(1).tolist() == predictions(run, "test/accuracy")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_networks_of_all_objectives_are_read(tmp_path: Path, objective: str) -> None:
    run = trained(
        tmp_path / "run", f"objective.name={objective}", "data.augment.crop=resized",
        *([SMALL[objective]] if objective in SMALL else []),
    )  # fmt: skip
    model = hybridvit.load_run(str(run))
    assert model.features(torch.rand(2, 3, 8, 8)).shape == (2, TINY_ENCODER["dim"])
    path = checkpoint.latest(run / "checkpoints")
    assert path is not None
    weights = checkpoint.read_weights(path)
    prefix = f"{json.loads((run / 'run.json').read_text())['network']}."
    assert prefix == ("teacher." if objective == "dino" else "model.")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[prefix + name])


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no finished run with a checkpoint"):
        hybridvit.load_run(tmp_path)
    run = trained(tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "stopped"}))
    with pytest.raises(ValueError, match="is no finished run"):
        hybridvit.load_run(run)


def test_a_strangers_plugins_run_only_where_they_are_named(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", f"plugins=[{OWN_PARTS}]", "stem={name: blur, args: {}}")
    with pytest.raises(ValueError, match=r"plugins=\['own_parts:register'\]"):
        hybridvit.load_run(run)
    assert type(hybridvit.load_run(run, [OWN_PARTS]).stem).__name__ == "BlurStem"
    setup = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**setup, "plugins": ["antigravity:fly"]}))
    with pytest.raises(ValueError, match="whose code would run"):
        hybridvit.load_run(run, [OWN_PARTS])
    assert "antigravity" not in sys.modules


def test_pretrained_weights_are_not_fetched_again(tmp_path: Path) -> None:
    """They are in the checkpoint."""
    stem = "stem={name: timm, args: {backbone: test_resnet, level: 1}}"
    run = trained(tmp_path / "run", stem, "data.args.image_size=16")
    setup = yaml.safe_load((run / "config.yaml").read_text())
    setup["stem"]["args"]["pretrained"] = True
    before = hybridvit.load_run(run).state_dict()
    (run / "config.yaml").write_text(yaml.safe_dump(setup))
    after = hybridvit.load_run(run).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
