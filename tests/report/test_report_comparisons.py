import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_directories import write_run
from scipy import stats

from hybridvit.report import find_runs, write_report
from hybridvit.report.arms import Comparison, compare, group
from hybridvit.report.comparisons import headings, notes, table
from hybridvit.report.examples import HEADINGS, all_paired, interval, paired
from hybridvit.report.examples import table as disagreement
from hybridvit.report.page import Report, without_empty_columns
from hybridvit.report.predictions import read_predictions
from hybridvit.report.runs import read_run
from hybridvit.report.study import Plan, read_plan
from hybridvit.report.tables import headline, in_words

PURE = [0.900, 0.909, 0.904]
HYBRID = [0.920, 0.930, 0.928]  # 2.0, 2.1, 2.4 points more: sd 0.2082


def write_pair(root: Path, hits: dict[str, list[np.ndarray]] | None = None) -> None:
    for stem, values in (("linear", PURE), ("conv", HYBRID)):
        for seed, value in enumerate(values):
            path = write_run(root, stem, seed=seed, results={"test/accuracy": value})
            if hits:
                write_predictions(path, {"test/accuracy": hits[stem][seed]})


def write_predictions(path: Path, hits: dict[str, np.ndarray], **changes: Any) -> None:
    """Predictions of images of classes 0 to 9, wrong ones being of the next class."""
    n = len(next(iter(hits.values())))
    labels = np.arange(n) % 10
    predicted = {k: ((labels + ~h) % 10).tolist() for k, h in hits.items()}
    content = {"schema": 1, "labels": labels.tolist(), "predicted": predicted} | changes
    (path / "predictions.json").write_text(json.dumps(content))


def compared(root: Path) -> list[Comparison]:
    return compare(group(find_runs([root])))


def lines_of(root: Path, smallest: float | None) -> list[tuple[str, ...]]:
    comparisons = compared(root)
    return table(comparisons, all_paired(comparisons), smallest)


def test_table_by_itself_and_among_all(tmp_path: Path) -> None:
    write_pair(tmp_path)
    for seed, value in enumerate([0.7, 0.91, 0.95]):
        write_run(tmp_path, "resnet", seed=seed, results={"test/accuracy": value})
    first, second = lines_of(tmp_path, None)
    se = math.sqrt(((2.0 - 6.5 / 3) ** 2 + (2.1 - 6.5 / 3) ** 2 + (2.4 - 6.5 / 3) ** 2) / 2 / 3)
    half = stats.t.isf(0.025, 2) * se
    # Of two claims, one is Holm's: its interval starts at zero, at 5 % / (2 * 2 - 1).
    far = stats.t.isf(0.05 / 3, 2) * se
    mean = 6.5 / 3
    assert first == (
        "conv / supervised against linear / supervised, test/accuracy",
        "3", "+2.2", "0.21", f"[{mean - half:.1f}, {mean + half:.1f}]", f"(0, {mean + far:.1f}]",
        "better", "", "stem",
    )  # fmt: skip
    assert second[6] == "not distinguishable"
    assert len(first) == len(headings(None))


def test_seeds_needed_are_those_of_the_deviation_alone(tmp_path: Path) -> None:
    write_pair(tmp_path)
    (line,) = lines_of(tmp_path, 0.5)
    assert headings(0.5)[-2] == "seeds for 0.5 points"

    # 0.5 points are 2.402 deviations of 0.20817.
    def power(n: int, std: float) -> float:
        return float(stats.nct.sf(stats.t.isf(0.025, n - 1), n - 1, 0.5 / std * math.sqrt(n)))

    number = int(line[-2].split()[0])
    assert power(number, 0.20817) >= 0.8 > power(number - 1, 0.20817)
    low, high = (int(x) for x in line[-2].split(" ", 1)[1].strip("[]").split(", "))
    assert low == 3
    worst = 0.20817 * math.sqrt(2 / stats.chi2.ppf(0.025, 2))
    assert power(high, worst) >= 0.8 > power(high - 1, worst)
    assert "The difference observed has no part in it" in " ".join(notes([line], 0.5))


