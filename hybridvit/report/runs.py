"""Run directories as a report reads them: checked, capped in size, and free of surprises.

Run directories may come from strangers. Nothing here runs code, follows a link out of the
directory or reads without a limit, and every text is stripped of control characters (terminal
escapes, bidirectional overrides) on the way in.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hybridvit.studies.status import clean, number

SCHEMA = 1  # of run.json and summary.json
MAX_RECORD = 1 << 20  # bytes of a JSON or YAML file
MAX_PLAN = 32 << 20  # bytes of plan.json, which names every cell and candidate
MAX_METRICS = 64 << 20  # bytes of metrics.jsonl
MAX_PICTURE = 4 << 20  # bytes of a figure
MAX_PIXELS = 1 << 24  # of a figure: a small file can unpack to gigabytes
MAX_ROWS = 200  # characters of the names of its rows
MAX_DEPTH = 4  # folders below a path in which runs are looked for
PNG = b"\x89PNG\r\n\x1a\n"
STATUSES = ("complete", "running", "stopped", "diverged", "failed")
KINDS = ("train", "pixels", "tune")


@dataclass(frozen=True, eq=False)
class Run:
    """One run directory.

    `metrics` holds one entry a step, in order, with all that was logged at it; `summary` and
    `results`, which are accuracies in [0, 1], are empty unless the run is complete.
    """

    path: Path
    name: str
    hash: str
    kind: str
    status: str
    seed: int
    arm: dict[str, Any]
    config: dict[str, Any]
    record: dict[str, Any]  # run.json as a whole
    metrics: tuple[dict[str, float], ...] = ()
    summary: dict[str, Any] = field(default_factory=dict)
    results: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a reader of the run's numbers should know

    @property
    def is_complete(self) -> bool:
        return self.status == "complete"

    @property
    def objective(self) -> str:
        return part_name(self.config, "objective")

    @property
    def tokens(self) -> int | None:
        return _count(self.section("model"), "tokens")

    @property
    def patch_px(self) -> int | None:
        return _count(self.section("model"), "patch_px")

    @property
    def parameters(self) -> int | None:
        return _count(self.section("model", "parameters"), "total")

    @property
    def compared_parameters(self) -> int | None:
        """Of stem and encoder: heads, decoders and teachers come and go with the objective."""
        parts = [_count(self.section("model", "parameters"), p) for p in ("stem", "encoder")]
        return None if None in parts else sum(p or 0 for p in parts)

    @property
    def stage(self) -> str | None:
        """Of a study that has stages."""
        value = self.arm.get("stage")
        return value if isinstance(value, str) else None

    @property
    def epochs(self) -> float | None:
        """How often training has seen its images."""
        length = _count(self.section("data"), "train")
        return self.images / length if self.images is not None and length else None

    @property
    def flops(self) -> int | None:
        """Of one forward pass, per image."""
        return _count(self.section("model", "flops"), "forward")

    @property
    def is_patch_local(self) -> bool | None:
        value = self.section("model").get("patch_local")
        return value if isinstance(value, bool) else None

    @property
    def normalisation(self) -> tuple[Any, Any]:
        """Mean and std of each channel, as recorded."""
        section = self.section("model", "normalisation")
        return section.get("mean"), section.get("std")

    @property
    def images(self) -> int | None:
        """Images that training has seen, repeats included."""
        return _count(self.summary, "images")

    @property
    def training_flops(self) -> float | None:
        """Of all images seen, forward and backward."""
        backward = _count(self.section("model", "flops"), "backward")
        if None in (self.flops, backward, self.images):
            return None
        return float((self.flops or 0) + (backward or 0)) * (self.images or 0)

    @property
    def train_seconds(self) -> float | None:
        return number(self.summary.get("train_seconds"))

    @property
    def images_per_second(self) -> float | None:
        return number(self.summary.get("images_per_second"))

    def section(self, *keys: str) -> dict[str, Any]:
        """A nested mapping of run.json; empty where it is missing or no mapping."""
        return mapping(self.record, keys)

    def settings(self, *keys: str) -> dict[str, Any]:
        """A nested mapping of config.yaml, likewise."""
        return mapping(self.config, keys)


def mapping(node: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    """What lies below the keys of a record; empty where that is missing or no mapping."""
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def part_name(config: dict[str, Any], part: str) -> str:
    """Name of a config's part, `?` where it has none."""
    section = config.get(part)
    return str(section.get("name", "?")) if isinstance(section, dict) else "?"


