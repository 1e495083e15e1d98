"""Runs grouped into arms (one config, several seeds), and arms into comparisons."""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, Literal

from hybridvit.data.names import PUBLIC
from hybridvit.report.runs import Run, part_name
from hybridvit.studies.statistics import Difference, paired_difference, together

Kind = Literal["stem", "baseline", "training"]

BUDGET = "train.epochs"  # which a study may set to match the cost of arms; see `_stem_pairs`
MAX_LABEL_KEYS = 4
PIXEL_METRICS = ("logistic_regression", "knn")
PROBES = ("linear", "knn")
NOT_COMPARED = ("seed",)
# Keys that go along with the scale of an arm and move no result.
ALONG = (
    "eval.epochs",
    "train.accumulate",
    "train.grad_checkpointing",
    "train.log_every",
    "train.picture_epochs",
)


@dataclass(frozen=True, eq=False)
class Arm:
    """Runs that differ in their seed only, in the order of the seeds, whatever their status."""

    label: str
    runs: tuple[Run, ...]  # one a seed
    spare: tuple[Run, ...]  # further runs of the same seeds, not counted

    @property
    def first(self) -> Run:
        """The run that speaks for the arm: a complete one if there is one."""
        return next((r for r in self.runs if r.is_complete), self.runs[0])

    @property
    def is_pixels(self) -> bool:
        return self.first.kind == "pixels"

    @property
    def is_supervised(self) -> bool:
        return self.first.objective == "supervised"

    def values(self, metric: str) -> dict[int, float]:
        """Results by seed; seeds without the result are left out."""
        return {r.seed: r.results[metric] for r in self.runs if metric in r.results}

    def metrics(self) -> tuple[str, ...]:
        """Keys of the primary results: of the test split, or of validation without one."""
        names = ("accuracy",) if self.is_supervised else PROBES
        if self.is_pixels:
            names = PIXEL_METRICS
        known = {key for run in self.runs for key in run.results}
        for split, wanted in itertools.product(("test", "val"), (names, ("accuracy",))):
            keys = tuple(f"{split}/{n}" for n in wanted if f"{split}/{n}" in known)
            if keys:
                return keys
        return ()


@dataclass(frozen=True, eq=False)
class Comparison:
    """`arm` minus `other`, seed by seed.

    "stem": hybrid minus pure. "baseline": an arm minus what its study compares with. "training":
    trained minus untrained encoder of the same arm.
    """

    kind: Kind
    arm: Arm
    other: Arm
    metric: str
    seeds: tuple[int, ...]  # that both sides have
    alone: Difference | None  # as if nothing else were compared; none where no seed is on both
    difference: Difference | None  # as one of all the comparisons

    @property
    def runs(self) -> tuple[Run, ...]:
        return self.arm.runs if self.arm is self.other else self.arm.runs + self.other.runs


def group(runs: Sequence[Run]) -> list[Arm]:
    """Arms in the order in which their first runs come; pixel baselines last."""
    grouped: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        grouped[_arm_key(run)].append(run)
    members = sorted(grouped.values(), key=lambda runs: runs[0].kind == "pixels")
    arms = []
    for label, group in zip(_labels([m[0] for m in members]), members, strict=True):
        counted: dict[int, Run] = {}
        for run in sorted(group, key=lambda r: (r.seed, not r.is_complete)):
            counted.setdefault(run.seed, run)
        spare = tuple(r for r in group if counted[r.seed] is not r)
        arms.append(Arm(label, tuple(counted.values()), spare))
    return arms


