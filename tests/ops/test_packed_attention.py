"""Attention within the images of a pack: all forms against the definition, that against each image alone."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.ops.packed_attention import (
    BLOCK,
    automatic,
    image_mask,
    packed_attention,
    padded_length,
)
from vitrail.packing import Spans
from vitrail_runtime.errors import InputError

HEADS, WIDTH, VALUES = 2, 4, 3
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def tensors(queries: Spans, keys: Spans, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(queries.total, WIDTH), (keys.total, WIDTH), (keys.total, VALUES)]
    return [
        torch.randn(n, HEADS, d, generator=generator, dtype=dtype).requires_grad_()
        for n, d in shapes
    ]


def outcome(inputs: list[Tensor], spans: Spans, keys: Spans | None, form: str) -> list[Tensor]:
    """The output and the gradients of a sum in which every number counts differently."""
    out = packed_attention(*inputs, spans, keys, implementation=form)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device)
    return [out, *torch.autograd.grad((out.flatten() * weights).sum(), inputs)]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, spans: Spans, keys: Spans) -> Tensor:
    """The formula, image by image."""
    parts = []
    pieces = zip(*(x.split(s.lengths) for x, s in ((q, spans), (k, keys), (v, keys))), strict=True)
    for own_q, own_k, own_v in pieces:
        heads = []
        for h in range(HEADS):
            scores = own_q[:, h] @ own_k[:, h].T / WIDTH**0.5
            heads.append(scores.softmax(-1) @ own_v[:, h])
        parts.append(torch.stack(heads, dim=1))
    return torch.cat(parts)


@settings(max_examples=8)
@given(lengths=LENGTHS, others=st.lists(st.integers(1, 5), min_size=6, max_size=6))
def test_the_forms_for_a_cpu_are_the_formula_of_each_image_in_output_and_gradients(lengths, others):
    spans, keys = Spans(tuple(lengths)), Spans(tuple(others[: len(lengths)]))
    for theirs in (None, keys):
        inputs = tensors(spans, theirs or spans)
        dense = outcome(inputs, spans, theirs, "dense")
        alone = one_by_one(*inputs, spans, theirs or spans)
        torch.testing.assert_close(dense[0], alone, atol=1e-12, rtol=1e-12)
        for form in ("runs", "auto"):
            for got, want in zip(outcome(inputs, spans, theirs, form), dense, strict=True):
                torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_another_images_tokens_change_nothing():
    spans = Spans((3, 5, 3))
    q, k, v = (x.detach() for x in tensors(spans, spans))
    before = packed_attention(q, k, v, spans)
    k[3:8], v[3:8] = 100.0, float("nan")
    after = packed_attention(q, k, v, spans)
    assert torch.equal(before[:3], after[:3])
    assert torch.equal(before[8:], after[8:])
    assert after[3:8].isnan().all()


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ((5, 200, 1, 50), None),
        ((128, 128), None),  # whole blocks, nothing to fill up
        ((1, 1, 1), (100, 300, 17)),
        ((130, 126), (128, 128)),
        ((1, 1), (120, 136)),  # queries to fill up, and no keys
    ],
)
def test_flex_attention_is_given_what_makes_it_the_definition(queries, keys, monkeypatch):
    """In place of the compiled kernel all scores under the mask; its blocks are the next test's."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
        rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        seen = block_mask.mask_mod(torch.tensor(0), torch.tensor(0), rows, columns)
        scores = (q @ k.transpose(2, 3) / WIDTH**0.5).masked_fill(~seen, float("-inf"))
        return scores.softmax(-1) @ v

    monkeypatch.setattr("vitrail.ops.packed_attention._compiled", lambda: kernel)
    spans, others = Spans(queries), keys and Spans(keys)
    q, k, v = (x.detach() for x in tensors(spans, others or spans))
    got = packed_attention(q, k, v, spans, others, implementation="flex")
    want = packed_attention(q, k, v, spans, others, implementation="dense")
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5), pool=st.booleans())
def test_the_mask_of_blocks_visits_every_pair_of_an_image_and_no_block_without_one(lengths, pool):
    keys = Spans(tuple(lengths))
    spans = Spans((1,) * len(lengths)) if pool else keys
    mask = image_mask(spans, keys, torch.device("cpu"))
    rows, columns = padded_length(spans.total), padded_length(keys.total)
    visited = mask.to_dense()[0, 0].bool()
    assert visited.shape == (rows // BLOCK, columns // BLOCK)
    q = torch.arange(rows)[:, None]
    kv = torch.arange(columns)[None]
    seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), q, kv)
    same = spans.images(q.device)[:, None] == keys.images(q.device)
    assert torch.equal(seen[: spans.total, : keys.total], same)
    assert seen.any(1).all()  # a row without a key is a softmax over nothing
    blocks = seen.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK).any(3).any(1)
    assert torch.equal(visited, blocks)


