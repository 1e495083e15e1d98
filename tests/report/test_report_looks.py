from __future__ import annotations

from pathlib import Path

import pytest

from hybridvit.report.looks import keep_look


@pytest.mark.parametrize("plan", [None, "{", '{"schema": 1}', '{"schema": 1, "looks": [3]}'])
def test_a_report_makes_and_mends_no_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str | None
) -> None:
    monkeypatch.setattr("hybridvit.report.page.Report.seeds", 5)
    if plan is not None:
        (tmp_path / "plan.json").write_text(plan)
    keep_look(tmp_path, [])
    assert (tmp_path / "plan.json").is_file() == (plan is not None)
    if plan is not None:
        assert (tmp_path / "plan.json").read_text() == plan