def compare(
    arms: Sequence[Arm], tuned: tuple[str, ...] = (), baseline: Mapping[str, str] | None = None
) -> list[Comparison]:
    """Arms against the baseline, or hybrid against pure stems where there is none; then training
    against the untrained encoder.

    All of them are claims of one page: their verdicts and intervals hold together.

    Args:
        tuned: config keys that each arm chose for itself, in which arms that are compared may
            differ.
        baseline: values of axes; an arm is compared with the one that has these, and is like it
            on all other axes.
    """
    found = []
    kind: Kind = "baseline" if baseline else "stem"
    pairs = _baseline_pairs(arms, baseline) if baseline else _stem_pairs(arms, tuned)
    for arm, other in pairs:
        shared = [m for m in arm.metrics() if m in other.metrics()]
        if not shared and _diverged(arm, other):  # all of one side
            shared = list(arm.metrics() or other.metrics())
        for metric in shared:
            found.append(
                _paired(kind, arm, other, metric, arm.values(metric), other.values(metric))
            )
    for arm in arms:
        if arm.is_supervised or arm.is_pixels:
            continue
        for metric in arm.metrics():
            untrained = arm.values(f"untrained/{metric}")
            if untrained:
                found.append(_paired("training", arm, arm, metric, arm.values(metric), untrained))
    joint = iter(together([c.alone for c in found if c.alone]))
    return [replace(c, difference=next(joint) if c.alone else None) for c in found]


