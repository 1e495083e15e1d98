"""The contrasts of arms that studies' READMEs quote."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = Path(__file__).parents[1] / "experiments" / "contrasts.py"


@pytest.fixture(scope="module")
def contrasts() -> ModuleType:
    spec = importlib.util.spec_from_file_location("contrasts", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder: Path, **arms: tuple[float, float, float]) -> str:
    lines = ["run,hash,seed,arm,status,metric,value"]
    for arm, values in arms.items():
        for seed, value in enumerate(values):
            lines.append(f"r,h,{seed},{arm},complete,test/accuracy,{value}")
            lines.append(f"r,h,{seed},{arm},complete,val/accuracy,{1 - value}")
    (folder / "results.csv").write_text("\n".join(lines))
    return str(folder)


def test_differences_are_paired_by_seed_and_judged_together(
    contrasts: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(
        tmp_path, base=(0.7, 0.72, 0.74), much=(0.8, 0.821, 0.84), little=(0.71, 0.72, 0.75)
    )
    contrasts.main([folder, "* vs base"])
    _, _, much, little = capsys.readouterr().out.splitlines()
    assert much == "| much | base | +10.0 | 0.1 | [9.9, 10.2] | (0.0, 10.2] | better |"
    assert little.startswith("| little | base | +0.7 |")
    assert little.endswith("not distinguishable |")
    contrasts.main([folder, "much vs base", "--metric", "val/accuracy"])
    assert "| much | base | -10.0 | 0.1 |" in capsys.readouterr().out


def test_an_arm_of_which_a_run_diverged_is_claimed_nothing(
    contrasts: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path, base=(0.7, 0.72, 0.74), much=(0.8, 0.821, 0.84))
    with (tmp_path / "results.csv").open("a") as file:
        file.write("\nr,h,3,much,diverged,,\n")
    contrasts.main([folder, "much vs base"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == "| much | base | +10.0 | 0.1 |  |  | diverged |"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["c vs b"], "test/accuracy: no arm 'c' in the results; there are: a, b\n"),
        (["a vs b", "--metric", "top5"], "top5: no arm 'a' in the results; there are: none\n"),
    ],
)
def test_an_unknown_arm_is_refused_in_one_line(
    contrasts: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    words: str,
) -> None:
    with pytest.raises(SystemExit):
        contrasts.main([write(tmp_path, a=(0.1, 0.2, 0.3), b=(0.1, 0.2, 0.3)), *more])
    assert capsys.readouterr().err.endswith(words)
