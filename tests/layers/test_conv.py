"""Parts of mobile networks against timm's and against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity import randomise
from vitrail.features import Features, FeatureSpec
from vitrail.layers.conv import (
    ConvNormAct,
    ConvPoolHead,
    InvertedResidual,
    SamePadConv2d,
    SqueezeExcite,
    absorb_eps,
    fast_layout,
    make_divisible,
    run_stages,
    stage_specs,
)

timm = pytest.importorskip("timm")


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def ready(module: nn.Module) -> nn.Module:
    randomise(module)
    return module.double().eval()


def norm(bn: nn.BatchNorm2d, x: Tensor, eps: float) -> Tensor:
    scale = bn.weight / (bn.running_var + eps).sqrt()
    return (x - bn.running_mean[:, None, None]) * scale[:, None, None] + bn.bias[:, None, None]


@pytest.mark.parametrize("size", [(1, 1), (6, 7), (9, 8), (2, 11)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (3, 3), (2, 2)])
def test_same_padding_is_timms(size, kernel, stride):
    ours = ready(SamePadConv2d(3, 6, kernel, stride, groups=3, bias=False))
    theirs = timm.layers.Conv2dSame(3, 6, kernel, stride, groups=3, bias=False).double()
    theirs.load_state_dict(ours.state_dict())
    x = draw(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("same_pad", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_is_normed_and_then_activated(same_pad, stride):
    part = ready(ConvNormAct(4, 8, 5, stride, groups=2, eps=1e-2, momentum=0.3, same_pad=same_pad))
    assert isinstance(part.conv, SamePadConv2d) == (same_pad and stride > 1)
    assert part.conv.bias is None
    assert (part.bn.eps, part.bn.momentum) == (1e-2, 0.3)
    x = draw(2, 4, 8, 11)
    left = (1, 2) if same_pad and stride > 1 else (2, 2)  # of the even height
    padded = F.pad(x, (2, 2, *left))
    with torch.no_grad():
        want = F.silu(
            norm(part.bn, F.conv2d(padded, part.conv.weight, None, stride, 0, 1, 2), 1e-2)
        )
        torch.testing.assert_close(part(x), want)
    assert not hasattr(ConvNormAct(4, 8, act=None), "act")


def test_gates_are_a_function_of_the_pooled_map():
    part = ready(SqueezeExcite(6, 4, act=nn.ReLU, gate=F.hardsigmoid))
    x = draw(2, 6, 3, 5) * 3
    pooled = x.flatten(2).mean(2)
    with torch.no_grad():
        hidden = F.linear(pooled, part.fc1.weight.flatten(1), part.fc1.bias).clamp(min=0)
        gates = F.linear(hidden, part.fc2.weight.flatten(1), part.fc2.bias)
        want = x * ((gates + 3) / 6).clamp(0, 1)[:, :, None, None]
        torch.testing.assert_close(part(x), want)
        smooth = SqueezeExcite(6, 4)
        assert isinstance(smooth.act, nn.SiLU)
        assert smooth.gate is torch.sigmoid


@pytest.mark.parametrize(
    ("out", "hidden", "stride", "shortcut"),
    [
        (6, 12, 1, True),
        (6, 6, 1, True),
        (6, 12, 2, False),
        (8, 12, 1, False),
        (12, 12, 1, False),
    ],
)
def test_an_inverted_residual_widens_filters_gates_and_narrows(out, hidden, stride, shortcut):
    se = SqueezeExcite(hidden, 3, act=nn.ReLU)
    block = ready(
        InvertedResidual(
            6, out, hidden, kernel_size=5, stride=stride, act=nn.Hardswish, se=se, eps=1e-2,
            momentum=0.2,
        )
    )  # fmt: skip
    assert (len(block.expand.state_dict()) == 0) == (hidden == 6)
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-2, 0.2)}
    x = draw(2, 6, 7, 10)
    with torch.no_grad():
        y = x
        if hidden != 6:
            y = F.hardswish(norm(block.expand.bn, F.conv2d(y, block.expand.conv.weight), 1e-2))
        y = F.conv2d(y, block.depthwise.conv.weight, None, stride, 2, 1, hidden)
        y = block.se(F.hardswish(norm(block.depthwise.bn, y, 1e-2)))
        y = norm(block.project.bn, F.conv2d(y, block.project.conv.weight), 1e-2)
        torch.testing.assert_close(block(x.clone()), x + y if shortcut else y)


def test_an_inverted_residual_pads_its_depthwise_convolution_as_it_is_told():
    blocks = [InvertedResidual(4, 4, 8, stride=2, same_pad=same) for same in (False, True)]
    kinds = [isinstance(b.depthwise.conv, SamePadConv2d) for b in blocks]
    assert kinds == [False, True]
    assert [type(b.expand.conv) for b in blocks] == [nn.Conv2d, nn.Conv2d]


def test_the_pooled_head_widens_the_coarsest_map_before_it_is_pooled():
    head = ready(ConvPoolHead(3, 5, 4, act=nn.ReLU, drop=0.4, eps=1e-2, momentum=0.2))
    assert (head.conv.bn.eps, head.conv.bn.momentum, head.drop.p) == (1e-2, 0.2, 0.4)
    fine, coarse = draw(2, 7, 6, 8), draw(2, 3, 3, 4)
    with torch.no_grad():
        wide = F.relu(norm(head.conv.bn, F.conv2d(coarse, head.conv.conv.weight), 1e-2))
        want = F.linear(wide.flatten(2).mean(2), head.fc.weight, head.fc.bias)
        torch.testing.assert_close(head(Features({"c2": fine, "c3": coarse})), want)


class Times(nn.Module):
    """A block that has more to record."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.calls = 0

    def forward(self, x: Tensor, record: dict[str, Tensor] | None = None, name: str = "") -> Tensor:
        self.calls += 1
        if record is not None and name:
            record[f"{name}.seen"] = x
        return x * self.factor


