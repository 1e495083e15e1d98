import pytest
import torch
from conftest import make_objective

from hybridvit.analysis import cost


def hand_count(n: int, d: int, hidden: int, depth: int, patch_values: int, read: int) -> int:
    """Forward multiply-adds of a ViT with a linear stem and n patches up to its last norm, times 2.
    Only `read` of its tokens are queries of the last block and pass its MLP."""
    tokens = n + 1
    blocks = [tokens] * (depth - 1) + [read]
    spent = sum(
        queries * d * d  # q
        + tokens * d * 2 * d  # k, v
        + 2 * queries * tokens * d  # scores and weighted sum
        + queries * d * d  # projection
        + 2 * queries * d * hidden
        for queries in blocks
    )
    return 2 * (n * patch_values * d + spent)


def test_forward_flops_equal_a_hand_count() -> None:
    objective = make_objective()
    expected = hand_count(16, 16, 64, 2, 48, read=1) + 2 * 16 * 10  # the class token; the head
    assert cost.measure(objective, (16, 16)).forward_flops == expected


def test_backward_is_twice_forward_but_for_the_first_layer() -> None:
    # Every product needs two in the backward pass; the stem's needs none for the images.
    objective = make_objective()
    spent = cost.measure(objective, (16, 16))
    assert spent.backward_flops == 2 * spent.forward_flops - 2 * 16 * 48 * 16


def test_masked_prediction_counts_its_head() -> None:
    # 8 of 16 patches are read, and get 512 outputs each.
    expected = hand_count(16, 16, 64, 2, 48, read=8) + 2 * 16 * 8 * 512
    assert cost.measure(make_objective("masked_patch"), (16, 16)).forward_flops == expected


def test_convolution_flops_equal_a_hand_count() -> None:
    args = {
        "width": 0.125,
        "blocks": [],
        "root_kernel": 3,
        "root_stride": 1,
        "root_pool": False,
        "patch": 4,
    }
    objective = make_objective(stem="resnet", stem_args={**args, "strides": None})
    linear = cost.measure(make_objective(), (16, 16)).forward_flops - 2 * 16 * 48 * 16
    root = 2 * 16 * 16 * 3 * 9 * 8
    projection = 2 * 16 * (8 * 16) * 16
    assert cost.measure(objective, (16, 16)).forward_flops == linear + root + projection


def test_counting_leaves_the_model_alone() -> None:
    objective = make_objective("masked_patch").eval()
    before = {n: p.clone() for n, p in objective.state_dict().items()}
    cost.measure(objective, (16, 16))
    assert not objective.training
    for name, value in objective.state_dict().items():
        assert value.device.type == "cpu"
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("objective", ["supervised", "masked_patch"])
@pytest.mark.parametrize("stem", ["linear", "resnet"])
def test_parameters_by_part_add_up(objective: str, stem: str) -> None:
    made = make_objective(objective, stem)
    counted = cost.parameters(made)
    assert counted["stem"] + counted["encoder"] + counted["objective"] == counted["total"]
    assert counted["total"] == sum(p.numel() for p in made.parameters())
    expected = 16 * 10 + 10 if objective == "supervised" else 16 * 512 + 512 + 16
    assert counted["objective"] == expected


def test_activation_memory_grows_by_one_block_at_a_time() -> None:
    def activations(depth: int) -> int:
        spent = cost.measure(make_objective(encoder_args={"depth": depth}), (16, 16))
        assert spent.activation_bytes is not None
        return spent.activation_bytes

    one_block = activations(3) - activations(2)
    assert activations(4) - activations(3) == one_block
    # At least what no implementation can do without, in float32: the input of q, k and v, these
    # three, the attention weights, the input of the projection, of the MLP's layers and its GELU.
    tokens, dim, heads = 17, 16, 2
    least = 4 * (tokens * dim * (1 + 3 + 1 + 1 + 4 + 4) + heads * tokens**2)
    assert least <= one_block <= 2 * least


def test_memory_in_closed_form() -> None:
    assert cost.memory_bytes(10, 800, ema=False) == 160 + 800
    assert cost.memory_bytes(10, 800, ema=True) == 200 + 800


def test_an_objective_whose_shapes_depend_on_data_has_no_count() -> None:
    class Chooses(type(make_objective())):
        def forward(self, batch):
            output = super().forward(batch)
            bright = batch.images[batch.images.mean(dim=(1, 2, 3)) > 0.5]
            return output._replace(loss=output.loss + bright.sum())

    objective = make_objective()
    objective.__class__ = Chooses
    assert cost.measure(objective, (16, 16)) == cost.Cost(None, None, None)


def test_an_objectives_own_error_is_not_taken_for_that() -> None:
    objective = make_objective()
    objective.model.head = torch.nn.Linear(3, 10)
    with pytest.raises(RuntimeError, match=r"reduction dim|cannot be multiplied"):
        cost.measure(objective, (16, 16))
