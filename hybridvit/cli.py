"""The command line: parses, calls, prints. Heavy modules are imported by the command that needs
them, so that `--help` is immediate."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hybridvit.version import __version__

if TYPE_CHECKING:
    from hybridvit.registry import Registry

USER_ERROR = 2
EXIT_CODES = {"complete": 0, "diverged": 1, "stopped": 130}


def main(argv: list[str] | None = None) -> int:
    """Run a command; user mistakes end in one line and exit code 2."""
    arguments = parser().parse_args(argv)
    # What libraries warn of is not for the user of a command; tests see every warning.
    warnings.filterwarnings("ignore", module=r"(torch|lightning|timm|sklearn|PIL)")
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except ValueError as error:
        print(f"hybridvit: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        text = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        print(f"hybridvit: {text}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("hybridvit: stopped", file=sys.stderr)
        return EXIT_CODES["stopped"]


class _Parser(argparse.ArgumentParser):
    """Argument errors in one line, as all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"hybridvit: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """All commands."""
    top = _Parser(
        prog="hybridvit",
        description="Pure and hybrid vision transformers: swap the stem, swap the objective, "
        "compare honestly.",
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> _Parser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    def takes_config(command: _Parser) -> None:
        command.add_argument("config", help="a YAML file, or the name of a shipped one")
        command.add_argument("overrides", nargs="*", metavar="key.path=value")

    takes_config(add("train", _train, "train a config; started again, go on or say it is done"))
    takes_config(add("describe", _describe, "what a config is and costs, without training"))
    study = add("study", _study, "run all cells of a study file, then write its report")
    study.add_argument("file", type=Path)
    study.add_argument("overrides", nargs="*", metavar="key.path=value")
    study.add_argument("--out", type=Path, help="folder of the runs (default: runs/<study>)")
    report = add("report", _report, "table and page from any set of run directories")
    report.add_argument("runs", nargs="+", type=Path, help="run directories, or folders of them")
    report.add_argument("--out", type=Path, default=Path("report"), help="folder of the page")
    report.add_argument("--title", default="Pure and hybrid vision transformers")
    listing = add("list", _list, "the parts there are, with their arguments")
    kinds = "stems, objectives, targets, encoders, datasets, configs"
    listing.add_argument("kind", nargs="?", help=kinds)
    listing.add_argument("--plugin", action="append", default=[], help="module:function or name")
    add("doctor", _doctor, "versions, threads, compiler, GPU and disk of this machine")
    return top


def _train(arguments: argparse.Namespace) -> int:
    from hybridvit import config

    overrides = [o for o in arguments.overrides if not o.startswith("out=")]
    outs = [o.removeprefix("out=") for o in arguments.overrides if o.startswith("out=")]
    if outs and not outs[-1]:
        raise ValueError("out= needs a directory, such as out=runs/mine")
    loaded = config.load(arguments.config, overrides)

    from hybridvit.engine.run import train

    name = Path(arguments.config).stem
    outcome = train(loaded, name=name, out=Path(outs[-1]) if outs else None)
    print(f"{outcome.message}\n{outcome.path}")
    return EXIT_CODES[outcome.status]


def _describe(arguments: argparse.Namespace) -> int:
    from hybridvit import config

    loaded = config.load(arguments.config, arguments.overrides)

    from hybridvit.engine.describe import describe

    print(describe(loaded))
    return 0


def _study(arguments: argparse.Namespace) -> int:
    from hybridvit.studies.grid import read_study, run_study

    study = read_study(arguments.file, arguments.overrides)
    out = arguments.out or Path("runs") / study.name
    failed = run_study(study, out)

    from hybridvit.report import find_runs, text_table, write_report

    runs = find_runs([out / cell.name for cell in study.cells if (out / cell.name).is_dir()])
    page = write_report(runs, out, title=study.title, question=study.question, longer=study.longer)
    print(text_table(runs, longer=study.longer))
    print(f"\nreport: {page}")
    return 1 if failed else 0


def _report(arguments: argparse.Namespace) -> int:
    from hybridvit.report import find_runs, text_table, write_report

    runs = find_runs(arguments.runs)
    page = write_report(runs, arguments.out, title=arguments.title)
    print(text_table(runs))
    print(f"\nreport: {page}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
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


def _doctor(arguments: argparse.Namespace) -> int:
    from hybridvit.engine.doctor import checks

    results = checks()
    for name, ok, text in results:
        print(f"{'ok  ' if ok else 'FAIL'}  {name:12} {text}")
    return 0 if all(ok for _, ok, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
