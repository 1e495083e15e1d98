from __future__ import annotations

import json
import random

import pytest

from hybridvit.studies.choices import (
    Choice,
    Trial,
    at_edge,
    best,
    from_plain,
    to_plain,
    tried_in_words,
    warning,
)


def choice(values: list[object], results: list[float | None], chosen: object) -> Choice:
    trials = tuple(
        Trial(f"cell-{i}", {"optim.lr": value}, result)  # type: ignore[dict-item]
        for i, (value, result) in enumerate(zip(values, results, strict=True))
    )
    return Choice("linear", "val/accuracy", trials, {"optim.lr": chosen})  # type: ignore[dict-item]


def test_the_best_by_brute_force() -> None:
    draw = random.Random(0)
    for _ in range(200):
        results = [draw.choice([None, 0.0, 0.25, 0.5, 1.0]) for _ in range(draw.randint(1, 5))]
        found = best(choice(list(range(len(results))), results, 0).trials)
        scored = [r for r in results if r is not None]
        if not scored:
            assert found is None
        else:
            assert found == {"optim.lr": results.index(max(scored))}


@pytest.mark.parametrize(
    ("values", "chosen", "keys"),
    [
        ([1e-4, 1e-3, 1e-2], 1e-3, []),
        ([1e-4, 1e-3, 1e-2], 1e-2, ["optim.lr"]),
        ([1e-3, 1e-4, 1e-2], 1e-4, ["optim.lr"]),  # whatever the order
        ([1e-3, 1e-4, 1e-2], 1e-3, []),
        ([1, 2.0], 2.0, ["optim.lr"]),  # of two values, each is an edge
        (["adamw", "sgd"], "sgd", []),  # names have none
        ([True, False], True, []),
    ],
)
def test_the_edge_of_what_was_tried(values: list[object], chosen: object, keys: list[str]) -> None:
    found = choice(values, [0.5] * len(values), chosen)
    assert at_edge(found) == keys
    assert (warning(found) is None) == (keys == [])


def test_a_rate_that_diverged_is_no_edge_of_a_smaller_one() -> None:
    found = choice([1e-3, 1e-2, 1e-1], [0.5, 0.7, None], 1e-2)
    assert warning(found) is None
    assert tried_in_words(found) == (
        "optim.lr=0.001: 50.0 %; optim.lr=0.01: 70.0 %; optim.lr=0.1: diverged"
    )
    assert warning(choice([1e-3, 1e-2], [0.5, 0.7], 1e-2)) == (
        "The best of what linear tried is at the edge (optim.lr=0.01 of 0.001 to 0.01): a better "
        "value may lie beyond."
    )


def test_choices_are_read_as_they_were_written() -> None:
    found = [choice([1e-3, 1], [None, 0.25], 1), choice(["adamw", "sgd"], [0.5, 0.5], "sgd")]
    assert from_plain(json.loads(json.dumps(to_plain(found)))) == found


@pytest.mark.parametrize(
    "content",
    [
        None,
        {},
        [3, None, {}],
        [{"label": "a", "metric": "b", "trials": 3, "chosen": {}}],
        [{"label": "a", "metric": "b", "trials": [], "chosen": {"optim.lr": [1]}}],
        [{"label": "a", "metric": "b", "trials": [{"cell": 3}], "chosen": {"optim.lr": 1}}],
        [{"label": "a", "metric": "b", "trials": [], "chosen": [1]}],
        [{"label": "a", "metric": "b", "trials": [], "chosen": {"data": 1}}],
    ],
)
def test_what_is_unsound_is_left_out(content: object) -> None:
    assert from_plain(content) == []


def test_a_number_of_400_digits_is_none() -> None:
    assert warning(choice([1e-3, 10**400], [0.5, 0.5], 10**400)) is None
    trial = {"cell": "c", "values": {"optim.lr": 1e-3}, "result": 10**400}
    content = {"label": "a", "metric": "b", "trials": [trial], "chosen": {"optim.lr": 1e-3}}
    assert from_plain([content])[0].trials[0].result is None
