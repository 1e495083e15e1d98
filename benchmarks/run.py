"""Measure cases side by side: python benchmarks/run.py --case supervised-32-4

Contestants are processes of their own that take turns, round after round. A line of JSON a case is
appended to a file of results, of which table.py makes the table of the README.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import machine
import results
from cases import CASES
from contestant import Process

from hybridvit.engine.device import bf16_slowdown
from hybridvit.engine.idle import BUSY, SECONDS, busy_seconds, check_unused, refuse

TRIES = 5  # at a turn that something else disturbs
SETTLING = 20  # half seconds to wait between turns


def main(argv: list[str] | None = None) -> int:
    """Measure the cases that are named; 1 where contestants are missing, 2 where cases are."""
    arguments = parser().parse_args(argv)
    if arguments.list:
        for name, case in CASES.items():
            print(f"{name:24} {case.device:5} {case.title}: {', '.join(case.contestants)}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that contestants are ended, too
    code = 0
    for name in arguments.case:
        try:
            code = max(code, 0 if run_case(name, arguments) else 1)
        except ValueError as error:  # the other cases may go well
            print(f"benchmarks: {name}: {error}", file=sys.stderr)
            code = 2
    return code


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__)
    what = top.add_mutually_exclusive_group(required=True)
    what.add_argument("--case", action="append", choices=CASES, metavar="NAME", help="see --list")
    what.add_argument("--list", action="store_true", help="the cases and their contestants")
    top.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    top.add_argument("--seconds", type=float, default=10.0, help="length of a turn")
    top.add_argument("--out", type=Path, help="default: benchmarks/results/<device>.jsonl")
    top.add_argument("--beside-load", action="store_true", help="measure a busy machine, too")
    return top


def run_case(name: str, arguments: argparse.Namespace) -> bool:
    """Measure a case, print and keep its line; whether no contestant was missing."""
    line = {
        "case": name,
        **machine.describe(),
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        **measure(name, arguments.rounds, arguments.seconds, arguments.beside_load),
    }
    folder = Path(__file__).parent / "results"
    out = arguments.out or folder / f"{machine.name(line['machine'])}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    for row in line["rows"]:
        numbers = f"{row['median']:.4g} [{row['min']:.4g}, {row['max']:.4g}]"
        print(f"{name}: {row['what']}, {row['kind']} {row['against']}: {numbers}", flush=True)
    return not line["skipped"]


def measure(case: str, rounds: int, seconds: float, beside_load: bool) -> dict[str, Any]:
    """Rates of all contestants, in turn.

    Raises:
        ValueError: other processes use the machine, or no contestant can be measured here.
    """
    if rounds < 1:
        raise ValueError(f"--rounds {rounds} should be at least 1")
    if not beside_load:
        check_unused()
    with contestants(case) as (processes, skipped):
        if not processes:
            reasons = "; ".join(sorted(set(skipped.values())))
            raise ValueError(f"no contestant can be measured: {reasons}")
        rates: dict[str, list[float]] = {name: [] for name in processes}
        most = 0.0
        for number in range(rounds):
            for name, process in processes.items():
                rate, others = turn(process, seconds, beside_load)
                rates[name].append(rate)
                most = max(most, others)
                unit = CASES[case].contestants[name].job.unit
                print(f"{case}: round {number + 1}, {name}: {rate:.5g} {unit}", flush=True)
        found = {
            name: {
                "unit": CASES[case].contestants[name].job.unit,
                "rates": rates[name],
                **results.spread(rates[name]),
                **process.ask(do="report"),
            }
            for name, process in processes.items()
        }
    return {
        "other_load": round(most, 3),  # cores that something else used, at the most
        "contestants": found,
        "skipped": skipped,
        "rows": results.rows(CASES[case], found),
    }


@contextmanager
def contestants(case: str) -> Iterator[tuple[dict[str, Process], dict[str, str]]]:
    """The contestants of a case, ready one after the other; and why some are missing."""
    processes, skipped = {}, {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        slowdown = bf16_slowdown()
        for name, contestant in CASES[case].contestants.items():
            if slowdown and contestant.in_bf16:
                skipped[name] = "this CPU is far slower in bf16 than in float32"
                print(f"{case}: without {name}: {skipped[name]}", flush=True)
                continue
            started = time.perf_counter()
            process = stack.enter_context(closing(Process(case, name, contestant, folder)))
            answer = process.ask(do="build")
            took = time.perf_counter() - started
            if "skipped" in answer:
                process.close()
                skipped[name] = answer["skipped"]
                print(f"{case}: without {name}: {answer['skipped']}", flush=True)
            else:
                processes[name] = process
                print(f"{case}: {name} is ready after {took:.0f} s", flush=True)
        yield processes, skipped


def turn(process: Process, seconds: float, beside_load: bool) -> tuple[float, float]:
    """A contestant's rate and how many cores others used meanwhile; again where that is too many.

    Raises:
        ValueError: something disturbs every try.
    """
    for _ in range(TRIES):
        if not beside_load:
            settle()
        started, before = time.perf_counter(), others(process)
        answer = process.ask(do="turn", seconds=seconds)
        used = (others(process) - before) / (time.perf_counter() - started)
        if "rate" not in answer:
            raise ValueError(f"{process.name} failed in its turn: {answer['skipped']}")
        if beside_load or used <= BUSY:
            return answer["rate"], used
    raise ValueError(
        f"other processes use {100 * used:.0f} % of a core while {process.name} is measured; "
        "wait for them, or add --beside-load"
    )


def settle() -> None:
    """Wait until the last contestant has done: a loader's workers fill their queues.

    Raises:
        ValueError: something goes on working.
    """
    for left in range(SETTLING, -1, -1):
        before = others()
        time.sleep(SECONDS)
        try:
            refuse(others() - before, SECONDS)
            return
        except ValueError:
            if left == 0:
                raise


def others(process: Process | None = None) -> float:
    """CPU time of all but this process, and a contestant whose turn it is, in seconds since the
    machine started."""
    its = process.cpu_seconds() if process else 0.0
    return busy_seconds() - its - time.process_time()


if __name__ == "__main__":
    sys.exit(main())