def read_run(path: Path) -> Run:
    """Read one run directory.

    Raises:
        ValueError: it is no run directory, a file of it is broken or too large, or it was written
            under a newer schema.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is no directory; give a run directory (one with a run.json)")
    if not (path / "run.json").is_file():
        raise ValueError(
            f"{path} is no run directory: it has no run.json; give one that `hybridvit train` wrote"
        )
    record = read_json(path, "run.json")
    text = {k: _required(path, record, k, str) for k in ("name", "hash", "kind", "status")}
    for key, valid in (("kind", KINDS), ("status", STATUSES)):
        if text[key] not in valid:
            raise ValueError(
                f"{path / 'run.json'}: {key} is {text[key][:40]!r}, not one of {', '.join(valid)}; "
                "is the file from another version of hybridvit?"
            )
    arm = record.get("arm") or {}
    if not isinstance(arm, dict):
        raise ValueError(
            f"{path / 'run.json'}: arm is no mapping of axes to values; is it damaged?"
        )
    metrics, notes = _read_metrics(path)
    run = Run(
        path=path,
        seed=_required(path, record, "seed", int),
        arm=arm,
        config=read_yaml(path, "config.yaml"),
        record=record,
        metrics=metrics,
        notes=notes,
        **text,
    )
    if not run.is_complete:
        return run
    if not (path / "summary.json").is_file():
        raise ValueError(
            f"{path} says that it is complete but has no summary.json; remove it to train anew"
        )
    summary = read_json(path, "summary.json")
    found = summary.get("results")
    pairs = found.items() if isinstance(found, dict) else ()
    results = {k: n for k, v in pairs if (n := number(v)) is not None and 0 <= n <= 1}
    if left := [k for k, _ in pairs if k not in results]:
        name, said = clean(str(path / "summary.json")), ", ".join(left)[:200]
        notes += (f"{name} has results that are no shares of images, left out: {said}",)
    return replace(run, summary=summary, results=results, notes=notes)


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Runs at the paths: run directories, or folders that hold some up to four levels below.

    Runs of one kind with the same hash are the same experiment and count once: a complete one if
    there is one, else the first. A note says so where their results differ. Runs that tuned are no
    results and are left out; the study's plan.json says what they showed.

    Raises:
        ValueError: a path does not exist or holds no run, or a run is broken.
    """
    found: dict[tuple[str, str], Run] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist; give run directories or folders of them")
        directories = _run_directories(path, MAX_DEPTH)
        if not directories:
            raise ValueError(
                f"{path} holds no run (no run.json in it or up to {MAX_DEPTH} folders below); "
                "give a run directory or a folder of them"
            )
        for directory in directories:
            run = read_run(directory)
            if run.kind == "tune":
                continue
            key = (run.kind, run.hash)  # a pixel baseline has the hash of the config it is given
            known = found.get(key)
            found[key] = run if known is None else _one_of(known, run)
    return list(found.values())


def read_picture(run: Run) -> tuple[Path, bytes, str] | None:
    """The run's latest reconstructions as (path, PNG bytes, what its rows show); none where there
    is no sound one."""
    steps = {}
    folder = run.path / "figures"
    for path in folder.glob("reconstructions-step-*.png") if folder.is_dir() else ():
        match = re.fullmatch(r"reconstructions-step-(\d{1,12})\.png", path.name)
        if match:
            steps[int(match[1])] = path
    for _, path in sorted(steps.items(), reverse=True):
        content = _read_bytes(run.path, path, MAX_PICTURE)
        if content is not None and _is_small_png(content):
            return path, content, _rows(content)
    return None


def _is_small_png(content: bytes) -> bool:
    if not content.startswith(PNG) or content[12:16] != b"IHDR" or len(content) >= MAX_PICTURE:
        return False
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    return 0 < width * height <= MAX_PIXELS


def _rows(png: bytes) -> str:
    """The text that the engine keeps in a picture: the names of its rows, from above."""
    place = len(PNG)
    while (kind := png[place + 4 : place + 8]) not in (b"", b"IDAT"):
        size = int.from_bytes(png[place : place + 4], "big")
        if kind == b"tEXt" and png[place + 8 :].startswith(b"rows\0"):
            return clean(png[place + 13 : place + 8 + size].decode("latin-1"))[:MAX_ROWS]
        place += 12 + size
    return "not named"


def _run_directories(path: Path, depth: int) -> list[Path]:
    if (path / "run.json").is_file():
        return [path]
    if depth == 0 or not path.is_dir():
        return []
    below = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    # A link may lead anywhere, or back up.
    return [d for p in below if not p.is_symlink() for d in _run_directories(p, depth - 1)]


def _one_of(first: Run, second: Run) -> Run:
    if os.path.realpath(first.path) == os.path.realpath(second.path):
        return first
    kept, other = (second, first) if second.is_complete > first.is_complete else (first, second)
    if kept.is_complete and other.is_complete and kept.results != other.results:
        note = (
            f"{clean(str(kept.path))} and {clean(str(other.path))} are the same experiment "
            f"({kept.hash}) with different results; the first is used"
        )
        return replace(kept, notes=(*kept.notes, note))
    return kept


