from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from hybridvit.cli import main
from hybridvit.studies import directories


def write(folder: Path, status: str = "complete") -> Path:
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / "checkpoints" / "step-1" / "weights.safetensors").write_bytes(bytes(2048))
    record = {"schema": 1, "kind": "train", "hash": "01234567", "status": status}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / ".lock").touch()
    return folder


def test_runs_are_listed_with_their_sizes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "study" / "a"), write(tmp_path / "b", "running")
    (second / "summary.json").hardlink_to(first / "checkpoints" / "step-1" / "weights.safetensors")
    text = directories.listing([tmp_path])
    assert f"{first} " in text
    assert "stopped" in text  # no process holds it
    own = sum(p.stat().st_size for p in first.rglob("*") if p.is_file())
    shared = sum(p.stat().st_size for p in second.rglob("*") if p.is_file()) - 2048
    assert text.endswith(f"2 runs, {(own + shared) / 1024:.3g} KiB")  # what is shared counts once


def test_only_run_directories_are_removed(tmp_path: Path) -> None:
    run, kept = write(tmp_path / "study" / "a"), write(tmp_path / "kept")
    (tmp_path / "study" / "report.html").write_text("")
    assert main(["runs", str(tmp_path / "study"), "--remove", "--yes"]) == 0
    assert not run.exists()
    assert kept.is_dir()
    assert (tmp_path / "study" / "report.html").is_file()


@pytest.mark.parametrize("content", [b"", b'{"schema": 1, "ki', b"[]", b"\xff\xfe"])
def test_damaged_runs_are_listed_and_removed(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write(tmp_path / "study" / "a")
    (run / "run.json").write_bytes(content)
    (line,) = [x for x in directories.listing([tmp_path]).splitlines() if str(run) in x]
    assert line.split()[1] == "damaged"
    (run / "notes.txt").touch()
    assert main(["runs", str(run), "--remove", "--yes"]) == 2
    assert "holds notes.txt, which no run has written" in capsys.readouterr().err
    (run / "notes.txt").unlink()
    assert main(["runs", str(run), "--remove", "--yes"]) == 0
    assert not run.exists()


def test_a_broken_file_of_that_name_alone_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{ // of something else")
    with pytest.raises(ValueError, match="holds no run"):
        directories.find([tmp_path])
    assert main(["runs", str(tmp_path), "--remove", "--yes"]) == 2


@pytest.mark.parametrize("name", ["notes.txt", "thesis", "checkpoints.bak"])
def test_a_run_with_other_files_is_kept(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write(tmp_path / "a")
    write(tmp_path / "b")
    (run / name / "x").mkdir(parents=True)
    assert main(["runs", str(tmp_path), "--remove", "--yes"]) == 2
    assert f"holds {name}, which no run has written" in capsys.readouterr().err
    assert (tmp_path / "b").is_dir()


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "run.json").write_text('{"status": "complete"}')  # of something else
    elsewhere = write(tmp_path / "elsewhere" / "run")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(elsewhere)
    for path in (precious, folder, tmp_path / "nothing"):
        assert main(["runs", str(path), "--remove", "--yes"]) == 2
    assert main(["runs", str(folder / "link"), "--remove", "--yes"]) == 2
    assert main(["runs", "--remove", "--yes"]) == 2
    errors = capsys.readouterr().err
    for words in ("holds no run", "does not exist", "is a link", "--remove needs the paths"):
        assert words in errors
    assert (precious / "run.json").is_file()
    assert (elsewhere / "run.json").is_file()


def test_a_running_one_is_refused_and_nothing_goes_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = write(tmp_path / "a", "running"), write(tmp_path / "b")
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["runs", str(tmp_path), "--remove", "--yes"]) == 2
        assert "is running" in capsys.readouterr().err
    assert other.is_dir()
    assert main(["runs", str(tmp_path), "--remove"]) == 2  # no terminal to ask on
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert main(["runs", str(tmp_path), "--remove"]) == 0
    assert run.is_dir()
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert main(["runs", str(tmp_path), "--remove"]) == 0
    assert list(tmp_path.iterdir()) == []
