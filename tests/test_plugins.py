"""Parts from outside the repository, by both routes, trained from a YAML file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

MODULE = '''
"""A stem and an objective that hybridvit does not know."""
import torch
from torch import nn
from hybridvit.contracts import Objective, StepOutput, Stem, Tokens

__version__ = "1.2.3"


class SpaceToDepth(Stem):
    """Pixels of a patch as channels, then a 1x1 convolution."""

    is_patch_local = True

    def __init__(self, *, dim: int, patch_px: int = 8) -> None:
        super().__init__()
        self.patch_px = patch_px
        self.net = nn.Sequential(nn.PixelUnshuffle(patch_px), nn.Conv2d(3 * patch_px**2, dim, 1))

    def forward(self, images, visible=None):
        x = self.net(images)
        return Tokens(x.flatten(2).mT, (x.shape[-2], x.shape[-1]))


class Brightness(Objective):
    """Predict the mean of the image."""

    def __init__(self, *, model, data, scale: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.scale = scale
        self.head = nn.Linear(model.encoder.dim, 1)

    def forward(self, batch):
        target = self.scale * batch.images.mean(dim=(1, 2, 3))
        loss = (self.head(self.model.features(batch.images))[:, 0] - target).square().mean()
        return StepOutput(loss, {"loss": loss.detach()})


def register(parts):
    parts.stems.add("space_to_depth", SpaceToDepth)
    parts.objectives.add("brightness", Brightness)
'''

SETUP = """
[metadata]
name = my-stems
version = 4.5.6
[options]
py_modules = my_stems
[options.entry_points]
hybridvit.plugins =
    my_stems = my_stems:register
"""

CONFIG = """
extends: [digits.yaml]
plugins: ["{plugin}"]
stem: {{name: space_to_depth, args: {{patch_px: 2}}}}
objective: {{name: brightness, args: {{scale: 2.0}}}}
encoder: {{args: {{dim: 16, depth: 1, heads: 2}}}}
train: {{epochs: 2}}
eval: {{probes: [knn]}}
"""


def write_package(folder: Path) -> Path:
    folder.mkdir()
    (folder / "my_stems.py").write_text(MODULE)
    (folder / "setup.cfg").write_text(SETUP)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
    )
    return folder


def run(
    folder: Path, *arguments: str, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, "-m", "hybridvit.cli", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )


def check_record(tmp_path: Path, plugin: str, version: str) -> None:
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "complete"
    assert list(record["plugins"]) == [plugin]
    assert record["plugins"][plugin].startswith(f"{version}, code ")
    assert record["model"]["tokens"] == 16
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    losses = [m["train/loss"] for m in metrics if "train/loss" in m]
    assert losses[-1] < losses[0] / 2


def test_a_module_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "my_stems.py").write_text(MODULE)
    (tmp_path / "mine.yaml").write_text(CONFIG.format(plugin="my_stems:register"))
    done = run(tmp_path, "train", "mine.yaml", "out=out", "train.log_every=10")
    assert done.returncode == 0, done.stderr
    check_record(tmp_path, "my_stems:register", "1.2.3")

    again = run(tmp_path, "train", "mine.yaml", "out=out", "train.log_every=10")
    assert (again.returncode, "already complete" in again.stdout) == (0, True)
    (tmp_path / "my_stems.py").write_text(MODULE.replace("PixelUnshuffle(", "PixelUnshuffle( "))
    other = run(tmp_path, "train", "mine.yaml", "out=out", "train.log_every=10")
    assert other.returncode == 2
    assert "was begun with other code of plug-in 'my_stems:register'" in other.stderr
    assert len(other.stderr.splitlines()) == 1


def test_an_installed_package(tmp_path: Path) -> None:
    package, site = write_package(tmp_path / "package"), tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--target",
        str(site),
        str(package),
    ]
    done = subprocess.run(install, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (tmp_path / "mine.yaml").write_text(CONFIG.format(plugin="my_stems"))
    done = run(tmp_path, "train", "mine.yaml", "out=out", "train.log_every=10", path=site)
    assert done.returncode == 0, done.stderr
    check_record(tmp_path, "my_stems", "4.5.6")

    listed = run(tmp_path, "list", "--plugin", "my_stems", path=site).stdout
    assert "space_to_depth  Pixels of a patch as channels" in listed
    assert "patch_px: int = 8" in listed
    # Installed but not named: unknown.
    unnamed = run(tmp_path, "train", "digits.yaml", "stem.name=space_to_depth", path=site)
    assert unnamed.returncode == 2
    assert "unknown stem 'space_to_depth'" in unnamed.stderr


def test_a_stem_whose_stride_is_not_what_it_declares(tmp_path: Path) -> None:
    text = MODULE.replace("self.patch_px = patch_px\n", "self.patch_px = 2 * patch_px\n")
    (tmp_path / "my_stems.py").write_text(text)
    (tmp_path / "mine.yaml").write_text(CONFIG.format(plugin="my_stems:register"))
    done = run(tmp_path, "train", "mine.yaml")
    assert done.returncode == 2
    assert "declares patch_px=4, hence 2 x 2 tokens" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_plugin_that_takes_a_built_in_name(tmp_path: Path) -> None:
    text = MODULE.replace('"space_to_depth"', '"linear"')
    (tmp_path / "my_stems.py").write_text(text)
    done = run(tmp_path, "train", "digits.yaml", "plugins=[my_stems:register]")
    assert done.returncode == 2
    assert "already registered by hybridvit.stems.linear.LinearStem" in done.stderr
    assert len(done.stderr.splitlines()) == 1
