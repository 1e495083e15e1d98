"""What a reader needs to know to doubt the numbers, as sentences."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import PurePath
from typing import Any

from hybridvit.registry import CODE
from hybridvit.report import tuning
from hybridvit.report.arms import ALONG, Arm, Comparison, data_of, is_below, varying
from hybridvit.report.leakage import leaked
from hybridvit.report.runs import Run
from hybridvit.report.study import Plan
from hybridvit.report.tables import Row, rows
from hybridvit.studies.statistics import MIN_SEEDS, detectable
from hybridvit.studies.status import number

NAMED = 6  # of many
NO_PLAN = Plan()
# Config keys that set how fine the grid of tokens is, and how long an arm trains on what.
GRID = ("stem.args", "data.args.image_size")
SPENT = ("data.train_images", "train.epochs", "optim.warmup_epochs")
MUCH = 1.5  # between two shares of training that are warm-up
LATER = ("fingerprint of the test images", "decoder")  # which not all records tell of


def caveats(
    arms: Sequence[Arm],
    comparisons: Sequence[Comparison],
    plan: Plan = NO_PLAN,
) -> list[str]:
    """All that holds, the gravest first, each once."""
    found = [
        *_leaking(arms),
        *_unfinished(arms),
        *_absent(arms, plan.cells),
        *_unpaired_seeds(comparisons),
        *_uneven(comparisons),
        *_uneven_warmups(comparisons),
        *_trained_before(comparisons),
        *_unequal_costs(comparisons),
        *tuning.warnings(plan.tuning),
        *_environments(arms, comparisons),
        *_continued(arms),
        *_too_few(arms),
        *_below_pixels(arms),
        *_many_claims(comparisons),
        *_looks(plan.looks),
        *_seeds(arms),
        *_shared_starts(arms),
        *_teachers(arms),
        *_splits(arms),
        *_notes(arms),
    ]
    return list(dict.fromkeys(found))


def environment(run: Run) -> dict[str, str]:
    """What a run was made with, by name: code, packages, machine, data."""
    code, hardware = run.section("code"), run.section("hardware")
    named = {
        "hybridvit": code.get("version"),
        "commit": code.get("commit"),
        "Python": run.record.get("python"),
        "CPU": hardware.get("cpu"),
        "cores": hardware.get("cores"),
        "threads": hardware.get("threads"),
        "GPU": hardware.get("gpu"),
        "ranks": hardware.get("ranks", 1),
        "data fingerprint": run.section("data").get("fingerprint"),
        "fingerprint of the test images": run.section("data").get("test_fingerprint"),
        "decoder": run.section("data").get("decoder"),
        **run.section("packages"),
        **{f"plug-in {name}": version for name, version in run.section("plugins").items()},
    }
    return {key: "none" if value is None else str(value) for key, value in named.items()}


def _leaking(arms: Sequence[Arm]) -> Iterable[str]:
    for arm in arms:
        found = [shares for run in arm.runs if (shares := leaked(run)) and any(shares)]
        if found:
            tokens, outputs, gradient = (100 * max(s) for s in zip(*found, strict=True))
            yield (
                f"{arm.label} leaks: pixels that it hides reach {tokens:.3g} % of its tokens and "
                f"{outputs:.3g} % of its predictions ({gradient:.3g} % of their squared gradient), "
                "so it may have learnt to copy them. Its training loss compares with no other's."
            )


def _unfinished(arms: Sequence[Arm]) -> Iterable[str]:
    words = {"running": "is not finished", "stopped": "was stopped before its end"}
    for run in (r for arm in arms for r in arm.runs if not r.is_complete):
        error = run.record.get("error")
        why = f" ({str(error)[:200]})" if error else ""
        what = words.get(run.status, run.status)
        yield f"Run {run.name} (seed {run.seed}, {run.hash}) {what}{why}; it counts in no number."
    for arm in arms:
        if arm.runs and all(r.is_complete for r in arm.runs) and not arm.metrics():
            yield f"{arm.label} is complete but has no result that this report knows."
        for run in arm.spare:
            yield (
                f"{arm.label} has seed {run.seed} more than once; "
                f"{run.path} ({run.hash}) counts in no number."
            )


def _absent(arms: Sequence[Arm], planned: Sequence[str]) -> Iterable[str]:
    here = {run.path.name for arm in arms for run in (*arm.runs, *arm.spare)}
    absent = [name for name in planned if name not in here]
    if absent:
        more = f" and {len(absent) - NAMED} more" if len(absent) > NAMED else ""
        yield (
            f"{len(absent)} of the study's {len(planned)} runs are not on this page (not started, "
            f"failed before they had a record, or left out): {', '.join(absent[:NAMED])}{more}."
        )


def _unpaired_seeds(comparisons: Sequence[Comparison]) -> Iterable[str]:
    for c in comparisons:
        sides = [(c.arm.label, c.arm.values(c.metric))]
        if c.kind != "training":
            sides.append((c.other.label, c.other.values(c.metric)))
        else:
            sides.append((f"the untrained {c.arm.label}", c.arm.values(f"untrained/{c.metric}")))
        seeds = sorted({seed for _, values in sides for seed in values})
        for label, values in sides:
            missing = [str(s) for s in seeds if s not in values]
            if missing:
                used = ", ".join(map(str, c.seeds)) or "none"
                yield (
                    f"Seed {', '.join(missing)} is missing from {label} ({c.metric}); "
                    f"the comparison uses the seeds that both sides have: {used}."
                )


def _unequal_costs(comparisons: Sequence[Comparison]) -> Iterable[str]:
    for c in comparisons:
        a, b = c.arm.first, c.other.first
        if a.flops and b.flops and abs(math.log(a.flops / b.flops)) > math.log(1.1):
            yield (
                f"{c.arm.label} takes {a.flops / b.flops:.2g} times the forward FLOPs per image "
                f"of {c.other.label}."
            )


def _uneven(comparisons: Sequence[Comparison]) -> Iterable[str]:
    for c in _of_arms(comparisons):
        a, b = c.arm.first, c.other.first
        pairs: tuple[tuple[str, Any, Any, tuple[str, ...]], ...] = (
            ("tokens", a.tokens, b.tokens, (*GRID, *SPENT)),
            ("pixels per token side (stride)", a.patch_px, b.patch_px, (*GRID, *SPENT)),
            ("epochs", _epochs(a), _epochs(b), SPENT),
            ("training images", a.images, b.images, SPENT),
        )
        uneven = [
            (what, x, y)
            for what, x, y, keys in pairs
            if x != y and None not in (x, y) and not _is_about(c, keys)
        ]
        if uneven and c.kind == "stem":
            yield (
                f"{c.arm.label} and {c.other.label} have "
                f"{'; '.join(f'{x} and {y} {what}' for what, x, y in uneven)}: "
                "their difference is not the stem's alone."
            )
        elif uneven:
            shown = ", ".join(f"{what} ({x} and {y})" for what, x, y in uneven)
            yield f"{c.arm.label} and {c.other.label} are uneven in {shown}."
        if a.normalisation != b.normalisation and None not in (*a.normalisation, *b.normalisation):
            yield (
                f"{c.arm.label} and {c.other.label} normalise images with other means and "
                "standard deviations (pretrained weights bring their own)."
            )


def _uneven_warmups(comparisons: Sequence[Comparison]) -> Iterable[str]:
    for c in _of_arms(comparisons):
        a, b = _warmup(c.arm.first), _warmup(c.other.first)
        if a is None or b is None or max(a, b) <= MUCH * min(a, b):
            continue
        if not _is_about(c, ("optim.warmup_epochs",)):
            yield (
                f"{c.arm.label} and {c.other.label} spend {100 * a:.3g} % and {100 * b:.3g} % of "
                "their training in warm-up."
            )


def _trained_before(comparisons: Sequence[Comparison]) -> Iterable[str]:
    """Sides that start from weights which another training has made, against some that do not."""
    for c in _of_arms(comparisons):
        for arm, other in ((c.arm, c.other), (c.other, c.arm)):
            if _start(arm.first) is not None and _start(other.first) is None:
                yield (
                    f"{arm.label} starts from trained weights, {other.label} from fresh ones: what "
                    "those cost is on no axis."
                )


def _of_arms(comparisons: Iterable[Comparison]) -> list[Comparison]:
    return [c for c in comparisons if c.kind != "training"]


def _is_about(c: Comparison, keys: Iterable[str]) -> bool:
    """Whether a study compares these keys, and what goes along with them, alone."""
    differing = varying([c.arm.first, c.other.first])
    return c.kind == "baseline" and all(is_below(key, (*keys, *ALONG)) for key in differing)


def _epochs(run: Run) -> Any:
    return run.settings("train").get("epochs")


def _warmup(run: Run) -> float | None:
    """The share of its training that a run warms up; none where its config does not tell."""
    whole, warmup = number(_epochs(run)), number(run.settings("optim").get("warmup_epochs", 0))
    return None if not whole or warmup is None else min(1.0, warmup / whole)


def _environments(arms: Sequence[Arm], comparisons: Sequence[Comparison]) -> Iterable[str]:
    """Differences within one comparison, or among the seeds of one arm."""
    differing: dict[str, Counter[str]] = {}
    for runs in (*(c.runs for c in comparisons), *(arm.runs for arm in arms)):
        made_with = [environment(run) for run in runs if run.is_complete]
        for key in dict.fromkeys(k for env in made_with for k in env):
            values = Counter(_known(made_with, key))
            if len(values) > 1:
                differing[key] = differing.get(key, Counter()) | values
    for key, values in differing.items():
        shown = ", ".join(f"{v[:40]} ({n})" for v, n in values.most_common(6))
        yield f"Runs that are compared differ in {key} (runs each): {shown}."
    dirty = [r for arm in arms for r in arm.runs if r.section("code").get("dirty") is True]
    if dirty:
        were = "One run was" if len(dirty) == 1 else f"{len(dirty)} runs were"
        yield f"{were} made with uncommitted changes, so the commit does not tell the code."


def _continued(arms: Sequence[Arm]) -> Iterable[str]:
    """Runs that stopped and went on as something else: run.json's own lines tell of the end."""
    for run in (r for arm in arms for r in arm.runs if r.is_complete):
        parts = run.record.get("earlier")
        before = [x for x in parts if isinstance(x, dict)] if isinstance(parts, list) else []
        found = [environment(replace(run, record=x)) for x in before] + [environment(run)]
        ways = {k: [value[:40] for value, _ in groupby(_known(found, k))] for k in found[-1]}
        changed = [f"{k}: {', then '.join(way)}" for k, way in ways.items() if len(way) > 1]
        if changed:
            shown = "; ".join(changed[:NAMED])
            yield f"Run {run.name} (seed {run.seed}, {run.hash}) changed on its way ({shown})."


