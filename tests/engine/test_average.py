from __future__ import annotations

import copy

import torch
from conftest import SMALL_RESNET, make_objective
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hybridvit.engine.average import MovingAverage


def test_it_is_torchs_bit_by_bit() -> None:
    """Of parameters that move and of BatchNorm's buffers."""
    stem = {**SMALL_RESNET, "norm": "batch"}
    objective = make_objective(stem="resnet", stem_args=stem)
    theirs = AveragedModel(objective, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ours = MovingAverage(objective, 0.9)
    for step in range(4):
        torch.manual_seed(step)
        for tensor in (*objective.parameters(), *objective.buffers()):
            if tensor.is_floating_point():
                tensor.data = torch.randn_like(tensor)
        theirs.update_parameters(objective)
        ours.update(objective)
        expected = theirs.module.state_dict()
        found = ours.module.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any("running_var" in name for name in expected)
    weights = copy.deepcopy(objective.state_dict())
    assert not torch.equal(found["model.head.weight"], weights["model.head.weight"])
