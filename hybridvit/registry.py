"""Registries of parts, built per run, and the plug-ins that add to them."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import math
import sys
import traceback
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import yaml

T = TypeVar("T")
CODE = ", code "  # between a plug-in's version and the digest of its code
QUOTES = 'text with a colon needs quotes, such as plugins=["foo:register"]'


@dataclass
class Registry(Generic[T]):
    """Factories of one kind of part by name.

    A factory's signature is its schema: keyword arguments with types and defaults; a type may be
    bounded, as in `Annotated[int, range(1, 9)]`. `given` names the arguments that the framework
    passes; all others may be set in a config.
    """

    kind: str
    given: tuple[str, ...] = ()
    factories: dict[str, Callable[..., T]] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, factory: Callable[..., T]) -> None:
        """Register a factory.

        Raises:
            ValueError: the name is taken; a parameter is `*args` or `**kwargs`, has no type, or
                one that a config cannot hold.
        """
        owner = f"{_unwrap(factory).__module__}.{_unwrap(factory).__qualname__}"
        if name in self.factories:
            raise ValueError(
                f"{self.kind} {name!r} is already registered by {self.owners[name]}; "
                f"{owner} needs another name"
            )
        for p in inspect.signature(factory).parameters.values():
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                raise ValueError(
                    f"{self.kind} {name!r} ({owner}) takes *{p.name}; name every argument instead, "
                    "so that a typo in a config is an error"
                )
            if p.name not in self.given and not _is_plain(_hint(factory, p)):
                raise ValueError(
                    f"{self.kind} {name!r} ({owner}): {p.name} needs a plain type that a config "
                    f"can hold, such as int, list[str] or float | None, not "
                    f"{type_name(_hint(factory, p))}"
                )
        self.factories[name] = factory
        self.owners[name] = owner

    def schema(self, name: str) -> dict[str, inspect.Parameter]:
        """The arguments that a config may set, with types and defaults.

        Raises:
            ValueError: no such part.
        """
        if name not in self.factories:
            raise ValueError(
                f"unknown {self.kind} {name!r}{suggest(name, self.factories)}; "
                f"choose from {', '.join(sorted(self.factories))}"
            )
        factory = self.factories[name]
        return {
            key: p.replace(annotation=_hint(factory, p))
            for key, p in inspect.signature(factory).parameters.items()
            if key not in self.given
        }

    def resolve(self, name: str, args: dict[str, Any]) -> dict[str, Any]:
        """Config arguments checked against the signature, with all defaults filled in.

        Raises:
            ValueError: an unknown or missing argument, or a value of the wrong type.
        """
        schema = self.schema(name)
        for key, value in args.items():
            if key not in schema:
                raise ValueError(
                    f"{self.kind} {name!r} has no argument {key!r}{suggest(key, schema)}; "
                    f"valid: {', '.join(schema) or 'none'}"
                )
            if not fits(value, schema[key].annotation):
                wrong = mismatch(key, value, schema[key].annotation)
                raise ValueError(f"{self.kind} {name!r}: {wrong}")
        resolved = {}
        for key, p in schema.items():
            if key not in args and p.default is p.empty:
                raise ValueError(f"{self.kind} {name!r} needs {key} ({type_name(p.annotation)})")
            resolved[key] = args.get(key, p.default)
        return resolved

    def build(self, name: str, args: dict[str, Any], **given: Any) -> T:
        """Make a part from config arguments and what the framework gives it."""
        resolved = self.resolve(name, args)
        wanted = inspect.signature(self.factories[name]).parameters
        return self.factories[name](
            **resolved, **{key: value for key, value in given.items() if key in wanted}
        )

    def summary(self, name: str) -> str:
        """First line of the part's docstring."""
        factory = self.factories[name]
        own = None if factory.__doc__ == functools.partial.__doc__ else inspect.getdoc(factory)
        return (own or inspect.getdoc(_unwrap(factory)) or "").split("\n")[0]


@dataclass
class Parts:
    """The registries of one run; a plug-in's `register(parts)` adds to them."""

    datasets: Registry[Any] = field(
        default_factory=lambda: Registry("dataset"),
    )
    stems: Registry[Any] = field(default_factory=lambda: Registry("stem", given=("dim",)))
    encoders: Registry[Any] = field(default_factory=lambda: Registry("encoder", given=("grid",)))
    objectives: Registry[Any] = field(
        default_factory=lambda: Registry("objective", given=("model", "data", "targets"))
    )
    targets: Registry[Any] = field(
        default_factory=lambda: Registry("target", given=("model", "data"))
    )


def load_plugins(parts: Parts, names: list[str]) -> dict[str, str]:
    """Let each plug-in add its parts; returns the version of each and a digest of its code, by
    which a run that other code began is told.

    A name with a colon is `module:function` on the Python path (the working directory included),
    any other the name of an installed entry point in the group `hybridvit.plugins`.

    Raises:
        ValueError: the plug-in cannot be found, imported or called.
    """
    versions = {}
    for name in names:
        try:
            register, versions[name] = _from_path(name) if ":" in name else _from_entry_point(name)
            register(parts)
        except ValueError:
            raise
        except Exception as error:  # a stranger's module may raise anything
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = "" if isinstance(error, SyntaxError) else f"; {last.filename}, {last.lineno}"
            raise ValueError(
                f"plug-in {name!r} cannot be loaded ({type(error).__name__}: {error}{where})"
            ) from error
    return versions


