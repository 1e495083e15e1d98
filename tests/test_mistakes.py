"""What users get wrong ends in one line, with what would be valid."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path

import pytest
from command_line import TINY, refused

BAD_ARGUMENTS: list[tuple[list[str], str]] = [
    ([], "required: COMMAND"),
    (["trian"], "invalid choice: 'trian'"),
    (["train"], "required: config; see hybridvit train"),
    (["study"], "required: file; see hybridvit study"),
    (["check"], "required: plugin; see hybridvit check"),
    (["list", "stem"], "no list of 'stem', did you mean 'stems'?"),
    (["list", "--plugin", "nothing"], "'nothing' is not installed"),
    (["list", "stems", "train.epochs=3"], "unrecognized arguments: train.epochs=3"),
    (["bench", "digits.yaml", "--secnds", "3", "seed=1"], "unrecognized arguments: --secnds 3"),
    (["train", "no_such.yaml"], "no config file 'no_such.yaml'"),
    (["train", "digits"], "did you mean 'digits.yaml'?"),
    (["study", "no_such.yaml"], "no study file 'no_such.yaml'"),
    (["report", "no_such_folder"], "no_such_folder"),
]

BAD_OVERRIDES: list[tuple[str, str]] = [
    ("train.epochs", "should be key.path=value"),
    ("=3", "should be key.path=value"),
    ("train.epohs=3", "unknown key 'train.epohs', did you mean 'epochs'?"),
    ("trian.epochs=3", "unknown key 'trian', did you mean 'train'?"),
    ("train=3", "train should be a section, not 3"),
    ("train=[1,2]", "train should be a section, not [1, 2]"),
    ("stem=[conv]", "stem should be a section, not ['conv']"),
    ("data.augment=[1]", "data.augment should be a section, not [1]"),
    (
        "optim.freeze=[a] optim.freeze={} train.epochs=3",
        "optim.freeze={} is laid over the list ['a']",
    ),
    ("train.epochs=${foo}", "train.epochs='${foo}': Interpolation key 'foo' not found; give"),
    ("train.epochs=${train.epochs}", "train.epochs='${train.epochs}': Recursive interpolation"),
    ("plugins=[a,'${foo}']", "plugins[1]='${foo}': Interpolation key 'foo' not found; give the"),
    ("stem.name=${foo}", "stem.name='${foo}': Interpolation key 'foo' not found; give the"),
    ("stem=${foo}", "stem='${foo}': Interpolation key 'foo' not found; give the"),
    ("init=${oc.env:HYBRIDVIT_NO}", "'HYBRIDVIT_NO' not found; set it, or write"),
    ("train.epochs=${data.}", "'${data.}'"),
    ("train.epochs=many", "train.epochs='many' should be float"),
    ("train.epochs=0", "train.epochs=0 should be above 0"),
    ("train.epochs=[1", "is not valid YAML: did not find expected ',' or ']'"),
    ("stem.args={patch: 2, patch: 3}", "is not valid YAML: found duplicate key patch"),
    ("train.batch_size=0", "train.batch_size=0 should be at least 1"),
    ("train.batch_size=1.5", "train.batch_size=1.5 should be int"),
    ("train.accumulate=3", "should be a divisor of train.batch_size"),
    ("train.precision=fp8", "train.precision='fp8' should be"),
    ("train.ema=1", "train.ema=1 should be in (0, 1)"),
    ("optim.lr=-1", "optim.lr=-1 should be above 0"),
    ("optim.name=adam", "optim.name='adam' should be"),
    ("optim.betas=[0.9]", "two numbers in [0, 1)"),
    ("optim.freeze=[model.steam]", "no parameter lies under 'model.steam'"),
    ("optim.lr_factors={model: -1}", "factors of at least 0"),
    ("train.epochs=.inf", "train.epochs=inf should be a finite number"),
    ("optim.lr=.nan", "optim.lr=nan should be a finite number"),
    ("optim.clip_norm=-.inf", "optim.clip_norm=-inf should be a finite number"),
    ("optim.betas=[0.9, .nan]", "optim.betas=[0.9, nan] should be list of float, all finite"),
    ("seed=.nan", "seed=nan should be int"),
    ("encoder.args.mlp_ratio=.nan", "mlp_ratio=nan should be a finite number"),
    ("encoder.args.mlp_ratio=-1", "mlp_ratio=-1 leaves no hidden layer"),
    ("objective={name: masked_patch, args: {ratio: 0.05}}", "corrupts none of 16 patches"),
    ("optim.lr_factors={nothing: 2}", "no parameter lies under 'nothing'"),
    ("seed=-1", "seed=-1 should be in [0, 2^32)"),
    ("seed=one", "seed='one' should be int"),
    ("plugins=[no_such:thing]", "cannot import 'no_such'"),
    ("plugins=my_stems", "plugins='my_stems' should be list of str, such as [my_stems]"),
    ("plugins=[foo:]", 'needs quotes, such as plugins=["foo:register"]'),
    ("plugins=[foo: ]", "[{'foo': None}] should be list of str; text with a colon needs quotes"),
    ("plugins={a: b}", "plugins={'a': 'b'} should be list of str"),
    ("stem.name=linaer", "unknown stem 'linaer', did you mean 'linear'?"),
    ("stem.args.pach=2", "no argument 'pach', did you mean 'patch'?"),
    ("stem.args.patch=3", "a stride of 3 px does not divide images of 8 x 8 px"),
    ("stem.args.patch=0", "patch=0 should be int from 1 to 1,024"),
    ("stem.args.patch=1000000", "patch=1000000 should be int from 1 to 1,024"),
    ("stem={name: mlp, args: {depth: 1000000000}}", "depth=1000000000 should be int from 1 to"),
    ("stem={name: resnet, args: {blocks: [1000000000]}}", "should be list of int from 1 to 1,000"),
    ("stem={name: overlap, args: {kernel: 1000001}}", "kernel=1000001 should be int from 1 to "),
    ("stem={name: resnet, args: {width: 0.3}}", "width=0.3 must be a multiple of 1/32"),
    ("stem={name: resnet, args: {blocks: [1], strides: [1, 2]}}", "2 strides for 1 stages"),
    ("stem={name: timm, args: {backbone: resnet26x}}", "resnet26x"),
    ("encoder.name=medium", "unknown encoder 'medium'"),
    ("encoder.args.heads=5", "heads=5 must divide dim=16"),
    ("encoder.args.dim=-64", "dim=-64 should be int from 1 to 65,536"),
    ("encoder.args.dim=0", "dim=0 should be int from 1 to 65,536"),
    ("encoder.args.dim=1000000000", "dim=1000000000 should be int from 1 to 65,536"),
    ("encoder.args.depth=1000000000", "depth=1000000000 should be int from 0 to 1,000"),
    ("encoder.args.pool=max", "pool='max' should be one of 'token', 'mean', 'map'"),
    ("encoder.args.dropout=1.0", "must be in [0, 1)"),
    ("objective.name=superwised", "did you mean 'supervised'?"),
    ("objective.args.label_smoothing=2.0", "label_smoothing=2.0 should be in [0, 1)"),
    ("objective={name: masked_patch, args: {target: downsampled}}", "side that 4 divides"),
    ("objective={name: masked_patch, args: {ratio: 1.5}}", "ratio=1.5 should be in (0, 1)"),
    ("objective.args.mixup=0.5 train.batch_size=7", "is odd"),
    ("data.name=cifar", "unknown dataset 'cifar', did you mean 'cifar10'?"),
    ("data.val_fraction=1", "data.val_fraction=1 should be in [0, 1)"),
    ("data.args.image_size=0", "image_size=0 should be"),
    ("data.augment.crop=random", "crop='random' should be one of 'none', 'pad', 'resized'"),
    ("data.augment={crop: pad, pad: 8}", "data.augment.pad=8 should be smaller"),
    ("data.augment.pad=-1", "config: data.augment.pad=-1 should be 0 or more pixels"),
    ("data.augment.scale=[1,0]", "config: data.augment.scale=[1, 0] should be two shares"),
    ("data.augment.scale=1", "data.augment.scale=1 should be list [float, float]"),
    ("data.augment.erase=3", "config: data.augment.erase=3 should be a share"),
    ("data.augment.policy_ops=0", "config: data.augment.policy_ops=0 should be 1 or more"),
    ("data.augment.policy_magnitude=31", "config: data.augment.policy_magnitude=31 should be"),
    ("data={name: cifar10, args: {root: /nowhere}}", "/nowhere"),
    ("data={name: image_folder, args: {root: /nowhere}}", "/nowhere"),
    ("data={name: image_folder}", "needs root"),
    ("eval.probes=[svm]", "eval.probes=['svm'] should be list of some of 'knn', 'linear'"),
    ("eval.probes=knn", "should be list of some of 'knn', 'linear', such as [knn]"),
    ("eval.probes=[knn,knn]", "eval.probes=['knn', 'knn'] should be probes that differ"),
    ("out=", "out= needs a directory"),
    ("seed=" + 65 * "[" + 65 * "]", "nested too deeply"),
    ("seed=[&a 1, *a]", "aliases"),
    ("stem" + 64 * ".a" + "=1", "64 levels are the most"),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD_ARGUMENTS)
def test_bad_arguments_end_in_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("override", "expected"), BAD_OVERRIDES, ids=[o[:50] for o, _ in BAD_OVERRIDES]
)
def test_bad_overrides_end_in_one_line(
    override: str,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = override.split(" ") if " train." in override else [override]
    assert expected in refused(capsys, "train", "digits.yaml", *TINY, *overrides)


BAD_FILES: list[tuple[str, str]] = [
    ("train: [", "not valid YAML at line"),
    ("- a\n- b\n", "should hold sections"),
    ("hello", "should hold sections"),
    ("seed: 1\nseed: 2\n", "duplicate key"),
    ("extends: base.yaml", "extends should be a list"),
    ("extends: [nothing.yaml]", "extends 'nothing.yaml', which is neither in"),
    ("extends: [bad.yaml]", "extends itself"),
    ("stem: {args: {patch: 4}}", "stem needs a name"),
    ("data: {args: {root: '${oc.env:HOME}'}}", "is not allowed"),
    ("seed: ${nothing}", "config: seed='${nothing}': Interpolation key 'nothing' not found; give"),
    ("plugins: [foo: ]", 'text with a colon needs quotes, such as plugins=["foo:register"]'),
    ("extends: [digits.yaml]\ntrain: [1]", "config: train should be a section, not [1]"),
    ("a: &a [1]\nb: *a\n", "aliases"),
    ("seed: !!int 1\n", "tags"),
    ("stem: " + "[" * 2000 + "]" * 2000, "nested too deeply"),
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def register(parts) -> None\n", "SyntaxError"),
        ("x = nothing\n", "NameError: name 'nothing' is not defined"),
        ("def register(parts):\n    parts.nothing.add('x', 1)\n", "broken_parts.py, 2)"),
    ],
)
def test_a_broken_plug_in_ends_in_one_line(
    text: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_parts.py").write_text(text)
    said = refused(capsys, "train", "digits.yaml", "plugins=[broken_parts:register]")
    sys.modules.pop("broken_parts", None)
    assert expected in said
    assert "broken_parts" in said


@pytest.mark.parametrize(("text", "expected"), BAD_FILES)
def test_bad_files_end_in_one_line(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert expected in refused(capsys, "train", str(path))


def test_a_file_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert "not a text file" in refused(capsys, "train", str(path))


def test_a_folder_as_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no config file" in refused(capsys, "train", str(tmp_path))


def test_a_directory_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    line = refused(capsys, "train", "digits.yaml", *TINY, f"out={tmp_path / 'file' / 'run'}")
    assert "cannot write to" in line


def test_a_truncated_data_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 60000), ("t10k", 10000)):
        header = struct.pack(">IIII", 2051, count, 28, 28)
        (raw / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + b"\0" * 100))
        labels = struct.pack(">II", 2049, count)
        (raw / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels + b"\0" * 10))
    line = refused(
        capsys, "train", "fashion_mnist.yaml", f"data.args.root={tmp_path}", f"out={tmp_path}/run",
        "train.precision=fp32",  # or CPUs without bf16 warn of it first
    )  # fmt: skip
    assert "ubyte" in line


BAD_STUDIES: list[tuple[str, str]] = [
    ("title: a\n", "needs 'question'"),
    ("{title: a, question: b, config: digits.yaml, axis: {}}", "did you mean 'axes'?"),
    ("{title: a, question: b, config: digit.yaml, axes: {}}", "did you mean 'digits.yaml'?"),
    ("{title: a, question: b, config: digits.yaml, axes: {x: {}}}", "should map names"),
    ("{title: a, question: b, config: digits.yaml, axes: {x: {y: 3}}}", "should be a set"),
    ("{title: a, question: b, config: digits.yaml, axes: {x: {y: {seeds: 3}}}}", "'seeds'"),
    ("{title: a, question: b, config: digits.yaml, axes: {}, seeds: []}", "seeds is empty"),
    ("{title: a, question: b, config: digits.yaml, axes: {x: {y: {}, z: {}}}}", "the same run"),
    ("{title: a, question: b, config: digits.yaml, axes: {}, threads: 0}", "threads=0"),
    (
        "{title: a, question: b, config: digits.yaml, axes: {x: {y: {stem: {name: q}}}}}",
        "unknown stem 'q'",
    ),
]


@pytest.mark.parametrize(("text", "expected"), BAD_STUDIES)
def test_bad_studies_end_in_one_line_before_anything_runs(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    out = tmp_path / "out"
    assert expected in refused(capsys, "study", str(path), "--out", str(out))
    assert not out.exists()
