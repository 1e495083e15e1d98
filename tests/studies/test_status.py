from __future__ import annotations

import fcntl
import io
import json
from pathlib import Path

import pytest

from hybridvit.studies import status
from hybridvit.studies.status import (
    Live,
    Place,
    State,
    duration,
    remaining,
    state,
    study_name,
)


def write(folder: Path, record: dict[str, object] | None, *lines: object) -> Place:
    folder.mkdir(parents=True)
    (folder / ".lock").touch()
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    return Place(folder, folder.name.rpartition("-")[0], epochs=10.0)


LINE = {"epoch": 2.5, "seconds": 30.0, "images_per_second": 100.0}


def test_what_a_cell_is_doing_is_read_from_its_directory(tmp_path: Path) -> None:
    assert state(Place(tmp_path / "none", "a", 1.0)) == State("waiting")
    running = write(tmp_path / "a-0", {"status": "running"}, LINE, {"epoch": 2.6, "val": 1})
    with (running.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert state(running) == State("running", 0.25, 30.0, 100.0, None)
    assert state(running).status == "stopped"  # its process is gone, it will go on
    bad = write(tmp_path / "b-0", {"status": "diverged", "error": "not finite"}, LINE)
    assert (state(bad).status, state(bad).error) == ("diverged", "not finite")
    done = write(tmp_path / "c-0", {"status": "complete"}, LINE)
    assert state(done).share == 1
    (done.folder / ".error").write_text("in use")  # by a second process that came too late
    assert state(done).status == "complete"
    (bad.folder / ".error").write_text("no data")
    assert state(bad) == State("failed", error="no data")
    half = write(tmp_path / "d-0", {"status": "stopped"}, LINE)
    with (half.folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 5.0, "sec')  # cut off when it was killed
    assert state(half).share == 0.25


def test_time_left_is_that_of_like_cells_shared_by_the_slots(tmp_path: Path) -> None:
    places = [Place(tmp_path / str(i), label, 1.0) for i, label in enumerate("aabb")]
    known = [State("complete", 1.0, 40.0), State("running", 0.25, 10.0)]
    # a: 30 s of 40 left; b is known by a alone, until one of it runs.
    waiting = [State("waiting")] * 2
    assert remaining(places, [*known, *waiting], 1) == pytest.approx(30 + 40 + 40)
    assert remaining(places, [*known, *waiting], 2) == pytest.approx(55)
    assert remaining(places, [*known, *waiting], 9) == pytest.approx(40)  # no cell is divided
    b = [State("running", 0.5, 100.0), State("waiting")]
    assert remaining(places, [*known, *b], 1) == pytest.approx(30 + 100 + 200)
    assert remaining(places, [State("waiting")] * 4, 1) is None
    assert remaining(places, [State("diverged", 0.5, 3.0)] * 4, 1) == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_drawn_anew_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(status.sys, "stderr", screen)
    monkeypatch.setattr(status, "REDRAW_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "40")
    places = [write(tmp_path / f"a-{i}", {"status": "running"}, LINE) for i in range(2)]
    live = Live(places)
    live.update(["a-0", "a-1"])
    first = screen.getvalue()
    assert first.count("\n") == 5  # summary, headings, rule, two cells
    assert max(map(len, first.splitlines())) < 40  # a wrapped line would break going up
    live.update(["a-0"])
    assert screen.getvalue()[len(first) :].startswith("\x1b[5F\x1b[J")
    live.clear()
    assert screen.getvalue().endswith("\x1b[4F\x1b[J")


def test_a_drawing_fits_the_screen_and_leaves_out_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(status.sys, "stderr", screen)
    monkeypatch.setenv("LINES", "10")
    places = [write(tmp_path / f"a-{i}", {"status": "running"}, LINE) for i in range(12)]
    places += [write(tmp_path / "b-0", None)]
    Live(places).update([p.folder.name for p in places])
    drawn = screen.getvalue().splitlines()
    assert len(drawn) == 9  # and the cursor below
    assert drawn[-1] == "and 7 more"  # summary, headings, rule and 5 cells stand above
    screen.truncate(0)
    Live(places).update(["a-3", "b-0"])
    assert "a-3" in screen.getvalue()
    assert "b-0" not in screen.getvalue()


def test_durations_read_as_one_says_them() -> None:
    said = {0.25: "0.25 s", 4: "4 s", 59.7: "60 s", 130: "2 min 10 s", 11_100: "3 h 05 min"}
    assert {s: duration(s) for s in said} == said


def test_no_study_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no study was started in"):
        status.study_status(tmp_path)
    (tmp_path / "plan.json").write_text('{"cells": [{}]}')
    with pytest.raises(ValueError, match="is broken"):
        status.study_status(tmp_path)


@pytest.mark.parametrize(("error", "shown"), [(5, "5"), ("\x1b[2Jgone\n", "\ufffd[2Jgone")])
def test_errors_are_shown_as_plain_text(tmp_path: Path, error: object, shown: str) -> None:
    write(tmp_path / "a-0", {"status": "failed", "error": error})
    cell = {"name": "a-0", "label": "a", "epochs": 1, "kind": "train"}
    (tmp_path / "plan.json").write_text(json.dumps({"cells": [cell]}))
    assert status.study_status(tmp_path).splitlines()[-1] == f"a-0: {shown}"


def test_a_reason_that_could_not_be_written_is_guessed(tmp_path: Path) -> None:
    """As on a full disk, which takes the file and not what is in it."""
    failed = write(tmp_path / "a-0", {"status": "running"})
    (failed.folder / status.ERROR).touch()
    assert state(failed).status == "failed"
    assert state(failed).error == "its reason was not written; a full disk, perhaps"


def test_variants_of_a_study_have_names_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "0042-mine"
    folder.mkdir()
    assert study_name(folder / "small.yaml") == "small"  # a study by itself
    (folder / "study.yaml").touch()
    assert study_name(folder / "study.yaml") == "0042-mine"
    assert study_name(folder / "figures" / ".." / "study.yaml") == "0042-mine"
    assert study_name(folder / "small.yaml") == "0042-mine-small"


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no study file .*typo\.yaml"):
        status.study_status(tmp_path / "typo.yaml")
