"""What a study will be and cost, as a table, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hybridvit.analysis.cost import UNCOUNTED
from hybridvit.studies.choices import Choice, tried_in_words, values_in_words, warning
from hybridvit.studies.executors.local import Local
from hybridvit.studies.facts import kept_facts, known
from hybridvit.studies.grid import TUNING_SEED, Study
from hybridvit.studies.matching import Arm, by_stage, check_budgets, equality, match
from hybridvit.studies.status import columns, duration, shorten
from hybridvit.studies.timing import timed
from hybridvit.studies.tuning import (
    candidates,
    check_validation,
    kept_choices,
    tuned_arms,
    tuning_cells,
)

PROBE_STEPS = 3  # of --probe; the first is warm-up
MUCH_WARMUP = 0.3  # of an arm's steps
LABEL = 40  # columns
SHOWN = 3  # arms that a warning names
HEADINGS = (
    "arm", "seeds", "tokens", "stride", "params", "GFLOPs", "epochs", "steps", "FLOPs", "time",
    "memory",
)  # fmt: skip


def dry_run(study: Study, out: Path, *, probe: bool = False, slots: int | None = None) -> str:
    """What `hybridvit study --dry-run` prints: the grid, its costs, and what is not comparable.

    Args:
        probe: time three steps of each arm; otherwise only what plan.json has is known.
        slots: jobs at once on this machine; by default as many as fit.

    Raises:
        ValueError: the arms cannot be matched.
    """
    check_budgets(study)
    check_validation(study)
    facts = known(study.arms(), kept_facts(out))
    executor = Local(study.threads, slots)
    if probe:
        facts = timed(study, facts, 1, PROBE_STEPS - 1, executor)
    arms = match(study, facts)
    lines = [study.title, *_table(arms), "", *_totals(study, arms, executor)]
    lines += _tuning(study, arms, kept_choices(study, out))
    return "\n".join([*lines, *(f"Warning: {text}" for text in warnings(study, arms))])


def warnings(study: Study, arms: Sequence[Arm]) -> list[str]:
    """Why arms are not comparable, each reason once; with stages, stage by stage."""
    found = [text for stage in by_stage(arms) for text in _warnings(study, stage)]
    return list(dict.fromkeys(found))


def _warnings(study: Study, arms: Sequence[Arm]) -> list[str]:
    found = []
    same = {
        "token counts": [f"{a.facts.tokens}" for a in arms],
        "strides": [f"{a.facts.patch_px} px" for a in arms],
        "data": [
            a.facts.data if a.facts.images is None else f"{a.facts.data}, {a.facts.images:,} images"
            for a in arms
        ],
    }
    for what, values in same.items():
        if len(set(values)) > 1:
            groups: dict[str, list[str]] = {}
            for arm, value in zip(arms, values, strict=True):
                groups.setdefault(value, []).append(arm.label)
            shown = "; ".join(f"{value} in {_some(labels)}" for value, labels in groups.items())
            found.append(f"arms differ in {what}, and so in more than one part: {shown}")
    if uncounted := [a.label for a in arms if a.facts.flops is None]:
        found.append(f"FLOPs cannot be counted, {UNCOUNTED}: {_some(uncounted)}")
    if absent := sorted({a.facts.data for a in arms if a.facts.images is None}):
        found.append(f"{', '.join(absent)} is not here, so steps are not known")
    total = [a.flops for a in arms if a.flops]
    if study.match != "flops" and total and max(total) > 1.1 * min(total):
        found.append(
            f"training FLOPs differ by a factor of {max(total) / min(total):.2f} between arms"
        )
    for arm in arms:
        warmup = arm.config.optim.warmup_epochs / arm.config.train.epochs
        if warmup > MUCH_WARMUP:
            found.append(f"{arm.label} spends {warmup:.0%} of its steps in warm-up")
    return found


def _table(arms: Sequence[Arm]) -> list[str]:
    rows: list[Sequence[str]] = [HEADINGS]
    for arm in arms:
        facts = arm.facts
        rows.append(
            (
                shorten(arm.label, LABEL),
                str(len(arm.cells)),
                str(facts.tokens),
                f"{facts.patch_px} px",
                f"{facts.parameters / 1e6:.3g} M",
                _or_unknown(facts.flops, lambda x: f"{x / 1e9:.3g}"),
                "?" if arm.steps is None else f"{arm.config.train.epochs:g}",
                _or_unknown(arm.steps, lambda x: f"{x:,}"),
                _or_unknown(arm.flops, _scientific),
                _or_unknown(arm.seconds, duration),
                _or_unknown(facts.memory, lambda x: f"{x / 2**30:.2f} GiB"),
            )
        )
    return columns(rows, right=range(1, len(HEADINGS)))


def _totals(study: Study, arms: Sequence[Arm], executor: Local) -> list[str]:
    """What the table's columns are, how equal the arms are, and what the whole study takes."""
    pixels = any(c.kind == "pixels" for c in study.cells)
    runs = sum(len(arm.cells) for arm in arms) + sum(map(len, tuning_cells(study)))
    more = " or more" if executor.gpus and executor.given is None else ""  # of one GPU, if they fit
    at_once = f"{executor.slots}{more} at once here"
    lines = [
        f"{runs} runs{' and the pixel baselines' if pixels else ''}, {at_once}",
        "GFLOPs: forward and backward of one image; FLOPs and time: one whole run",
    ]
    if study.match is not None:
        lines.append(f"match: {study.match}, {equality(study.match, arms)}")
    counts = {arm.label: len(arm.cells) for arm in arms}
    for cells in tuned_arms(study):
        counts[cells[0].label] += len(candidates(study))
    return [*lines, f"in total {_cost(arms, counts, executor)}"]


