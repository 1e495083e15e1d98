"""Commands of many runs: study, status, runs, report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hybridvit.commands import Commands, add, takes_overrides, warn_of_precision


def add_studies(commands: Commands) -> None:
    """All of them."""
    _study_options(add(commands, _study))
    status = add(commands, _status)
    status.add_argument("study", type=Path, help="its file, or its folder below runs/")
    listed = add(commands, _runs)
    listed.add_argument("paths", nargs="*", type=Path, help="run directories or folders of them")
    listed.add_argument("--remove", action="store_true", help="remove the runs at the paths")
    listed.add_argument("--yes", action="store_true", help="with --remove: do not ask")
    report = add(commands, _report)
    report.add_argument(
        "runs", nargs="+", type=Path, help="a study, or run directories, or folders of them"
    )
    where = "folder of the page (default: that of a study's runs, else report)"
    report.add_argument("--out", type=Path, help=where)
    report.add_argument("--title", help="default: the study's")


def _study_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=Path)
    takes_overrides(command, "key.path=value")
    command.add_argument("--out", type=Path, help="folder of the runs (default: runs/<study>)")
    command.add_argument(
        "--dry-run", action="store_true", help="show the grid and its costs, run nothing"
    )
    command.add_argument(
        "--probe", action="store_true", help="with --dry-run: time three steps an arm"
    )
    command.add_argument(
        "--only", metavar="PATTERN", help="the cells to run, such as 'resnet-*seed0'"
    )
    command.add_argument(
        "--retry-failed", action="store_true", help="run cells again that failed or diverged"
    )
    command.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="so many, to extend a study (docs/statistics.md: what looking in between costs)",
    )
    command.add_argument("--jobs", type=int, metavar="N", help="cells at once (default: as fit)")
    command.add_argument(
        "--executor", choices=("local", "slurm", "ray"), default="local", help="where cells run"
    )
    command.add_argument(
        "--executor-args", nargs="+", default=[], metavar="KEY=VALUE",
        help="of sbatch, such as partition=gpu time=240, or of ray: address, cpus, gpus",
    )  # fmt: skip


def _study(arguments: argparse.Namespace) -> int:
    """Run all cells of a study file, then write its report."""
    from hybridvit.launcher import check_alone
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
        warn_of_precision(*(cell.config for cell in chosen if cell.kind != "pixels"))
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
    """How far a study is, and how long it will take."""
    from hybridvit.studies.status import study_status

    print(study_status(arguments.study))
    return 0


def _runs(arguments: argparse.Namespace) -> int:
    """List run directories with their sizes, or remove them."""
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
    """Table and page from a study or any set of run directories."""
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
