import pytest
import torch
from conftest import make_batch, make_objective


@pytest.mark.parametrize("stem", ["linear", "resnet"])
@pytest.mark.parametrize("objective", ["supervised", "masked_patch"])
def test_one_graph_with_equal_loss(stem: str, objective: str) -> None:
    """torch.compile finds no reason to break the graph; the backend 'eager' computes as before."""
    made, batch = make_objective(objective, stem), make_batch(4)
    torch.compiler.reset()
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch).loss, made(batch).loss)
