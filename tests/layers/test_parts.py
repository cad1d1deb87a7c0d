"""Small parts that several papers share, each against its formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.parity import randomise
from vitrail.layers.checkpoint import checkpointed
from vitrail.layers.keys import join_rows
from vitrail.layers.mlp import Mlp
from vitrail.layers.position import resample_positions
from vitrail.layers.residual import DropPath, LayerScale, drop_path_schedule
from vitrail.layers.resize import resize_to_multiple
from vitrail.layers.tables import cached_table


def test_a_dropped_sample_is_zero_and_a_kept_one_is_scaled_so_that_the_mean_stays():
    torch.manual_seed(0)
    drop = DropPath(0.2).train()
    for shape in [(20000, 1), (20000, 3), (20000, 2, 2, 1)]:
        samples = drop(torch.ones(shape)).flatten(1)
        assert torch.equal(samples, samples[:, :1].expand_as(samples)), "whole samples"
        values, counts = samples[:, 0].unique(return_counts=True)
        assert values.tolist() == pytest.approx([0.0, 1.25])
        # Six standard errors of 20,000 draws are 0.017.
        assert counts[1].item() / 20000 == pytest.approx(0.8, abs=0.017)


def test_nothing_is_dropped_in_evaluation_or_at_a_rate_of_zero():
    x = torch.randn(5, 2)
    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0).train()(x) is x
    assert repr(DropPath(0.25)) == "DropPath(rate=0.25)"


def test_rates_grow_linearly_and_one_block_drops_nothing():
    assert drop_path_schedule(0.2, 5) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert drop_path_schedule(0.2, 1) == [0.0]


def test_layer_scale_is_a_factor_per_channel_of_tokens():
    scale = LayerScale(3, 0.1)
    assert scale.gamma.tolist() == pytest.approx([0.1] * 3)
    randomise(scale)
    x = torch.randn(2, 4, 5, 3)
    want = torch.stack([x[..., c] * scale.gamma[c] for c in range(3)], dim=-1)
    torch.testing.assert_close(scale(x), want)


@pytest.mark.parametrize("act", [nn.GELU, nn.SiLU])
def test_an_mlp_is_two_layers_with_dropout_after_each(act):
    torch.manual_seed(0)
    mlp = Mlp(4, 6, act=act, drop=0.2).double()
    x = torch.randn(50, 4, dtype=torch.float64)
    with torch.no_grad():
        hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
        exact = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        hidden = exact if act is nn.GELU else hidden * hidden.sigmoid()
        want = hidden @ mlp.fc2.weight.T + mlp.fc2.bias
        torch.testing.assert_close(mlp.eval()(x), want)
        torch.manual_seed(1)
        got = mlp.train()(x)
        torch.manual_seed(1)
        want = F.dropout(F.dropout(hidden, 0.2) @ mlp.fc2.weight.T + mlp.fc2.bias, 0.2)
    torch.testing.assert_close(got, want)
    assert Mlp(2, 2).act.approximate == "none"  # the exact one
    assert Mlp(2, 2).drop.p == 0.0


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("size", "grown"), [((5, 8), (6, 8)), ((6, 7), (6, 8)), ((1, 1), (2, 2))])
def test_a_map_grows_to_the_next_multiple(size, grown, align_corners):
    x = torch.randn(2, 3, *size)
    got = resize_to_multiple(x, 2, align_corners=align_corners)
    want = F.interpolate(x, grown, mode="bilinear", align_corners=align_corners)
    assert torch.equal(got, want)
    assert resize_to_multiple(got, 2, align_corners=align_corners) is got


def test_half_precision_tables_are_summed_in_float32():
    table = torch.randn(1, 35, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = resample_positions(table, (5, 7), (6, 3), antialias=True)
    want = resample_positions(table.float(), (5, 7), (6, 3), antialias=True)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want.bfloat16())


def test_layers_kept_apart_are_joined_row_by_row_in_the_order_given():
    state = {
        f"a.{part}.{leaf}": torch.full(shape, float(i))
        for i, part in enumerate(("v", "q", "k"))
        for leaf, shape in (("weight", (2, 3)), ("bias", (2,)))
    }
    state["b.q.weight"] = torch.ones(1)  # its k and v are missing
    out = join_rows(state, "qkv", ("q", "k", "v"))
    assert out.keys() == {"a.qkv.weight", "a.qkv.bias", "b.q.weight"}
    assert out["a.qkv.weight"].shape == (6, 3)
    assert out["a.qkv.bias"].tolist() == [1, 1, 2, 2, 0, 0]
    assert len(state) == 7


def test_a_table_is_computed_once_for_each_shape():
    made = []

    @cached_table
    def squares(n: int, device: torch.device) -> torch.Tensor:
        """(n,) squares."""
        made.append(n)
        return torch.arange(n, device=device) ** 2

    cpu = torch.device("cpu")
    assert squares(3, cpu) is squares(3, cpu)
    assert squares(4, cpu).tolist() == [0, 1, 4, 9]
    assert made == [3, 4]
    assert squares.__doc__ == "(n,) squares."


def test_a_table_first_asked_for_in_inference_or_while_shapes_are_traced_serves_training():
    @cached_table
    def ramp(n: int) -> torch.Tensor:
        return torch.arange(n).float()

    with FakeTensorMode():
        fake = ramp(3)
    with torch.inference_mode():
        inside = ramp(3)
    assert type(fake) is not torch.Tensor
    assert type(inside) is torch.Tensor
    assert not inside.is_inference()
    weight = torch.ones(3, requires_grad=True)
    (weight * ramp(3)).sum().backward()
    assert weight.grad.tolist() == [0, 1, 2]


class Noisy(nn.Module):
    """BatchNorm and dropout: what a second run could get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.runs = 0

    def forward(self, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        self.runs += 1
        return self.drop(self.bn(self.fc(x)).relu() * factor)

    def doubled(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self(x)


@pytest.mark.parametrize("method", [None, "doubled"])
def test_what_is_computed_again_gives_the_same_gradients_and_statistics(method):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = Noisy().train()
        x = torch.randn(8, 4, requires_grad=True)
        run = None if method is None else module.doubled
        if checkpointing:
            y = checkpointed(module, x, run=run)
        else:
            y = (run or module)(x)
        kept = {k: v.clone() for k, v in module.bn.named_buffers()}
        y.square().sum().backward()
        assert module.runs == 1 + checkpointing
        for key, value in module.bn.named_buffers():
            assert torch.equal(value, kept[key]), "the second run moves nothing"
        results.append([y, x.grad, *(p.grad for p in module.parameters()), *kept.values()])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)
    assert results[0][-1].item() == 1  # and the first run is counted


def test_arguments_reach_the_module():
    module = Noisy().eval()
    x = torch.randn(3, 4)
    assert torch.equal(checkpointed(module, x, 3.0), module(x, 3.0))
