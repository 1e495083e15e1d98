"""Synthetic run directories, as the engine writes them."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import yaml

from hybridvit.report import find_runs
from hybridvit.report.arms import Comparison, compare, group
from hybridvit.report.caveats import caveats

HOSTILE = "</script><img src=x onerror=\"document.title='pwned'\"><b>bold</b>"
SCHEME = "<a href=\"javascript:document.title='pwned'\">javascript:alert(1)</a>"
STEMS = {"linear": True, "conv": False, "resnet": False}  # name: patch-local


def merged(base: dict[str, Any], changes: dict[str, Any] | None) -> dict[str, Any]:
    result = copy.deepcopy(base)
    for key, value in (changes or {}).items():
        is_nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if is_nested else value
    return result


def png(width: int = 32, height: int = 12) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    lines = b"".join(
        b"\0" + bytes((x * 8 + y * 5 * c) % 256 for x in range(width) for c in (1, 2, 3))
        for y in range(height)
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def leakage_of(stem: str, *, hidden: dict[str, float] | None = None) -> dict[str, Any]:
    """What the engine records of a 4 x 4 grid: the neighbours of an edited patch move, or none."""
    reach = 0 if STEMS.get(stem, True) else 1
    ring = [1.0, float(reach), 0.0, 0.0]
    changed = [[0.125 * (max(abs(r - 2), abs(c - 2)) <= reach) for c in range(4)] for r in range(4)]
    return {
        "mixing": {
            "training": True,
            "threshold": 0.01,
            "tokens": 16,
            "moved": (1 + 6 * reach) / 16,
            "change": 0.1 * reach,
            "jacobian_outside": 0.25 * reach,
            "moved_by_distance": ring,
            "jacobian_by_distance": [1 - 0.25 * reach, 0.25 * reach, 0.0, 0.0],
            "picture": changed,
        },
        "hidden": hidden,
    }


def config_of(stem: str, objective: str, seed: int, changes: dict[str, Any] | None) -> Any:
    base = {
        "plugins": [],
        "data": {"name": "digits", "args": {}, "augment": {"flip": False}},
        "stem": {"name": stem, "args": {"patch_px": 4, "channels": [32, 64]}},
        "encoder": {"name": "vit", "args": {"dim": 96, "depth": 4}},
        "objective": {"name": objective, "args": {}},
        "optim": {"lr": 0.001},
        "train": {"epochs": 5},
        "eval": {"batch": 256},
        "seed": seed,
    }
    return merged(base, changes)


def write_run(
    root: Path,
    stem: str = "linear",
    objective: str = "supervised",
    seed: int = 0,
    results: dict[str, float] | None = None,
    *,
    config: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    metrics: list[dict[str, Any]] | None = None,
    figure: bytes | None = None,
    folder: str | None = None,
) -> Path:
    """Write a run directory below `root`; `record`, `config` and `summary` are merged over it."""
    resolved = config_of(stem, objective, seed, config)
    kind = (record or {}).get("kind", "train")
    identity = json.dumps([kind, resolved], sort_keys=True).encode()
    digest = hashlib.sha256(identity).hexdigest()[:8]
    run_json = merged(
        {
            "schema": 1,
            "kind": kind,
            "name": f"{stem}-{objective}",
            "hash": digest,
            "arm": {},
            "status": "complete",
            "seed": seed,
            "started": "2026-01-02T03:04:05+00:00",
            "code": {"version": "0.1.0", "commit": "c0ffee" * 6, "dirty": False}
            | {"results_version": 1},
            "packages": {"torch": "2.15.0", "timm": "1.0.31"},
            "python": "3.12.1",
            "hardware": {"cpu": "A CPU", "cores": 8, "threads": 4, "gpu": None, "memory_gb": 32},
            "data": {"name": "digits", "fingerprint": "f00d", "train": 1000, "val": 200}
            | {"test": 400, "classes": 10, "channels": 1, "image_size": [16, 16], "notes": []},
            "plugins": {},
            "error": None,
        },
        record,
    )
    if kind == "train" and "model" not in (record or {}):
        run_json["model"] = {
            "tokens": 16,
            "grid": [4, 4],
            "patch_px": 4,
            "receptive_field": "4 px" if STEMS.get(stem, True) else "11 px",
            "patch_local": STEMS.get(stem, True),
            "parameters": {"stem": 10, "encoder": 20, "objective": 30, "total": 1_234_567},
            "flops": {"forward": 2_345_000_000, "backward": 4_690_000_000},
        }
        run_json.setdefault("leakage", leakage_of(stem))
    path = root / (folder or f"{stem}-{objective}-{digest}")
    (path / "figures").mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(resolved))
    (path / "run.json").write_text(json.dumps(run_json))
    lines = [json.dumps(line) for line in metrics or []]
    (path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    if run_json["status"] == "complete":
        base = {"schema": 1, "steps": 40, "images": 5000, "train_seconds": 12.5}
        base |= {"images_per_second": 400.0 + seed, "results": results or {}, "protocol": {}}
        if kind == "train":
            base["leakage"] = leakage_of(stem)
        (path / "summary.json").write_text(json.dumps(merged(base, summary)))
    if figure is not None:
        (path / "figures" / "reconstructions-step-000100.png").write_bytes(figure)
    return path


def curve(seed: int, top: float, objective: str = "supervised") -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for k in range(1, 21):
        wave = 0.02 * ((seed * 7 + k * 3) % 5 - 2) / k
        line = {"step": 10 * k, "epoch": k / 4, "images": 250 * k, "seconds": 0.5 * k, "lr": 1e-3}
        line["train/loss"] = 2.3 / k**0.6 + wave
        if objective != "supervised":
            line |= {"train/target_entropy": 1.9, "train/constant_guess_accuracy": 0.22}
            line["train/accuracy"] = 0.2 + 0.01 * k
        lines.append(line)
        if k % 4 == 0:
            lines.append({"step": 10 * k, "val/accuracy": top * (1 - 0.5 / k) + wave})
    return lines


def write_study(root: Path, hostile: str = "conv") -> None:
    for stem, top in (("linear", 0.90), ("conv", 0.93)):
        label = hostile if stem == "conv" else stem
        for seed in range(3):
            write_run(
                root,
                stem,
                seed=seed,
                results={"test/accuracy": top + 0.004 * ((seed * 2) % 3), "val/accuracy": top},
                record={"arm": {"stem": label, "objective": "supervised"}, "name": label},
                metrics=curve(seed, top),
                config={"optim": {"note": "n"}},
                summary={"protocol": {"test/accuracy": "argmax of the head, <once>"}},
            )
            results = {"test/linear": top - 0.1 - 0.01 * seed, "test/knn": top - 0.2}
            results |= {"untrained/test/linear": 0.78, "untrained/test/knn": 0.70 + 0.01 * seed}
            write_run(
                root,
                stem,
                "mae",
                seed,
                results,
                record={"arm": {"stem": label, "objective": "mae"}, "name": label},
                metrics=curve(seed, top - 0.2, "mae"),
                figure=png(256, 96),
                config={"optim": {"note": "n"}},
            )
    results = {"test/logistic_regression": 0.80, "test/knn": 0.85}
    write_run(root, results=results, record={"kind": "pixels", "name": "pixels"})
    diverged = {"status": "diverged", "error": "loss is nan at step 30", "arm": {"stem": "resnet"}}
    write_run(root, "resnet", record=diverged)


PURE = [0.900, 0.909, 0.904]
HYBRID = [0.920, 0.930, 0.925]


def write_pair(root: Path, pure: list[float] = PURE, hybrid: list[float] = HYBRID) -> None:
    for stem, values in (("linear", pure), ("conv", hybrid)):
        for seed, value in enumerate(values):
            write_run(root, stem, seed=seed, results={"test/accuracy": value})


def compared(root: Path) -> list[Comparison]:
    return compare(group(find_runs([root])))


def caveats_of(root: Path) -> str:
    arms = group(find_runs([root]))
    return "\n".join(caveats(arms, compare(arms)))


def write_masked(root: Path, stem: str, trained: list[float], untrained: list[float]) -> None:
    for seed, (a, b) in enumerate(zip(trained, untrained, strict=True)):
        results = {"test/linear": a, "test/knn": a - 0.01, "untrained/test/linear": b}
        results["untrained/test/knn"] = b - 0.02
        write_run(root, stem, "mae", seed, results)