def _known(environments: Iterable[dict[str, str]], key: str) -> list[str]:
    """An item of each; where only some records have it at all, of those."""
    values = [env.get(key, "none") for env in environments]
    if key.startswith("plug-in ") and not all(CODE in value for value in values):
        return [value.partition(CODE)[0] for value in values]
    return [v for v in values if v != "none"] if key in LATER else values


def _too_few(arms: Sequence[Arm]) -> Iterable[str]:
    few = [row for row in rows(arms) if row.result and row.result.n < MIN_SEEDS]
    labels = list(dict.fromkeys(r.arm.label for r in few if not r.arm.is_pixels))
    if labels:
        yield f"Fewer than three seeds, hence no interval: {'; '.join(labels)}."


def _below_pixels(arms: Sequence[Arm]) -> Iterable[str]:
    """Each data set by itself."""
    by_data: dict[str, list[Row]] = {}
    for row in rows(arms):
        if row.result and row.metric:
            by_data.setdefault(data_of(row.arm.first), []).append(row)
    for scored in by_data.values():
        baselines = [(r.metric, r.result.mean) for r in scored if r.arm.is_pixels and r.result]
        if not baselines:
            continue
        metric, best = max(baselines, key=lambda b: b[1])
        below = [
            f"{row.arm.label} ({row.metric}, {row.result} %)"
            for row in scored
            if row.result and not row.arm.is_pixels and row.result.mean <= best
        ]
        if below:
            yield f"Not above {metric} on raw pixels ({100 * best:.1f} %): {'; '.join(below)}."