@pytest.mark.parametrize("checkpointing", [False, True])
def test_stages_run_in_order_give_the_named_maps_and_record_every_block(checkpointing):
    record: dict[str, Tensor] = {}
    x = torch.ones(1, 1, 1, 1)
    options = {"checkpointing": checkpointing, "recording": Times}
    stages = nn.ModuleList(
        [nn.ModuleList([nn.Identity(), Times(3.0)]), nn.ModuleList([Times(5.0)])]
    )
    maps = run_stages(x, stages, {0: "c2", 1: "c3"}, record, **options)
    assert {k: v.item() for k, v in maps.items()} == {"c2": 3.0, "c3": 15.0}
    assert record["stages.0.1"].item() == 3.0
    assert record["stages.1.0"].item() == 15.0
    assert record["stages.1.0.seen"].item() == 3.0
    assert {"stages.0.0", "stages.0.1.seen"} < set(record)
    maps["c3"].sum().backward()
    assert stages[1][0].calls == (2 if checkpointing else 1)
    assert run_stages(x, stages, {1: "c3"}).keys() == {"c3"}


def test_the_last_stage_of_each_stride_from_four_up_is_a_map():
    specs, outputs = stage_specs((8, 12, 16, 20, 24), (1, 2, 2, 1, 2))
    assert specs == {"c2": FeatureSpec(12, 4), "c3": FeatureSpec(20, 8), "c4": FeatureSpec(24, 16)}
    assert outputs == {1: "c2", 3: "c3", 4: "c4"}
    assert stage_specs((8,), (2,), stem_stride=4) == ({"c3": FeatureSpec(8, 8)}, {0: "c3"})


def test_running_variances_take_up_another_epsilon():
    theirs, ours = ready(nn.BatchNorm2d(5, eps=1e-3)), nn.BatchNorm2d(5, eps=1e-5).double().eval()
    state = theirs.state_dict()
    before = {k: v.clone() for k, v in state.items()}
    ours.load_state_dict(absorb_eps(state, 1e-3, 1e-5))
    assert all(torch.equal(v, state[k]) for k, v in before.items())
    x = draw(2, 5, 3, 4)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-13, rtol=0)


def test_widths_are_rounded_as_timm_rounds_them():
    for divisor in (8, 16):
        for tenths in range(5, 4000, 7):
            width = tenths / 10
            assert make_divisible(width, divisor) == timm.layers.make_divisible(width, divisor)
    assert make_divisible(30) == 32  # 8 without a word


def test_the_fast_layout_keeps_the_values():
    x = draw(2, 3, 5, 4)
    fast = fast_layout(x)
    assert torch.equal(fast, x)
    assert fast.is_contiguous(memory_format=torch.channels_last)
