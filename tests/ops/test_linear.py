"""The product of linear layers by oneDNN, where it is the faster one."""

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from vitrail.ops import linear as module
from vitrail.ops.linear import Linear, linear

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN"
)


@pytest.fixture
def products(monkeypatch):
    """The shapes that oneDNN was asked for; here it takes the smallest products too."""
    seen, real = [], module.product

    def product(x, weight, bias):
        seen.append((tuple(x.shape), tuple(weight.shape)))
        return real(x, weight, bias)

    monkeypatch.setattr(module, "_pays", lambda: True)
    monkeypatch.setattr(module, "LEAST", 1)
    monkeypatch.setattr(module, "product", product)
    return seen


def given(*shape, bias=True):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 24, generator=g, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(40, 24, generator=g))
    return x, weight, torch.nn.Parameter(torch.randn(40, generator=g)) if bias else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 4)])
def test_value_and_gradients_are_those_of_pytorchs_linear(products, shape, bias):
    tensors = given(*shape, bias=bias)
    wanted = [t for t in tensors if t is not None]
    out, expected = linear(*tensors), F.linear(*tensors)
    torch.testing.assert_close(out, expected)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad(y, wanted, g) for y in (out, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    rows = out[..., 0].numel()
    assert [weight for _, weight in products] == [(40, 24), (24, 40), (24, rows)]


@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 4)])
def test_an_activation_may_work_in_its_place(products, shape):
    x, weight, bias = given(*shape)
    found = []
    for form in (linear, F.linear):
        out = F.silu(form(x, weight, bias), inplace=True)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, weight, bias])])
    assert len(products) == 3
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)


def test_gradients_of_gradients_are_those_of_pytorchs_linear(products):
    x, weight, bias = given(7)
    found = []
    for form in (linear, F.linear):
        (first,) = torch.autograd.grad(form(x, weight, bias).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), [x, weight, bias]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-1)  # of values up to 1e6


def test_parts_of_larger_tensors_are_copied_before(monkeypatch):
    seen = []

    def plain(x, weight, bias, *_):
        seen.append((x.stride(), weight.stride()))
        return F.linear(x, weight, bias)

    monkeypatch.setattr(module.torch.ops, "mkldnn", SimpleNamespace(_linear_pointwise=plain))
    wide = torch.randn(7, 3, 24)
    module.product(wide[:, 0], torch.randn(40, 48)[:, :24], None)
    module.product(torch.randn(1, 1).expand(7, 24), torch.randn(24, 40).t(), None)
    assert seen == [((24, 1), (24, 1)), ((24, 1), (1, 40))]


def test_a_bias_may_be_a_part_of_another_tensor_or_one_number_for_all(products):
    x, weight, whole = torch.randn(7, 24), torch.randn(40, 24), torch.randn(80, requires_grad=True)
    for bias in (whole[1::2], whole[:1].expand(40)):
        found = [form(x, weight, bias) for form in (linear, F.linear)]
        torch.testing.assert_close(*found)
        ours, theirs = (torch.autograd.grad(y.sum(), whole)[0] for y in found)
        torch.testing.assert_close(ours, theirs)
    assert len(products) == 2


def test_only_what_needs_a_gradient_has_its_product_computed(products):
    x, weight, bias = given(7)
    linear(x.detach(), weight, bias).sum().backward()
    assert len(products) == 2
    assert weight.grad is not None
    with torch.no_grad():
        assert linear(x, weight, bias).grad_fn is None


@pytest.mark.parametrize("form", [linear, F.linear])
def test_what_no_gradient_asks_for_is_not_kept_and_may_change(products, form):
    x, weight, bias = given(7)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        form(x, weight.detach(), bias)
        form(x.detach(), weight, bias)
        form(x.detach(), weight.detach(), bias)
    assert [shape.numel() for shape in kept] == [40 * 24, 7 * 24]
    into, frozen = x.clone(), weight.detach()
    out = form(into, frozen, None)
    into.add_(1)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], frozen.sum(0).expand(7, 24))


def test_a_layer_is_pytorchs_with_its_parameters(products):
    torch.manual_seed(0)
    ours, theirs = Linear(24, 40), torch.nn.Linear(24, 40)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 24)
    torch.testing.assert_close(ours(x), theirs(x))
    assert len(products) == 1
    assert isinstance(ours, torch.nn.Linear)


def test_what_onednn_would_round_or_does_not_know_goes_to_pytorch(products):
    x, weight, bias = given(7)
    torch.testing.assert_close(
        linear(x.double(), weight.double(), bias.double()).float(), F.linear(x, weight, bias)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    assert linear(x[0], weight, bias).shape == (40,)
    with torch.backends.mkldnn.flags(enabled=False):
        linear(x, weight, bias)
    assert linear(x.to("meta"), weight.to("meta"), bias.to("meta")).device.type == "meta"
    assert products == []


def test_what_fits_in_another_way_or_not_is_answered_by_pytorch(products):
    x, weight, bias = (t.detach() for t in given(7))
    one = bias[:1]
    sparse = weight.to_sparse()
    for tensors in ((x, weight, one), (x, weight[0], None), (x, sparse, None)):
        torch.testing.assert_close(linear(*tensors), F.linear(*tensors))
    for tensors in ((x[:, 1:], weight, bias), (x, weight, bias[1:])):
        with pytest.raises(RuntimeError) as theirs:
            F.linear(*tensors)
        with pytest.raises(RuntimeError) as ours:
            linear(*tensors)
        assert str(ours.value) == str(theirs.value)
    with suppress(RuntimeError):
        linear(x, weight, bias.to("meta"))
    assert products == []


def test_small_products_stay_with_pytorch(products, monkeypatch):
    x, weight, bias = given(7)
    monkeypatch.setattr(module, "LEAST", 7 * 24 * 40 + 1)
    linear(x, weight, bias)
    assert products == []
    monkeypatch.setattr(module, "LEAST", 7 * 24 * 40)
    linear(x, weight, bias)
    assert len(products) == 1


def test_who_looks_at_single_operations_sees_pytorchs(products):
    torch.manual_seed(0)
    layer, x = Linear(24, 40), torch.randn(7, 24)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 7 * 24 * 40
    expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(torch.vmap(layer)(x[:, None])[:, 0], expected)
    with forward_ad.dual_level():
        out = layer(forward_ad.make_dual(x, torch.ones_like(x)))
        assert forward_ad.unpack_dual(out).tangent is not None
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert "mkldnn" not in str(traced.inlined_graph)
    exported = torch.export.export(layer, (x,))
    assert "mkldnn" not in str(exported.graph)
    assert products == []


@pytest.mark.parametrize(
    ("vendor", "capability", "pays"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
    ],
)
def test_it_is_for_the_machines_where_it_was_measured(monkeypatch, vendor, capability, pays):
    monkeypatch.setattr(module.platform, "processor", lambda: "")
    monkeypatch.setattr(Path, "read_text", lambda self, **_: f"vendor_id : {vendor}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert module._pays.__wrapped__() is pays