def _many_claims(comparisons: Sequence[Comparison]) -> Iterable[str]:
    claims = sum(1 for c in comparisons if c.difference and c.difference.low is not None)
    if claims > 1:
        yield (
            f"{claims} comparisons are on this page. Their verdicts are Holm's over all of them: "
            "at most 5 % of such pages hold any false claim, and in 95 % all intervals hold. "
            "Comparisons that were looked at elsewhere, crossovers and the bars of single arms "
            "are not counted in."
        )


def _looks(looks: Sequence[int]) -> Iterable[str]:
    if len(looks) > 1:
        yield (
            f"Pages of this study were made with {', then '.join(map(str, looks))} seeds. Verdicts "
            "hold in 95 % of studies whose number of seeds does not depend on what a page said: "
            "adding seeds until one appears makes false claims more often (docs/statistics.md)."
        )


def _seeds(arms: Sequence[Arm]) -> Iterable[str]:
    if any(len(arm.values(m)) >= MIN_SEEDS for arm in arms for m in arm.metrics()):
        yield (
            "A seed varies initialisation, the order of images, augmentation, masks and dropout; "
            "the split of the data is the same for all seeds. Intervals assume differences that "
            f"are roughly normal, which few seeds cannot show, and {MIN_SEEDS} seeds show reliably "
            f"only what is above about {detectable(MIN_SEEDS):.1f} standard deviations of the "
            "differences."
        )


