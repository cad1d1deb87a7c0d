"""Where attention goes by oneDNN's products, and those in float32."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitrail.layers.attention import attend
from vitrail.ops import attention as module
from vitrail.ops import attention_fp32, linear
from vitrail.ops.attention import attention
from vitrail.ops.packed_attention import packed_attention
from vitrail.packing import Spans

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN"
)


@pytest.fixture
def products(monkeypatch):
    """The shapes that oneDNN was asked for; here it takes the smallest heads too, by three rows at most."""
    seen, real = [], linear.product

    def product(x, weight, bias):
        seen.append((tuple(x.shape), tuple(weight.shape)))
        return real(x, weight, bias)

    monkeypatch.setattr(linear, "_pays", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(module, "LEAST_FP32", 1)
    monkeypatch.setattr(module, "WIDTH_FP32", 1)
    monkeypatch.setattr(attention_fp32, "ROWS", 3)
    monkeypatch.setattr(attention_fp32, "product", product)
    return seen


def given(queries: int = 7, keys: int = 5, width: int = 8, values: int = 6) -> list[Tensor]:
    """Heads of two images, as a projection of all gives them: parts of larger tensors."""
    g = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(2, n, 3, c, generator=g).transpose(1, 2)
        for n, c in ((queries, width), (keys, width), (keys, values))
    ]
    return [t.requires_grad_() for t in tensors]


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).float()


@pytest.mark.parametrize(("queries", "keys"), [(7, 5), (6, 9), (1, 4), (3, 1), (4, 4)])
def test_value_and_gradients_are_those_of_the_formula(products, queries, keys):
    tensors = given(queries, keys)
    out, expected = attention(*tensors), formula(*tensors)
    torch.testing.assert_close(out, expected)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad(y, tensors, g) for y in (out, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert len(products) == 6 * -(-queries // 3) * (2 + 5)
    with torch.no_grad():
        torch.testing.assert_close(attention(*tensors), expected)
        assert attention(*tensors).grad_fn is None


def test_blocks_are_even_and_no_larger_than_what_the_caches_hold(products, monkeypatch):
    attention(*(t.detach() for t in given(7, 5)))
    assert [x for x, weight in products if weight == (5, 8)] == [(3, 8), (3, 8), (1, 8)] * 6
    products.clear()
    attention(*(t.detach() for t in given(4, 5)))
    assert [x for x, weight in products if weight == (5, 8)] == [(2, 8), (2, 8)] * 6
    products.clear()
    monkeypatch.setattr(attention_fp32, "SCORES", 10)
    attention(*(t.detach() for t in given(7, 5)))
    assert {x[0] for x, weight in products if weight == (5, 8)} == {2, 1}


def test_what_comes_out_lies_as_heads_are_joined_and_may_be_changed_in_its_place(products):
    tensors = given()
    for tensor in (attention(*tensors), attention(*(t.detach() for t in tensors))):
        assert tensor.transpose(1, 2).is_contiguous()
    out = F.relu(attention(*tensors).transpose(1, 2).flatten(2), inplace=True)
    want = formula(*tensors).transpose(1, 2).flatten(2).relu()
    for a, b in zip(*(torch.autograd.grad(y.sum(), tensors) for y in (out, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_layers_and_packs_take_it(products):
    q, k, v = (t.detach() for t in given(5, 5, values=8))
    torch.testing.assert_close(attend(q, k, v, None), formula(q, k, v))
    assert len(products) == 6 * 2 * 2
    tokens = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]  # of both images
    packed = packed_attention(*tokens, Spans((5, 5)), implementation="runs")
    torch.testing.assert_close(packed, formula(q, k, v).transpose(1, 2).flatten(0, 1))
    assert len(products) == 2 * 6 * 2 * 2
    bias = torch.zeros(5, 5)
    torch.testing.assert_close(attend(q, k, v, bias), formula(q, k, v))
    assert len(products) == 2 * 6 * 2 * 2, "a bias is the fused function's"


def test_an_images_result_is_the_same_bits_in_any_batch(products):
    q, k, v = (t.detach() for t in given(5, 5))
    together = attention(q, k, v)
    for i in range(2):
        assert torch.equal(attention(q[i : i + 1], k[i : i + 1], v[i : i + 1])[0], together[i])


def test_few_tokens_and_narrow_heads_stay_with_pytorch(products, monkeypatch):
    tensors = given(7, 5, 8, 6)
    for name, value in (("LEAST_FP32", 7 * 5), ("WIDTH_FP32", 6)):
        monkeypatch.setattr(module, name, value + 1)
        attention(*tensors)
        assert products == []
        monkeypatch.setattr(module, name, value)
        attention(*tensors)
        assert products
        products.clear()


def test_where_threads_share_the_heads_it_stays_with_pytorch(products, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    attention(*given())
    assert products == []


def test_what_onednn_would_round_or_does_not_know_goes_to_pytorch(products, monkeypatch):
    q, k, v = tensors = given()
    want = formula(q, k, v)
    doubles = [t.double() for t in tensors]
    torch.testing.assert_close(attention(*doubles).float(), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(*tensors).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        attention(*tensors)
    assert attention(*(t.to("meta") for t in tensors)).device.type == "meta"
    torch.testing.assert_close(attention(q[0], k[0], v[0]), want[0])
    torch.testing.assert_close(attention(q[:1], k, v)[1], formula(q[0], k[1], v[1]))
    with pytest.raises(RuntimeError):
        attention(q, k, v[:, :, 1:])
    with FlopCounterMode(display=False) as counter:
        attention(q, k, given(7, 5, 8, 8)[2])
    assert counter.get_total_flops() > 0
    exported = torch.export.export(_Layer(), tuple(t.detach() for t in tensors))
    assert "mkldnn" not in str(exported.graph)
    assert products == []
    monkeypatch.setattr(linear, "_pays", lambda: False)
    attention(*tensors)
    assert products == []


class _Layer(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v)
