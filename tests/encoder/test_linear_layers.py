"""Linear layers: torch's values, and gradients that a finite difference or float64 shows."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hybridvit.encoder import linear as module
from hybridvit.encoder.linear import Affine, Linear, joins_bias, linear, weight_gradient
from hybridvit.encoder.mlp import Mlp

DOUBLE = torch.float64
# What torch says of the CPU, not our own answer: a wrong one would skip its tests.
ONEDNN = torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported()
onednn = pytest.mark.skipif(not ONEDNN, reason="no oneDNN for bf16 here: needs AVX-512")


class Operators(TorchDispatchMode):
    """Operators that are called, and the sizes of their first tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: defaultdict[str, list[tuple[int, ...]]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.sizes[func.overloadpacket.__name__].append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def two_threads_for_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(module, "threads", lambda: 2)
    monkeypatch.setattr(module, "FEW", 1)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])  # of 6 tokens; 4 do not divide them
@pytest.mark.parametrize("sizes", [(5, 3), (3, 5)])
@pytest.mark.parametrize("activated", [True, False])
def test_gradients_are_those_of_finite_differences(
    parts: int, sizes: tuple[int, int], activated: bool
) -> None:
    width, outputs = sizes
    x = torch.randn(2, 3, width, dtype=DOUBLE, requires_grad=True)
    weight = torch.randn(outputs, width, dtype=DOUBLE, requires_grad=True)
    bias = torch.randn(outputs, dtype=DOUBLE, requires_grad=True)
    how = (parts, activated)
    assert torch.autograd.gradcheck(lambda *args: Affine.apply(*args, *how), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *args: Affine.apply(*args, None, *how), (x, weight))


@pytest.mark.parametrize(
    ("wanted", "flops"), [(0, 2 * 2 * 8 * 2), (1, 2 * 2 * 8 * 2), (2, 2 * 2 * 8)]
)
def test_a_gradient_that_nobody_asks_for_is_not_computed(wanted: int, flops: int) -> None:
    inputs = [torch.randn(2, 2), torch.randn(8, 2), torch.randn(8)]
    inputs[wanted].requires_grad_()
    with FlopCounterMode(display=False) as counted:
        Affine.apply(*inputs, 1, True).sum().backward()
    assert counted.get_total_flops() == 2 * 2 * 8 * 2 + flops  # forward, and one product backward


def test_few_tokens_have_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEW", 10)
    for tokens, parts in ((18, 1), (20, 2)):
        x, gradient = torch.randn(tokens, 4), torch.randn(tokens, 3)
        with Operators() as called:
            found = weight_gradient(x, gradient, 2)
        assert called.sizes["bmm"] == [(parts, 3, tokens // parts)]
        torch.testing.assert_close(found, gradient.mT @ x)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("outputs", [16, 64])
def test_the_gradient_of_weights_lies_as_they_do(parts: int, outputs: int) -> None:
    """Else torch copies it at every step."""
    found = weight_gradient(torch.randn(2, 8, 32), torch.randn(2, 8, outputs), parts)
    assert found.shape == (outputs, 32)
    assert found.is_contiguous()


def products(precision: torch.dtype, *, activated: bool = False) -> Counter[str]:
    """Operators of a compiled layer's step for 8 images of 16 tokens."""
    counts: Counter[str] = Counter()

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        called = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
        counts.update(name.removeprefix("aten.").partition(".")[0] for name in called)
        return make_boxed_func(graph)

    layer = Linear(32, 64, activated=activated)
    x = torch.randn(8, 16, 32, requires_grad=True)
    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=count), fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        compiled(x).float().square().mean().backward()
    return counts


def test_compiled_in_bf16_weights_have_a_product_a_thread_and_the_bias_is_apart() -> None:
    counts = products(torch.bfloat16)
    assert (counts["addmm"], counts["mm"], counts["bmm"]) == (0, 2, 1)


def test_before_an_activation_function_the_gradient_of_the_bias_is_a_product_too() -> None:
    assert Mlp(32, 64, nn.ReLU(), 0.0).fc1.activated
    counts = products(torch.bfloat16, activated=True)
    assert (counts["addmm"], counts["mm"], counts["bmm"]) == (0, 3, 1)


def test_compiled_in_float32_it_is_torchs() -> None:
    counts = products(torch.float32)
    assert (counts["addmm"], counts["mm"], counts["bmm"]) == (1, 2, 0)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_not_compiled_it_is_torchs_bit_by_bit_in_float32_and_without_onednn(
    precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "joins_bias", lambda: precision == torch.float32)
    layer, x = Linear(32, 64), torch.randn(8, 16, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@onednn
def test_onednn_is_found() -> None:
    assert joins_bias()


def test_without_onednn_there_is_no_product_with_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert joins_bias.__wrapped__() is False


@onednn
def test_not_compiled_in_bf16_the_bias_is_added_by_the_product() -> None:
    layer, x = Linear(32, 64), torch.randn(8, 16, 32, requires_grad=True)
    with Operators() as called, torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert called.sizes["_linear_pointwise"] == [(8, 16, 32)]
    assert not called.sizes.keys() & {"addmm", "mm", "add"}


@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16])
def test_without_autocast_tokens_and_weights_of_two_types_are_refused_as_by_torch(
    tokens: torch.dtype,
) -> None:
    (weights,) = {torch.float32, torch.bfloat16} - {tokens}
    layer = Linear(4, 6).to(weights)
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(torch.randn(2, 4, dtype=tokens))


