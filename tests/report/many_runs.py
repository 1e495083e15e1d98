"""A grid of a thousand small runs, and how long their report takes:

python tests/report/many_runs.py [RUNS]

prints a JSON line: wall seconds of `hybridvit report` as a process of its own, of `import torch`
beside it, and of three loads of the page in chromium, where that is installed.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from run_directories import curve, png, write_run

STEMS = {"linear": 0.80, "conv": 0.82, "resnet": 0.83, "overlap": 0.79}
OBJECTIVES = ("supervised", "mae")
DEPTHS = (1, 2, 4, 8, 12)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
IMAGES = 359  # of the test split
KEYS = {f"key_{k}": [0.5, None, True, "text"][k % 4] for k in range(80)}  # as many as real configs


def write_many(root: Path, count: int) -> None:
    """The first `count` runs of 4 stems x 2 objectives x 5 depths x 5 rates, five seeds each."""
    draw = random.Random(0)
    picture = png(256, 96)
    labels = [draw.randrange(10) for _ in range(IMAGES)]
    grid = itertools.product(STEMS, OBJECTIVES, DEPTHS, RATES, range(5))
    for stem, objective, depth, rate, seed in itertools.islice(grid, count):
        top = STEMS[stem] + 0.01 * depth + draw.gauss(0, 0.01)
        keys = ["test/accuracy"]
        if objective != "supervised":
            keys = [f"{w}test/{probe}" for w in ("", "untrained/") for probe in ("knn", "linear")]
        said = {k: [x if draw.random() < top else 0 for x in labels] for k in keys}
        hits = {k: sum(a == b for a, b in zip(v, labels, strict=True)) for k, v in said.items()}
        flops = {"forward": 10**8 * depth, "backward": 2 * 10**8 * depth}
        path = write_run(
            root,
            stem,
            objective,
            seed,
            {k: n / IMAGES for k, n in hits.items()},
            config={"optim": {"lr": rate}, "encoder": {"args": {"depth": depth, **KEYS}}},
            record={
                "arm": {"stem": stem, "objective": objective, "depth": depth, "lr": rate},
                "model": {"flops": flops, "patch_local": stem == "linear", "tokens": 16},
            },
            metrics=curve(seed, top, objective),
            figure=picture if objective == "mae" else None,
        )
        content = {"schema": 1, "labels": labels, "predicted": said}
        (path / "predictions.json").write_text(json.dumps(content, separators=(",", ":")))


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as folder:
        runs, out = Path(folder) / "runs", Path(folder) / "out"
        write_many(runs, count)
        report = ("-m", "hybridvit.cli", "report", str(runs), "--out", str(out))
        found = {
            "runs": count,
            "report_s": [_seconds(*report) for _ in range(3)],
            "import_torch_s": [_seconds("-c", "import torch") for _ in range(3)],
            "open_s": _opening(out / "report.html"),
            "page_mb": round((out / "report.html").stat().st_size / 1e6, 1),
        }
        print(json.dumps(found))


def _seconds(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - start, 2)


def _opening(page: Path) -> list[float]:
    """Until the page is loaded, in a fresh browser and then again."""
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver or not chromium:
        return []
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        browser.get(page.resolve().as_uri())
        times.append(round(time.perf_counter() - start, 2))
    browser.quit()
    return times


if __name__ == "__main__":
    main()
