"""A process that trains some configs one after the other, as torchrun starts several of it:
training_ranks.py CASES.json FOLDER, where cases are lists of overrides by name."""

import json
import sys
from pathlib import Path

from hybridvit import config
from hybridvit.engine.run import train

if __name__ == "__main__":
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for name, overrides in cases.items():
        settings = config.load("digits.yaml", overrides)
        outcome = train(settings, name=name, out=folder / name, show=False)
        print(name, outcome.status, outcome.message, flush=True)
