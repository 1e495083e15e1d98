"""`hybridvit check` as a plug-in's author meets it, and the suites as pytest classes."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from failing import failures
from torch import Tensor, nn

from hybridvit.cli import main
from hybridvit.conformance import ObjectiveConformance, StemConformance
from hybridvit.conformance.plugin import Result, check_part, checks_of, table
from hybridvit.contracts import Stem, Tokens
from hybridvit.stems.linear import LinearStem

MODULE = '''
from torch import nn
from hybridvit.contracts import Objective, Stem, StepOutput, Target, Tokens
from hybridvit.patches import patchify

class Local(Stem):
    """A projection of patches."""
    is_patch_local = True
    def __init__(self, *, dim: int, patch: int{default}) -> None:
        super().__init__()
        self.patch_px = patch
        self.proj = nn.Conv2d(3, dim, patch, patch)
    def forward(self, images, visible=None):
        x = self.proj(images)
        return Tokens(x.flatten(2).mT, (x.shape[-2], x.shape[-1]))

class Liar(Local):
    """Says that it mixes."""
    is_patch_local = False

def register(parts):
    parts.stems.add("local", Local)
    {more}
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module `checked_plugin` to write, on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "checked_plugin.py"
    sys.modules.pop("checked_plugin", None)


def write(path: Path, *, default: str = " = 8", more: str = "pass") -> None:
    path.write_text(MODULE.format(default=default, more=more))


def test_what_passes_ends_with_0(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(plugin)
    assert main(["check", "checked_plugin:register"]) == 0
    printed = capsys.readouterr()
    count = len(checks_of(StemConformance))
    assert printed.out.splitlines()[0] == "stem local"
    assert f"\n\n{count} of {count} checks pass\n" in printed.out
    assert "FAIL" not in printed.out
    assert printed.err == ""


def test_what_fails_ends_with_1_and_the_reason(
    plugin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(
        plugin,
        more='parts.stems.add("liar", Liar)\n    parts.encoders.add("theirs", lambda: None)',
    )
    assert main(["check", "checked_plugin:register", "local.patch=16", "liar.patch=4"]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("  FAIL")]
    assert failed == [
        "  FAIL  patch locality         declares is_patch_local=False, but each token depends on "
        "the pixels of its patch alone: declare True, so that hidden patches are not computed and "
        "reports call it pure"
    ]
    assert lines.index("stem local") < lines.index("stem liar") < lines.index(failed[0])
    assert lines[lines.index("encoder theirs") + 1].split() == ["-", "not", "checked"]


def test_arguments_are_given_by_name(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(plugin, default="")
    assert main(["check", "checked_plugin:register"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  builds  needs patch: give defaults" in out
    assert "or set local.patch=VALUE here" in out
    assert "0 of 1 checks pass" in out
    assert main(["check", "checked_plugin:register", "local.patch=4"]) == 0
    assert main(["check", "checked_plugin:register", "local.patch=wide"]) == 1
    assert "FAIL  builds  ValueError: stem 'local': patch='wide' should be int" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_such_module:register"], "cannot import 'no_such_module'"),
        (["no_such_plugin"], "'no_such_plugin' is not installed"),
        (["checked_plugin:registre"], "has no 'registre'"),
        (["checked_plugin:Local"], "cannot be loaded (TypeError: "),
        (["checked_plugin:register", "locale.patch=4"], "did you mean 'local'?; give arguments as"),
        (["checked_plugin:register", "local=4"], "'local' is no part that"),
        (["checked_plugin:register", "local.patch"], "should be key.path=value"),
        (["checked_plugin:print"], "has no 'print'"),
    ],
)
def test_mistakes_of_the_user_end_with_2(
    plugin: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    write(plugin)
    assert main(["check", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert words in printed.err


def test_a_plug_in_that_adds_nothing(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin.write_text("def register(parts): pass")
    assert main(["check", "checked_plugin:register"]) == 2
    assert "adds no part" in capsys.readouterr().err


def test_a_module_that_does_not_parse(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin.write_text("def register(parts)")
    assert main(["check", "checked_plugin:register"]) == 2
    assert "cannot be loaded (SyntaxError: expected ':'" in capsys.readouterr().err


class Explodes(Stem):
    """Whatever it raises is its own failure."""

    patch_px = 8

    def __init__(self, *, dim: int) -> None:
        super().__init__()

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        raise MemoryError("line one\nline two")


class Stops(Explodes):
    def __init__(self, *, dim: int) -> None:
        raise KeyboardInterrupt


def test_an_exception_is_a_failure_in_one_line() -> None:
    suite = type("Suite", (StemConformance,), {"factory": Explodes})
    results = check_part("stem explodes", suite)
    assert [(r.check, r.passed) for r in results] == [
        ("builds", True),
        ("tokens", False),
        ("", None),
    ]
    assert results[1].text == "MemoryError: line one"
    assert results[2].text == f"the {len(checks_of(suite)) - 2} other checks need this one first"


def test_but_an_interrupt_is_not() -> None:
    with pytest.raises(KeyboardInterrupt):
        check_part("stem", type("Suite", (StemConformance,), {"factory": Stops}))


def test_progress_tells_what_runs() -> None:
    told: list[str] = []
    check_part("stem x", type("Suite", (StemConformance,), {"factory": Explodes}), told.append)
    assert told == [f"stem x: builds (1 of {N})", f"stem x: tokens (2 of {N})"]


N = len(checks_of(StemConformance))


def test_the_table_counts_what_ran() -> None:
    results = [
        Result("stem a", "builds", True, ""),
        Result("stem a", "copy", False, "why"),
        Result("stem b", "", None, "not checked"),
    ]
    assert table(results) == (
        "stem a\n  pass  builds\n  FAIL  copy    why\n\nstem b\n  -             not checked\n\n"
        "1 of 2 checks pass"
    )


ROOT = Path(__file__).parents[2]


def example(monkeypatch: pytest.MonkeyPatch, page: str, name: str) -> Any:
    """A class from the first Python block of a page that has it, without its `register`."""
    blocks = (ROOT / page).read_text().split("```python\n")[1:]
    code = next(b for b in blocks if f"class {name}(" in b).split("```")[0]
    names: dict[str, Any] = {}
    exec("from torch import nn; import torch.nn.functional as F", names)
    exec("from __future__ import annotations\nfrom hybridvit.contracts import *\n" + code, names)
    module = types.ModuleType("example")  # where the registry looks types up
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, "example", module)
    names[name].__module__ = "example"
    return names[name]


def test_the_examples_of_the_pages_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    stem = example(monkeypatch, "CONTRIBUTING.md", "SpaceToDepth")
    assert failures(StemConformance, stem, slow=False) == {}
    objective = example(monkeypatch, "docs/own-stem.md", "Brightness")
    assert failures(ObjectiveConformance, objective, slow=False) == {}


def linear(*, dim: int) -> Stem:
    return LinearStem(dim=dim, patch=8)


class TestAFunction(StemConformance):
    """A plain function as the factory becomes no method."""

    factory = linear
    test_compile = None  # left out


class TestAPartial(StemConformance):
    factory = functools.partial(LinearStem, patch=8)
    test_compile = None


class TestAClass(StemConformance):
    factory = LinearStem
    args = {"patch": 4}  # noqa: RUF012
    test_compile = None


def test_the_classes_above_have_all_checks_but_one() -> None:
    for suite in (TestAFunction, TestAPartial, TestAClass):
        assert set(checks_of(StemConformance)) - set(checks_of(suite)) == {"test_compile"}
    assert TestAFunction().name == "linear"
    assert TestAClass().fresh().patch_px == 4
    assert isinstance(TestAPartial().fresh(), nn.Module)
