"""Every contestant of every case can be built and takes its turn, small and on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import ours
import product
import pytest
import settings
import torch
import turns
import worker
from bench_jobs import needs, tiny
from cases import CASES, Command, Contestant, Product, Training, Whole
from torch.utils.flop_counter import FlopCounterMode

from hybridvit import config
from hybridvit.encoder import linear
from hybridvit.engine.bench import Steps

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own
STEPS = {
    tiny(contestant): case
    for case in CASES
    for contestant in CASES[case].contestants.values()
    if not isinstance(contestant.job, Whole | Command | Product)
}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is compiled, and steps are not repeated to warm up."""
    monkeypatch.setattr(turns, "WARMUP", 0)
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
    import timm.layers

    timm.layers.set_fused_attn(True)


@pytest.mark.parametrize(
    ("contestant", "case"),
    STEPS.items(),
    ids=[f"{case}-{c.framework}-{c.setting}" for c, case in STEPS.items()],
)
def test_it_takes_its_turn(contestant: Contestant, case: str, eager: None) -> None:
    needs(contestant.framework)
    ready = worker.build(case, contestant)
    assert ready.turn(0.001) > 0
    assert ready.memory() > 0


@pytest.mark.parametrize("case", ["supervised-32-4", "mae-32-4", "hybrid-224"])
def test_products_alone_are_all_products_of_a_step(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "joins_bias", lambda: False)  # oneDNN's product is not counted
    contestant = tiny(CASES[case].contestants["our products"])
    assert isinstance(contestant.job, Training)
    overrides = settings.ours(case, "best", "cpu")
    steps = Steps(ours.training_config(contestant.job, [*overrides, "train.compile=none"]))
    with FlopCounterMode(display=False) as whole:
        steps.run(lambda _: None)
    recorded = product.recorded_products(steps)
    with FlopCounterMode(display=False) as alone:
        for call in recorded.calls:
            call()
    assert alone.get_total_flops() == whole.get_total_flops() > 0


def test_our_best_setting_is_valid_for_every_case() -> None:
    for case in CASES:
        for device in ("cpu", "cuda"):
            config.load("base.yaml", settings.ours(case, "best", device))
    named = {case for table in settings.OURS.values() for case in table} - {"any"}
    assert named <= set(CASES)


def test_rows_name_contestants_of_their_case() -> None:
    for case in CASES.values():
        names = {row.first for row in case.rows} | {row.second for row in case.rows} - {None}
        assert names <= set(case.contestants)


def test_paced_turns_take_about_as_long_as_asked_for() -> None:
    """A step of 5 ms that does 3: 600 a second, and as many steps as fit."""
    import time

    steps: list[float] = []

    def step() -> int:
        time.sleep(0.005)
        steps.append(time.perf_counter())
        return 3

    paced = turns.Paced(step, uncounted=2)
    paced(0)
    assert len(steps) == 3
    rate = paced(0.1)
    assert rate == pytest.approx(600, rel=0.3)
    assert 10 <= len(steps) - 5 <= 20
