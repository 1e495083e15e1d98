"""The command line: parses, calls, prints. Heavy modules are imported by the command that needs
them, so that `--help` is immediate."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import gc
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hybridvit.version import __version__

if TYPE_CHECKING:
    from hybridvit.config import RunConfig
    from hybridvit.engine.batch_size import Trial
    from hybridvit.registry import Registry

USER_ERROR = 2
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
# Seconds in which rank 0 tells of a mistake: once one rank has ended, torchrun ends the others.
SILENCE = 5
EXIT_CODES = {"complete": 0, "diverged": 1, "stopped": 130}


def program() -> NoReturn:
    """`main` as a program. It leaves Python without taking it apart, which lasts a second or two
    where torch was imported."""
    # What torch's C++ warns of passes by Python's filters; it reads this when it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Imports make half a million objects that stay. Looking through all of them for garbage, time
    # and again, takes a sixth of a start; what is young is looked through as ever.
    gc.set_threshold(*gc.get_threshold()[:2], 1000)
    code = main()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # of a full disk or a closed pipe `main` has told
            stream.flush()
    os._exit(code)


def main(argv: list[str] | None = None) -> int:
    """Run a command; user mistakes end in one line and exit code 2."""
    arguments = parse(argv)
    # What libraries warn of is not for the user of a command; tests see every warning.
    warnings.filterwarnings("ignore", module=r"(torch|lightning|timm|sklearn|PIL)")
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        _check_launcher()
        code = run(arguments)
        sys.stdout.flush()
        return code
    except ValueError as error:
        if _tells():
            print(f"hybridvit: {' '.join(str(error).split())}", file=sys.stderr)
        else:
            time.sleep(SILENCE)
        return USER_ERROR
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        text = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        if error.errno == errno.ENOSPC:
            text = text.removeprefix(f"[Errno {errno.ENOSPC}] ")
            text += "; free some space and run the same command again"
        print(f"hybridvit: {text}", file=sys.stderr)
        return USER_ERROR
    except (RuntimeError, MemoryError) as error:
        if not _told_out_of_memory(error):
            raise
        return USER_ERROR
    except KeyboardInterrupt:
        print("hybridvit: stopped", file=sys.stderr)
        return EXIT_CODES["stopped"]


def _check_launcher() -> None:
    """See whether what a launcher of several processes sets is what it sets.

    Raises:
        ValueError: one of its variables is no number.
    """
    for name in LAUNCHER:
        said = os.environ.get(name, "0")
        if not (said.isascii() and said.isdecimal()):
            raise ValueError(
                f"the environment variable {name}={said!r} should be a whole number, which "
                "torchrun sets; unset it"
            )


def _tells() -> bool:
    """Whether this process tells of mistakes. Until ranks have joined, all make the same ones."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if alone or os.environ.get("RANK", "0") == "0":
        return True
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


def _told_out_of_memory(error: Exception) -> bool:
    from hybridvit.engine.device import out_of_memory

    if not out_of_memory(error):
        return False
    print(
        "hybridvit: out of memory; set train.accumulate higher, train.grad_checkpointing=true or "
        "train.batch_size lower (hybridvit bench CONFIG --find-batch-size tells what fits)",
        file=sys.stderr,
    )
    return True


