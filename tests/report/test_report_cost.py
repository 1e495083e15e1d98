import json
import math
from pathlib import Path

import numpy as np
import pytest
from run_directories import write_run
from scipy import stats

from hybridvit.report import find_runs, write_report
from hybridvit.report.arms import Arm, Comparison, compare, group
from hybridvit.report.cost import COSTS, crossovers, front, matched
from hybridvit.report.runs import read_run

GFLOPS = COSTS[0][1]
TITLE = COSTS[0][0]


def write_sizes(
    root: Path, pure: list[list[float]], hybrid: list[list[float]], costs: tuple[float, ...]
) -> None:
    """Arms of several sizes: a list of accuracies over seeds for each size."""
    for stem, sizes, factor in (("linear", pure, 1.0), ("conv", hybrid, 1.0)):
        for size, (values, cost) in enumerate(zip(sizes, costs, strict=True)):
            for seed, value in enumerate(values):
                flops = {"forward": int(1e9 * cost * factor), "backward": int(2e9 * cost * factor)}
                write_run(
                    root,
                    stem,
                    seed=seed,
                    results={"test/accuracy": value},
                    config={"encoder": {"args": {"depth": size + 1}}},
                    record={"model": {"flops": flops, "patch_local": stem == "linear"}},
                )


def arms_of(root: Path) -> list[Arm]:
    return group(find_runs([root]))


def compared(root: Path) -> list[Comparison]:
    return compare(arms_of(root))


def test_front_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        points = [(float(x), float(y)) for x, y in rng.integers(0, 6, (rng.integers(1, 9), 2))]
        beaten = {p for p in points for q in points if q[0] <= p[0] and q[1] >= p[1] and q != p}
        found = front(points)
        assert {points[i] for i in found} == set(points) - beaten
        assert len(found) == len({points[i] for i in found})
        assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)
    assert front([]) == []


def test_crossover_of_straight_lines_over_log_cost(tmp_path: Path) -> None:
    # Pure 0.70, 0.74, 0.78 at 1, 2, 4; hybrid 0.1 steeper through an own crossing for each seed.
    crossing = [1.7, 2.0, 2.3]
    costs = (1.0, 2.0, 4.0)
    pure = [[0.70 + 0.04 * math.log2(c)] * 3 for c in costs]
    hybrid = [
        [p[0] + 0.1 * math.log2(c / x) for x in crossing] for c, p in zip(costs, pure, strict=True)
    ]
    write_sizes(tmp_path, pure, hybrid, costs)
    (found,) = crossovers(compared(tmp_path), GFLOPS)
    assert found.at == pytest.approx(crossing)
    logs = np.log(crossing)
    ends = stats.t.interval(0.95, 2, logs.mean(), logs.std(ddof=1) / math.sqrt(3))
    assert found.interval == pytest.approx(tuple(np.exp(ends)))
    low, high = np.exp(ends)
    assert found.in_words(TITLE) == (
        "conv / supervised against linear / supervised, test/accuracy: cross at "
        f"{math.exp(logs.mean()):.3g} {TITLE} [{low:.3g}, {high:.3g}], n = 3; "
        "the hybrid is ahead above"
    )
    # Where a run diverged, the seeds that are left are those that went well.
    write_run(
        tmp_path,
        "conv",
        seed=3,
        config={"encoder": {"args": {"depth": 2}}},
        record={"status": "diverged", "model": {"patch_local": False}},
    )
    assert crossovers(compared(tmp_path), GFLOPS) == []


def test_curves_of_two_data_sets_have_no_crossover(tmp_path: Path) -> None:
    for name, cost, sign in (("cifar10", 1.0, 1), ("svhn", 2.0, -1)):
        for stem, value in (("linear", 0.8), ("conv", 0.8 + 0.1 * sign)):
            for seed in range(3):
                flops = {"forward": int(cost * 1e9), "backward": 0}
                write_run(
                    tmp_path, stem, seed=seed, results={"test/accuracy": value},
                    config={"data": {"name": name}},
                    record={"model": {"flops": flops, "patch_local": stem == "linear"}},
                )  # fmt: skip
    assert len(compared(tmp_path)) == 2
    assert crossovers(compared(tmp_path), GFLOPS) == []


