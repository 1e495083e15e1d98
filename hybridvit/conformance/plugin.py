"""The suites run on what a plug-in adds, and their results as a table."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hybridvit import build
from hybridvit.compose import dotlist, to_plain
from hybridvit.conformance.objectives import ObjectiveConformance
from hybridvit.conformance.stems import StemConformance
from hybridvit.conformance.suite import Suite, reason_of
from hybridvit.conformance.targets import TargetConformance
from hybridvit.registry import Parts, Registry, suggest

KINDS: dict[str, tuple[str, type[Suite] | None]] = {
    "stems": ("stem", StemConformance),
    "objectives": ("objective", ObjectiveConformance),
    "targets": ("target", TargetConformance),
    "encoders": ("encoder", None),
    "datasets": ("dataset", None),
}


@dataclass(frozen=True)
class Result:
    """What a check found; `passed` is none where nothing was checked."""

    part: str  # its kind and name
    check: str
    passed: bool | None
    text: str  # why it failed, or a note


def check_plugin(
    plugin: str, overrides: list[str], progress: Callable[[str], None]
) -> list[Result]:
    """Run every check on every part that a plug-in adds; no part's error ends it.

    Args:
        plugin: `module:function`, or the name of an entry point.
        overrides: arguments as `name.key=value`, by default those of the factories.
        progress: told what is about to run.

    Raises:
        ValueError: no such plug-in, one that cannot be loaded or adds nothing, an override of no
            part of it.
    """
    added = added_parts(plugin)
    names = [name for parts in added.values() for name in parts]
    args: dict[str, Any] = dict(to_plain(dotlist(overrides)))
    for name, values in args.items():
        if name not in names or not isinstance(values, dict):
            raise ValueError(
                f"{name!r} is no part that {plugin!r} adds{suggest(name, names)}; give arguments "
                f"as NAME.KEY=VALUE, with NAME one of {', '.join(names)}"
            )
    results = []
    for kind, factories in added.items():
        word, base = KINDS[kind]
        for name, factory in factories.items():
            if base is None:
                results.append(Result(f"{word} {name}", "", None, "not checked"))
                continue
            attributes = {"factory": staticmethod(factory), "name": name, "plugins": (plugin,)}
            suite = type(base.__name__, (base,), {**attributes, "args": args.get(name, {})})
            results += check_part(f"{word} {name}", suite, progress)
    return results


def added_parts(plugin: str) -> dict[str, dict[str, Callable[..., Any]]]:
    """The factories that a plug-in adds, by kind and name.

    Raises:
        ValueError: no such plug-in, one that cannot be loaded, or that adds nothing.
    """
    after, _ = build.make_parts([plugin])
    before, _ = build.make_parts([])
    added = {kind: _difference(kind, after, before) for kind in KINDS}
    if not any(added.values()):
        raise ValueError(f"plug-in {plugin!r} adds no part: its function should call parts...add")
    return added


def check_part(
    part: str, suite: type[Suite], progress: Callable[[str], None] = lambda _: None
) -> list[Result]:
    """Run the checks of a suite, one after the other, up to a gate that fails."""
    checks, results = checks_of(suite), []
    for i, check in enumerate(checks):
        title = check.removeprefix("test_").replace("_", " ")
        progress(f"{part}: {title} ({i + 1} of {len(checks)})")
        one = suite()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                getattr(one, check)()
        except Exception as error:  # whatever a part of a stranger raises is its failure
            results.append(Result(part, title, False, reason_of(error)))
            if check in suite.gates:
                rest = f"the {len(checks) - i - 1} other checks need this one first"
                return [*results, Result(part, "", None, rest)]
        else:
            results.append(Result(part, title, True, one.note))
    return results


def checks_of(suite: type[Suite]) -> list[str]:
    """The names of a suite's checks, in the order in which they are written."""
    written = dict.fromkeys(name for base in reversed(suite.__mro__) for name in vars(base))
    return [n for n in written if n.startswith("test_") and callable(getattr(suite, n))]


def table(results: list[Result]) -> str:
    """One line a check, one paragraph a part, and a count."""
    lines: list[str] = []
    width = max(len(r.check) for r in results)
    for i, result in enumerate(results):
        if i == 0 or result.part != results[i - 1].part:
            lines += ["", result.part] if lines else [result.part]
        word = {True: "pass", False: "FAIL", None: "-"}[result.passed]
        lines.append(f"  {word:4}  {result.check:{width}}  {result.text}".rstrip())
    run = [r for r in results if r.passed is not None]
    passed = sum(r.passed is True for r in run)
    return "\n".join([*lines, "", f"{passed} of {len(run)} checks pass"])


def _difference(kind: str, after: Parts, before: Parts) -> dict[str, Callable[..., Any]]:
    theirs: Registry[Any] = getattr(after, kind)
    ours: Registry[Any] = getattr(before, kind)
    return {k: v for k, v in theirs.factories.items() if k not in ours.factories}
