import importlib
import re
import sys
import types
import zipfile
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from hybridvit.registry import Parts, Registry, fits, load_plugins, mismatch, suggest, type_name


class Thing:
    """A thing of some size."""

    def __init__(self, *, dim: int, size: int = 3, kind: Literal["a", "b"] = "a") -> None:
        self.dim, self.size, self.kind = dim, size, kind


def make() -> Registry[Thing]:
    registry: Registry[Thing] = Registry("thing", given=("dim",))
    registry.add("thing", Thing)
    return registry


def test_resolve_fills_in_defaults_but_not_what_the_framework_gives() -> None:
    assert make().resolve("thing", {"size": 5}) == {"size": 5, "kind": "a"}


def test_build_passes_both() -> None:
    thing = make().build("thing", {"kind": "b"}, dim=7, unwanted=1)
    assert (thing.dim, thing.size, thing.kind) == (7, 3, "b")


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("thong", {}, r"unknown thing 'thong', did you mean 'thing'\?; choose from thing"),
        ("thing", {"sise": 1}, r"no argument 'sise', did you mean 'size'\?; valid: size, kind"),
        ("thing", {"dim": 1}, r"no argument 'dim'"),
        ("thing", {"size": "big"}, r"size='big' should be int"),
        ("thing", {"size": True}, r"size=True should be int"),
        ("thing", {"size": 1.5}, r"size=1.5 should be int"),
        ("thing", {"kind": "c"}, r"kind='c' should be"),
    ],
)
def test_errors_name_the_value_and_the_valid_ones(
    name: str, args: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make().resolve(name, args)


def test_a_missing_argument_is_an_error() -> None:
    registry: Registry[Thing] = Registry("thing")
    registry.add("thing", Thing)
    with pytest.raises(ValueError, match=r"thing 'thing' needs dim \(int\)"):
        registry.resolve("thing", {})


def test_registering_a_name_twice_names_the_first_owner() -> None:
    with pytest.raises(ValueError, match=r"already registered by .*test_registry\.Thing"):
        _add(make(), "thing", Thing)


def _add(registry: Registry[Thing], name: str, factory: type[Thing]) -> None:
    registry.add(name, factory)


def test_open_ended_arguments_are_refused() -> None:
    def loose(**kwargs: int) -> Thing:
        return Thing(dim=1)

    with pytest.raises(ValueError, match="name every argument"):
        make().add("loose", loose)


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, float, True),
        (True, float, False),
        (None, int | None, True),
        ("x", int | None, False),
        ([1, 2], tuple[int, ...], True),
        ([1, "a"], tuple[int, str], True),
        (["a", 1], tuple[int, str], False),
        ([1, 2, 3], tuple[int, int], False),
        (3, tuple[int, int], False),
        ([1, "2"], list[int], False),
        ({"a": 1.5}, dict[str, float], True),
        ({"a": "b"}, dict[str, float], False),
        (1, Literal[1, 2], True),
        (True, Literal[1, 2], False),
        (1, Annotated[int, range(1, 9)], True),
        (9, Annotated[int, range(1, 9)], False),
        (True, Annotated[int, range(1, 9)], False),
        (None, Annotated[int, range(1, 9)] | None, True),
        (float("nan"), float, False),
    ],
)
def test_fits(value: object, annotation: object, expected: bool) -> None:
    assert fits(value, annotation) is expected


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (int, "int"),
        (Any, "any"),
        (int | None, "int or null"),
        (Annotated[int, range(1, 1025)], "int from 1 to 1,024"),
        (Literal["knn", "linear"], "one of 'knn', 'linear'"),
        (Literal["knn", "linear"] | None, "one of 'knn', 'linear' or null"),
        (list[Literal["knn", "linear"]], "list of some of 'knn', 'linear'"),
        (list[Any], "list"),
        (list, "list"),
        (tuple[float, ...], "list of float"),
        (tuple[float, float], "list [float, float]"),
        (list[list[int]], "list of list of int"),
        (dict[str, float], "section {key: float}"),
        (dict[str, Any], "section"),
    ],
)
def test_types_are_told_in_plain_words(annotation: object, expected: str) -> None:
    assert type_name(annotation) == expected


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1.5, int, "int"),
        (float("nan"), float, "a finite number"),
        (float("inf"), float | None, "a finite number"),
        (float("nan"), int, "int"),
        ([1, float("nan")], list[float], "list of float, all finite"),
        ({"a": float("inf")}, dict[str, float], "section {key: float}, all finite"),
        ("a", list[str], "list of str, such as [a]"),
        ("a: b", list[str], "list of str, such as ['a: b']"),
        (0.5, tuple[float, ...] | None, "list of float or null, such as [0.5]"),
        (0.5, list[str], "list of str"),
        ([{"a": 1}], list[int], "list of int"),
    ],
)
def test_a_mismatch_shows_how_the_value_is_written(
    value: object, annotation: object, expected: str
) -> None:
    assert mismatch("x", value, annotation) == f"x={value!r} should be {expected}"