class _Parser(argparse.ArgumentParser):
    """Argument errors in one line, as all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"hybridvit: {message}; see {self.prog} --help\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments of a command; overrides may also stand behind options, where argparse alone does
    not take them."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(r.startswith("-") for r in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


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
        command.add_argument("overrides", nargs="*", default=[], metavar="key.path=value")

    takes_config(add("train", _train, "train a config; started again, go on or say it is done"))
    takes_config(add("describe", _describe, "what a config is and costs, without training"))
    bench = add("bench", _bench, "how fast a config trains here, and what its steps spend")
    takes_config(bench)
    bench.add_argument(
        "--seconds", type=float, help="time to measure (default: 10; with batch sizes 2 each)"
    )
    bench.add_argument(
        "--find-batch-size",
        action="store_true",
        help="try batch sizes up to the largest that memory holds; the config stays as it is",
    )
    bench.add_argument("--beside-load", action="store_true", help="measure a busy machine, too")
    bench.add_argument("--json", action="store_true", help="one line of JSON instead of words")
    profile = add("profile", _profile, "a trace of training steps and their largest costs")
    takes_config(profile)
    profile.add_argument("--out", type=Path, default=Path("profile"), help="folder of the trace")
    profile.add_argument("--beside-load", action="store_true", help="trace a busy machine, too")
    study = add("study", _study, "run all cells of a study file, then write its report")
    study.add_argument("file", type=Path)
    study.add_argument("overrides", nargs="*", default=[], metavar="key.path=value")
    study.add_argument("--out", type=Path, help="folder of the runs (default: runs/<study>)")
    study.add_argument(
        "--dry-run", action="store_true", help="show the grid and its costs, run nothing"
    )
    study.add_argument(
        "--probe", action="store_true", help="with --dry-run: time three steps an arm"
    )
    study.add_argument(
        "--only", metavar="PATTERN", help="the cells to run, such as 'resnet-*seed0'"
    )
    study.add_argument(
        "--retry-failed", action="store_true", help="run cells again that failed or diverged"
    )
    study.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="so many, to extend a study (docs/statistics.md: what looking in between costs)",
    )
    study.add_argument("--jobs", type=int, metavar="N", help="cells at once (default: as fit)")
    study.add_argument(
        "--executor", choices=("local", "slurm", "ray"), default="local", help="where cells run"
    )
    study.add_argument(
        "--executor-args", nargs="+", default=[], metavar="KEY=VALUE",
        help="of sbatch, such as partition=gpu time=240, or of ray: address, cpus, gpus",
    )  # fmt: skip
    status = add("status", _status, "how far a study is, and how long it will take")
    status.add_argument("study", type=Path, help="its file, or its folder below runs/")
    listed = add("runs", _runs, "list run directories with their sizes, or remove them")
    listed.add_argument("paths", nargs="*", type=Path, help="run directories or folders of them")
    listed.add_argument("--remove", action="store_true", help="remove the runs at the paths")
    listed.add_argument("--yes", action="store_true", help="with --remove: do not ask")
    report = add("report", _report, "table and page from a study or any set of run directories")
    report.add_argument(
        "runs", nargs="+", type=Path, help="a study, or run directories, or folders of them"
    )
    where = "folder of the page (default: that of a study's runs, else report)"
    report.add_argument("--out", type=Path, help=where)
    report.add_argument("--title", help="default: the study's")
    listing = add("list", _list, "the parts there are, with their arguments")
    kinds = "stems, objectives, targets, encoders, datasets, configs"
    listing.add_argument("kind", nargs="?", help=kinds)
    listing.add_argument("--plugin", action="append", default=[], help="module:function or name")
    check = add("check", _check, "whether a plug-in's parts keep what their contracts promise")
    check.add_argument("plugin", help="module:function, or the name of an installed entry point")
    check.add_argument("overrides", nargs="*", default=[], metavar="part.key=value")
    new = add("new", _new, "write a small installable package with a stem and a test that passes")
    new.add_argument("kind", choices=["stem"])
    new.add_argument("name", help="of the stem and its module, such as my_stem")
    new.add_argument("--out", type=Path, default=Path(), help="where its folder goes (default: .)")
    add("doctor", _doctor, "versions, threads, compiler, GPU, products and disk of this machine")
    return top


def _train(arguments: argparse.Namespace) -> int:
    from hybridvit import config

    overrides = [o for o in arguments.overrides if not o.startswith("out=")]
    outs = [o.removeprefix("out=") for o in arguments.overrides if o.startswith("out=")]
    if outs and not outs[-1]:
        raise ValueError("out= needs a directory, such as out=runs/mine")
    loaded = config.load(arguments.config, overrides)

    from hybridvit.engine.run import train

    _warn_of_precision(loaded)
    name = Path(arguments.config).stem
    outcome = train(loaded, name=name, out=Path(outs[-1]) if outs else None)
    if outcome.message:
        print(f"{outcome.message}\n{outcome.path}")
    return EXIT_CODES[outcome.status]


def _describe(arguments: argparse.Namespace) -> int:
    from hybridvit import config

    loaded = config.load(arguments.config, arguments.overrides)

    from hybridvit.engine.describe import describe

    print(describe(loaded))
    return 0


def _study(arguments: argparse.Namespace) -> int:
    from hybridvit.engine.ranks import check_alone
    from hybridvit.studies.cells import named
    from hybridvit.studies.dry_run import dry_run
    from hybridvit.studies.executors.choice import choose
    from hybridvit.studies.grid import read_study
    from hybridvit.studies.planner import plan
    from hybridvit.studies.tuning import run_tuned

    check_alone()
    if arguments.probe and not arguments.dry_run:
        raise ValueError("--probe times the arms for --dry-run; give both")
    study = read_study(arguments.file, arguments.overrides, arguments.seeds)
    out = arguments.out or Path("runs") / study.name
    if arguments.executor == "local" and (arguments.probe or not arguments.dry_run):
        chosen = named(study.cells, arguments.only) or study.cells  # or tuning runs of all
        _warn_of_precision(*(cell.config for cell in chosen if cell.kind != "pixels"))
    if arguments.dry_run:
        here = arguments.jobs if arguments.executor == "local" else None
        print(dry_run(study, out, probe=arguments.probe, slots=here))
        return 0
    name, args = arguments.executor, arguments.executor_args
    executor = choose(name, args, threads=study.threads, slots=arguments.jobs, out=out)
    study = plan(study, out, executor)
    study, failed = run_tuned(
        study, out, only=arguments.only, retry_failed=arguments.retry_failed, executor=executor
    )

    from hybridvit.report import find_runs, text_table, write_report
    from hybridvit.report.looks import keep_look

    folders = [out / cell.name for cell in study.cells]
    folders = [folder for folder in folders if (folder / "run.json").is_file()]
    if not folders:  # all failed, or only tuning runs were asked for
        return 1 if failed else 0
    runs = find_runs(folders)
    keep_look(out, runs)
    page = write_report(runs, out, title=study.title, question=study.question, longer=study.longer)
    print(text_table(runs, longer=study.longer))
    print(f"\nreport: {page}")
    return 1 if failed else 0


def _status(arguments: argparse.Namespace) -> int:
    from hybridvit.studies.status import study_status

    print(study_status(arguments.study))
    return 0


def _runs(arguments: argparse.Namespace) -> int:
    from hybridvit.studies import directories

    if not arguments.remove:
        print(directories.listing(arguments.paths or [Path("runs")]))
        return 0
    if not arguments.paths:
        raise ValueError("--remove needs the paths of the runs to remove")
    found = directories.removable(arguments.paths)
    print(directories.listing(arguments.paths))
    if not arguments.yes:
        if not sys.stdin.isatty():
            raise ValueError(f"nothing removed; --yes removes these {len(found)} without asking")
        if input(f"remove these {len(found)}? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing removed")
            return 0
    directories.remove(found)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from hybridvit.report import find_runs, find_study, text_table, write_report
    from hybridvit.report.looks import keep_look

    study = find_study(arguments.runs[0]) if len(arguments.runs) == 1 else None
    runs = find_runs(study.runs if study else arguments.runs)
    if study:
        keep_look(study.folder, runs)
    out = arguments.out or (study.folder if study else Path("report"))
    title = arguments.title or (study and study.title) or "Pure and hybrid vision transformers"
    question, longer = (study.question, study.longer) if study else (None, None)
    page = write_report(runs, out, title=title, question=question, longer=longer)
    print(text_table(runs, longer))
    print(f"\nreport: {page}")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from hybridvit import config
    from hybridvit.engine.bench import bench, bench_text

    loaded = config.load(arguments.config, arguments.overrides)
    if arguments.seconds is not None and not 0 < arguments.seconds < math.inf:
        raise ValueError(f"--seconds {arguments.seconds:g} should be above 0, such as 10")
    _warn_of_precision(loaded)
    if arguments.find_batch_size:
        return _find_batch_size(loaded, arguments)
    seconds = 10.0 if arguments.seconds is None else arguments.seconds
    found = bench(loaded, seconds=seconds, beside_load=arguments.beside_load)
    print(json.dumps(found) if arguments.json else bench_text(found))
    return 0


def _find_batch_size(loaded: RunConfig, arguments: argparse.Namespace) -> int:
    from hybridvit.engine.batch_size import find_batch_size, result_text, trial_text

    def show(trial: Trial) -> None:
        if not arguments.json:
            print(trial_text(trial), flush=True)

    seconds = 2.0 if arguments.seconds is None else arguments.seconds
    beside = arguments.beside_load
    found = find_batch_size(loaded, seconds=seconds, beside_load=beside, tried=show)
    print(json.dumps(found) if arguments.json else result_text(found))
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    from hybridvit import config
    from hybridvit.engine.bench import profile

    loaded = config.load(arguments.config, arguments.overrides)
    _warn_of_precision(loaded)
    costs = profile(loaded, arguments.out, beside_load=arguments.beside_load)
    for name, share, kind in costs:
        print(f"{100 * share:5.1f} %  {name:40} {kind}")
    print(f"\ntrace: {arguments.out / 'trace.json'} (chrome://tracing or Perfetto)")
    return 0


def _warn_of_precision(*configs: RunConfig) -> None:
    from hybridvit.engine.device import bf16_slowdown

    found = sorted({c.train.precision for c in configs} - {"fp32"})
    slowdown = bf16_slowdown() if found and _tells() else None
    if slowdown is not None:
        print(
            f"warning: train.precision={' and '.join(found)}: this CPU takes {slowdown:.0f} times "
            "as long for matrix products in bf16 as in float32; set train.precision=fp32",
            file=sys.stderr,
        )


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


def _check(arguments: argparse.Namespace) -> int:
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
    from hybridvit.scaffold import new_stem

    name: str = arguments.name
    folder = new_stem(name, arguments.out)
    print(f"{folder}\ncd {folder}; hybridvit check {name}:register; hybridvit train {name}.yaml")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from hybridvit.engine.doctor import checks

    results = checks()
    for name, ok, text in results:
        print(f"{'ok  ' if ok else 'FAIL'}  {name:12} {text}")
    return 0 if all(ok for _, ok, _ in results) else 1


if __name__ == "__main__":
    program()