def test_the_mask_is_made_once_for_all_layers():
    spans = Spans((3, 4))
    device = torch.device("cpu")
    assert image_mask(spans, spans, device) is image_mask(spans, spans, device)
    other = Spans((1, 1))
    assert image_mask(other, spans, device) is not image_mask(other, other, device)


@settings(max_examples=50)
@given(total=st.integers(1, 100_000))
def test_padded_lengths_are_few_and_near(total):
    length = padded_length(total)
    assert length % BLOCK == 0
    assert total <= length <= max(total * 1.125 + 1, total + BLOCK - 1)
    power = 1 << (total - 1).bit_length()
    assert len({padded_length(n) for n in range(power // 2 + 1, power + 1)}) <= 8


@pytest.mark.slow
def test_compiled_flex_attention_equals_the_definition_on_a_cpu():
    spans = Spans((70, 200, 31))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(301, 2, 16, generator=generator) for _ in range(3))
    got = packed_attention(q, k, v, spans, implementation="flex")
    want = packed_attention(q, k, v, spans, implementation="dense")
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("varlen", torch.bfloat16),
        ("varlen", torch.float16),
        ("flex", torch.bfloat16),
        ("flex", torch.float32),
        ("runs", torch.float32),
        ("auto", torch.bfloat16),
        ("auto", torch.float32),
    ],
)
@pytest.mark.parametrize("pool", [False, True])
def test_the_forms_for_a_gpu_equal_the_definition_in_output_and_gradients(form, dtype, pool):
    keys = Spans((70, 200, 31, 31, 256, 1))
    spans = Spans((1,) * 6) if pool else keys
    generator = torch.Generator().manual_seed(0)
    exact = [
        torch.randn(n, 3, 32, generator=generator, dtype=torch.float64)
        for n in (spans.total, keys.total, keys.total)
    ]
    inputs = [x.to("cuda", dtype).requires_grad_() for x in exact]
    rounded = [x.detach().double().requires_grad_() for x in inputs]
    want = outcome(rounded, spans, keys, "dense")
    # float32's products may be of 10 bits on such devices (TF32).
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 4e-3}[dtype]
    for got, truth in zip(outcome(inputs, spans, keys, form), want, strict=True):
        assert got.dtype == dtype
        assert (got.double() - truth).abs().max() <= tolerance * truth.abs().max()


def test_auto_is_by_runs_wherever_no_gpu_is():
    x = torch.zeros(1, 1, 64)
    assert automatic(x, x) == automatic(x.bfloat16(), x.bfloat16()) == "runs"


@pytest.mark.parametrize(
    ("change", "form", "message"),
    [
        ({"spans": Spans((3,))}, "auto", r"cover 3 queries and 3 keys.*\(5, 1, 2\)"),
        ({"keys": Spans((4, 1))}, "auto", "2 images' keys"),
        ({"spans": Spans((5, 0)), "keys": Spans((4, 1))}, "auto", "at least one token"),
        ({"v": torch.zeros(4, 1, 2)}, "auto", "do not fit"),
        ({"k": torch.zeros(5, 2, 2)}, "auto", "do not fit"),
        ({}, "varlen", "CUDA's kernel, but these tensors are on cpu"),
        ({}, "quick", "unknown implementation 'quick'; there are auto, runs"),
        ({"q": torch.zeros(5, 1, 2, requires_grad=True)}, "flex", "no backward pass on a CPU"),
    ],
)
def test_what_cannot_be_computed_is_said(change, form, message):
    given = {"q": torch.zeros(5, 1, 2), "k": torch.zeros(5, 1, 2), "v": torch.zeros(5, 1, 2)}
    given |= {"spans": Spans((5,)), "keys": None} | change
    with pytest.raises(InputError, match=message):
        packed_attention(
            given["q"],
            given["k"],
            given["v"],
            given["spans"],
            given["keys"],
            implementation=form,
        )