def _tuning(study: Study, arms: Sequence[Arm], choices: Sequence[Choice | None]) -> list[str]:
    """What the arms try before their seeds run, what that costs, and what is chosen already."""
    labels = [cells[0].label for cells in tuned_arms(study)]
    if not labels:
        return []
    tried = len(candidates(study))
    tuned = [arm for arm in arms if arm.label in labels]
    made = [choice for choice in choices if choice is not None]
    keys = "; ".join(f"{key} in {', '.join(map(str, v))}" for key, v in study.tune.items())
    cost = _cost(tuned, dict.fromkeys(labels, tried))
    return [
        f"tuning before the seeds, on validation: {keys}; {tried} runs an arm with seed "
        f"{TUNING_SEED}, {tried * len(tuned)} of all these runs{f', {cost}' if cost else ''}",
        *(f"{c.label} takes {values_in_words(c.chosen)}: {tried_in_words(c)}" for c in made),
        *(f"Warning: {text}" for c in made if (text := warning(c))),
    ]


def _cost(arms: Sequence[Arm], runs: dict[str, int], executor: Local | None = None) -> str:
    """FLOPs and time of so many runs of each arm."""
    flops = [arm.flops * runs[arm.label] for arm in arms if arm.flops is not None]
    seconds = [arm.seconds * runs[arm.label] for arm in arms if arm.seconds is not None]
    total = [f"{_scientific(sum(flops))} FLOPs"] if len(flops) == len(arms) else []
    if len(seconds) == len(arms):
        total.append(f"{duration(sum(seconds))} of training")
        if executor is not None:
            slots = executor.slots
            total.append(f"{duration(sum(seconds) / slots)} with {slots} at once")
    elif executor is not None:
        total.append("time not known; --probe times three steps of each arm")
    return ", ".join(total)


def _or_unknown(value: float | None, text: Callable[[float], str]) -> str:
    return "?" if value is None else text(value)


def _scientific(value: float) -> str:
    return f"{value:.2e}".replace("e+", "e")


def _some(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    return ", ".join(labels[:SHOWN]) + more
