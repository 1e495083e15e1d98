"""Commands of one config: train, describe, bench, profile."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from hybridvit.commands import Commands, add, takes_config, warn_of_precision

if TYPE_CHECKING:
    from hybridvit.config import RunConfig
    from hybridvit.engine.batch_size import Trial

EXIT_CODES = {"complete": 0, "diverged": 1, "stopped": 130}


def add_training(commands: Commands) -> None:
    """All of them."""
    takes_config(add(commands, _train))
    takes_config(add(commands, _describe))
    bench = add(commands, _bench)
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
    profile = add(commands, _profile)
    takes_config(profile)
    profile.add_argument("--out", type=Path, default=Path("profile"), help="folder of the trace")
    profile.add_argument("--beside-load", action="store_true", help="trace a busy machine, too")


def _train(arguments: argparse.Namespace) -> int:
    """Train a config; started again, go on or say it is done."""
    from hybridvit import config

    overrides = [o for o in arguments.overrides if not o.startswith("out=")]
    outs = [o.removeprefix("out=") for o in arguments.overrides if o.startswith("out=")]
    if outs and not outs[-1]:
        raise ValueError("out= needs a directory, such as out=runs/mine")
    loaded = config.load(arguments.config, overrides)

    from hybridvit.engine.run import train

    warn_of_precision(loaded)
    name = Path(arguments.config).stem
    outcome = train(loaded, name=name, out=Path(outs[-1]) if outs else None)
    if outcome.message:
        print(f"{outcome.message}\n{outcome.path}")
    return EXIT_CODES[outcome.status]


def _describe(arguments: argparse.Namespace) -> int:
    """What a config is and costs, without training."""
    from hybridvit import config

    loaded = config.load(arguments.config, arguments.overrides)

    from hybridvit.engine.describe import describe

    print(describe(loaded))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    """How fast a config trains here, and what its steps spend."""
    from hybridvit import config
    from hybridvit.engine.bench import bench, bench_text

    loaded = config.load(arguments.config, arguments.overrides)
    if arguments.seconds is not None and not 0 < arguments.seconds < math.inf:
        raise ValueError(f"--seconds {arguments.seconds:g} should be above 0, such as 10")
    warn_of_precision(loaded)
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
    """A trace of training steps and their largest costs."""
    from hybridvit import config
    from hybridvit.engine.bench import profile

    loaded = config.load(arguments.config, arguments.overrides)
    warn_of_precision(loaded)
    costs = profile(loaded, arguments.out, beside_load=arguments.beside_load)
    for name, share, kind in costs:
        print(f"{100 * share:5.1f} %  {name:40} {kind}")
    print(f"\ntrace: {arguments.out / 'trace.json'} (chrome://tracing or Perfetto)")
    return 0
