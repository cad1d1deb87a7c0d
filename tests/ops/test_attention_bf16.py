"""Attention in bfloat16, by products of many heads at once."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.layers.attention import attend
from vitrail.ops import attention as choice
from vitrail.ops import attention_bf16 as module
from vitrail.ops import linear
from vitrail.ops import packed_attention as packs
from vitrail.ops.attention import attention
from vitrail.ops.packed_attention import dense_attention, packed_attention
from vitrail.packing import Spans

BF16 = torch.bfloat16
SIZES = [(7, 5, 8, 6), (6, 9, 16, 16), (1, 4, 3, 5), (40, 33, 20, 24)]  # queries, keys, widths


@pytest.fixture
def calls(monkeypatch):
    """One for each call; here it is taken for the smallest heads too."""
    seen: list[tuple[int, ...]] = []

    def form(q, k, v, runs):
        assert q.dtype == k.dtype == v.dtype == BF16
        seen.append((*q.shape, *runs))
        return module.attention_bf16(q, k, v, runs)

    monkeypatch.setattr(linear, "_pays", lambda: True)
    monkeypatch.setattr(linear, "_has_bf16", lambda: True)
    for name in ("LEAST_BF16", "QUERIES_BF16", "WIDTH_BF16"):
        monkeypatch.setattr(choice, name, 1)
    for user in (choice, packs):
        monkeypatch.setattr(user, "attention_bf16", form)
    return seen


def given(queries: int = 7, keys: int = 5, width: int = 8, values: int = 6, std: float = 1.0):
    """Heads of two images, as a projection of all gives them: parts of larger tensors. Their scores have the
    deviation std^2."""
    g = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(2, n, 3, c, generator=g).mul(by).bfloat16().transpose(1, 2)
        for n, c, by in ((queries, width, std), (keys, width, std), (keys, values, 1))
    ]
    return [t.requires_grad_() for t in tensors]


def attention_bf16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, heads, N, D), ... -> (B, heads, N, E)"""
    tokens = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    out = module.attention_bf16(*tokens, [(len(q), q.shape[2], k.shape[2])])
    return out.unflatten(0, (len(q), -1)).transpose(1, 2)


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.double() for t in (q, k, v))
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def errors(form, tensors: list[Tensor]) -> list[float]:
    """Of the output and the three gradients, against the formula in float64."""
    copies = [t.detach().double().requires_grad_() for t in tensors]
    out, wanted = form(*tensors), formula(*copies)
    g = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = torch.autograd.grad(out, tensors, g)
    for t, of in zip(tensors, found, strict=True):
        assert of.dtype == t.dtype
        assert of.shape == t.shape
    exact = torch.autograd.grad(wanted, copies, g.double())
    return [error(a, b) for a, b in zip([out, *found], [wanted, *exact], strict=True)]


@pytest.mark.parametrize("scores", [2**20, 500, 100, 11])
@pytest.mark.parametrize("sizes", SIZES)
def test_value_and_gradients_are_those_of_the_formula(monkeypatch, sizes, scores):
    """In one block for all, for some heads, and for some queries of one head."""
    monkeypatch.setattr(module, "_most", lambda: scores)
    monkeypatch.setattr(module, "_places", module._Places())
    tensors = given(*sizes)
    out, *gradients = errors(attention_bf16, tensors)
    assert out < 0.005
    assert max(gradients) < 0.012 or sizes[1] == 1
    with torch.no_grad():
        alone = attention_bf16(*tensors)
        assert alone.grad_fn is None
        assert torch.equal(alone, attention_bf16(*tensors))
        assert error(alone, formula(*tensors)) == out


@pytest.mark.parametrize("std", [1.0, 3.0, 5.0])
def test_it_is_about_as_precise_as_the_fused_function_and_plain_products_are_not(std):
    """Scores of deviation 25, too, where a rounded one would be wrong by a quarter."""
    tensors = given(60, 70, 64, 64, std)
    ours, fused = (errors(f, tensors) for f in (attention_bf16, F.scaled_dot_product_attention))
    for own, other in zip(ours, fused, strict=True):
        assert own < 3 * other
    if std > 1:
        q, k, v = (t.detach() for t in tensors)
        plain = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        assert ours[0] < 0.4 * error(plain, formula(q, k, v))


def test_flat_attention_over_many_keys_is_not_biased():
    """All weights of a query are rounded alike there: an error of one is an error of their sum."""
    tensors = given(8, 1046, 16, 16, std=0.02)
    out, *gradients = errors(attention_bf16, tensors)
    assert out < 0.003
    assert max(gradients) < 0.005


