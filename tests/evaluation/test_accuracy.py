import torch
from conftest import make_batch, make_objective

from hybridvit.evaluation.accuracy import accuracy, predictions


def test_accuracy_counts_images_not_batches() -> None:
    model = make_objective().model
    torch.nn.init.normal_(model.head.weight)
    batches = [make_batch(5, seed=1), make_batch(3, seed=2)]
    hits = sum(int((model.eval()(b.images).argmax(1) == b.labels).sum()) for b in batches)
    model.head.train()
    predicted, labels = predictions(model, batches)
    assert accuracy(predicted, labels) == hits / 8
    assert torch.equal(labels, torch.cat([b.labels for b in batches]))


def test_evaluation_is_in_eval_mode_and_restores_training() -> None:
    model = make_objective().model.train()
    modes: list[bool] = []
    model.head.register_forward_hook(lambda module, *_: modes.append(module.training))
    predictions(model, [make_batch(2)])
    assert modes == [False]
    assert model.training


def test_classes_that_bf16_cannot_tell_apart_are_told() -> None:
    """The second has the higher logit by a 1000th, of which 8 bits know nothing."""
    model = make_objective().model
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([1.0, 1.001, *[0.0] * 8]))
    with torch.autocast("cpu", torch.bfloat16):
        predicted, _ = predictions(model, [make_batch(4)])
    assert predicted.tolist() == [1] * 4