def test_the_difference_observed_changes_no_number_of_seeds(tmp_path: Path) -> None:
    lines = []
    for shift in (0.0, 0.3):
        root = tmp_path / str(shift)
        for seed in range(3):
            write_run(root, seed=seed, results={"test/accuracy": PURE[seed] - shift})
            write_run(root, "conv", seed=seed, results={"test/accuracy": HYBRID[seed]})
        (line,) = lines_of(root, 0.5)
        lines.append(line)
    assert lines[0][-2] == lines[1][-2]
    assert lines[0][2] != lines[1][2]


def test_too_few_seeds_leave_cells_empty(tmp_path: Path) -> None:
    for stem in ("linear", "conv"):
        write_run(tmp_path, stem, results={"test/accuracy": 0.5})
    (line,) = lines_of(tmp_path, 1.0)
    assert line[1:] == ("1", "+0.0", "", "", "", "no interval", "", "", "stem")
    write_run(tmp_path, "resnet", seed=1, results={"test/accuracy": 0.5})
    lines = lines_of(tmp_path, 1.0)
    assert {len(line) for line in lines} == {len(headings(1.0))}


def test_plans_are_read_with_care(tmp_path: Path) -> None:
    write_pair(tmp_path / "study")
    runs = find_runs([tmp_path / "study"])
    assert read_plan(runs) == Plan()
    path = tmp_path / "study" / "plan.json"
    path.write_text(json.dumps({"schema": 1, "match": "flops", "smallest_difference": 0.5}))
    assert read_plan(runs) == Plan("flops", 0.5)
    text = write_report(runs, tmp_path / "out", title="t").read_text("utf-8")
    assert "seeds for 0.5 points" in text
    assert "seeds for 0.5 points" in (tmp_path / "out" / "report.md").read_text("utf-8")
    path.write_text('{"schema": 1, "baseline": {"stem": "linear", "lr": 3, "x": ["y"]}}')
    assert read_plan(runs) == Plan(baseline={"stem": "linear"})
    many = json.dumps({"schema": 1, "baseline": {"stem": "linear"}, "more": ["x" * 99] * 20_000})
    path.write_text(many)  # of hundreds of arms: two megabytes
    assert read_plan(runs) == Plan(baseline={"stem": "linear"})
    path.write_text('{"schema": 1, "looks": [3, "x", 5]}')
    assert read_plan(runs) == Plan(looks=(3, 5))
    text = write_report(runs, tmp_path / "out", title="t").read_text("utf-8")
    assert "Pages of this study were made with 3, then 5 seeds." in text
    path.write_text('{"schema": 1, "looks": [5]}')
    assert "Pages of this study" not in write_report(runs, tmp_path / "out", title="t").read_text()
    for bad in (
        '{"schema": 1, "looks": "3"}',
        '{"schema": 1, "smallest_difference": -1, "match": [1], "baseline": "stem"}',
        "[",
        "{}",
        '{"schema":9}',
    ):
        path.write_text(bad)
        assert read_plan(runs) == Plan()
    other = write_run(tmp_path / "other", seed=9)
    assert read_plan([*runs, read_run(other)]) == Plan()  # of no single study


def test_a_strangers_name_of_data_is_a_text(tmp_path: Path) -> None:
    for name in (["x"], {}, None, 3):
        write_run(tmp_path, results={"test/accuracy": 0.5}, config={"data": {"name": name}})
        compared(tmp_path)


