"""Which checks a part fails, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from hybridvit.conformance.objectives import SETTINGS
from hybridvit.conformance.plugin import check_part
from hybridvit.conformance.suite import Suite


class Broken(NamedTuple):
    """A part with one mistake, the check that finds it and words of its reason."""

    factory: Callable[..., Any]
    check: str
    words: str
    also: tuple[str, ...] = ()  # checks that cannot pass either
    everywhere: bool = False  # it shows in one of the other settings


def failures(
    base: type[Suite], factory: Callable[..., Any], *, slow: bool = True, **args: object
) -> dict[str, str]:
    """The reasons of failed checks, by check."""
    attributes: dict[str, Any] = {"factory": staticmethod(factory), "args": args}
    if not slow:
        attributes["test_compile"] = None
    results = check_part("part", type(base.__name__, (base,), attributes))
    return {r.check.replace(" ", "_"): r.text for r in results if r.passed is False}


def on_the_linear_stem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the other settings, to save time."""
    for where in list(SETTINGS)[1:]:
        monkeypatch.delitem(SETTINGS, where)


def check_broken(base: type[Suite], broken: Broken) -> None:
    """The named check fails with the right reason, those that it entails, and no other."""
    expected = {broken.check, *broken.also}
    found = failures(base, broken.factory, slow="compile" in expected)
    assert broken.words in found.get(broken.check, "nothing"), found
    assert found.keys() == expected, found
    for reason in found.values():
        assert "\n" not in reason
