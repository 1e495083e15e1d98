"""One contestant in a process of its own, told over a pipe when it is its turn.

Started by run.py as `worker.py CASE CONTESTANT`. Each line on its standard input is a request in
JSON, each answered by a line. Between requests it sleeps in reading the next.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

from cases import CASES, Command, Contestant, Input, Product, Training, Whole
from turns import Turns


def main() -> None:
    """Answer requests until there are no more."""
    # What libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    case, name = sys.argv[1:]
    turns: Turns | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if turns is None:
                turns = build(case, CASES[case].contestants[name])
                free_cached()
                answer: dict[str, Any] = {}
            elif request["do"] == "turn":
                answer = {"rate": turns.turn(request["seconds"])}
                free_cached()
            else:
                answer = {"memory_bytes": turns.memory(), **turns.found}
        except ModuleNotFoundError as error:
            answer = {"skipped": f"{error.name} is not installed"}
        except Exception as error:  # of a peer, too: the other contestants go on without it
            traceback.print_exc()
            text = " ".join(str(error).split())
            answer = {"skipped": f"{type(error).__name__}: {text[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


def free_cached() -> None:
    """Leave a GPU's memory to the next contestant."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def build(case: str, contestant: Contestant) -> Turns:
    """A contestant that is ready for its turns. Frameworks are imported here, each by itself."""
    import settings
    import turns

    job, framework, device = contestant.job, contestant.framework, turns.device().type
    overrides = settings.ours(case, contestant.setting, device)
    match job:
        case Command():
            import processes

            return processes.commands(job)
        case Whole():
            import processes

            compiled = contestant.setting == "compiled"
            return processes.training(framework, job, overrides, compiled=compiled)
        case Product():
            import product

            return product.product()
        case Training() if contestant.setting == "products":
            import product

            return product.products(job, overrides)
        case Training() if framework == "ours":
            import ours

            return ours.training(job, overrides)
        case Input() if framework == "ours":
            import ours

            return ours.inputs(job, overrides)
        case Training():
            import peers

            return peers.training(framework, job, settings.peers(contestant.setting, device))
        case Input():
            import loaders

            return loaders.inputs(framework, job)


if __name__ == "__main__":
    main()