def test_looks_count_the_seeds_that_are_compared(tmp_path: Path) -> None:
    write_pair(tmp_path)
    assert Report(find_runs([tmp_path]), tmp_path).seeds == 3
    write_run(tmp_path, "linear", seed=3, results={"test/accuracy": 0.9})  # conv has none yet
    assert Report(find_runs([tmp_path]), tmp_path).seeds == 3
    alone = tmp_path / "alone"
    for seed in range(3):
        write_run(alone, seed=seed, results={"test/accuracy": 0.5})
    assert Report(find_runs([alone]), alone).seeds is None


def test_arms_are_compared_with_the_baseline_that_is_like_them(tmp_path: Path) -> None:
    values: dict[tuple[str, str], list[float]] = {
        (kind, at): [0.5 + 0.1 * i + 0.01 * seed * (i + 1) for seed in range(3)]
        for i, (kind, at) in enumerate(
            [("none", "one"), ("learned", "one"), ("none", "all"), ("learned", "all")]
        )
    }
    for (kind, at), accuracies in values.items():
        for seed, accuracy in enumerate(accuracies):
            write_run(
                tmp_path, seed=seed, results={"test/accuracy": accuracy},
                folder=f"{kind}-{at}-{seed}", record={"arm": {"kind": kind, "at": at}},
                config={"encoder": {"args": {"kind": kind, "at": at}}},
            )  # fmt: skip
    arms = group(find_runs([tmp_path]))
    assert compare(arms) == []  # all have the same stem
    found = {(c.arm.label, c.other.label): c for c in compare(arms, baseline={"kind": "none"})}
    assert set(found) == {(f"learned / {at}", f"none / {at}") for at in ("one", "all")}
    for (left, right), c in found.items():
        a, b = (values[tuple(label.split(" / "))] for label in (left, right))  # type: ignore[index]
        assert c.alone is not None
        t = stats.ttest_rel(a, b).confidence_interval()
        assert (c.alone.low, c.alone.high) == pytest.approx((t.low, t.high))
        assert not in_words(c).startswith("hybrid")
    whole = compare(arms, baseline={"kind": "none", "at": "one"})
    assert [c.other.label for c in whole] == ["none / one"] * 3
    assert headline(whole)[0].startswith("Against none / one, 3 comparisons: ")
    assert headline(list(found.values()))[0].startswith("Against their baselines, 2 comparisons: ")


def test_of_two_passes_over_a_study_each_has_its_baseline(tmp_path: Path) -> None:
    for epochs in (1, 10):
        for kind in ("none", "learned"):
            write_run(
                tmp_path, results={"test/accuracy": 0.5}, folder=f"{kind}-{epochs}",
                record={"arm": {"kind": kind}},
                config={"train": {"epochs": epochs}, "encoder": {"args": {"kind": kind}}},
            )  # fmt: skip
    found = compare(group(find_runs([tmp_path])), baseline={"kind": "none"})
    assert len(found) == 2
    for c in found:
        assert c.arm.first.config["train"] == c.other.first.config["train"]
        assert c.other.first.arm == {"kind": "none"}


def test_folders_of_ones_own_are_other_data_wherever_known_sets_lie(tmp_path: Path) -> None:
    for name, count in (("image_folder", 2), ("digits", 1)):
        for i, root in enumerate(("/cats", "/dogs")):
            args = {"root": root, "download": bool(i)}
            write_run(
                tmp_path / name, seed=i, results={"test/accuracy": 0.5}, folder=str(i),
                config={"data": {"name": name, "args": args}},
            )  # fmt: skip
        assert len(group(find_runs([tmp_path / name]))) == count