@onednn
@pytest.mark.parametrize("images", [0, 1, 3])
def test_not_compiled_in_bf16_layers_take_tokens_and_weights_however_they_lie(images: int) -> None:
    wide = torch.randn(images, 4, 10, 8, dtype=torch.bfloat16)
    x = wide.transpose(1, 2)[..., ::2].requires_grad_()  # (B, 10, 4, 4)
    weight = torch.randn(4, 6, dtype=torch.bfloat16).T.requires_grad_()
    bias = torch.randn(12, dtype=torch.bfloat16)[::2].requires_grad_()
    leaves = (x, weight, bias)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    ours, known = linear(*leaves), F.linear(*exact)
    slope = torch.randn_like(ours)
    found = (ours, *torch.autograd.grad(ours, leaves, slope))
    wanted = (known, *torch.autograd.grad(known, exact, slope.double()))
    for mine, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.double(), true, atol=0.03, rtol=0.01)


@pytest.mark.parametrize("how", ["compiled", pytest.param("eager", marks=onednn)])
@pytest.mark.parametrize(("bias", "activated"), [(True, False), (False, False), (True, True)])
def test_values_and_gradients_are_about_as_exact_as_torchs(
    how: str, bias: bool, activated: bool
) -> None:
    """Beside float64, errors of both are those of rounding to bf16. A gradient of weights is
    rounded twice, its parts and their sum: by a factor of about sqrt(2) at the most."""
    torch.manual_seed(0)
    layer = Linear(64, 96, bias=bias)
    x = torch.randn(8, 50, 64)
    target = torch.randn(8, 50, 96)
    leaves = [x, *layer.parameters()]

    def gradients(call: Any, dtype: torch.dtype) -> list[Tensor]:
        copies = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            out = call(copies[0], copies[1], copies[2] if bias else None)
        return [out, *torch.autograd.grad((out.to(dtype) * target.to(dtype)).sum(), copies)]

    exact = gradients(F.linear, DOUBLE)
    torchs = gradients(F.linear, torch.float32)
    call = partial(linear, activated=activated)
    if how == "compiled":
        call = torch.compile(call, backend="aot_eager")
    ours = gradients(call, torch.float32)
    for mine, theirs, true in zip(ours, torchs, exact, strict=True):
        scale = true.abs().mean()
        error, plain = ((found - true).abs().mean() / scale for found in (mine, theirs))
        assert mine.dtype == theirs.dtype
        assert error < 1.42 * plain + 1e-6
        assert plain < 0.01
