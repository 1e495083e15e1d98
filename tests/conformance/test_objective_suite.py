"""Broken objectives fail the check that is for their mistake, which says why; sound ones pass."""

from __future__ import annotations

import pytest
from broken_objectives import BROKEN, ON_MIXING, BranchesOnValues, Good, TwoViews
from failing import Broken, check_broken, failures, on_the_linear_stem

from hybridvit.conformance import ObjectiveConformance
from hybridvit.contracts import Objective
from hybridvit.objectives import OBJECTIVES


@pytest.mark.parametrize("broken", BROKEN, ids=[b.factory.__name__ for b in BROKEN])
def test_a_broken_objective_fails_for_the_right_reason(
    broken: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not broken.everywhere:
        on_the_linear_stem(monkeypatch)
    check_broken(ObjectiveConformance, broken)


@pytest.mark.parametrize("good", [Good, TwoViews])
def test_what_they_are_derived_from_passes(good: type[Objective]) -> None:
    assert failures(ObjectiveConformance, good, slow=False) == {}


def test_what_is_only_slow_is_noted() -> None:
    suite = type("Suite", (ObjectiveConformance,), {"factory": BranchesOnValues})()
    suite.test_compile()
    assert suite.note.startswith("breaks the graph, which is slow: ")
    suite.test_device()
    assert suite.note.startswith("shapes depend on values")


SMALL: dict[str, dict[str, object]] = {
    "mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "ratio": 0.5},
    "simclr": {"hidden_dim": 16, "output_dim": 8},
    "dino": {"hidden_dim": 16, "bottleneck_dim": 8, "output_dim": 32},
}


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_built_in_objectives_pass(name: str) -> None:
    slow = name == "simclr"  # tests/objectives/test_compile.py has the others
    found = failures(ObjectiveConformance, OBJECTIVES[name], slow=slow, **SMALL.get(name, {}))
    assert found == {}


@pytest.mark.parametrize("name", ["masked_patch", "simmim", "mae"])
def test_without_protection_they_fail_on_hidden_pixels_alone(name: str) -> None:
    args = {**SMALL.get(name, {}), "fill": "none"}
    found = failures(ObjectiveConformance, OBJECTIVES[name], slow=False, **args)
    assert found.keys() == {"hidden_pixels"}
    assert ON_MIXING in found["hidden_pixels"]