def test_example_interval_is_paired_over_images_and_seeds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    n = 300
    easy = rng.random(n) < 0.8  # what one gets right, the other does, too
    hits = {
        stem: [easy ^ (rng.random(n) < noise) for _ in range(3)]
        for stem, noise in (("linear", 0.10), ("conv", 0.05))
    }
    write_pair(tmp_path, hits)
    (comparison,) = compared(tmp_path)
    found = paired(comparison)
    assert found is not None
    d = np.mean(hits["conv"], axis=0) - np.mean(hits["linear"], axis=0)
    assert np.subtract(found.arm, found.other) / found.seeds == pytest.approx(d)
    half = 1.96 * d.std() / math.sqrt(n)
    assert interval(found) == pytest.approx((d.mean() - half, d.mean() + half), abs=0.005)
    report = Report(find_runs([tmp_path]), tmp_path)
    assert report.comparisons[1][7].startswith("[")
    assert any(note.startswith("These trained models only") for note in report.comparison_notes)


def test_training_is_paired_with_the_untrained_predictions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hits = {"test/knn": rng.random(50) < 0.8, "untrained/test/knn": rng.random(50) < 0.4}
    for seed in range(3):
        path = write_run(tmp_path, "linear", "mae", seed,
                         {k: h.mean() for k, h in hits.items()})  # fmt: skip
        write_predictions(path, hits)
    (comparison,) = compared(tmp_path)
    assert comparison.kind == "training"
    low, high = interval(paired(comparison)) or (0, 0)
    assert low < hits["test/knn"].mean() - hits["untrained/test/knn"].mean() < high


def test_disagreement_by_hand(tmp_path: Path) -> None:
    ours, theirs = np.ones(40, bool), np.ones(40, bool)  # four images of each class
    ours[[0, 1]] = False  # of classes 0 and 1
    theirs[[7, 17, 27, 3]] = False  # three of class 7, one of class 3
    write_pair(tmp_path, {"conv": [ours] * 3, "linear": [theirs, theirs, np.ones(40, bool)]})
    (comparison,) = compared(tmp_path)
    headings, cells = disagreement([comparison], all_paired([comparison]))
    assert headings[len(HEADINGS) :] == tuple(f"class {k}, points" for k in range(10))
    # Nobody is right in all seeds where the other is right in none: linear's third is always right.
    assert cells[:7] == (
        "conv / supervised against linear / supervised, test/accuracy",
        "40", "4", "2", "34", "0", "2: 0, 1",
    )  # fmt: skip
    points = [-25.0, -25.0, 0, 100 * 2 / 3 / 4, 0, 0, 0, 100 * 2 / 4, 0, 0]
    assert cells[7:] == tuple(f"{x:+.1f}" for x in points)
    page = write_report(find_runs([tmp_path]), tmp_path / "out", title="t").read_text("utf-8")
    assert "Where they disagree" in page
    assert "| 4 | 2 | 34 | 0 | 2: 0, 1 |" in (tmp_path / "out" / "report.md").read_text("utf-8")


def test_of_many_classes_the_extremes_are_named(tmp_path: Path) -> None:
    labels = list(range(30)) * 2
    right, wrong = np.array(labels), (np.array(labels) + 1) % 30
    ours, theirs = right.copy(), right.copy()
    ours[[4, 34, 5]] = wrong[[4, 34, 5]]
    theirs[[17]] = wrong[17]
    for stem, said in (("linear", theirs), ("conv", ours)):
        for seed in range(3):
            path = write_run(tmp_path, stem, seed=seed, results={"test/accuracy": 0.5 + seed})
            content = {"schema": 1, "labels": labels}
            content["predicted"] = {"test/accuracy": said.tolist()}
            (path / "predictions.json").write_text(json.dumps(content))
    comparisons = compared(tmp_path)
    headings, cells = disagreement(comparisons, all_paired(comparisons))
    low, high = cells[len(HEADINGS) :]
    assert low.startswith("4: -100.0, 5: -50.0, 0: +0.0")
    assert high.startswith("17: +50.0, ")
    assert headings[-1] == "highest classes, points"


def test_columns_without_any_number_are_left_out(tmp_path: Path) -> None:
    assert without_empty_columns([("a", "b", "c"), ("1", "", "")]) == [("a",), ("1",)]
    write_pair(tmp_path)
    page = write_report(find_runs([tmp_path]), tmp_path / "out", title="t").read_text("utf-8")
    assert "these trained models only</th>" not in page


