"""A new package for a stem: it passes its own test, `check`, and trains."""

from __future__ import annotations

import configparser
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hybridvit.cli import main
from hybridvit.scaffold import new_stem

TINY = ["encoder.args.dim=16", "encoder.args.depth=1", "encoder.args.heads=2", "train.epochs=1"]


def test_its_test_passes(tmp_path: Path) -> None:
    folder = new_stem("ripple", tmp_path)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout
    assert "18 passed" in done.stdout


def test_it_passes_check_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = new_stem("trickle", tmp_path)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)  # for this test only
    assert main(["check", "trickle:register"]) == 0
    assert "18 of 18 checks pass" in capsys.readouterr().out
    out = tmp_path / "run"
    assert main(["train", "trickle.yaml", f"out={out}", *TINY]) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["plugins"]["trickle:register"].startswith("0.1.0, code ")
    assert record["model"]["tokens"] == 16


def test_what_is_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "stem", "my_stem", "--out", str(tmp_path / "deep" / "er")]) == 0
    folder = tmp_path / "deep" / "er" / "my_stem"
    assert capsys.readouterr().out.startswith(f"{folder}\n")
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {
        "README.md",
        "pyproject.toml",
        "my_stem.yaml",
        "my_stem.py",
        "tests/test_my_stem.py",
    }
    for path in folder.rglob("*.*"):
        assert "$" not in path.read_text()
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["hybridvit.plugins"] == {"my_stem": "my_stem:register"}
    stem = (folder / "my_stem.py").read_text()
    assert "class MyStem(Stem):" in stem
    compile(stem, "stem", "exec")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("My-Stem", "cannot name a stem and its module"),
        ("2d", "such as my_stem"),
        ("", "'' cannot name"),
        ("../evil", "'../evil' cannot name"),
        ("class", "'class' is a Python keyword; choose another name, such as my_class"),
        ("linear", "is a built-in stem; choose another name, such as my_linear"),
        ("json", "is a Python module already"),
        ("torch", "is a Python module already"),
        ("hybridvit", "is a Python module already"),
        ("sys", "is a Python module already (built-in)"),
    ],
)
def test_bad_names_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    assert main(["new", "stem", name, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    assert main(["new", "stem", "mine", "--out", str(tmp_path)]) == 2
    assert "mine exists; choose another name or --out=FOLDER" in capsys.readouterr().err
    assert list((tmp_path / "mine").iterdir()) == []


def test_other_kinds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["new", "encoder", "mine"])
    assert "invalid choice: 'encoder'" in capsys.readouterr().err


def test_templates_are_shipped() -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    assert "templates/stem/*" in setup["options.package_data"]["hybridvit"]


def test_all_packages_are_shipped() -> None:
    root = Path(__file__).parents[1]
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    listed = set(setup["options"]["packages"].split()) - {"hybridvit.configs"}
    found = {p.parent for p in (root / "hybridvit").rglob("__init__.py")}
    assert listed == {".".join(p.relative_to(root).parts) for p in found}
