"""What every detector promises on every family's tiny backbone."""

import pytest
import torch

import vitrail.backbones  # noqa: F401  (registers every backbone)
from tests.parity import randomise
from vitrail.detectors.cascade import CascadeMaskRCNNConfig
from vitrail.detectors.deformable_detr import DeformableDETR, DeformableDETRConfig
from vitrail.detectors.detr import DETR, DETRConfig
from vitrail.detectors.efficientdet import EfficientDet, EfficientDetConfig
from vitrail.detectors.rcnn import RCNN, MaskRCNNConfig, RCNNConfig
from vitrail.registry import tiny_entries
from vitrail.train.ranks import total_loss

TINY = tiny_entries()
K = 3
SMALL = {"neck_dim": 8, "box_dim": 16, "proposals_before_nms": (100, 60), "proposals": (80, 50)}
SMALL |= {"detections": 20, "samples": 32}
ONE_STAGE = {"neck_dim": 8, "neck_cells": 1, "head_convs": 1, "detections": 20, "candidates": 300}
QUERIES = {"num_heads": 2, "mlp_dim": 16, "encoder_layers": 1, "decoder_layers": 2}
QUERIES |= {"num_queries": 45, "dropout": 0.0}
CONFIGS = {
    "cascade": CascadeMaskRCNNConfig(ious=(0.5, 0.6), mask_dim=8, mask_convs=1, **SMALL),
    "pyramid": RCNNConfig(neck="simple_pyramid", **SMALL),
    "efficientdet": EfficientDetConfig(**ONE_STAGE),
    "detr": DETRConfig(dim=16, **QUERIES),
    "deformable_detr": DeformableDETRConfig(dim=64, refine=True, detections=20, **QUERIES),
}
BUILD = {"efficientdet": EfficientDet, "detr": DETR, "deformable_detr": DeformableDETR}
ROWS = {"detr": 45}  # an answer of each query
# Each family under one detector of its own kind; the matrix of all (benchmarks/matrix.py) trains each.
PAIRS = [(family, "cascade") for family in TINY] + [(f, "pyramid") for f in ("vit", "cmt")]
PAIRS += [(f, "efficientdet") for f in ("dinov2", "efficientvit", "mobilevit", "resnet", "swin")]
PAIRS += [(f, "detr") for f in ("vit", "swin")] + [(f, "deformable_detr") for f in ("vit", "cmt")]


def make(family, config="cascade", seed=0):
    torch.manual_seed(seed)
    build = BUILD.get(config, RCNN)
    model = build(TINY[family].cls(TINY[family].config), CONFIGS[config], K)
    randomise(model)
    return model.eval()


def images(batch, height, width):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def target(height, width, number):
    """Objects all over an image, of at least one pixel."""
    generator = torch.Generator().manual_seed(number)
    corner = torch.rand(number, 2, generator=generator) * torch.tensor([width, height]) * 0.7
    size = 1 + torch.rand(number, 2, generator=generator) * torch.tensor([width, height]) * 0.3
    return {
        "boxes": torch.cat((corner, corner + size), 1),
        "labels": torch.randint(0, K, (number,), generator=generator),
        "masks": torch.randint(
            0, 2, (number, height, width), dtype=torch.uint8, generator=generator
        ),
    }


def loss_of(model, x, targets, **given):
    torch.manual_seed(0)
    return total_loss(model.losses(x, targets, **given), model.weight(targets))


@pytest.mark.parametrize(("family", "config"), PAIRS)
def test_any_size_from_one_pixel_is_answered_in_tensors_of_fixed_size(family, config):
    model = make(family, config)
    for height, width in ((1, 1), (70, 45)):
        with torch.no_grad():
            found = model.forward_tensors(images(1, height, width))
        rows = ROWS.get(config, 20)
        assert found["boxes"].shape == (1, rows, 4)
        assert found["scores"].shape == found["labels"].shape == (1, rows)
        assert found["labels"].dtype == found["count"].dtype == torch.int64
        assert ("mask_crops" in found) == model.has_masks == (config == "cascade")
        boxes = found["boxes"]
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()
        assert all(value.isfinite().all() for value in found.values())
        assert (found["scores"].diff() <= 0).all()