def test_values_far_from_zero_leave_the_gradients_what_they_are():
    """What a softmax's gradient takes off is then many times as large as what is left."""
    q, k, v = given(60, 70, 64, 64)
    tensors = [q, k, (v.detach() + 30).requires_grad_()]
    ours, fused = (errors(f, tensors) for f in (attention_bf16, F.scaled_dot_product_attention))
    assert ours[1] < 2 * fused[1]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_of_one_sign_and_hundreds_neither_overflow_nor_vanish(sign):
    q, k, v = (t.detach() for t in given(9, 12, 8, 8))
    q, k = q.abs() * 40, k.abs() * 40 * sign
    assert error(attention_bf16(q, k, v), formula(q, k, v)) < 0.01
    same = torch.zeros_like(k)
    mean = v.double().mean(2, keepdim=True).expand(-1, -1, 9, -1)
    assert error(attention_bf16(q, same, v), mean) < 0.005


def test_the_highest_score_is_found_whatever_its_sign():
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 5, 300, generator=g).bfloat16()
    scores[:, :, 100:200] = -scores[:, :, 100:200].abs()
    scores[:, :, 0], scores[:, 0, 0] = -0.0, 0.0
    assert (scores.amax(1) < 0).any()
    for part in (scores, scores[:, :, :100].abs().contiguous()):
        assert torch.equal(module._highest(part), part.amax(1, keepdim=True))


