"""Dense heads against transformers and formulas; what a segmenter of any backbone must do."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import ResNetConfig, UperNetConfig, UperNetForSemanticSegmentation
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

import vitrail.backbones  # noqa: F401  (registers every backbone)
from tests.parity import assert_close_to_peer, randomise
from vitrail.features import FeatureSpec
from vitrail.registry import tiny_entries
from vitrail.segmenters.linear import LinearConfig, LinearHead
from vitrail.segmenters.segmenter import IGNORE, Segmenter, check_classes, to_image
from vitrail.segmenters.semantic_fpn import SemanticFPNConfig, SemanticFPNHead
from vitrail.segmenters.upernet import FCNHead, UPerNetConfig, UPerNetHead, from_foreign
from vitrail_runtime.errors import InputError

SPECS = {f"c{i + 2}": FeatureSpec(d, 4 * 2**i) for i, d in enumerate((5, 6, 7, 8))}
SIZES = [[(16, 24), (8, 12), (4, 6), (2, 3)], [(17, 13), (9, 7), (5, 4), (3, 2)]]
K = 3


def maps_of(sizes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(2, spec.channels, *size, generator=generator, dtype=dtype)
        for (name, spec), size in zip(SPECS.items(), sizes, strict=True)
    }


class Still(torch.nn.Module):
    """A backbone of no weights: average pooling to each stride, channels repeated."""

    feature_specs = SPECS

    def forward(self, images, record=None):
        from vitrail.features import Features, pad_to_multiple

        x = pad_to_multiple(images, 32)
        maps = {}
        for name, spec in SPECS.items():
            small = F.avg_pool2d(x, int(spec.stride)).repeat(1, 3, 1, 1)[:, : spec.channels]
            h, w = (math.ceil(s / spec.stride) for s in images.shape[-2:])
            maps[name] = small[..., :h, :w]
        return Features(maps)


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: str(s[0]))
def test_upernet_equals_transformers_in_both_heads(sizes):
    config = UperNetConfig(hidden_size=10, auxiliary_channels=9, num_labels=K)
    peer = torch.nn.ModuleDict(
        {
            "decode_head": UperNetHead(config, [5, 6, 7, 8]),
            "auxiliary_head": UperNetFCNHead(config, [5, 6, 7, 8]),
        }
    )
    randomise(peer)
    peer = peer.double().eval()
    own = UPerNetConfig(dim=10, auxiliary_dim=9)
    ours = torch.nn.ModuleDict(
        {"head": UPerNetHead(own, SPECS, K), "auxiliary": FCNHead(own, SPECS, K)}
    )
    ours.load_state_dict(from_foreign(peer.state_dict()))
    ours = ours.double().eval()
    maps = maps_of(sizes)
    with torch.no_grad():
        assert_close_to_peer(ours["head"](maps), peer["decode_head"](list(maps.values())))
        assert_close_to_peer(ours["auxiliary"](maps), peer["auxiliary_head"](list(maps.values())))


def test_a_whole_upernet_on_resnet_equals_transformers_in_logits_and_loss():
    config = UperNetConfig(
        backbone_config=ResNetConfig(
            embedding_size=8,
            hidden_sizes=[16, 24, 32, 40],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        hidden_size=12,
        auxiliary_channels=10,
        num_labels=K,
    )
    peer = UperNetForSemanticSegmentation(config)
    randomise(peer, 1.3)
    peer = peer.double().eval()

    class Backbone(torch.nn.Module):  # transformers' own, so that only our part is compared
        feature_specs = {  # noqa: RUF012
            f"c{i + 2}": FeatureSpec(d, 4 * 2**i) for i, d in enumerate((16, 24, 32, 40))
        }

        def forward(self, images, record=None):
            from vitrail.features import Features

            maps = peer.backbone(images).feature_maps
            return Features(dict(zip(self.feature_specs, maps, strict=True)))

    own = UPerNetConfig(dim=12, auxiliary_dim=10, dropout=0.0)
    backbone = Backbone()
    ours = Segmenter(
        backbone,
        UPerNetHead(own, backbone.feature_specs, K),
        auxiliary=FCNHead(own, backbone.feature_specs, K),
        auxiliary_weight=own.auxiliary_weight,
    ).double()
    heads = {k: v for k, v in peer.state_dict().items() if not k.startswith("backbone.")}
    ours.load_state_dict(from_foreign(heads))
    ours.eval()
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, 64, 96, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, K, (2, 64, 96), generator=generator)
    targets[:, :20] = IGNORE
    with torch.no_grad():
        want = peer(pixel_values=images, labels=targets)
        assert_close_to_peer(ours(images), want.logits)
        assert_close_to_peer(ours.forward_tensors(images)["logits"], want.logits)
        got = ours.losses(images, targets)
    loss = sum(got.values()) / ours.weight(targets)
    assert loss.item() == pytest.approx(
        want.loss.item(), rel=1e-6
    )  # our loss is reckoned in float32
    assert set(got) == {"segment", "auxiliary"}
    assert ours.weight(targets) == 2 * 44 * 96


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: str(s[0]))
def test_semantic_fpn_equals_its_formula(sizes):
    head = SemanticFPNHead(SemanticFPNConfig(fpn_dim=6, dim=8, groups=4), SPECS, K)
    randomise(head)
    head = head.double().eval()
    maps = maps_of(sizes)

    def step(x, conv):
        x = F.conv2d(x, conv.conv.weight, padding=1)
        groups = x.reshape(len(x), 4, -1)
        mean, var = groups.mean(-1, keepdim=True), groups.var(-1, unbiased=False, keepdim=True)
        x = ((groups - mean) / (var + 1e-5).sqrt()).reshape(x.shape)
        x = x * conv.norm.weight[:, None, None] + conv.norm.bias[:, None, None]
        return x.clamp(min=0)

    def grow(x, size):
        return F.interpolate(x, size, mode="bilinear", align_corners=False)

    with torch.no_grad():
        p2, p3, p4, p5 = head.fpn(maps).values()
        b = head.branches
        assert [len(steps) for steps in b] == [1, 1, 2, 3], "figure 3: as many as upsamplings"
        total = step(p2, b[0][0])
        total = total + grow(step(p3, b[1][0]), sizes[0])
        x = grow(step(p4, b[2][0]), sizes[1])
        total = total + grow(step(x, b[2][1]), sizes[0])
        x = grow(step(p5, b[3][0]), sizes[2])
        x = grow(step(x, b[3][1]), sizes[1])
        total = total + grow(step(x, b[3][2]), sizes[0])
        want = F.conv2d(total, head.fc.weight, head.fc.bias)
        assert_close_to_peer(head(maps), want)
    assert head.stride == 4


def test_the_linear_head_is_one_layer_on_the_joined_and_normalised_maps():
    head = LinearHead(LinearConfig(), SPECS, K)
    randomise(head)
    head = head.double().eval()
    maps = maps_of(SIZES[1])
    with torch.no_grad():
        x = torch.cat(
            [
                F.interpolate(m, SIZES[1][0], mode="bilinear", align_corners=False)
                for m in maps.values()
            ],
            1,
        )
        n = head.norm
        x = (x - n.running_mean[:, None, None]) / (n.running_var[:, None, None] + 1e-5).sqrt()
        x = x * n.weight[:, None, None] + n.bias[:, None, None]
        want = torch.einsum("bchw,kc->bkhw", x, head.fc.weight[:, :, 0, 0])
        assert_close_to_peer(head(maps), want + head.fc.bias[:, None, None])


@pytest.mark.parametrize("stride", [1, 4, 14, 3.5])
@pytest.mark.parametrize("size", [(28, 56), (27, 30), (1, 1)], ids=str)
def test_logits_of_an_image_that_does_not_fit_stay_where_they_were_computed(stride, size):
    h, w = (2 * math.ceil(s / stride / 2) for s in size)  # whole pixels for a stride of 3.5, too
    logits = torch.randn(1, 2, h, w, generator=torch.Generator().manual_seed(0))
    got = to_image(logits, stride, size)
    assert got.shape == (1, 2, *size)
    whole = (int(h * stride), int(w * stride))
    want = F.interpolate(logits, whole, mode="bilinear", align_corners=False)
    torch.testing.assert_close(got, want[..., : size[0], : size[1]])


def test_the_loss_counts_labelled_pixels_by_the_weight_of_their_class():
    head = LinearHead(LinearConfig(), SPECS, K)
    model = Segmenter(Still(), head, class_weights=(1.0, 0.0, 2.5)).eval()
    plain = Segmenter(Still(), head).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 30, 45, generator=generator)
    targets = torch.randint(0, K, (2, 30, 45), generator=generator, dtype=torch.uint8)
    targets[0, :9] = IGNORE
    logits = plain(images)
    for m, weight in ((model, torch.tensor([1.0, 0.0, 2.5])), (plain, None)):
        got = m.losses(images, targets)
        assert set(got) == {"segment"}
        want = F.cross_entropy(logits, targets.long(), weight, ignore_index=255)
        torch.testing.assert_close(got["segment"] / m.weight(targets), want)
    nothing = torch.full_like(targets, IGNORE)
    assert model.weight(nothing) == plain.weight(nothing) == 0
    assert model.losses(images, nothing)["segment"] == 0


HEADS = {
    "linear": lambda specs: (LinearHead(LinearConfig(), specs, K), None),
    "semantic_fpn": lambda specs: (
        SemanticFPNHead(SemanticFPNConfig(fpn_dim=8, dim=8, groups=2), specs, K),
        None,
    ),
    "upernet": lambda specs: (
        UPerNetHead(c := UPerNetConfig(dim=8, auxiliary_dim=8), specs, K),
        FCNHead(c, specs, K),
    ),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", tiny_entries())
def test_every_head_stands_on_every_backbone_and_every_weight_learns(family, head):
    torch.manual_seed(0)
    entry = tiny_entries()[family]
    backbone = entry.cls(entry.config)
    specs = Segmenter(backbone, torch.nn.Identity()).levels.feature_specs
    main, auxiliary = HEADS[head](specs)
    model = Segmenter(backbone, main, auxiliary=auxiliary)
    images = torch.randn(2, 3, 70, 99)
    targets = torch.randint(0, K, (2, 70, 99), dtype=torch.uint8)
    loss = sum(model.losses(images, targets).values()) / model.weight(targets)
    loss.backward()
    for name, parameter in [*main.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert any(p.grad is not None for p in backbone.parameters())
    model.eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 1, 1)).shape == (1, K, 1, 1)
        both = model(images)
        torch.testing.assert_close(both[1:], model(images[1:]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_built_on_meta_without_the_draw_that_imports_torchs_compiler(head, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("normal_ on meta imports torch._dynamo, for seconds")

    monkeypatch.setattr(torch.Tensor, "normal_", refuse)
    with torch.device("meta"):
        HEADS[head](SPECS)


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_classifiers_of_pixels_start_from_small_normal_weights(head):
    torch.manual_seed(0)
    specs = {"c2": FeatureSpec(512, 4), "c3": FeatureSpec(512, 8), "c4": FeatureSpec(512, 16)}
    specs["c5"] = FeatureSpec(512, 32)
    build = {
        "linear": lambda: [LinearHead(LinearConfig(), specs, 60)],
        "upernet": lambda: [
            UPerNetHead(c := UPerNetConfig(dim=64), specs, 60),
            FCNHead(c, specs, 60),
        ],
    }
    for made in build[head]():
        assert made.fc.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert abs(made.fc.weight.mean().item()) < 0.001
        assert (made.fc.bias == 0).all()


def test_steps_of_semantic_fpn_start_as_he_et_al_draw_for_the_outputs():
    torch.manual_seed(0)
    head = SemanticFPNHead(SemanticFPNConfig(fpn_dim=96, dim=64), SPECS, K)
    for branch in head.branches:
        weight = branch[0].conv.weight
        assert weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.03)


@pytest.mark.parametrize("class_weights", [None, (1.0, 0.0, 2.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
def test_a_batch_without_labelled_pixels_teaches_nothing_and_breaks_nothing(
    head, dtype, class_weights
):
    torch.manual_seed(0)
    main, auxiliary = HEADS[head](SPECS)
    model = Segmenter(Still(), main, auxiliary=auxiliary, class_weights=class_weights)
    images = torch.randn(2, 3, 40, 56)
    nothing = torch.full((2, 40, 56), IGNORE, dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = model.losses(images, nothing)
    total = sum(losses.values())
    assert total == 0
    assert model.weight(nothing) == 0
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name


@pytest.mark.parametrize("head", HEADS)
def test_in_half_precision_the_loss_is_reckoned_in_full(head):
    torch.manual_seed(0)
    main, auxiliary = HEADS[head](SPECS)
    model = Segmenter(Still(), main, auxiliary=auxiliary).eval()
    images = torch.randn(2, 3, 40, 56)
    targets = torch.randint(0, K, (2, 40, 56), dtype=torch.uint8)
    full = model.losses(images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).dtype == torch.bfloat16
        half = model.losses(images, targets)
    assert half.keys() == full.keys()
    for name, value in half.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, full[name], rtol=0.02, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    want = F.cross_entropy(logits.float(), targets.long(), reduction="sum")
    torch.testing.assert_close(half["segment"], want)
    pure = model.bfloat16()
    assert pure.forward_tensors(images.bfloat16())["logits"].dtype == torch.bfloat16
    for value in pure.losses(images.bfloat16(), targets).values():
        assert value.dtype == torch.float32
        assert value.isfinite()


def test_more_classes_than_a_mask_can_hold_are_refused():
    check_classes(255)
    for count in (0, 256):
        with pytest.raises(InputError, match=f"1 to 255 classes .* but got {count}"):
            check_classes(count)
