"""The command line as a user meets it: what it prints, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import TINY, refused

from hybridvit.cli import main


def test_list_shows_every_part_with_types_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for text in (
        "linear  Linear map",
        "patch: int from 1 to 1,024 = 16",
        "kernel: int from 1 to 2,047 or null",
        "channels: list of int = ",
        "pool: one of 'token', 'mean', 'map' = ",
        "masked_patch  Predict half",
        "cifar10",
        "giant",
        "digits.yaml",
    ):
        assert text in printed
    assert "typing." not in printed
    assert main(["list", "stems"]) == 0
    assert "cifar10" not in capsys.readouterr().out


def test_describe_counts_the_papers_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data.args.image_size=224", "stem.args.patch=16", "encoder={name: tiny}"]
    assert main(["describe", "digits.yaml", *arguments]) == 0
    printed = capsys.readouterr().out
    for text in ("196 (14 x 14)", "16 px", "patch-local", "GiB"):
        assert text in printed


def test_describe_plans_for_data_that_are_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"data={{name: imagenet, args: {{root: {tmp_path}, image_size: 224}}}}"
    arguments = [data, "encoder={name: base, args: {}}", "stem.args.patch=16"]
    assert main(["describe", "digits.yaml", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "imagenet is not here; assumed: 224 px, 1000 classes" in printed
    assert "total 86,567,656" in printed  # timm's vit_base_patch16_224
    missing = f"data={{name: cifar10, args: {{root: {tmp_path}}}}}"
    assert "or set data.args.image_size" in refused(capsys, "describe", "digits.yaml", missing)


def test_train_report_and_train_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits.yaml", *TINY]) == 0
    assert "test/accuracy" in capsys.readouterr().out
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("digits-")
    assert main(["train", "digits.yaml", *TINY]) == 0
    assert "already complete" in capsys.readouterr().out
    assert main(["report", "runs"]) == 0
    assert "report: report/report.html" in capsys.readouterr().out
    assert (tmp_path / "report" / "report.html").is_file()


def test_a_study_says_after_how_many_seeds_it_was_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From three on, below which there are no verdicts; the same page again is no other look."""
    monkeypatch.chdir(tmp_path)
    arms = "{linear: {}, two: {stem: {args: {patch: 4}}}}"
    text = f"title: T\nquestion: Q?\nconfig: digits.yaml\naxes: {{stem: {arms}}}\nseeds: [0]\n"
    text += "baseline: {stem: linear}\n"
    Path("study.yaml").write_text(text)
    said = []
    for command in ("1", "3", "3", "report", "4"):
        arguments = ["study", "study.yaml", "--out", "out", "--seeds", command, *TINY]
        assert main(["report", "out"] if command == "report" else arguments) == 0
        assert "report: out/report.html" in capsys.readouterr().out
        page = Path("out/report.md").read_text()
        said.append("Pages of this study were made with 3, then 4 seeds" in page)
    assert said == [False, False, False, False, True]
    # Runs of another length are others, which nobody has looked at.
    more = [*TINY, "train.epochs=2"]
    assert main(["study", "study.yaml", "--out", "out", "--seeds", "3", *more]) == 0
    assert "Pages of this study" not in Path("out/report.md").read_text()


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m hybridvit.cli list | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "stems:\n"


def buffered(script: str) -> subprocess.CompletedProcess[str]:
    """A script in a process that writes into pipes as Python does by default."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_program_ends_as_python_would() -> None:
    code = (
        "import atexit, sys\n"
        "from hybridvit import cli\n"
        "atexit.register(print, 'cleaned up')\n"
        "sys.argv = ['hybridvit', 'describe', 'absent.yaml']\n"
        "cli.program()\n"
    )
    done = buffered(code)
    assert (done.returncode, done.stdout) == (2, "cleaned up\n")
    assert done.stderr.startswith("hybridvit: ")


def test_what_is_imported_is_not_looked_through_for_garbage() -> None:
    """What is young is, or memory of objects that name each other would not be given back."""
    code = (
        "import atexit, gc, sys\n"
        "from hybridvit import cli\n"
        "found = []\n"
        "gc.callbacks.append(lambda phase, what: found.append(what['generation']))\n"
        "atexit.register(lambda: print(2 in found, len(found) > 9))\n"
        "sys.argv = ['hybridvit', 'list', 'stems']\n"
        "cli.program()\n"
    )
    assert buffered(code).stdout.splitlines()[-1] == "False True"


@pytest.mark.parametrize("code", [0, 2])
def test_what_a_program_printed_is_not_lost(code: int) -> None:
    """Also where it fails afterwards, and into a pipe, which is written when it is full."""
    script = (
        f"from hybridvit import cli\ncli.main = lambda: print('told') or {code}\ncli.program()\n"
    )
    done = buffered(script)
    assert (done.returncode, done.stdout, done.stderr) == (code, "told\n", "")


def test_memory_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = ["encoder.args.mlp_ratio=1e12"]  # more than any machine
    line = refused(capsys, "train", "digits.yaml", *huge, f"out={tmp_path / 'run'}")
    assert "out of memory; set train.accumulate higher" in line


def test_errors_of_code_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> str:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("hybridvit.engine.describe.describe", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        main(["describe", "digits.yaml"])


def test_processes_that_torchrun_has_not_started_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # without what else torchrun sets
    line = refused(capsys, "train", "digits.yaml", *TINY, f"out={tmp_path / 'run'}")
    assert "WORLD_SIZE=8 asks for several processes; start them by torchrun" in line


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_one_line() -> None:
    command = f"{sys.executable} -m hybridvit.cli list > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    said = "No space left on device; free some space and run the same command again"
    assert (done.returncode, done.stderr) == (2, f"hybridvit: {said}\n")


def test_doctor_finds_this_machine_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in ("python", "packages", "torchvision", "threads", "compiler", "gpu", "disk"):
        assert name in printed


def modules_after(arguments: list[str], names: tuple[str, ...]) -> list[str]:
    """Those of `names` that a fresh process has imported after a command."""
    code = (
        "import sys\n"
        "from hybridvit.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit:\n"
        "    pass\n"
        f"print(*[name for name in {names!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


def test_commands_import_only_what_they_need() -> None:
    heavy = (
        "torch",
        "timm",
        "torchvision",
        "lightning_fabric",
        "sklearn",
        "scipy",
        "torch._dynamo",
    )
    assert modules_after(["--help"], (*heavy, "omegaconf", "numpy", "yaml")) == []
    assert modules_after(["list"], heavy) == ["torch"]


def test_a_report_is_rendered_without_torch(tmp_path: Path) -> None:
    from run_directories import write_run

    run = write_run(tmp_path / "run")
    arguments = ["report", str(run), "--out", str(tmp_path / "page")]
    assert modules_after(arguments, ("torch", "timm")) == []
    assert (tmp_path / "page" / "report.html").is_file()
