from __future__ import annotations

import hand_counts as by_hand
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import OWN_PARTS, make_objective
from hand_counts import DEPTH, HIDDEN, D, Flops, N
from torch import Tensor

from hybridvit import build
from hybridvit.analysis import cost
from hybridvit.contracts import Objective
from hybridvit.engine.optim import freeze

PARTS = build.make_parts([OWN_PARTS])[0]
IMAGES = 2  # of a batch: contrastive losses cost more for each where there are more
ARGS: dict[str, dict[str, object]] = {
    "mae": {
        "decoder_dim": by_hand.MAE_DIM,
        "decoder_depth": by_hand.MAE_DEPTH,
        "decoder_heads": 2,
    }
}


def counted(objective: Objective, images: int = IMAGES) -> Flops:
    spent = cost.measure(objective, (by_hand.SIDE, by_hand.SIDE), images)
    assert spent.forward_flops is not None
    assert spent.backward_flops is not None
    return Flops(spent.forward_flops, spent.backward_flops)


@pytest.mark.parametrize("objective", PARTS.objectives.factories)
@pytest.mark.parametrize("stem", PARTS.stems.factories)
def test_every_stem_and_objective_against_a_count_by_hand(stem: str, objective: str) -> None:
    made = make_objective(objective, stem, **ARGS.get(objective, {}))
    assert counted(made) == by_hand.OBJECTIVES[objective](stem, IMAGES)


@pytest.mark.parametrize("stem", PARTS.stems.factories)
def test_a_teacher_is_counted_without_a_backward_pass(stem: str) -> None:
    made = make_objective("masked_patch", stem, target="features")
    assert counted(made) == by_hand.masked_features(stem, IMAGES)


@pytest.mark.parametrize("stem", ["resnet", "conv", "overlap", "cct", "convnext"])
def test_masks_inside_a_stem_save_nothing(stem: str) -> None:
    made = make_objective("simmim", stem, stem_args={"masked": True})
    assert counted(made) == by_hand.simmim(stem, IMAGES)


def test_negatives_are_those_of_the_micro_batch() -> None:
    for images in (2, 8):
        assert counted(make_objective("simclr"), images) == by_hand.simclr("linear", images)


def test_what_is_frozen_has_no_backward_pass() -> None:
    objective = make_objective()
    freeze(objective, ["model.stem", "model.encoder"])
    head = by_hand.product(1, D, by_hand.CLASSES, 1)
    forward = by_hand.supervised("linear", IMAGES).forward
    assert counted(objective) == Flops(forward, head.backward)
    freeze(objective, ["model.head.weight"])  # its bias alone is left
    assert counted(objective) == Flops(forward, 0)


def test_fused_attention_counts_as_plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a third party's network may call, and torch's counter has a formula of its own for."""
    plain = counted(make_objective())

    def fused(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr("hybridvit.encoder.attention.attend", fused)
    assert counted(make_objective()) == plain


def variant(**args: object) -> Flops:
    return counted(make_objective(encoder_args=args))


def whole(blocks: Flops) -> Flops:
    return by_hand.stem("linear") + blocks + by_hand.product(1, D, by_hand.CLASSES)


def test_variants_of_the_encoder_against_counts_by_hand() -> None:
    tokens, side = 1 + N, by_hand.SIDE // by_hand.PATCH
    block = by_hand.block
    # The last block computes the class token alone,
    assert variant(registers=3) == whole(block(tokens + 3) + block(tokens + 3, read=1))
    assert variant(class_token=False, pool="mean") == whole(block(N) * DEPTH)
    gated = block(tokens, gated=True) + block(tokens, gated=True, read=1)
    assert variant(mlp="swiglu") == whole(gated)
    room = by_hand.product(tokens, D, D - 4)
    concat = variant(position_combine="concat", position_dim=4)
    assert concat == whole(by_hand.encoder(read=1) + room)
    # but all tokens where attention depends on their places.
    # A patch attends to its line and the class token, that one to all.
    pairs = N * (side + 1) + tokens
    assert variant(attention="axial") == whole(block(tokens, pairs=pairs) * DEPTH)
    # Each query with all offsets.
    offsets = by_hand.product(N * (2 * N - 1), D, 1)
    assert variant(position="relative") == whole((block(tokens) + offsets) * DEPTH)
    assert variant(position="relative_bias") == whole(block(tokens) * DEPTH)
    assert variant(position="rope_2d", heads=1) == whole(block(tokens) * DEPTH)


def test_attention_pooling_against_a_count_by_hand() -> None:
    # Its query is the same for all images and projected once for a batch.
    query = by_hand.product(1 / IMAGES, D, D)
    keys = by_hand.product(N, D, 2 * D) + by_hand.product(N, D, 1) * 2
    rest = by_hand.product(1, D, D) + by_hand.product(1, D, HIDDEN) + by_hand.product(1, HIDDEN, D)
    expected = whole(by_hand.encoder() + query + keys + rest)
    assert variant(pool="map") == expected


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


def of_head(head: torch.nn.Module) -> cost.Cost:
    objective = make_objective()
    objective.model.head = head
    return cost.measure(objective, (by_hand.SIDE, by_hand.SIDE), IMAGES)


def test_products_that_torchs_counter_leaves_out() -> None:
    class Bilinear(torch.nn.Bilinear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x, x)

    class Matvec(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return logits + (self.weight.T @ self.bias).sum() + self.bias @ self.bias

    linear, bilinear = of_head(torch.nn.Linear(D, 10)), of_head(Bilinear(D, D, 10))
    assert bilinear.forward_flops - linear.forward_flops == 2 * 10 * D * D - 2 * 10 * D
    of_vectors = of_head(Matvec(D, 10)).forward_flops - linear.forward_flops
    assert of_vectors == (2 * 10 * D + 2 * 10) // IMAGES  # once a batch


@pytest.mark.filterwarnings("ignore")
def test_what_another_library_computes_is_not_taken_for_nothing() -> None:
    class Deformed(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            image, offset = x[:, :3, None, None], x.new_zeros(len(x), 2, 1, 1)
            weight = self.weight[:, :3, None, None]
            return torchvision.ops.deform_conv2d(image, offset, weight, self.bias).flatten(1)

    found = of_head(Deformed(D, 10))
    assert (found.forward_flops, found.backward_flops) == (None, None)
    assert found.activation_bytes is not None


def test_an_objectives_own_error_is_not_taken_for_that() -> None:
    objective = make_objective()
    objective.model.head = torch.nn.Linear(3, 10)
    with pytest.raises(RuntimeError, match=r"reduction dim|cannot be multiplied"):
        cost.measure(objective, (16, 16))
