"""plan.json, beside a study's cells: what was planned, measured, chosen and looked at. Replaced
whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hybridvit.studies.status import PLAN, read_json


def write_plan(out: Path, content: dict[str, Any]) -> None:
    """Replace plan.json."""
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".{PLAN}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, out / PLAN)


def planned_names(out: Path) -> set[str]:
    """Names of the cells as last planned."""
    cells = (read_json(out / PLAN) or {}).get("cells")
    listed = cells if isinstance(cells, list) else []
    return {cell["name"] for cell in listed if isinstance(cell, dict) and "name" in cell}


def looks(out: Path) -> list[int]:
    """After how many seeds a page with verdicts was made, in order."""
    kept = (read_json(out / PLAN) or {}).get("looks")
    return kept if isinstance(kept, list) else []


def update_plan(out: Path, **changed: Any) -> None:
    """Replace these keys of plan.json."""
    write_plan(out, {**(read_json(out / PLAN) or {}), **changed})
