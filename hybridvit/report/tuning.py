"""What each arm of a study tried on validation before its seeds ran, and what it took."""

from __future__ import annotations

from collections.abc import Sequence

from hybridvit.studies.choices import Choice, tried_in_words, values_in_words, warning

HEADINGS = ("arm", "takes", "by", "what it tried")


def keys(choices: Sequence[Choice]) -> tuple[str, ...]:
    """The config keys that arms chose."""
    return tuple(dict.fromkeys(key for choice in choices for key in choice.chosen))


def table(choices: Sequence[Choice]) -> list[tuple[str, ...]]:
    """Cells under `HEADINGS` of each arm that chose."""
    return [(c.label, values_in_words(c.chosen), c.metric, tried_in_words(c)) for c in choices]


def note(choices: Sequence[Choice]) -> str:
    """How it was done."""
    return (
        f"Every arm tried the same values of {' and '.join(keys(choices))} before its seeds ran, "
        "each once, for as long as its seeds train and with one seed that no result here has. It "
        "took the best on the validation images; the test images had no part in it."
    )


def warnings(choices: Sequence[Choice]) -> list[str]:
    """Of each arm whose best is at the edge of what it tried."""
    return [text for choice in choices if (text := warning(choice))]
