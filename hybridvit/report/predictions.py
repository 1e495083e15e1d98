"""What the trained models said of each test image, where run directories hold it.

`predictions.json` of a run: `{"schema": 1, "labels": [..], "predicted": {"test/accuracy": [..]}}`,
class numbers in the order of the test split, under the keys of the results. Older runs have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybridvit.report.runs import Run, load_json

if TYPE_CHECKING:
    import numpy as np

    Classes = np.ndarray[tuple[int], np.dtype[np.int32]]

MAX_PREDICTIONS = 32 << 20  # bytes of predictions.json


@dataclass(frozen=True, eq=False)
class Predictions:
    """The classes that a run's networks gave to the test images, by result, and the true ones."""

    labels: Classes
    predicted: dict[str, Classes]


def read_predictions(run: Run) -> Predictions | None:
    """What the run says of single test images; none where there is nothing sound."""
    if not run.is_complete or not (run.path / "predictions.json").exists():
        return None
    try:
        content = load_json(run.path, "predictions.json", MAX_PREDICTIONS)
    except ValueError:
        return None
    labels, predicted = _classes(content.get("labels")), content.get("predicted")
    if labels is None or not isinstance(predicted, dict):
        return None
    read = {key: _classes(value) for key, value in predicted.items()}
    sound = {k: v for k, v in read.items() if v is not None and len(v) == len(labels)}
    return Predictions(labels, sound)


def _classes(value: Any) -> Classes | None:
    """Class numbers; none for all else."""
    import numpy as np

    if not isinstance(value, list) or set(map(type, value)) != {int}:
        return None
    try:
        return np.array(value, np.int32)
    except OverflowError:
        return None
