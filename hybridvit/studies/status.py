"""How far the cells of a study are, read from their directories: no torch, no lock is taken."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLAN = "plan.json"
ERROR = ".error"  # why a cell ended that left no record
TAIL = 1 << 14  # bytes of metrics.jsonl that hold its last lines
REDRAW_SECONDS = 0.5
BAR = 20
ENDED = ("complete", "diverged", "failed")


@dataclass(frozen=True)
class Place:
    """A cell as far as its progress goes: its folder, its arm and its length."""

    folder: Path
    label: str
    epochs: float
    kind: str = "train"


@dataclass(frozen=True)
class State:
    """How far a cell is. `share` is of its training steps, `seconds` are those trained so far."""

    status: str  # waiting, running, stopped, complete, diverged or failed
    share: float = 0.0
    seconds: float | None = None
    images_per_second: float | None = None
    error: str | None = None


def state(place: Place) -> State:
    """How far a cell is; one that was killed counts as stopped, since it will go on."""
    error = place.folder / ERROR
    record = read_json(place.folder / "run.json")
    status = str((record or {}).get("status"))
    # What another process wrote that came too late does not count against a run that succeeds.
    if error.is_file() and status != "complete" and not is_held(place.folder):
        unwritten = "its reason was not written; a full disk, perhaps"
        return State("failed", error=error.read_text() or unwritten)
    if record is None:
        return State("waiting")
    if status == "running" and not is_held(place.folder):
        status = "stopped"
    epoch, seconds, rate = _progress(place.folder / "metrics.jsonl")
    share = 1.0 if status == "complete" else min(0.99, epoch / place.epochs)
    said = record.get("error")
    return State(status, share, seconds, rate, None if said is None else str(said))


def is_held(folder: Path) -> bool:
    """Whether a process is at work in a run directory."""
    try:
        with (folder / ".lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock was ever taken
        return False
    return False


def read_json(path: Path) -> dict[str, Any] | None:
    """A record; none where it is missing or broken."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def clean(text: str) -> str:
    """A text on one line, without control, format or surrogate characters."""
    if text.isprintable():  # most are
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def number(value: Any) -> float | None:
    """A finite number of a record; none for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def remaining(places: Sequence[Place], states: Sequence[State], slots: int) -> float | None:
    """Seconds until all cells have ended, from how fast those that train or have trained were;
    none before there is any such."""
    whole: dict[str, list[float]] = {}
    for place, now in zip(places, states, strict=True):
        if now.share and now.seconds:
            whole.setdefault(place.label, []).append(now.seconds / now.share)
    if not whole:
        return None
    typical = statistics.fmean(s for found in whole.values() for s in found)
    left = [
        (1 - now.share) * (statistics.fmean(whole[p.label]) if p.label in whole else typical)
        for p, now in zip(places, states, strict=True)
        if now.status not in ENDED and p.kind != "pixels"
    ]
    return max([sum(left) / max(1, slots), *left], default=0.0)


def summary(places: Sequence[Place], states: Sequence[State], slots: int) -> str:
    """One line on the whole study."""
    count = Counter(s.status for s in states)
    words = [f"{count['complete']} of {len(places)} cells complete"]
    words += [f"{n} {status}" for status, n in count.items() if status not in ("complete",)]
    if any(s.status not in ENDED for s in states):
        left = remaining(places, states, slots)
        words.append("time left not known yet" if left is None else f"{duration(left)} left")
    return ", ".join(words)


def lines(places: Sequence[Place], states: Sequence[State]) -> list[str]:
    """A table with a line a cell: status, progress, throughput and the time it has left."""
    rows = [("cell", "status", "progress", "img/s", "left")]
    for place, now in zip(places, states, strict=True):
        left = now.seconds / now.share * (1 - now.share) if now.seconds and now.share else None
        done = round(BAR * now.share)
        rows.append(
            (
                place.folder.name,
                now.status,
                f"{'#' * done}{'.' * (BAR - done)} {now.share:4.0%}",
                f"{now.images_per_second:,.0f}" if now.images_per_second else "",
                duration(left) if left and now.status not in ENDED else "",
            )
        )
    return columns(rows, right=(3, 4))


def study_status(path: Path) -> str:
    """What `hybridvit status` prints of a study, as it was last started.

    Args:
        path: the study's file or its folder, whose runs are in runs/<study>; or the folder of its
            runs.

    Raises:
        ValueError: no study was started there.
    """
    folder = path
    if path.suffix in (".yaml", ".yml") and not path.is_file():
        raise ValueError(
            f"there is no study file {str(path)!r}; give its path, or its runs' folder"
        )
    if path.suffix in (".yaml", ".yml") or (path / "study.yaml").is_file():
        folder = Path("runs") / study_name(path / "study.yaml" if path.is_dir() else path)
    plan = read_json(folder / PLAN)
    if plan is None:
        raise ValueError(
            f"no study was started in {folder}; give the study's file, or the folder of its runs"
        )
    try:
        places = [
            Place(folder / Path(c["name"]).name, str(c["label"]), float(c["epochs"]), c["kind"])
            for c in plan["cells"]
        ]
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{folder / PLAN} is broken; remove it and start the study again"
        ) from None
    states = [state(p) for p in places]
    slots = sum(s.status == "running" for s in states)
    errors = [
        clean(f"{p.folder.name}: {' '.join(s.error.split())}")
        for p, s in zip(places, states, strict=True)
        if s.error and s.status in ENDED
    ]
    head = [summary(places, states, slots), "", *lines(places, states)]
    return "\n".join([*head, *([""] if errors else []), *errors])


def study_name(path: Path) -> str:
    """The name of a study file: that of its folder, and its own behind it where it is a variant.

    `experiments/0042-mine/study.yaml` is 0042-mine, `small.yaml` beside it 0042-mine-small; a file
    with no study.yaml beside it has its own name.
    """
    folder = Path(os.path.abspath(path)).parent  # without the dots of `..`, which is no name
    if path.stem == "study":
        return folder.name
    return f"{folder.name}-{path.stem}" if (folder / "study.yaml").is_file() else path.stem


class Live:
    """The running cells, drawn anew in place on a terminal; elsewhere a line for each that ends."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places
        self.known = {p.folder.name: state(p) for p in places}
        self.is_terminal = sys.stderr.isatty()
        self.drawn, self.last = 0, 0.0

    def update(self, running: list[str]) -> None:
        """Draw again, if it is time."""
        now = time.monotonic()
        if not self.is_terminal or now - self.last < REDRAW_SECONDS:
            return
        self.last = now
        started = [p for p in self.places if p.folder.name in running]
        self.known |= {p.folder.name: state(p) for p in started}
        shown = [p for p in started if self.known[p.folder.name].status != "waiting"]
        states = [self.known[p.folder.name] for p in self.places]
        width, height = shutil.get_terminal_size()
        text = [summary(self.places, states, len(shown))]
        text += lines(shown, [self.known[p.folder.name] for p in shown])
        if len(text) >= height:  # going up ends at the top of the screen
            text[height - 2 :] = [f"and {len(text) - height + 2} more"]
        self.clear()
        sys.stderr.write("".join(f"{line[: width - 1]}\n" for line in text))
        sys.stderr.flush()
        self.drawn = len(text)

    def ended(self, name: str) -> State:
        """Note that a cell has ended, and how."""
        place = next(p for p in self.places if p.folder.name == name)
        now = self.known[name] = state(place)
        if now.status == "complete" and not self.is_terminal:
            done = sum(s.status == "complete" for s in self.known.values())
            self.say(f"[{done}/{len(self.places)}] {name}")
        return now

    def say(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the drawing away."""
        if self.drawn:
            sys.stderr.write(f"\x1b[{self.drawn}F\x1b[J")
            self.drawn = 0


def columns(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Lines of a table whose first row is its headings; columns in `right` are right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    text.insert(1, "-" * max(map(len, text)))
    return text


def shorten(text: str, width: int) -> str:
    """The text within a width, its middle left out: ends tell arms apart."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def duration(seconds: float) -> str:
    """As one says it: 4 s, 2 min 10 s, 3 h 05 min."""
    if seconds < 1:
        return f"{seconds:.2g} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def _progress(metrics: Path) -> tuple[float, float | None, float | None]:
    """Epoch, seconds trained and images/s of the last lines of metrics.jsonl."""
    try:
        with metrics.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL))
            found = file.read().splitlines()
    except OSError:
        return 0.0, None, None
    for line in reversed(found):
        try:
            entry = json.loads(line)
            return float(entry["epoch"]), float(entry["seconds"]), entry.get("images_per_second")
        except (ValueError, KeyError, TypeError):
            continue  # cut off, or of an evaluation
    return 0.0, None, None
