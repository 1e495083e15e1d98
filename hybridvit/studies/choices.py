"""What tuning tried in an arm and what it chose: as plan.json holds it and in words. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hybridvit.studies.status import number

Value = bool | int | float | str | None


@dataclass(frozen=True)
class Trial:
    """A run of an arm with candidate values; `result` on validation is none where it diverged."""

    cell: str
    values: dict[str, Value]
    result: float | None


@dataclass(frozen=True)
class Choice:
    """The values of the tuned keys that an arm trains with, and all that it tried."""

    label: str
    metric: str
    trials: tuple[Trial, ...]
    chosen: dict[str, Value]

    @property
    def cells(self) -> tuple[str, ...]:
        """The runs that it rests on."""
        return tuple(trial.cell for trial in self.trials)


def best(trials: Sequence[Trial]) -> dict[str, Value] | None:
    """The values of the best result, of equal ones those listed first; none where all diverged."""
    scored = [trial for trial in trials if trial.result is not None]
    return max(scored, key=lambda t: t.result or 0.0).values if scored else None


def at_edge(choice: Choice) -> list[str]:
    """Keys whose chosen number is the least or the largest of those tried: a better one may lie
    beyond."""
    found = []
    for key, value in choice.chosen.items():
        tried = _numbers(choice, key)
        if len(set(tried)) > 1 and number(value) in (min(tried), max(tried)):
            found.append(key)
    return found


def values_in_words(values: dict[str, Value]) -> str:
    """Such as `optim.lr=0.001, optim.weight_decay=0.1`."""
    return ", ".join(f"{key}={_text(value)}" for key, value in values.items())


def tried_in_words(choice: Choice) -> str:
    """Each candidate with its result in per cent."""
    return "; ".join(
        f"{values_in_words(t.values)}: "
        + ("diverged" if t.result is None else f"{100 * t.result:.1f} %")
        for t in choice.trials
    )


def warning(choice: Choice) -> str | None:
    """That the best value is at the edge of what was tried, if it is."""
    keys = at_edge(choice)
    if not keys:
        return None
    ranges = []
    for key in keys:
        tried = _numbers(choice, key)
        ranges.append(f"{key}={_text(choice.chosen[key])} of {min(tried):g} to {max(tried):g}")
    return (
        f"The best of what {choice.label} tried is at the edge ({'; '.join(ranges)}): a better "
        "value may lie beyond."
    )


def to_plain(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """For plan.json."""
    return [asdict(choice) for choice in choices]


def from_plain(content: Any) -> list[Choice]:
    """What plan.json holds; whatever is unsound is left out."""
    found = (_choice(entry) for entry in content) if isinstance(content, list) else ()
    return [choice for choice in found if choice is not None]


def _choice(entry: Any) -> Choice | None:
    try:
        trials = tuple(
            Trial(str(t["cell"]), _values(t["values"]), number(t["result"]))
            for t in entry["trials"]
        )
        return Choice(str(entry["label"]), str(entry["metric"]), trials, _values(entry["chosen"]))
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def _values(content: dict[str, Any]) -> dict[str, Value]:
    sound = all(k.startswith("optim.") and isinstance(v, Value) for k, v in content.items())
    if not content or not sound:
        raise ValueError(f"{content!r} holds no values of the optimizer")
    return {str(key): value for key, value in content.items()}


def _numbers(choice: Choice, key: str) -> list[float]:
    return [n for t in choice.trials if (n := number(t.values.get(key))) is not None]


def _text(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
