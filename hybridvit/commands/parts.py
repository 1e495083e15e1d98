"""Commands of parts and of the machine: list, check, new, doctor."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hybridvit.commands import Commands, add, takes_overrides

if TYPE_CHECKING:
    from hybridvit.registry import Registry


def add_parts(commands: Commands) -> None:
    """All of them."""
    listing = add(commands, _list)
    kinds = "stems, objectives, targets, encoders, datasets, configs"
    listing.add_argument("kind", nargs="?", help=kinds)
    listing.add_argument("--plugin", action="append", default=[], help="module:function or name")
    check = add(commands, _check)
    check.add_argument("plugin", help="module:function, or the name of an installed entry point")
    takes_overrides(check, "part.key=value")
    new = add(commands, _new)
    new.add_argument("kind", choices=["stem"])
    new.add_argument("name", help="of the stem and its module, such as my_stem")
    new.add_argument("--out", type=Path, default=Path(), help="where its folder goes (default: .)")
    add(commands, _doctor)


def _list(arguments: argparse.Namespace) -> int:
    """The parts there are, with their arguments."""
    from hybridvit.build import make_parts, shipped_configs
    from hybridvit.registry import suggest

    parts, _ = make_parts(arguments.plugin)
    kinds: dict[str, Registry[object] | None] = {
        "stems": parts.stems,
        "objectives": parts.objectives,
        "targets": parts.targets,
        "encoders": parts.encoders,
        "datasets": parts.datasets,
        "configs": None,
    }
    if arguments.kind is not None and arguments.kind not in kinds:
        raise ValueError(
            f"no list of {arguments.kind!r}{suggest(arguments.kind, kinds)}; "
            f"choose from {', '.join(kinds)}"
        )
    for kind, registry in kinds.items():
        if arguments.kind not in (None, kind):
            continue
        print(f"{kind}:")
        if registry is None:
            for path in shipped_configs():
                print(f"  {path.name}")
        else:
            for name in registry.factories:
                print(_listed(registry, name))
    return 0


def _listed(registry: Registry[object], name: str) -> str:
    from hybridvit.registry import type_name

    lines = [f"  {name}  {registry.summary(name)}"]
    for key, p in registry.schema(name).items():
        default = "" if p.default is p.empty else f" = {p.default!r}"
        lines.append(f"      {key}: {type_name(p.annotation)}{default}")
    return "\n".join(lines)


def _check(arguments: argparse.Namespace) -> int:
    """Whether a plug-in's parts keep what their contracts promise."""
    from hybridvit.conformance.plugin import check_plugin, table

    def show(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    try:
        results = check_plugin(arguments.plugin, arguments.overrides, show)
    finally:
        show("")
    print(table(results))
    return 0 if all(r.passed is not False for r in results) else 1


def _new(arguments: argparse.Namespace) -> int:
    """Write a small installable package with a stem and a test that passes."""
    from hybridvit.scaffold import new_stem

    name: str = arguments.name
    folder = new_stem(name, arguments.out)
    print(f"{folder}\ncd {folder}; hybridvit check {name}:register; hybridvit train {name}.yaml")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    """Versions, threads, compiler, GPU, products and disk of this machine."""
    from hybridvit.engine.doctor import checks

    results = checks()
    for name, ok, text in results:
        print(f"{'ok  ' if ok else 'FAIL'}  {name:12} {text}")
    return 0 if all(ok for _, ok, _ in results) else 1
