from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from two_stems import read

from hybridvit.studies.timing import time_steps


def test_seconds_are_those_of_a_step(tmp_path: Path) -> None:
    (cells, _) = read(tmp_path / "s", "seconds").arms()
    config = dataclasses.replace(
        cells[0].config, train=dataclasses.replace(cells[0].config.train, threads=None)
    )
    time_steps(config, 5, 20, tmp_path / "timed")
    result = json.loads((tmp_path / "timed" / "result.json").read_text())
    assert 1e-5 < result["seconds_per_step"] < 1
    assert result["memory"] > 1 << 20
    lines = (tmp_path / "timed" / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 25
    # Behind the first lap, images/s and seconds a step are one thing.
    rates = [json.loads(line)["images_per_second"] for line in lines[1:]]
    assert result["seconds_per_step"] == pytest.approx(sum(64 / r for r in rates) / 4)