def test_text_that_yaml_took_apart_at_its_colon_needs_quotes() -> None:
    for value in ({"foo": None}, {"foo": "register"}):
        said = mismatch("plugins", [value], list[str])
        assert said.endswith('; text with a colon needs quotes, such as plugins=["foo:register"]')


def test_a_range_is_part_of_an_arguments_type() -> None:
    def bounded(*, size: Annotated[int, range(1, 9)] = 3) -> None: ...

    registry: Registry[None] = Registry("thing")
    registry.add("bounded", bounded)
    assert registry.resolve("bounded", {"size": 8}) == {"size": 8}
    with pytest.raises(ValueError, match="thing 'bounded': size=9 should be int from 1 to 8"):
        registry.resolve("bounded", {"size": 9})


def test_suggest_is_silent_when_nothing_is_near() -> None:
    assert suggest("zebra", ["linear", "resnet"]) == ""


def test_plugin_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "local_stems.py").write_text(
        "__version__ = '3.1'\n"
        "class Mine:\n"
        "    '''Mine.'''\n"
        "def register(parts):\n"
        "    parts.stems.add('mine', Mine)\n"
    )
    monkeypatch.chdir(tmp_path)
    parts = Parts()
    versions = load_plugins(parts, ["local_stems:register"])
    assert re.fullmatch(r"3\.1, code [0-9a-f]{8}", versions["local_stems:register"])
    assert parts.stems.summary("mine") == "Mine."
    sys.modules.pop("local_stems")


def test_a_plugins_version_follows_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All Python files of a package, whichever of them the plug-in names, as they were imported;
    of a module its own; of a namespace what is below it."""
    package, space = tmp_path / "mine_as_package", tmp_path / "mine_space" / "inner"
    for folder in (package, space):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "layers.py").write_text("WIDTH = 1\n")
        (folder / "parts.py").write_text("def register(parts): pass\n")
    (tmp_path / "mine_alone.py").write_text("def register(parts): pass\n")
    (tmp_path / "mine_space" / "other.py").touch()
    monkeypatch.chdir(tmp_path)
    names = ["mine_as_package.parts:register", "mine_space.inner.parts:register"]
    names.append("mine_alone:register")

    def versions(*, anew: bool = True) -> list[str]:
        for name in [n for n in sys.modules if n.startswith("mine_")] if anew else []:
            sys.modules.pop(name)
        importlib.invalidate_caches()
        found = list(load_plugins(Parts(), names).values())
        assert all(re.fullmatch(r"unversioned, code [0-9a-f]{8}", text) for text in found)
        return found

    first = versions()
    assert versions() == first
    # What editors leave behind is no code.
    (package / ".#layers.py").symlink_to("me@here.1234")
    (package / ".ipynb_checkpoints").mkdir()
    (package / ".ipynb_checkpoints" / "parts.py").touch()
    (package / "folder.py").mkdir()
    (tmp_path / "mine_space" / "other.py").write_text("WIDTH = 3\n")
    assert versions() == first
    (package / "layers.py").write_text("WIDTH = 2\n")
    assert versions(anew=False) == first  # what runs is what was imported
    second = versions()
    assert [x != y for x, y in zip(first, second, strict=True)] == [True, False, False]
    (space / "layers.py").write_text("WIDTH = 2\n")
    (tmp_path / "mine_alone.py").write_text("def register(parts): return None\n")
    third = versions()
    assert [x != y for x, y in zip(second, third, strict=True)] == [False, True, True]


def test_a_plugin_without_files_has_no_code_to_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("mine_in_a_notebook")
    vars(module)["register"] = lambda parts: None
    monkeypatch.setitem(sys.modules, "mine_in_a_notebook", module)
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
        archive.writestr("mine_zipped.py", "def register(parts): pass\n")
    monkeypatch.syspath_prepend(tmp_path / "mine.zip")
    for name in ("mine_in_a_notebook:register", "mine_zipped:register"):
        assert load_plugins(Parts(), [name]) == {name: "unversioned"}
    sys.modules.pop("mine_zipped")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:register", "cannot import 'no_such_module'"),
        ("json:no_such_function", "has no 'no_such_function'"),
        (":", "plug-in ':' should be module:function"),
        (":register", "plug-in ':register' should be module:function"),
        ("json:", "plug-in 'json:' should be module:function"),
        ("no_such_plugin", "is not installed; installed: "),
    ],
)
def test_plugin_errors(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_plugins(Parts(), [name])