def test_crossover_of_bent_curves_by_a_fine_grid(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    costs = (1.0, 1.5, 3.0, 7.0)
    pure = [[float(x) for x in 0.8 + 0.02 * k + 0.002 * rng.normal(size=3)] for k in range(4)]
    hybrid = [[float(x) for x in 0.74 + 0.04 * k + 0.002 * rng.normal(size=3)] for k in range(4)]
    hybrid[3] = [x + 0.1 for x in hybrid[3]]
    write_sizes(tmp_path, pure, hybrid, costs)
    (found,) = crossovers(compared(tmp_path), GFLOPS)
    grid = np.linspace(0, math.log(7), 200_001)
    for seed in range(3):
        a, b = (np.interp(grid, np.log(costs), [s[seed] for s in side]) for side in (hybrid, pure))
        (place,) = np.flatnonzero(np.diff(np.sign(a - b)))
        assert found.at[seed] == pytest.approx(math.exp(grid[place]), rel=1e-4)


@pytest.mark.parametrize(
    ("hybrid", "words"),
    [
        ([[0.9] * 3, [0.95] * 3], "no crossover; the hybrid is ahead at every cost and seed"),
        ([[0.7] * 3, [0.75] * 3], "no crossover; the pure stem is ahead at every cost and seed"),
        ([[0.7, 0.7, 0.9], [0.9, 0.9, 0.95]], "no one crossover (2 of 3 seeds cross once)"),
        ([[0.7, 0.7, 0.9], [0.9, 0.9, 0.7]], "no one crossover (3 of 3 seeds cross once)"),
        ([[0.9] * 3, [0.7] * 3], "the hybrid is ahead below"),
        ([[0.80] * 3, [0.84] * 3], "no one crossover (0 of 3 seeds cross once)"),
        ([[0.80] * 3, [0.7] * 3], "no one crossover (0 of 3 seeds cross once)"),
    ],
)
def test_no_single_crossover(tmp_path: Path, hybrid: list[list[float]], words: str) -> None:
    write_sizes(tmp_path, [[0.80] * 3, [0.84] * 3], hybrid, (1.0, 2.0))
    (found,) = crossovers(compared(tmp_path), GFLOPS)
    assert found.in_words(TITLE).endswith(words)
    assert found.interval is None  # crossing at one place for all seeds has no spread, either


def test_costs_that_make_no_curve(tmp_path: Path) -> None:
    write_sizes(tmp_path / "one", [[0.8] * 3], [[0.9] * 3], (1.0,))
    assert crossovers(compared(tmp_path / "one"), GFLOPS) == []
    write_sizes(tmp_path / "same", [[0.8] * 3, [0.8] * 3], [[0.7] * 3, [0.9] * 3], (1.0, 1.001))
    assert crossovers(compared(tmp_path / "same"), GFLOPS) == []
    for seed in range(3):  # the only sizes that both have are one
        for stem, depth, cost in (("linear", 1, 1.0), ("conv", 2, 5.0)):
            model = {"flops": {"forward": int(cost * 1e9)}, "patch_local": stem == "linear"}
            write_run(tmp_path / "apart", stem, seed=seed, results={"test/accuracy": 0.5},
                      record={"model": model}, config={"train": {"epochs": depth}})  # fmt: skip
    assert crossovers(compared(tmp_path / "apart"), GFLOPS) == []


def test_training_flops_are_forward_and_backward_of_all_images(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, results={"test/accuracy": 0.5}))
    assert run.training_flops == (2_345_000_000 + 4_690_000_000) * 5000
    old = read_run(write_run(tmp_path, "conv", record={"model": {"flops": {"forward": 5}}}))
    assert old.training_flops is None


def test_how_equal_matched_arms_came_out(tmp_path: Path) -> None:
    for stem, images in (("linear", 5000), ("conv", 5010)):
        write_run(tmp_path, stem, results={"test/accuracy": 0.5}, summary={"images": images})
    arms = arms_of(tmp_path)
    assert matched(arms, "images") == (
        "Arms are matched by images seen and came out within 0.2 % of each other"
    )
    assert "training FLOPs" in (matched(arms, "flops") or "")
    assert matched(arms, None) is None
    assert matched(arms, "<b>") is None
    (tmp_path / "plan.json").write_text(json.dumps({"schema": 1, "match": "images"}))
    page = write_report(find_runs([tmp_path]), tmp_path / "out", title="t").read_text("utf-8")
    assert "came out within 0.2 % of each other" in page


def test_equal_epochs_and_parameters_have_a_sentence_too(tmp_path: Path) -> None:
    for stem, images, length, encoder in (("linear", 5000, 1000, 90), ("conv", 2525, 500, 93)):
        parts = {"stem": 10, "encoder": encoder, "total": 10_000 if stem == "conv" else 200}
        write_run(
            tmp_path,
            stem,
            results={"test/accuracy": 0.5},
            summary={"images": images},
            record={"data": {"train": length}, "model": {"parameters": parts}},
        )
    arms = arms_of(tmp_path)
    words = "and came out within"
    assert matched(arms, "epochs") == f"Arms are matched by epochs {words} 1 % of each other"
    assert matched(arms, "params") == (
        f"Arms are matched by parameters of stem and encoder {words} 3 % of each other"
    )


def test_stages_are_each_matched_for_itself(tmp_path: Path) -> None:
    for stage, budgets in (("pretrain", (5000, 5010)), ("probe", (900, 900))):
        for stem, images in zip(("linear", "conv"), budgets, strict=True):
            arm = {"stem": stem, "stage": stage}
            results = {"test/accuracy": 0.5}
            config = {"objective": {"args": {"x": stage}}}
            write_run(tmp_path, stem, results=results, config=config, record={"arm": arm},
                      summary={"images": images})  # fmt: skip
    assert matched(arms_of(tmp_path), "images") == (
        "Arms are matched by images seen and came out within 0.2 % (pretrain), 0 % (probe) of each "
        "other"
    )


