"""The core of attention against its formula, in all the ways that it is called."""

import math

import pytest
import torch

from vitrail.layers.attention import attend, map_to_tokens, tokens_to_map


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("bias", [None, (1, 3, 5, 7), (2, 1, 5, 7)])
def test_it_is_the_softmax_of_scaled_scores_plus_bias_times_the_values(grad, recorded, bias):
    q, k, v = draw(2, 3, 5, 4), draw(2, 3, 7, 4, seed=1), draw(2, 3, 7, 4, seed=2)
    table = None if bias is None else draw(*bias, seed=3).requires_grad_()
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(4)
    weights = (scores if table is None else scores + table).softmax(3)
    record = {} if recorded else None
    with torch.set_grad_enabled(grad):
        got = attend(q, k, v, table, record, "block.attn")
    torch.testing.assert_close(got, torch.einsum("bhqk,bhkd->bhqd", weights, v))
    if record is not None:
        assert list(record) == ["block.attn.weights"]
        torch.testing.assert_close(record["block.attn.weights"], weights)
    if table is not None and grad:
        (gradient,) = torch.autograd.grad(got.square().sum(), table)
        assert gradient.abs().min() > 0


def test_queries_may_be_narrower_than_values():
    q, k, v = draw(1, 2, 3, 6), draw(1, 2, 5, 6, seed=1), draw(1, 2, 5, 8, seed=2)
    want = (q @ k.mT / 6**0.5).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v, None), want)
    torch.testing.assert_close(attend(q, k, v, None, {}, "x"), want)


def test_tokens_are_the_places_of_a_map_row_by_row():
    x = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    tokens = map_to_tokens(x)
    assert tokens.shape == (2, 20, 3)
    assert torch.equal(tokens[1, 2 * 5 + 3], x[1, :, 2, 3])
    assert torch.equal(tokens_to_map(tokens, 4, 5), x)