def suggest(name: str, valid: typing.Iterable[str]) -> str:
    """', did you mean 'x'?', or nothing."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def type_name(annotation: Any) -> str:
    """A type in the words of a config: `int or null`, `list of int`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (Any, inspect.Parameter.empty):
        return "any"
    if annotation is type(None):
        return "null"
    if origin is Annotated:
        bounds = [f" from {r[0]:,} to {r[-1]:,}" for r in args[1:] if isinstance(r, range)]
        return type_name(args[0]) + "".join(bounds)
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(type_name, args))
    if origin is tuple and args[-1] is not Ellipsis:
        return f"list [{', '.join(map(type_name, args))}]"
    if origin in (list, tuple):
        of = type_name(args[0]).replace("one of", "some of")
        return "list" if args[0] is Any else f"list of {of}"
    if origin is dict:
        return "section" if args[1] is Any else f"section {{key: {type_name(args[1])}}}"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def mismatch(key: str, value: Any, annotation: Any) -> str:
    """What a value that does not fit should be, and how it would be written."""
    wanted, hint = type_name(annotation), ""
    if fits(_finite(value), annotation):
        wanted = "a finite number" if isinstance(value, float) else f"{wanted}, all finite"
    elif fits([value], annotation):
        written = yaml.safe_dump([value], default_flow_style=True, width=math.inf).strip()
        hint = f", such as {written}"
    elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
        hint = f"; {QUOTES}" if fits([str(v) for v in value], annotation) else ""
    return f"{key}={value!r} should be {wanted}{hint}"


def _from_path(name: str) -> tuple[Callable[[Parts], None], str]:
    module_name, _, function = name.partition(":")
    if not (module_name and function):
        raise ValueError(f"plug-in {name!r} should be module:function, e.g. my_stem:register")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"plug-in {name!r}: cannot import {module_name!r} ({error}); "
            "it must be on the Python path or in the working directory"
        ) from None
    if not hasattr(module, function):
        raise ValueError(f"plug-in {name!r}: module {module_name!r} has no {function!r}")
    version = str(getattr(module, "__version__", "unversioned"))
    return getattr(module, function), version + _code(_outermost(module_name))


def _from_entry_point(name: str) -> tuple[Callable[[Parts], None], str]:
    found = {e.name: e for e in importlib.metadata.entry_points(group="hybridvit.plugins")}
    if name not in found:
        raise ValueError(
            f"plug-in {name!r} is not installed{suggest(name, found)}; installed: "
            f"{', '.join(sorted(found)) or 'none'} (or give module:function)"
        )
    register, dist = found[name].load(), found[name].dist
    version = dist.version if dist else "unversioned"
    return register, version + _code(_outermost(found[name].module))


@functools.cache  # what runs is what was imported, whatever becomes of its file
def _code(module: types.ModuleType) -> str:
    """`, code ` and eight hex digits of the SHA-256 of a module's file, or of all Python files of a
    package; nothing where there are no files to read, as in a notebook."""
    file = getattr(module, "__file__", None)
    if file is None:
        return ""
    files, folder = [Path(file)], Path(file).parent
    if hasattr(module, "__path__"):
        found = (path.relative_to(folder) for path in folder.rglob("*.py"))
        shown = [p for p in found if not any(part.startswith(".") for part in p.parts)]
        files = [folder / path for path in sorted(shown) if (folder / path).is_file()]
    digest = hashlib.sha256()
    try:
        for path in files:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    except OSError:  # inside an archive
        return ""
    return f"{CODE}{digest.hexdigest()[:8]}" if files else ""


def _outermost(module_name: str) -> types.ModuleType:
    """The module, or the first package above it that is no mere namespace."""
    names = module_name.split(".")
    above = [sys.modules[".".join(names[: n + 1])] for n in range(len(names))]
    return next((m for m in above if getattr(m, "__file__", None)), above[-1])


def _unwrap(factory: Callable[..., Any]) -> Any:
    return getattr(factory, "func", factory)  # functools.partial


def _hint(factory: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    # `from __future__ import annotations` leaves strings. Only the parameters that a config may
    # set are evaluated: those the framework gives may be typed by imports for checkers alone.
    annotation = parameter.annotation
    if isinstance(annotation, str):
        return eval(annotation, vars(sys.modules[_unwrap(factory).__module__]))
    return annotation


def _is_plain(annotation: Any) -> bool:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal or annotation in (bool, int, float, str, type(None), Any):
        return True
    if origin is Annotated:
        return _is_plain(args[0])
    containers = (list, tuple, dict, typing.Union, types.UnionType)
    return origin in containers and all(_is_plain(a) for a in args if a is not Ellipsis)


def _finite(value: Any) -> Any:
    """The value with 0 for every float."""
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return 0.0 if isinstance(value, float) else value


def fits(value: Any, annotation: Any) -> bool:
    """Whether a YAML value has an annotated type; ints pass as floats, lists as tuples."""
    if annotation is Any:
        return True
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return fits(value, args[0]) and all(value in r for r in args[1:] if isinstance(r, range))
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in args)
    if origin is typing.Literal:
        return value in args and type(value) in {type(a) for a in args}
    if origin is tuple and args[-1] is not Ellipsis:
        of_length = isinstance(value, list | tuple) and len(value) == len(args)
        return of_length and all(map(fits, value, args))
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(fits(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(v, args[1]) for v in value.values())
    if annotation is type(None):
        return value is None
    if annotation is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is annotation