def test_sums_are_those_of_float32():
    weights = torch.rand(3, 700, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = weights.double().sum(1, keepdim=True).float()
    torch.testing.assert_close(module._sum(weights), wanted, rtol=2**-16, atol=0)


def test_a_query_that_is_no_number_spoils_its_own_row_alone():
    q, k, v = (t.detach().clone() for t in given(7, 5, 8, 8))
    wanted = attention_bf16(q, k, v)
    q[0, 1, 3] = float("nan")
    out = attention_bf16(q, k, v)
    assert out[0, 1, 3].isnan().all()
    out[0, 1, 3] = wanted[0, 1, 3]
    assert torch.equal(out, wanted)


def test_blocks_fill_what_the_caches_hold(monkeypatch):
    """12 queries and 10 keys: 120 scores a head."""
    q, k = torch.empty(6, 12, 8), torch.empty(6, 10, 8)

    def sizes(scores):
        monkeypatch.setattr(module, "_most", lambda: scores)
        return [
            (len(q[block]), q[block].shape[1], (block[0].start, block[1].start))
            for block in module._blocks(q, k)
        ]

    assert sizes(720) == [(6, 12, (0, 0))]
    assert sizes(599) == [(4, 12, (0, 0)), (2, 12, (4, 0))]
    assert sizes(119)[:3] == [(1, 6, (0, 0)), (1, 6, (0, 6)), (1, 6, (1, 0))]
    assert len(sizes(9)) == 6 * 12
    monkeypatch.setattr(module, "_most", lambda: 2 * 3 * 12 * 10)
    assert [*module._pieces([(5, 12, 10), (1, 1, 2)], heads=3)] == [
        (2, slice(0, 24), slice(0, 20)),
        (2, slice(24, 48), slice(20, 40)),
        (1, slice(48, 60), slice(40, 50)),
        (1, slice(60, 61), slice(50, 52)),
    ]


@pytest.mark.parametrize(("threads", "times"), [(1, 1), (2, 2), (64, 8)])
def test_a_block_grows_with_the_threads_that_share_it(monkeypatch, threads, times):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert module._most() == times * module.SCORES


def test_scores_of_all_blocks_stand_in_the_same_place_in_each_thread_its_own():
    tensors = given(40, 33, 20, 24)
    wanted = attention_bf16(*tensors)
    kept = module._places.kept
    attention_bf16(*tensors)
    assert module._places.kept.data_ptr() == kept.data_ptr()
    found, places = [], []

    def work():
        with torch.inference_mode():  # what is made here must do for training, too
            attention_bf16(*tensors)
        places.append(module._places.kept.data_ptr())
        found.extend(attention_bf16(*tensors).detach() for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({*places, kept.data_ptr()}) == 3
    assert len(found) == 40
    assert all(torch.equal(out, wanted) for out in found)


def test_what_comes_out_lies_as_heads_are_joined_and_is_differentiated_once():
    tensors = given()
    for out in (attention_bf16(*tensors), attention_bf16(*(t.detach() for t in tensors))):
        assert out.transpose(1, 2).is_contiguous()
    (first,) = torch.autograd.grad(
        attention_bf16(*tensors).square().sum(), tensors[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_layers_take_it_with_any_number_of_threads(calls, monkeypatch):
    q, k, v = (t.detach() for t in given(5, 5, values=8))
    assert error(attend(q, k, v, None), formula(q, k, v)) < 0.005
    assert calls == [(10, 3, 8, (2, 5, 5))]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    attention(q, k, v)
    assert len(calls) == 2


@pytest.mark.parametrize("pooled", [False, True])
def test_a_pack_takes_it_at_once_and_equals_one_softmax_under_a_mask(calls, pooled, monkeypatch):
    """Images of several lengths, two of one; with `pooled` each has two queries."""
    monkeypatch.setattr(module, "_most", lambda: 40)
    keys = Spans((4, 9, 9, 2, 7))
    spans = Spans((2,) * 5) if pooled else keys
    g = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(n, 3, c, generator=g).bfloat16().requires_grad_()
        for n, c in ((spans.total, 8), (31, 8), (31, 6))
    ]
    copies = [t.detach().double().requires_grad_() for t in tensors]
    out = packed_attention(*tensors, spans, keys, implementation="runs")
    wanted = dense_attention(*copies, spans, keys)
    of = torch.randn(out.shape, generator=g).bfloat16()
    found = torch.autograd.grad(out, tensors, of)
    exact = torch.autograd.grad(wanted, copies, of.double())
    for a, b in zip([out, *found], [wanted, *exact], strict=True):
        assert error(a, b) < 0.012
    queries = [2, 2, 2, 2] if pooled else [4, 9, 2, 7]
    runs = [*zip([1, 2, 1, 1], queries, [4, 9, 2, 7], strict=True)]
    assert calls == [(spans.total, 3, 8, *runs)]


def test_autocast_gives_it_what_is_float32(calls):
    tensors = [t.detach().float().requires_grad_() for t in given()]
    with torch.autocast("cpu", BF16):
        out = attention(*tensors)
        attention(tensors[0], tensors[1].bfloat16(), tensors[2])
        assert len(calls) == 2
        assert attention(*(t.double() for t in tensors)).dtype == torch.float64
    assert out.dtype == BF16
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert [g.dtype for g in gradients] == [torch.float32] * 3
    attention(*tensors)
    with torch.autocast("cpu", torch.float16):
        attention(*tensors)
        own = given()
        again = torch.autograd.grad(attention_bf16(*own).sum(), own)
    for a, b in zip(again, gradients, strict=True):
        assert torch.equal(a, b.bfloat16())
    with pytest.raises(RuntimeError):
        attention(tensors[0].bfloat16(), *tensors[1:])
    assert len(calls) == 2


def test_queries_are_counted_on_average(calls, monkeypatch):
    tokens = torch.zeros(16, 3, 8, dtype=BF16)
    monkeypatch.setattr(choice, "QUERIES_BF16", 8)
    packed_attention(tokens, tokens, tokens, Spans((5, 7, 4)))
    assert calls == []
    packed_attention(tokens, tokens, tokens, Spans((5, 11)))
    assert len(calls) == 1


def test_few_scores_few_queries_narrow_heads_and_other_cpus_stay_with_pytorch(calls, monkeypatch):
    tensors = [t.detach() for t in given(7, 5, 8, 6)]
    for name, value in (
        ("LEAST_BF16", 2 * 3 * 7 * 5),
        ("QUERIES_BF16", 7),
        ("WIDTH_BF16", 6),
    ):
        monkeypatch.setattr(choice, name, value + 1)
        attention(*tensors)
        assert calls == []
        monkeypatch.setattr(choice, name, value)
        attention(*tensors)
        assert calls
        calls.clear()
    for name in ("_pays", "_has_bf16"):
        with monkeypatch.context() as patch:
            patch.setattr(linear, name, lambda: False)
            attention(*tensors)
            attention(*(t.float() for t in tensors))
    with torch.backends.mkldnn.flags(enabled=False):
        attention(*tensors)
    q, k, v = tensors
    attention(q[0], k[0], v[0])
    attention(q[:1], k, v)
    assert calls == []


def test_bf16_is_for_cpus_that_multiply_it(monkeypatch):
    for supported in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=supported: found)
        assert linear._has_bf16.__wrapped__() is supported
