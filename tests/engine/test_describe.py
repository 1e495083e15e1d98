"""What `describe` prints and run records say of mixing, leakage and normalisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_RESNET, make_batch, make_objective

from hybridvit import config
from hybridvit.contracts import DataSpec
from hybridvit.engine.describe import (
    describe,
    describe_leakage,
    describe_model,
    leakage_warning,
    probe_batch,
)
from hybridvit.engine.run import train
from hybridvit.report import find_runs, write_report
from hybridvit.report.leakage import leaked, measured

MIXES = (
    "stem={name: resnet, args: {width: 0.125, blocks: [1], strides: [2], root_kernel: 3, "
    "root_stride: 1, root_pool: false}}"
)
SMALL = ["encoder.args.dim=16", "encoder.args.depth=1", "encoder.args.heads=2", "train.epochs=1"]
LEAKS = "objective={name: masked_patch, args: {fill: none}}"


def row(text: str, name: str) -> str:
    (line,) = (line for line in text.splitlines() if line.startswith(f"{name}  "))
    return line.removeprefix(name).strip()


def described(*overrides: str) -> str:
    return describe(config.load("digits.yaml", [*SMALL, *overrides]))


def test_describe_tells_mixing_and_leakage_apart() -> None:
    local = described("objective={name: masked_patch}")
    assert row(local, "mixing").startswith("editing one patch moves 1 of 16 tokens by more than 1%")
    assert "; 0 % of a token's squared gradient is outside" in row(local, "mixing")
    assert row(local, "leakage").startswith("0: no token and no prediction")
    sealed = described("objective={name: masked_patch}", MIXES)
    assert "moves 16 of 16 tokens" in row(sealed, "mixing")
    assert row(sealed, "leakage").startswith("0: ")
    leaking = described(LEAKS, MIXES)
    assert row(leaking, "mixing") == row(sealed, "mixing")
    assert "of the tokens and 100 % of the predictions" in row(leaking, "leakage")
    assert "objective.args.fill=mean" in row(leaking, "leakage")
    assert row(described(MIXES), "leakage") == "the objective hides nothing"
    assert row(local, "normalisation") == "mean and std of the data"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr_factors={foo: 2}", "no parameter lies under 'foo'"),
        ("optim.freeze=[foo]", "no parameter lies under 'foo'"),
        ("init=foo", "init=.foo. is no finished run"),
    ],
)
def test_describe_refuses_what_could_not_be_trained(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        described(override)


def test_describe_measures_on_noise_where_the_data_are_not_here(tmp_path: Path) -> None:
    data = f"data={{name: imagenet, args: {{root: {tmp_path}, image_size: 32}}}}"
    text = described(data, "objective={name: masked_patch}", MIXES)
    assert "colour; measured on noise" in row(text, "data")
    assert "of 256 tokens by more than 1%; " in row(text, "mixing")
    assert row(text, "leakage").startswith("0: ")


def test_describe_and_the_run_measure_the_same(tmp_path: Path) -> None:
    text = described(LEAKS, MIXES)
    setup = config.load("digits.yaml", [*SMALL, LEAKS, MIXES])
    outcome = train(setup, name="a", out=tmp_path, show=False)
    found = json.loads((outcome.path / "run.json").read_text())["leakage"]
    assert f"moves {16 * found['mixing']['moved']:.3g} of 16" in row(text, "mixing")
    assert f"{100 * found['hidden']['tokens']:.3g} % of the tokens" in row(text, "leakage")


def test_a_run_records_both_before_and_after_training_and_the_report_shows_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, objective in (("open", LEAKS), ("sealed", "objective={name: masked_patch}")):
        setup = config.load("digits.yaml", [*SMALL, objective, MIXES])
        train(setup, name=name, out=tmp_path / name)
        warned = "warning: hidden pixels leak into" in capfd.readouterr().err
        assert warned == (name == "open")
    runs = {run.name: run for run in find_runs([tmp_path])}
    assert leaked(runs["sealed"]) == (0.0, 0.0, 0.0)
    tokens, outputs, gradient = leaked(runs["open"]) or (0.0, 0.0, 0.0)
    assert 0 < tokens < 1
    assert outputs == 1
    assert 0 < gradient < 1
    fresh, trained = (measured(runs["sealed"], when) for when in ("fresh", "trained"))
    assert fresh is not None
    assert trained is not None
    assert fresh.moved == 1.0
    assert fresh.outside != trained.outside  # training has changed the stem
    assert len(fresh.picture) == len(fresh.picture[0]) == len(fresh.moved_by_distance) == 4
    page = write_report(list(runs.values()), tmp_path / "out", title="t").read_text("utf-8")
    assert "leaks: pixels that it hides reach" in page
    assert page.count('<svg class="heat" ') == 4


def test_training_mode_is_measured_and_the_run_is_left_as_it_was() -> None:
    objective = make_objective(
        "masked_patch", "timm", 64, stem_args={"backbone": "resnet10t", "level": 2}
    ).eval()
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    state = torch.get_rng_state()
    found = describe_leakage(objective, make_batch(2, 64))
    assert found["mixing"]["training"] is True
    assert found["hidden"] == {"tokens": 0.0, "outputs": 0.0, "gradient": 0.0}
    assert not objective.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in objective.state_dict().items())
    json.dumps(found, allow_nan=False)


def test_a_batch_norm_stem_couples_images_in_the_record() -> None:
    args: dict[str, Any] = {"stem_args": {"backbone": "resnet10t", "level": 1}}
    found = describe_leakage(make_objective("supervised", "timm", 64, **args), make_batch(2, 64))
    assert found["hidden"] is None
    mixing = found["mixing"]
    assert sum(mixing["jacobian_by_distance"]) < 1 - 1e-6  # the rest is on the other image


def test_small_leaks_are_not_rounded_away() -> None:
    hidden = {"tokens": 0.0, "outputs": 0.0, "gradient": 1e-12}
    warning = leakage_warning({"hidden": hidden})
    assert warning is not None
    assert leakage_warning({"hidden": None}) is None
    assert leakage_warning({"hidden": dict.fromkeys(hidden, 0.0)}) is None


def test_the_record_says_whose_normalisation_it_is() -> None:
    spec = DataSpec(10, (16, 16), 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    setup = config.load("digits.yaml", SMALL)
    objective = make_objective("supervised", "resnet", stem_args=dict(SMALL_RESNET))
    own = describe_model(objective, spec, setup)["normalisation"]
    assert own == {"of": "the data", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    objective.model.stem.normalisation = ((0.5,) * 3, (0.1,) * 3)
    other = describe_model(objective, spec, setup)["normalisation"]
    assert other == {"of": "the stem's weights", "mean": [0.5] * 3, "std": [0.1] * 3}


def test_probe_images_are_the_splits_first() -> None:
    from hybridvit.data.splits import ArraySplit

    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 8, 8) * 51
    batch = probe_batch(ArraySplit(images, torch.zeros(5)), (8, 8), "cpu")
    assert batch.images.shape == (2, 3, 8, 8)
    assert batch.images[:, 0, 0, 0].tolist() == pytest.approx([0.0, 0.2])


def test_the_channels_of_a_concatenated_position_are_shown() -> None:
    plain = described()
    text = described(
        "encoder.args.position=learned_2d",
        "encoder.args.position_combine=concat",
        "encoder.args.position_dim=4",
    )
    words = "1 blocks of width 16 (12 of content and 4 of position), positions learned_2d at input"
    assert row(text, "encoder") == f"{words}, concat"

    def encoder_parameters(text: str) -> int:
        return int(row(text, "parameters").split()[3].replace(",", ""))

    # A table of 4 columns and 4 rows for one of 16 patches and the class token; the map 16 -> 12.
    more = encoder_parameters(text) - encoder_parameters(plain)
    assert more == (4 + 4) * 2 + 16 * 12 - (16 + 1) * 16
