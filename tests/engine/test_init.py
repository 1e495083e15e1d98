from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridvit import build
from hybridvit.config import RunConfig, config_hash, load, resolved
from hybridvit.contracts import Objective
from hybridvit.encoder.model import HybridViT
from hybridvit.encoder.vit import Encoder
from hybridvit.engine import checkpoint, init
from hybridvit.engine.init import start_from
from hybridvit.engine.run import train
from hybridvit.stems.linear import LinearStem

TINY = [
    "encoder.args.dim=16",
    "encoder.args.depth=1",
    "encoder.args.heads=1",
    "train.epochs=0.2",
]
MAE = "objective={name: mae, args: {decoder_dim: 16, decoder_depth: 1, decoder_heads: 1}}"
RESIZED = "data.augment.crop=resized"


def pretrain(folder: Path, *overrides: str) -> Path:
    out = folder / "pretrained-01234567"
    assert train(load("digits.yaml", [*TINY, *overrides]), name="p", out=out).status == "complete"
    return out


def objective(*overrides: str) -> Objective:
    parts, _ = build.make_parts([])
    config = build.resolve(load("digits.yaml", [*TINY, *overrides]), parts)
    return build.make_objective(config, parts, build.make_dataset(config, parts).spec())


def saved(run: Path, file: str = checkpoint.WEIGHTS) -> dict[str, Any]:
    path = checkpoint.latest(run / "checkpoints")
    assert path
    return checkpoint.read_weights(path, file)


def test_a_run_starts_from_stem_and_encoder_of_another(tmp_path: Path) -> None:
    source = pretrain(tmp_path, MAE)
    out = tmp_path / "fine"
    config = load(
        "digits.yaml", [*TINY, f"init={source}", "optim.lr=1e-20", "optim.weight_decay=0"]
    )
    train(config, name="f", out=out)
    before, after = saved(source), saved(out)
    for name in before:
        if name.startswith(("model.stem", "model.encoder")):
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-12)
    record = json.loads((out / "run.json").read_text())["init"]
    assert record["loaded"] == sum(k.startswith(("model.stem", "model.encoder")) for k in before)
    assert (record["network"], record["interpolated"]) == ("model", [])
    assert set(record["left"]) >= {"decoder", "decoder_pred", "mask_token"}


def test_what_was_evaluated_is_what_is_loaded(tmp_path: Path) -> None:
    source = pretrain(tmp_path, MAE, "train.ema=0.5")
    fresh = objective()
    assert start_from(fresh, source)["network"] == "ema of model"
    ema, raw = saved(source, checkpoint.EMA), saved(source)
    name = "stem.proj.weight"
    assert torch.equal(fresh.model.state_dict()[name], ema[f"model.{name}"])
    assert not torch.equal(ema[f"model.{name}"], raw[f"model.{name}"])


def test_a_teacher_starts_where_its_student_does(tmp_path: Path) -> None:
    source = pretrain(tmp_path, MAE)
    dino = objective("objective={name: dino}", RESIZED)
    start_from(dino, source)
    expected = saved(source)["model.stem.proj.weight"]
    for network in (dino.model, dino.teacher):
        assert isinstance(network, torch.nn.Module)
        assert torch.equal(network.state_dict()["stem.proj.weight"], expected)


def test_positions_follow_another_grid_and_nothing_else_may_differ(tmp_path: Path) -> None:
    source = pretrain(tmp_path, MAE)
    larger = objective("data.args.image_size=16")
    assert start_from(larger, source)["interpolated"] == ["encoder.pos_embed"]
    rows = saved(source)["model.encoder.pos_embed"]
    moved = larger.model.encoder.state_dict()["pos_embed"]
    assert moved.shape == (1, 65, 16)
    assert torch.equal(moved[:, 0], rows[:, 0])  # the class token's
    # Bicubic interpolation keeps the mean but for its edges.
    torch.testing.assert_close(moved[:, 1:].mean(1), rows[:, 1:].mean(1), rtol=0, atol=5e-3)
    for override, words in (
        ("encoder.args.depth=2", "only this model has encoder.blocks.1"),
        ("stem={name: mlp, args: {patch: 2}}", "only this model has stem"),
        ("encoder.args.dim=8", r"\(16,\) there and \(8,\) here"),
    ):
        with pytest.raises(ValueError, match=words):
            start_from(objective(override), source)


@pytest.mark.parametrize("kind", ["learned_2d", "relative_bias"])
def test_other_learned_positions_are_what_the_encoder_makes_of_them(
    kind: str, tmp_path: Path
) -> None:
    """On a larger image the encoder of the run itself interpolates: it attends as the one that
    starts from it."""
    choice = f"encoder.args.position={kind}"
    source = pretrain(tmp_path, MAE, choice)
    same, larger = objective(choice), objective(choice, "data.args.image_size=16")
    start_from(same, source)
    done = start_from(larger, source)["interpolated"]
    assert done == [name for name in same.model.state_dict() if name.endswith("pos_embed")]
    images = torch.rand(2, 3, 16, 16)
    expected = same.model.eval().encoder(same.model.tokens(images))
    found = larger.model.eval().encoder(larger.model.tokens(images))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["learned_1d", "learned_2d", "relative_bias", "relative"])
def test_a_grid_of_as_many_rows_is_another_grid(kind: Any) -> None:
    """2 x 8 patches and 8 x 2: tables of one shape, whose rows belong to other places."""
    wide, high = (
        HybridViT(
            LinearStem(dim=8, patch=2),
            Encoder(grid=grid, dim=8, depth=1, heads=1, position=kind),
            mean=(0.5,) * 3,
            std=(0.2,) * 3,
        )
        for grid in ((2, 8), (8, 2))
    )
    found = init._tensors(wide)
    if kind == "relative":
        with pytest.raises(ValueError, match="use the same grid"):
            init._fitted(found, high, (2, 8), Path("run"))
        return
    fitted, interpolated = init._fitted(found, high, (2, 8), Path("run"))
    assert interpolated == [name for name in found if name.endswith("pos_embed")]
    assert not any(torch.equal(fitted[name], found[name]) for name in interpolated)


def test_relative_positions_need_the_grid_they_were_learned_on(tmp_path: Path) -> None:
    choice = "encoder.args.position=relative"
    source = pretrain(tmp_path, MAE, choice)
    with pytest.raises(ValueError, match="with position='relative' use the same grid"):
        start_from(objective(choice, "data.args.image_size=16"), source)


def test_what_is_left_behind_is_named(tmp_path: Path) -> None:
    source = pretrain(tmp_path)
    assert start_from(objective(), source)["left"] == ["model.head", "model.mean", "model.std"]


def test_only_a_finished_run_will_do(tmp_path: Path) -> None:
    source = pretrain(tmp_path)
    record = json.loads((source / "run.json").read_text())
    (source / "run.json").write_text(json.dumps({**record, "status": "running"}))
    for path in (source, tmp_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match="is no finished run"):
            start_from(objective(), path)


def test_the_run_to_start_from_is_a_part_of_the_hash() -> None:
    assert "init" not in resolved(RunConfig())
    hashes = [
        config_hash(RunConfig(init=name))
        for name in (None, "runs/a-01234567", "elsewhere/b-01234567", "runs/a-76543210")
    ]
    assert hashes[1] == hashes[2]
    assert len(set(hashes)) == 3
    # Without a hash at its end it is known by its name, of which the last part is a seed, say.
    names = ("runs/mae-seed0", "runs/simmim-seed0", "elsewhere/mae-seed0")
    mae, simmim, moved = (config_hash(RunConfig(init=name)) for name in names)
    assert mae == moved != simmim
