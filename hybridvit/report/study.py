"""A study as its files tell of it: study.yaml in its own folder, plan.json among its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridvit.report.runs import MAX_PLAN, Run, read_json, read_yaml
from hybridvit.studies.choices import Choice, from_plain
from hybridvit.studies.status import PLAN, number, study_name

REPORTED = ("train", "pixels")  # kinds of cells that a report shows


@dataclass(frozen=True)
class Study:
    """Where the runs of a study are, and what it asks in words."""

    folder: Path  # of the runs and the report
    runs: tuple[Path, ...]
    title: str | None
    question: str | None
    longer: str | None


@dataclass(frozen=True)
class Plan:
    """What a report takes from the plan.json of a study; none where it says nothing sound."""

    match: str | None = None  # the cost that was made equal
    smallest_difference: float | None = None  # of interest, in percentage points
    cells: tuple[str, ...] = ()  # names of the folders of its runs
    tuning: tuple[Choice, ...] = ()  # what arms chose on validation
    baseline: dict[str, str] = field(default_factory=dict)  # the axes and values to compare with
    looks: tuple[int, ...] = ()  # after how many seeds a page was made


def find_study(path: Path) -> Study | None:
    """The study of a study file, of the folder of one, or of the folder of its runs; else none.

    Of a study file the runs are the cells as last planned, in runs/<study>; of a folder of runs
    they are all in it.

    Raises:
        ValueError: the study was not started, or its file is broken.
    """
    file = path / "study.yaml" if path.is_dir() else path
    if file.suffix in (".yaml", ".yml") and file.is_file():
        folder = Path("runs") / study_name(file)
        cells = [folder / name for name in _plan(folder).cells]
        runs = [cell for cell in cells if (cell / "run.json").is_file()] or [folder]
        if not folder.is_dir():
            raise ValueError(
                f"{path} has no runs in {folder}; run `hybridvit study {file}`, or give the folder "
                "of its runs"
            )
        return Study(folder, tuple(runs), **_words(read_yaml(file.parent, file.name)))
    if (path / PLAN).is_file():
        return Study(path, (path,), **_words(_content(path)))
    return None


def read_plan(runs: Sequence[Run]) -> Plan:
    """The plan of the study that all the runs lie in; an empty one for any others."""
    folders = {run.path.parent for run in runs}
    return _plan(folders.pop()) if len(folders) == 1 else Plan()


def _plan(folder: Path) -> Plan:
    content = _content(folder)
    match, smallest = content.get("match"), number(content.get("smallest_difference"))
    cells, looks = content.get("cells"), content.get("looks")
    listed = cells if isinstance(cells, list) else []
    names = [c.get("name") for c in listed if isinstance(c, dict) and c.get("kind") in REPORTED]
    return Plan(
        match if isinstance(match, str) else None,
        smallest if smallest is not None and smallest > 0 else None,
        # A name is that of a folder here, wherever a planted plan may point.
        tuple(Path(name).name for name in names if isinstance(name, str)),
        tuple(from_plain(content.get("tuning"))),
        _texts(content.get("baseline")),
        tuple(n for n in looks if isinstance(n, int)) if isinstance(looks, list) else (),
    )


def _texts(value: Any) -> dict[str, str]:
    items = value.items() if isinstance(value, dict) else ()
    return {key: text for key, text in items if isinstance(text, str)}


def _content(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder, PLAN, MAX_PLAN)
    except ValueError:
        return {}


def _words(content: dict[str, Any]) -> dict[str, str | None]:
    found = {key: content.get(key) for key in ("title", "question", "longer")}
    return {key: value if isinstance(value, str) else None for key, value in found.items()}
