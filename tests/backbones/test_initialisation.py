"""Fresh parameters are drawn as the references draw theirs: same spread, same shape of the distribution."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitrail.backbones  # noqa: F401  (registers every backbone)
from vitrail.models import build_classifier
from vitrail.registry import backbone_entry

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

TOKENS = r"backbone\.(cls|dist|reg)_token"  # 1e-6 in timm; DeiT's and DeepViT's code have 0.02
ZERO_HEAD = {r"head\.fc(_dist)?\.weight": ("normal", 0.0)}  # fine-tuning starts from zero
VIT = {TOKENS: ("normal", 0.02), **ZERO_HEAD}
ONES = {r".*\.project\.bn\.weight": ("ones", 0.0)}  # timm starts its residual branches from zero
TORCHS_LINEAR = {r"head\.fc\.(weight|bias)": ("torch", 0.0)}  # the pooled head of no paper
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, tuple[str, float]]]] = {
    # ours: (layout, the peer, config fields, {our keys: what they have instead of the peer's})
    "vit_tiny_patch16": ("timm", "vit_tiny_patch16_224", {"depth": 2}, VIT),
    "deit_tiny_distilled_patch16": (
        "timm",
        "deit_tiny_distilled_patch16_224",
        {"depth": 2},
        VIT,
    ),
    "vit_small_patch14_reg4_dinov2": (
        "timm",
        "vit_small_patch14_reg4_dinov2",
        {"depth": 1},
        VIT,
    ),
    "vit_tiny_r_s16_p8": ("timm", "vit_tiny_r_s16_p8_224", {"depth": 1}, VIT),
    "swin_tiny_patch4_window7": (
        "timm",
        "swin_tiny_patch4_window7_224",
        {"depths": (1, 1, 1, 1)},
        {},
    ),
    "efficientvit_m0": ("timm", "efficientvit_m0", {}, {}),
    "mobilevit_xxs": (
        "timm",
        "mobilevit_xxs",
        {},
        {
            **ONES,
            r".*\.transformer\..*(qkv|proj|fc\d)\.weight": ("normal", 0.02),
        },  # cvnets' setting
    ),
    "mobilevitv2_050": ("timm", "mobilevitv2_050", {}, {**ONES, **TORCHS_LINEAR}),
    "mobilenetv1_100": ("timm", "mobilenetv1_100", {}, TORCHS_LINEAR),
    # torchvision's tails, which are TensorFlow Slim's; timm draws its own.
    "mobilenetv2_035": ("timm", "mobilenetv2_035", {}, {r"head\.fc\.weight": ("normal", 0.01)}),
    "mobilenetv3_small_050": (
        "timm",
        "mobilenetv3_small_050",
        {},
        {r"head\.(expand|fc)\.weight": ("normal", 0.01)},
    ),
    "efficientnet_b0": ("timm", "efficientnet_b0", {}, {r"head\.fc\.weight": ("normal", 0.01)}),
    "resnet18": ("torchvision", "resnet18", {}, {}),
}


def fresh(name: str, seed: int, classes: int = 1000, **fields: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    entry = backbone_entry(name)
    return build_classifier(entry, replace(entry.config, **fields), classes).state_dict()


def drawn(kind: str, spread: float, like: Tensor, fan_in: int) -> Tensor:
    """A sample of what a departure says."""
    sample = torch.empty_like(like)
    if kind == "torch":  # nn.Linear's own
        return sample.uniform_(-(fan_in**-0.5), fan_in**-0.5)
    return sample.fill_(1.0) if kind == "ones" else sample.normal_(0.0, spread)


def assert_drawn_alike(key: str, ours: Tensor, theirs: Tensor) -> None:
    """Equal where nothing is random; else mean, spread and shape within six standard errors."""
    n, spread = ours.numel(), float(theirs.double().square().mean().sqrt())
    if n < 2 or float(theirs.double().var()) == 0.0:
        assert torch.equal(ours, theirs), f"{key}: not {theirs.flatten()[0]:g} everywhere"
        return
    slack = 6 / n**0.5
    own = float(ours.double().square().mean().sqrt())
    assert own == pytest.approx(spread, rel=slack), f"{key}: spread {own:.3g}, not {spread:.3g}"
    assert abs(float(ours.mean() - theirs.mean())) < 1.5 * slack * spread, f"{key}: mean"
    # E|x| / spread is 0.80 for a normal and 0.87 for a uniform distribution.
    shapes = [float(x.abs().mean()) / s for x, s in ((ours, own), (theirs, spread))]
    assert shapes[0] == pytest.approx(shapes[1], abs=max(slack, 0.002)), f"{key}: shape"


@pytest.mark.parametrize("name", CASES)
def test_fresh_parameters_are_drawn_as_the_peers(name):
    layout, peer_name, fields, departures = CASES[name]
    torch.manual_seed(0)
    if layout == "timm":
        peer = timm.create_model(peer_name, **fields)
    else:
        peer = torchvision.models.get_model(peer_name)
    entry = backbone_entry(name)
    theirs = entry.layouts[layout].convert(peer.state_dict(), replace(entry.config, **fields))
    ours = fresh(name, seed=1, **fields)
    compared = set()
    for key, tensor in ours.items():
        found = [what for pattern, what in departures.items() if re.fullmatch(pattern, key)]
        if not tensor.is_floating_point() or (key not in theirs and not found):
            continue
        fan_in = ours[key.replace(".bias", ".weight")][0].numel()
        want = drawn(*found[0], tensor, fan_in) if found else theirs[key]
        assert_drawn_alike(key, tensor, want)
        compared.add(key)
    left = {k for k in ours if k not in compared and not k.endswith("num_batches_tracked")}
    assert left <= {"head.fc.bias"}, "timm's DINOv2 has no head; all else is compared"


# CMT and DeepViT have no peer: what their official code says of each kind of module.


def assert_modules(model: nn.Module, linear_std: float, conv_std: Any, skip: str) -> None:
    for name, module in model.named_modules():
        if re.fullmatch(skip, name):
            continue
        if isinstance(module, nn.Linear | nn.Conv2d):
            spread = linear_std if isinstance(module, nn.Linear) else conv_std(module)
            if spread is not None:
                want = torch.empty_like(module.weight).normal_(0.0, spread)
                assert_drawn_alike(f"{name}.weight", module.weight.detach(), want)
                assert module.bias is None or not module.bias.any(), f"{name}.bias"
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            assert bool((module.weight == 1).all()), name
            assert module.bias is None or not module.bias.any(), name


def test_cmt_is_drawn_as_its_official_code_says():
    """Linear layers 0.02; convolutions He-normal by the fan out of the whole kernel, groups or not; the
    position tables standard normal."""
    torch.manual_seed(0)
    entry = backbone_entry("cmt_ti")
    model = build_classifier(entry, replace(entry.config, depths=(1, 1, 1, 1), image_size=64), 100)

    def conv_std(conv: nn.Conv2d) -> float:
        return (2 / (conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1])) ** 0.5

    assert_modules(model, 0.02, conv_std, skip="")
    for i, stage in enumerate(model.backbone.stages):
        table = stage.relative_pos.detach()
        assert_drawn_alike(f"stages.{i}.relative_pos", table, torch.randn(table.shape))


@pytest.mark.parametrize("name", ["deepvit_s", "deepvit_16b"])
def test_deepvit_is_drawn_as_its_official_code_says(name):
    """Linear layers, the position table and the class token 0.02; convolutions as torch draws them."""
    torch.manual_seed(0)
    entry = backbone_entry(name)
    config = replace(entry.config, depth=1, mix_from=0)
    model = build_classifier(entry, config, 100)
    assert_modules(model, 0.02, lambda conv: None, skip=r"head\.fc")
    assert not model.head.fc.weight.any()
    for key in ("pos_embed", "cls_token"):
        value = getattr(model.backbone, key).detach()
        assert_drawn_alike(key, value, torch.empty_like(value).normal_(0.0, 0.02))
    mixing = model.backbone.blocks[0].attn.reatten_matrix
    kernels = [
        mixing,
        *(m for m in model.backbone.patch_embed.modules() if isinstance(m, nn.Conv2d)),
    ]
    for conv in kernels:
        bound = conv.weight[0].numel() ** -0.5
        assert float(conv.weight.detach().abs().max()) <= bound
        assert float(conv.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.15)


def test_navit_is_drawn_as_the_vits():
    """Linear layers and the tables 0.02; the classifier zero."""
    torch.manual_seed(0)
    entry = backbone_entry("navit_tiny_patch16")
    model = build_classifier(entry, replace(entry.config, depth=1), 100)
    assert_modules(model, 0.02, lambda conv: None, skip=r"head\.fc")
    assert not model.head.fc.weight.any()
    for value in (model.backbone.rows.table, model.backbone.columns.table, model.head.pool.query):
        assert_drawn_alike("table", value.detach(), torch.empty_like(value).normal_(0.0, 0.02))


@pytest.mark.parametrize("head", ["tanh", "mlp"])
def test_a_head_with_a_hidden_layer_does_not_start_from_zero(head):
    state = fresh("vit_tiny_patch16", seed=0, classes=50, depth=1, head=head, head_hidden_dim=96)
    assert state["head.hidden.weight"].shape == (96, 192)
    for key in ("head.hidden.weight", "head.fc.weight"):
        assert_drawn_alike(key, state[key], torch.empty_like(state[key]).normal_(0.0, 0.02))
    assert not state["head.hidden.bias"].any()
    assert not state["head.fc.bias"].any()


def test_layer_scale_starts_at_the_number_of_the_config():
    state = fresh("vit_small_patch14_dinov2", seed=0, depth=1)
    for key in ("backbone.blocks.0.ls1.gamma", "backbone.blocks.0.ls2.gamma"):
        assert bool((state[key] == 1e-5).all()), key  # section 4 of the paper's settings
