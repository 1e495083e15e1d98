import pytest
import torch
from conftest import make_batch, make_objective

from hybridvit.objectives import OBJECTIVES
from hybridvit.stems import STEMS

MULTI_VIEW = [name for name, made in OBJECTIVES.items() if made.views > 1]  # tested apart
PAIRS = {(stem, "mae") for stem in STEMS} | {
    (stem, objective)
    for stem in ("linear", "resnet")
    for objective in OBJECTIVES
    if objective not in MULTI_VIEW
}
SMALL = {"mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}}


@pytest.mark.parametrize(("stem", "objective"), sorted(PAIRS))
def test_one_graph_with_equal_loss(stem: str, objective: str) -> None:
    """torch.compile finds no reason to break the graph; the backend 'eager' computes as before."""
    encoder = {"depth": 1}
    made = make_objective(objective, stem, encoder_args=encoder, **SMALL.get(objective, {}))
    batch = make_batch(4)
    torch.compiler.reset()
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch).loss, made(batch).loss)