def _read_bytes(root: Path, path: Path, cap: int) -> bytes | None:
    """Up to `cap` + 1 bytes of a regular file below `root`; none for anything else."""
    try:
        if not path.is_file() or not path.resolve().is_relative_to(root.resolve()):
            return None
        with path.open("rb") as file:
            return file.read(cap + 1)
    except OSError:
        return None


def _read_record(root: Path, name: str, cap: int = MAX_RECORD) -> str:
    content = _read_bytes(root, root / name, cap)
    if content is None:
        raise ValueError(f"{root / name} is no readable file of the run directory; is it a link?")
    if len(content) > cap:
        raise ValueError(
            f"{root / name} is larger than {cap >> 20} MiB, too large for a run record; "
            "is it damaged?"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{root / name} is no UTF-8 text; is it damaged?") from None


def load_json(root: Path, name: str, cap: int = MAX_RECORD) -> dict[str, Any]:
    """A record of a schema known here, its texts as they are.

    Raises:
        ValueError: it is missing, broken, too large or of a newer schema.
    """
    text = _read_record(root, name, cap)
    try:
        record = json.loads(text)
    except RecursionError:
        raise ValueError(f"{root / name} is nested too deeply; is it damaged?") from None
    except ValueError as error:  # JSONDecodeError, or an integer of thousands of digits
        raise ValueError(
            f"{root / name} is broken JSON ({clean(str(error))[:120]}); "
            "restore it or remove the run directory"
        ) from None
    if not isinstance(record, dict):
        raise ValueError(f"{root / name} holds no JSON object; is it damaged?")
    schema = record.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise ValueError(f"{root / name} has no schema version; is it from hybridvit?")
    if schema > SCHEMA:
        raise ValueError(
            f"{root / name} has schema {schema}, newer than the {SCHEMA} known here; "
            "update hybridvit to read it"
        )
    return record


def read_json(root: Path, name: str, cap: int = MAX_RECORD) -> dict[str, Any]:
    """`load_json`, its texts cleaned."""
    cleaned: dict[str, Any] = _clean_tree(load_json(root, name, cap))
    return cleaned


def read_yaml(root: Path, name: str) -> dict[str, Any]:
    """A mapping of plain values, its texts cleaned.

    Raises:
        ValueError: it is missing, too large, or anything else.
    """
    import yaml

    from hybridvit.plain_yaml import LOADER, check_plain

    text = _read_record(root, name)
    try:
        check_plain(text)
        config = yaml.load(text, LOADER)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        what = clean(str(getattr(error, "problem", None) or error))[:120]
        raise ValueError(
            f"{root / name} is no plain YAML ({what}); restore it or remove the run"
        ) from None
    if not isinstance(config, dict):
        raise ValueError(f"{root / name} holds no mapping; is it damaged?")
    cleaned: dict[str, Any] = _clean_tree(config)
    return cleaned


def _read_metrics(root: Path) -> tuple[tuple[dict[str, float], ...], tuple[str, ...]]:
    """Metrics by step, and notes. Later lines win: a resumed run logs some steps again.

    One line that cannot be read is what a run leaves that was cut off; of more, a note tells.
    """
    content = _read_bytes(root, root / "metrics.jsonl", MAX_METRICS)
    if content is None:
        return (), ()
    notes = []
    name = clean(str(root / "metrics.jsonl"))
    if len(content) > MAX_METRICS:
        notes.append(f"only the first {MAX_METRICS >> 20} MiB of {name} are read")
    by_step: dict[float, dict[str, float]] = {}
    lines = [line for line in content.splitlines() if line.strip()]
    unread = 0
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or (step := number(entry.get("step"))) is None:
            unread += 1
            continue
        numbers = {clean(k): n for k, v in entry.items() if (n := number(v)) is not None}
        by_step.setdefault(step, {}).update(numbers)
    if unread > 1 or (lines and unread == len(lines)):
        notes.append(f"{unread} of {len(lines)} lines of {name} cannot be read")
    return tuple(by_step[step] for step in sorted(by_step)), tuple(notes)


def _required(path: Path, record: dict[str, Any], key: str, kind: type) -> Any:
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(
            f"{path / 'run.json'}: {key} is {str(value)[:40]!r}, expected {kind.__name__}; "
            "is the file from another version of hybridvit?"
        )
    return value


def _clean_tree(node: Any) -> Any:
    """JSON-like data with cleaned texts; keys become texts, and dates what they read like."""
    if isinstance(node, dict):
        return {clean(str(k)): _clean_tree(v) for k, v in node.items()}
    if isinstance(node, list):
        return [_clean_tree(v) for v in node]
    if node is None or isinstance(node, bool | int | float):
        return node
    return clean(str(node))


def _count(section: dict[str, Any], key: str) -> int | None:
    value = number(section.get(key))
    return int(value) if value is not None and value >= 0 else None
