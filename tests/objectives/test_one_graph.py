"""Every built-in stem and objective is one graph of torch.compile, and computes the same by it."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from conftest import make_batch, make_objective

from hybridvit.contracts import Batch, Objective
from hybridvit.engine.compile import OPTIONS, compiler
from hybridvit.objectives import OBJECTIVES
from hybridvit.stems import STEMS

MASKED = ["resnet", "conv", "overlap", "cct", "convnext"]  # stems that take masked=true
HIDING = ["masked_patch", "mae", "simmim"]
PAIRS = [(stem, False, objective) for stem in STEMS for objective in OBJECTIVES]
PAIRS += [(stem, True, objective) for stem in MASKED for objective in HIDING]
SMALL: dict[str, dict[str, Any]] = {
    "mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    "simclr": {"hidden_dim": 32, "output_dim": 16},
    "dino": {"hidden_dim": 32, "bottleneck_dim": 16, "output_dim": 64},
}


@pytest.fixture(scope="module", autouse=True)
def one_cache() -> Iterator[None]:
    """Without a reset for each pair, torch need not learn anew what an operator gives: half the
    time. All pairs are entries of the same few functions, hence the limit."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=10 * len(PAIRS)):
        yield
    torch.compiler.reset()


def make(stem: str, masked: bool, objective: str, **encoder: Any) -> tuple[Objective, Batch]:
    made = make_objective(
        objective,
        stem,
        stem_args={"masked": True} if masked else {},
        encoder_args={"depth": 1, **encoder},
        **SMALL.get(objective, {}),
    )
    batch = make_batch(4)
    others = tuple(make_batch(4, seed=view).images for view in range(1, made.views))
    return made, dataclasses.replace(batch, others=others)


@pytest.mark.parametrize(("stem", "masked", "objective"), PAIRS)
def test_one_graph_with_equal_loss(stem: str, masked: bool, objective: str) -> None:
    """torch.compile finds no reason to break the graph; the backend 'eager' computes as before.

    Objectives that compare two views break it once, before lightly's loss.
    """
    made, batch = make(stem, masked, objective)
    expected = copy.deepcopy(made)(batch).loss
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(made, backend=count, fullgraph=made.views == 1)
    torch.testing.assert_close(compiled(batch).loss, expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_so_it_is_in_bf16_whose_linear_layers_are_others(objective: str) -> None:
    made, batch = make("linear", False, objective)
    plain, graphs = copy.deepcopy(made), []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(made, backend=count, fullgraph=made.views == 1)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = plain(batch).loss, compiled(batch).loss
    assert len(graphs) == 1
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    expected.backward()
    found.backward()
    for (name, ours), theirs in zip(made.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and theirs.grad is not None:
            difference = (ours.grad - theirs.grad).norm()
            assert difference <= 0.1 * theirs.grad.norm() + 1e-6, name


def test_the_matrix_is_whole() -> None:
    assert {stem for stem, masked, _ in PAIRS if masked} == {
        name for name, made in STEMS.items() if "masked" in made.__annotations__ or masks(made)
    }


def masks(factory: Any) -> bool:
    import inspect

    return "masked" in inspect.signature(factory).parameters


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler, which torch needs on a CPU")
@pytest.mark.parametrize(
    ("stem", "masked", "objective"), [("linear", False, "supervised"), ("conv", True, "mae")]
)
def test_compiled_loss_and_gradients_are_close(stem: str, masked: bool, objective: str) -> None:
    plain, batch = make(stem, masked, objective)
    made = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on what it finds to compile with
        loss = torch.compile(made, options=OPTIONS)(batch).loss
        loss.backward()
    expected = plain(batch).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for (name, ours), theirs in zip(made.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=name)