def test_configs_of_a_comparison_differ_in_what_it_says(tmp_path: Path) -> None:
    for stem, epochs in (("linear", 5), ("conv", 4)):
        for seed in range(3):
            write_run(tmp_path, stem, seed=seed, results={"test/accuracy": 0.5 + 0.1 * seed},
                      config={"train": {"epochs": epochs}})  # fmt: skip
            write_run(tmp_path, stem, "mae", seed, {"test/knn": 0.5, "untrained/test/knn": 0.4})
    ends = {line[0]: line[-1] for line in lines_of(tmp_path, None)}
    assert ends == {
        "conv / mae against linear / mae, test/knn": "stem",
        "conv / supervised against linear / supervised, test/accuracy": "stem, train.epochs",
        "linear / mae against its untrained encoder, test/knn": "nothing",
        "conv / mae against its untrained encoder, test/knn": "nothing",
    }


@pytest.mark.parametrize(
    "content",
    [
        "[",
        "{}",
        '{"schema": 2, "labels": [1], "predicted": {"test/accuracy": [1]}}',
        '{"schema": 1, "labels": [1, 2], "predicted": {"test/accuracy": [1]}}',
        '{"schema": 1, "labels": [1, true], "predicted": {"test/accuracy": [1, 2]}}',
        '{"schema": 1, "labels": [], "predicted": {"test/accuracy": []}}',
        '{"schema": 1, "labels": "12", "predicted": 3}',
        '{"schema": 1, "labels": [[1]], "predicted": {"test/accuracy": [NaN]}}',
    ],
)
def test_unsound_predictions_give_no_interval(tmp_path: Path, content: str) -> None:
    write_pair(tmp_path, {s: [np.ones(40, bool)] * 3 for s in ("linear", "conv")})
    (comparison,) = compared(tmp_path)
    assert paired(comparison) is not None
    assert interval(paired(comparison)) is None  # all images alike: no spread
    (comparison.arm.runs[0].path / "predictions.json").write_text(content)
    assert paired(comparison) is None


def test_other_test_images_and_missing_files_give_no_interval(tmp_path: Path) -> None:
    hits = np.arange(40) % 3 > 0
    write_pair(tmp_path, {"linear": [hits] * 3, "conv": [~hits] * 3})
    (comparison,) = compared(tmp_path)
    assert interval(paired(comparison)) is not None
    path = comparison.other.runs[2].path
    write_predictions(path, {"test/accuracy": hits}, labels=[9] * 40)
    assert interval(paired(comparison)) is None
    (path / "predictions.json").unlink()
    assert interval(paired(comparison)) is None
    assert read_predictions(read_run(path)) is None
    text = write_report(find_runs([tmp_path]), tmp_path / "out", title="t").read_text("utf-8")
    assert "These trained models only: a paired" not in text


def test_predictions_outside_the_run_are_not_read(tmp_path: Path) -> None:
    write_pair(tmp_path, {s: [np.ones(40, bool)] * 3 for s in ("linear", "conv")})
    (comparison,) = compared(tmp_path)
    path = comparison.arm.runs[0].path / "predictions.json"
    outside = tmp_path / "elsewhere.json"
    path.rename(outside)
    path.symlink_to(outside)
    assert read_predictions(comparison.arm.runs[0]) is None


def test_a_whole_number_is_the_same_setting_with_and_without_a_point(tmp_path: Path) -> None:
    for stem, epochs in (("linear", 4), ("conv", 4.0)):
        for seed in range(3):
            write_run(
                tmp_path,
                stem,
                seed=seed,
                results={"test/accuracy": PURE[seed]},
                config={"train": {"epochs": epochs}},
            )
    (cells,) = lines_of(tmp_path, None)
    assert cells[-1] == "stem"
