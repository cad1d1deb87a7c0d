"""The simple feature pyramid against the paper's levels, written out."""

import pytest
import torch
import torch.nn.functional as F

from tests.parity import assert_close_to_peer, randomise
from vitrail.features import Features, FeatureSpec
from vitrail.models import create_model
from vitrail.necks.simple_pyramid import SimplePyramid

DIM = 6


def channel_norm(x, weight, bias):
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * weight[:, None, None] + bias[:, None, None]


def enlarged(x, weight, bias):
    """A transposed convolution of kernel and stride 2: every value becomes a 2 x 2 block of its own."""
    out = torch.einsum("bchw,cdyx->bdhywx", x, weight) + bias[:, None, None, None, None]
    return out.flatten(4, 5).flatten(2, 3)


def pooled(x):
    """The largest of each 2 x 2, of what is left of it at an odd border."""
    height, width = x.shape[-2:]
    x = F.pad(x, (0, width % 2, 0, height % 2), value=-torch.inf)
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))


def smoothed(x, state, first):
    """1x1 and 3x3 convolution without bias, each normed; `first` is the number of the 1x1 in its stage."""
    x = torch.einsum("bchw,dc->bdhw", x, state[f"{first}.weight"][..., 0, 0])
    x = channel_norm(x, state[f"{first + 1}.weight"], state[f"{first + 1}.bias"])
    height, width = x.shape[-2:]
    windows = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    assert windows.shape[2:4] == (height, width)
    x = torch.einsum("bchwyx,dcyx->bdhw", windows, state[f"{first + 2}.weight"])
    return channel_norm(x, state[f"{first + 3}.weight"], state[f"{first + 3}.bias"])


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3), (1, 1)])
def test_every_level_is_what_the_paper_makes_of_the_last_map(height, width):
    specs = {"b0": FeatureSpec(8, 16), "b1": FeatureSpec(8, 16)}
    neck = SimplePyramid(specs, DIM, pool=True).double()
    randomise(neck)
    generator = torch.Generator().manual_seed(0)
    first, x = torch.randn(2, 2, 8, height, width, generator=generator, dtype=torch.float64)
    state = [stage.state_dict() for stage in neck.stages]
    up = enlarged(x, state[0]["0.weight"], state[0]["0.bias"])
    up = F.gelu(channel_norm(up, state[0]["1.weight"], state[0]["1.bias"]))
    want = [
        smoothed(enlarged(up, state[0]["3.weight"], state[0]["3.bias"]), state[0], 4),
        smoothed(enlarged(x, state[1]["0.weight"], state[1]["0.bias"]), state[1], 1),
        smoothed(x, state[2], 0),
        smoothed(pooled(x), state[3], 1),
    ]
    want.append(want[-1][..., ::2, ::2])
    got = neck(Features({"b0": first, "b1": x}))
    assert list(got) == list(neck.feature_specs) == ["p2", "p3", "p4", "p5", "p6"]
    for level, theirs in zip(got.values(), want, strict=True):
        assert_close_to_peer(level, theirs)


def test_it_declares_its_width_and_the_true_strides():
    neck = SimplePyramid({"c4": FeatureSpec(8, 14)}, 10, pool=True)
    strides = {"p2": 3.5, "p3": 7, "p4": 14, "p5": 28, "p6": 56}
    assert neck.feature_specs == {name: FeatureSpec(10, s) for name, s in strides.items()}
    assert SimplePyramid({"c4": FeatureSpec(8, 14)}).feature_specs["p5"] == FeatureSpec(256, 28)


def test_a_map_of_another_stride_is_enlarged_and_pooled_as_often_as_it_takes():
    """Patches of 8 give stride 4 by one step and stride 32 by two."""
    neck = SimplePyramid({"c3": FeatureSpec(8, 8)}, DIM)
    kinds = [[type(m).__name__ for m in stage.children()][:-4] for stage in neck.stages]
    assert kinds == [["ConvTranspose2d"], [], ["MaxPool2d"], ["MaxPool2d"] * 2]
    shapes = [tuple(x.shape) for x in neck(Features({"c3": torch.zeros(1, 8, 5, 7)})).values()]
    assert shapes == [(1, DIM, 10, 14), (1, DIM, 5, 7), (1, DIM, 3, 4), (1, DIM, 2, 2)]


SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 2, "image_size": 32}


@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_segmenters_read_it_where_their_config_says_so(head, tmp_path):
    import vitrail

    fields = {"neck": "simple_pyramid", "neck_dim": 12, "dim": 16}
    fields |= {"auxiliary_dim": 8} if head == "upernet" else {"groups": 4, "fpn_dim": 8}
    torch.manual_seed(0)
    model = create_model(f"{head}/vit_tiny_patch16", num_classes=3, head=fields, **SMALL).eval()
    assert isinstance(model.levels, SimplePyramid)
    assert {s.channels for s in model.levels.feature_specs.values()} == {12}
    images = torch.randn(2, 3, 37, 50, generator=torch.Generator().manual_seed(1))
    targets = torch.zeros(2, 37, 50, dtype=torch.long)
    model.train()
    sum(model.losses(images, targets).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.levels.parameters())
    model.eval()
    with torch.no_grad():
        want = model(images)
        assert want.shape == (2, 3, 37, 50)
        vitrail.save(model, tmp_path / "model")
        again = vitrail.load(tmp_path / "model")
        torch.testing.assert_close(again(images), want)


def test_without_being_asked_for_a_segmenter_has_no_neck():
    model = create_model("upernet/vit_tiny_patch16", num_classes=3, head={"dim": 8}, **SMALL)
    assert not isinstance(model.levels, SimplePyramid)
    assert not list(model.levels.parameters())