def test_front_and_crossover_are_on_the_page(tmp_path: Path) -> None:
    write_sizes(
        tmp_path,
        [[0.80, 0.81, 0.805], [0.84, 0.842, 0.839]],
        [[0.79, 0.80, 0.80], [0.88, 0.87, 0.875]],
        (1.0, 2.0),
    )
    page = write_report(find_runs([tmp_path]), tmp_path / "out", title="t")
    text, markdown = page.read_text("utf-8"), (tmp_path / "out" / "report.md").read_text("utf-8")
    block = text.split('id="plot-data">')[1].split("</script>")[0]
    (plot,) = [p for p in json.loads(block) if p["id"] == "plot-cost-test-accuracy"]
    assert plot["axes"][0]["log"] is True
    assert plot["axes"][0]["front"]["x"] == [1.0, 2.0]
    assert plot["axes"][0]["front"]["y"] == pytest.approx([80.5, 87.5])
    assert "lines" not in plot
    for where in (text, markdown):
        assert "Nothing is better and cheaper in forward GFLOPs per image: " in where
        assert "the hybrid is ahead above" in where


def write_curves(root: Path, name: str, changes: list[dict[str, object]]) -> None:
    """Pure and hybrid arms at a cost of 1, 2, ... GFLOPs, one for each change of the config; the
    hybrid ones get ahead."""
    for size, change in enumerate(changes):
        for stem, value in (("linear", 0.8), ("conv", 0.75 + 0.1 * size)):
            model = {"flops": {"forward": (1 + size) * 10**9}, "patch_local": stem == "linear"}
            write_run(root / name, stem, results={"test/accuracy": value}, config=change,
                      record={"model": model})  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "is_curve"),
    [
        ("width", [{"encoder": {"args": {"dim": d, "heads": d // 32}}} for d in (64, 128)], True),
        ("preset", [{"encoder": {"name": n, "args": {}}} for n in ("tiny", "small")], True),
        ("length", [{"train": {"epochs": e}, "optim": {"warmup_epochs": e / 5}} for e in (5, 9)],
         True),
        ("images", [{"data": {"train_images": n}} for n in (1000, 4000)], True),
        ("memory", [{"train": {"epochs": e, "accumulate": e}} for e in (1, 2)], True),
        ("mask", [{"objective": {"args": {"ratio": r}}} for r in (0.75, 0.25)], False),
        ("position", [{"encoder": {"args": {"position": p}}} for p in ("none", "rope_2d")], False),
        ("rate", [{"optim": {"lr": r}} for r in (1e-3, 1e-2)], False),
        ("policy", [{"data": {"augment": {"policy": p}}} for p in ("none", "rand")], False),
    ],
)  # fmt: skip
def test_points_of_one_curve_differ_in_scale_alone(
    tmp_path: Path, name: str, changes: list[dict[str, object]], is_curve: bool
) -> None:
    write_curves(tmp_path, name, changes)
    comparisons = compared(tmp_path)
    assert len(comparisons) == 2
    assert [c.is_single for c in crossovers(comparisons, GFLOPS)] == [True] * is_curve


def test_rates_that_arms_chose_make_no_other_curve(tmp_path: Path) -> None:
    sizes = [{"encoder": {"args": {"dim": d}}, "optim": {"lr": d * 1e-5}} for d in (64, 128)]
    write_curves(tmp_path, "tuned", sizes)
    assert crossovers(compared(tmp_path), GFLOPS) == []
    assert len(crossovers(compared(tmp_path), GFLOPS, tuned=("optim.lr",))) == 1
    choice = {"label": "x", "metric": "val/accuracy", "trials": [], "chosen": {"optim.lr": 1e-3}}
    (tmp_path / "tuned" / "plan.json").write_text(json.dumps({"schema": 1, "tuning": [choice]}))
    write_report(find_runs([tmp_path]), tmp_path / "out", title="t")
    assert "cross at" in (tmp_path / "out" / "report.md").read_text("utf-8")


def test_curves_of_one_name_say_in_what_they_differ(tmp_path: Path) -> None:
    for ratio in (0.75, 0.25):
        sizes = [
            {"encoder": {"args": {"dim": d}}, "objective": {"args": {"ratio": ratio}}}
            for d in (64, 128)
        ]
        write_curves(tmp_path, str(ratio), sizes)
    words = [found.in_words(TITLE) for found in crossovers(compared(tmp_path), GFLOPS)]
    assert [text.split(", test/")[0] for text in words] == [
        "conv / supervised, objective.args.ratio=0.25 against "
        "linear / supervised, objective.args.ratio=0.25",
        "conv / supervised, objective.args.ratio=0.75 against "
        "linear / supervised, objective.args.ratio=0.75",
    ]