def _shared_starts(arms: Sequence[Arm]) -> Iterable[str]:
    """Seeds that do not vary all that seeds vary."""
    for arm in arms:
        starts = {_start(run) for run in arm.runs}
        if len(arm.runs) > 1 and len(starts) == 1 and (start := starts.pop()) is not None:
            yield (
                f"All seeds of {arm.label} start from the same weights ({start}): their spread "
                "leaves out that of other pre-training."
            )


def _start(run: Run) -> str | None:
    """The weights that a run starts from, if its seed does not make them."""
    init = run.config.get("init")
    if isinstance(init, str):
        return PurePath(init).name
    pretrained = run.settings("stem", "args").get("pretrained") is True
    return "a pretrained stem" if pretrained else None


def _teachers(arms: Sequence[Arm]) -> Iterable[str]:
    for arm in arms:
        args = arm.first.settings("objective", "args", "target_args")
        if args.get("pretrained") is True and args.get("teacher") not in (None, "ema"):
            yield (
                f"{arm.label} predicts what a pretrained network computes ({args['teacher']}): the "
                "images, and perhaps labels, which that was trained on are behind its result, too."
            )


def _splits(arms: Sequence[Arm]) -> Iterable[str]:
    runs = [r for arm in arms for r in arm.runs]
    for run in runs:
        if any(key.startswith("test/") for entry in run.metrics for key in entry):
            yield (
                f"Run {run.name} (seed {run.seed}, {run.hash}) scored the test split during "
                "training; it is no untouched test split then."
            )
    metrics = [m for arm in arms for m in arm.metrics()]
    if any(m.startswith("val/") for m in metrics):
        yield "Results named val/ are of the validation split, which training may have looked at."
    tested = [a for a in arms if not a.is_pixels and any(m[:5] == "test/" for m in a.metrics())]
    if len(tested) > 1:
        yield (
            f"The same test split scores {len(tested)} arms: the best number among them, taken "
            "alone, is too good."
        )
    size = arms[0].first.section("data").get("test") if arms else None
    if tested and isinstance(size, int) and not isinstance(size, bool) and 0 < size < 10_000:
        yield (
            f"The test split has {size} images, one of them {100 / size:.2g} points; the intervals "
            "cover seeds and training, not the choice of test images."
        )


def _notes(arms: Sequence[Arm]) -> Iterable[str]:
    for run in (r for arm in arms for r in arm.runs):
        notes = run.section("data").get("notes")
        yield from (f"Data: {n}." for n in (notes if isinstance(notes, list) else ()) if n)
        yield from (f"{note}." for note in run.notes)