@pytest.mark.parametrize(("family", "config"), PAIRS)
def test_every_parameter_receives_a_finite_gradient_whatever_is_in_the_images(family, config):
    model = make(family, config).train()
    for height, width, numbers in ((70, 45, (0, 5)), (1, 1, (40, 0))):
        model.zero_grad()
        targets = tuple(target(height, width, number) for number in numbers)
        loss = loss_of(model, images(2, height, width), targets)
        loss.backward()
        assert loss.isfinite()
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                assert name.startswith("backbone."), name  # a map or token that no level reads
            else:
                assert parameter.grad.isfinite().all(), name
        assert any(p.grad is not None for p in model.backbone.parameters())


@pytest.mark.parametrize(
    ("family", "config"),
    [
        *((f, "cascade") for f in TINY),
        *(("resnet", one) for one in ("efficientdet", "detr", "deformable_detr")),
    ],
)
def test_an_image_in_a_batch_is_answered_as_the_image_alone(family, config):
    model = make(family, config).double()
    x = images(2, 64, 96).double()
    with torch.no_grad():
        both = model.forward_tensors(x)
        for i in range(2):
            alone = model.forward_tensors(x[i : i + 1])
            for name, value in both.items():
                torch.testing.assert_close(value[i : i + 1], alone[name], rtol=1e-7, atol=1e-7)
    assert both["count"].min() > 0


@pytest.mark.parametrize(
    ("family", "config"),
    [
        *((f, "cascade") for f in ("vit", "swin", "efficientvit", "resnet")),
        *(("vit", one) for one in ("efficientdet", "detr", "deformable_detr")),
    ],
)
def test_checkpointing_and_bf16_train_too(family, config):
    model = make(family, config).train()
    for module in model.modules():  # what is dropped at random differs between the two runs
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    x, targets = images(2, 64, 96), (target(64, 96, 4), target(64, 96, 2))
    plain = loss_of(model, x, targets)
    plain.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.backbone.grad_checkpointing = True
    again = loss_of(model, x, targets)
    again.backward()
    torch.testing.assert_close(again, plain)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(x, targets)
    for value in losses.values():
        assert value.dtype == torch.float32
        assert value.isfinite()


def test_answers_of_one_stage_end_where_the_padding_begins():
    model, sizes = make("resnet", "efficientdet"), ((64, 96), (40, 50))
    with torch.no_grad():
        found = model.forward_tensors(images(2, 64, 96), sizes=sizes)
    for own, (height, width) in zip(found["boxes"], sizes, strict=True):
        assert width - 2 <= own[:, 2].max() <= width
        assert height - 2 <= own[:, 3].max() <= height


@pytest.mark.parametrize("kind", [RCNNConfig, MaskRCNNConfig, CascadeMaskRCNNConfig])
def test_boxes_end_where_the_padding_begins(kind):
    config = kind(
        neck_dim=8, box_dim=16, score=0.0, **({} if kind is RCNNConfig else {"mask_dim": 8})
    )
    torch.manual_seed(0)
    model = RCNN(TINY["resnet"].cls(TINY["resnet"].config), config, K)
    randomise(model)
    model.eval()
    sizes = ((64, 96), (40, 50))
    record = {}
    with torch.no_grad():
        found = model.forward_tensors(images(2, 64, 96), record, sizes=sizes)
    for boxes in (found["boxes"], *record.values()):
        for own, (height, width) in zip(boxes, sizes, strict=True):
            assert width - 2 <= own[:, 2].max() <= width
            assert height - 2 <= own[:, 3].max() <= height