def varying(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Config keys whose values differ between runs, with one value a run (none: not there).

    Those of `NOT_COMPARED` are left out.
    """
    flat = [settings(run) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = {key: [config.get(key) for config in flat] for key in keys}
    return {
        key: values
        for key, values in rows.items()
        if key not in NOT_COMPARED and len({_canonical(v) for v in values}) > 1
    }


def is_below(key: str, keys: Collection[str]) -> bool:
    """Whether a dotted key is one of the keys or below one."""
    return any(prefix in keys for prefix in itertools.accumulate(key.split("."), "{}.{}".format))


def config_key(run: Run, leave_out: tuple[str, ...]) -> str:
    """All of a config but `NOT_COMPARED` and the keys below those left out."""
    left = (*NOT_COMPARED, *leave_out)
    flat = {key: value for key, value in settings(run).items() if not is_below(key, left)}
    return _canonical([run.section("code").get("results_version"), sorted(flat.items())])


def told_apart(
    labels: Sequence[str], runs: Sequence[Run], leave_out: tuple[str, ...] = ()
) -> list[str]:
    """The labels of runs, those that come twice with values in which these runs' configs differ,
    but for keys below those left out."""
    found = list(labels)
    for label in {x for x in labels if labels.count(x) > 1}:
        places = [i for i, x in enumerate(labels) if x == label]
        apart = varying([runs[i] for i in places])
        differing = [item for item in apart.items() if not is_below(item[0], leave_out)]
        for position, i in enumerate(places):
            detail = [f"{key}={_plain(x[position])}" for key, x in differing[:MAX_LABEL_KEYS]]
            found[i] = ", ".join([label, *detail])
    return found


def _paired(
    kind: Kind,
    arm: Arm,
    other: Arm,
    metric: str,
    a: dict[int, float],
    b: dict[int, float],
) -> Comparison:
    seeds = tuple(sorted(a.keys() & b.keys()))
    alone = paired_difference([a[s] for s in seeds], [b[s] for s in seeds]) if seeds else None
    if alone is not None and _diverged(arm, other):
        alone = replace(alone, low=None, high=None, verdict="diverged")
    return Comparison(kind, arm, other, metric, seeds, alone, alone)


def _diverged(*arms: Arm) -> bool:
    return any(run.status == "diverged" for arm in arms for run in arm.runs)


def _baseline_pairs(arms: Sequence[Arm], baseline: Mapping[str, str]) -> list[tuple[Arm, Arm]]:
    trained = [arm for arm in arms if not arm.is_pixels]
    known: dict[str, list[Arm]] = defaultdict(list)
    for arm in trained:
        known[_canonical(arm.first.arm)].append(arm)
    found = []
    for arm in trained:
        values = arm.first.arm
        wanted = {**values, **{axis: v for axis, v in baseline.items() if axis in values}}
        if wanted == values:
            continue
        others = known.get(_canonical(wanted), [])
        # Of several passes over a study, the one most like it.
        apart = [len(varying([arm.first, other.first])) for other in others]
        if others:
            found.append((arm, others[apart.index(min(apart))]))
    return found


def _stem_pairs(arms: Sequence[Arm], tuned: tuple[str, ...]) -> list[tuple[Arm, Arm]]:
    """(hybrid, pure) arms whose configs differ in the stem only, or in what they chose.

    Arms without such a partner may be paired across training lengths with those of the same folder,
    because a study that matches FLOPs or seconds sets them by stem; a caveat then says so. So may
    arms that started from runs with their own stem. Of studies at several budgets each has its own
    pairs.
    """
    pairs = _pairs_by(arms, leave_out=("stem", *tuned))
    paired = {id(arm) for pair in pairs for arm in pair}
    rest = [arm for arm in arms if id(arm) not in paired]
    return pairs + [
        (hybrid, pure)
        for hybrid, pure in _pairs_by(rest, leave_out=("stem", "init", BUDGET, *tuned))
        if hybrid.first.path.parent == pure.first.path.parent
        and _differing_axes(hybrid.first, pure.first) <= 1
    ]


def _pairs_by(arms: Iterable[Arm], leave_out: tuple[str, ...]) -> list[tuple[Arm, Arm]]:
    groups: dict[str, tuple[list[Arm], list[Arm]]] = defaultdict(lambda: ([], []))
    for arm in arms:
        is_local = arm.first.is_patch_local
        if is_local is not None and not arm.is_pixels:
            groups[config_key(arm.first, leave_out)][is_local].append(arm)
    return list(itertools.chain(*(itertools.product(*g) for g in groups.values())))


def _differing_axes(a: Run, b: Run) -> int:
    return sum(_canonical(a.arm.get(k)) != _canonical(b.arm.get(k)) for k in {**a.arm, **b.arm})


def _arm_key(run: Run) -> str:
    if run.kind == "pixels":  # whatever model the config names, pixels do not pass it
        leave_out: tuple[str, ...] = ("stem", "encoder", "objective", "optim", "train", "plugins")
        return "pixels" + config_key(run, leave_out)
    return "train" + config_key(run, ())


def _labels(runs: Sequence[Run]) -> list[str]:
    """One distinct label for each arm, given by a run of it."""
    labels = told_apart([_short_label(run) for run in runs], runs)
    # Arms of other results versions, or that differ in the fifth key.
    return [f"{x} [{runs[i].hash}]" if labels.count(x) > 1 else x for i, x in enumerate(labels)]


def _short_label(run: Run) -> str:
    if run.kind == "pixels":
        return "raw pixels"
    if run.arm:
        values = (v if isinstance(v, str) else f"{k}={_plain(v)}" for k, v in run.arm.items())
        return " / ".join(values)
    return f"{part_name(run.config, 'stem')} / {run.objective}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else _canonical(value)


def data_of(run: Run) -> str:
    """What names a run's data set, whatever of it was used: a folder of one's own by its place."""
    known = settings(run)
    return _canonical([known.get("data.name"), known.get("data.args.root")])


def settings(run: Run) -> dict[str, Any]:
    """A run's config by dotted key; the run that it started from without the seed of that.

    Where a public data set lies, and whether it may be fetched, is not what the data are; one's
    own is known by its place.
    """
    flat = _flatten(run.config)
    flat.pop("data.args.download", None)
    if str(flat.get("data.name")) in PUBLIC:
        flat.pop("data.args.root", None)
    if isinstance(flat.get("init"), str):
        flat["init"] = re.sub(r"-seed-?\d+(-[0-9a-f]{8})?$", "", PurePath(flat["init"]).name)
    return flat


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        if isinstance(node, float) and node.is_integer():
            return {prefix: int(node)}  # 1 and 1.0 are the same setting
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat.update(_flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
