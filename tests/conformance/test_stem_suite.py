"""Broken stems fail the check that is for their mistake, which says why; sound ones pass."""

from __future__ import annotations

import pytest
from broken_stems import BROKEN, Good, Local
from conftest import STEM_ARGS
from failing import Broken, check_broken, failures

from hybridvit.conformance import StemConformance
from hybridvit.contracts import Stem
from hybridvit.stems import STEMS


@pytest.mark.parametrize("broken", BROKEN, ids=[b.factory.__name__ for b in BROKEN])
def test_a_broken_stem_fails_for_the_right_reason(broken: Broken) -> None:
    check_broken(StemConformance, broken)


@pytest.mark.parametrize("good", [Good, Local])
def test_what_they_are_derived_from_passes(good: type[Stem]) -> None:
    assert failures(StemConformance, good) == {}


@pytest.mark.parametrize("name", sorted(STEMS))
def test_built_in_stems_pass(name: str) -> None:
    # tests/objectives/test_compile.py compiles them.
    assert failures(StemConformance, STEMS[name], slow=False, **STEM_ARGS[name]) == {}


@pytest.mark.parametrize("name", ["resnet", "conv"])
def test_and_with_masks_inside(name: str) -> None:
    args = {**STEM_ARGS[name], "masked": True}
    assert failures(StemConformance, STEMS[name], slow=False, **args) == {}
