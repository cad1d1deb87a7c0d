"""Faster and Mask R-CNN against torchvision's, with its weights carried over by the key map."""

from dataclasses import replace

import pytest
import torch
from torchvision.models import resnet
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead, concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image

from tests.parity import assert_close_to_peer, randomise
from vitrail.backbones.resnet import ResNet, ResNetConfig
from vitrail.detectors.keys import from_torchvision
from vitrail.detectors.rcnn import RCNN, MaskRCNNConfig, RCNNConfig

K = 3
FIELDS = {"neck_dim": 8, "box_dim": 16}
SIZES = ((128, 192), (128, 160))  # the second is padded
NAMES = {
    "loss_objectness": "rpn_class",
    "loss_rpn_box_reg": "rpn_box",
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
}


def peer_of(kind):
    """kind: "faster", "mask" or "v2": masks, with the norms and convolutions of the second versions."""
    body = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=1)
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    norm = torch.nn.BatchNorm2d if kind == "v2" else None
    backbone = BackboneWithFPN(body, layers, [64, 128, 256, 512], 8, norm_layer=norm)
    given = {"box_head": TwoMLPHead(8 * 49, 16), "box_predictor": FastRCNNPredictor(16, K + 1)}
    if kind == "v2":
        given["rpn_head"] = RPNHead(8, 3, conv_depth=2)
        given["box_head"] = FastRCNNConvFCHead((8, 7, 7), [8] * 4, [16], norm_layer=norm)
    if kind != "faster":
        given["mask_head"] = MaskRCNNHeads(8, (8, 8, 8, 8), 1, norm_layer=norm)
        given["mask_predictor"] = MaskRCNNPredictor(8, 8, K + 1)
    model = (FasterRCNN if kind == "faster" else MaskRCNN)(backbone, None, **given)
    randomise(model, 1.2)
    return model.double()


def ours_of(kind, peer):
    config = RCNNConfig(**FIELDS) if kind == "faster" else MaskRCNNConfig(mask_dim=8, **FIELDS)
    if kind == "v2":
        config = replace(config, neck_norm=True, mask_norm=True, rpn_convs=2)
        config = replace(config, box_convs=4, box_conv_dim=8, box_fcs=1)
    model = RCNN(ResNet(ResNetConfig(depths=(1, 1, 1, 1), bottleneck=False)), config, K)
    model.load_state_dict(from_torchvision(peer.state_dict()))
    return model.double()


def batch_of(objects=True):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, *SIZES[0], generator=generator, dtype=torch.float64)
    images[1, :, :, SIZES[1][1] :] = 0
    boxes = [
        [[10.0, 12.0, 60.0, 70.0], [80.0, 20.0, 150.0, 110.0], [40.0, 60.0, 70.0, 120.0]],
        [[5.0, 5.0, 120.0, 90.0], [30.0, 40.0, 62.0, 64.0]],
    ]
    targets = []
    for given, size in zip(boxes, SIZES, strict=True):
        own = torch.tensor(given) if objects else torch.zeros(0, 4)
        masks = torch.zeros(len(own), *size, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, own.long().tolist(), strict=True):
            seen = torch.rand(bottom - top, right - left, generator=generator) > 0.4
            mask[top:bottom, left:right] = seen.to(torch.uint8)
        labels = torch.arange(len(own)) % K
        targets.append({"boxes": own, "labels": labels, "masks": masks})
    return images, tuple(targets)


def theirs(targets):
    """torchvision counts classes from 1."""
    return [{**t, "boxes": t["boxes"].double(), "labels": t["labels"] + 1} for t in targets]


@pytest.fixture(scope="module", params=["faster", "mask", "v2"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def peer(kind):
    return peer_of(kind)


@pytest.fixture(scope="module")
def ours(kind, peer):
    return ours_of(kind, peer)


def test_every_tensor_before_suppression_and_all_answers_equal_torchvisions(peer, ours):
    peer.eval()
    ours.eval()
    images, _ = batch_of()
    listed, record = ImageList(images, list(SIZES)), {}
    with torch.no_grad():
        features = peer.backbone(images)
        maps = ours.maps(images)
        for mine, other in zip(maps, features.values(), strict=True):
            assert_close_to_peer(mine, other)
        found = ours.rpn(maps)
        every = list(features.values())
        logits, deltas = concat_box_prediction_layers(*peer.rpn.head(every))
        assert_close_to_peer(found.anchors, peer.rpn.anchor_generator(listed, every)[0])
        assert_close_to_peer(found.logits.flatten(), logits.flatten())
        assert_close_to_peer(found.deltas.flatten(0, 1), deltas)
        want, _ = peer.rpn(listed, features)
        proposals = ours.rpn.propose(found, SIZES, training=False)
        for mine, other in zip(proposals, want, strict=True):
            assert_close_to_peer(mine, other)
        pooled = peer.roi_heads.box_roi_pool(features, want, list(SIZES))
        assert_close_to_peer(ours.pool(maps, proposals), pooled)
        logits, deltas = peer.roi_heads.box_predictor(peer.roi_heads.box_head(pooled))
        mine = ours.stages[0](ours.pool(maps, proposals))
        assert_close_to_peer(mine[0], logits.roll(-1, 1))
        assert_close_to_peer(mine[1].flatten(1), deltas[:, 4:])
        answers, _ = peer.roi_heads(features, want, list(SIZES))
        got = ours.forward_tensors(images, record, sizes=SIZES)
        listed_answers = ours(images, sizes=SIZES)
    for i, (answer, row) in enumerate(zip(answers, listed_answers, strict=True)):
        count = got["count"][i]
        assert len(answer["boxes"]) == count > 5
        assert torch.equal(row["labels"], answer["labels"] - 1)
        assert_close_to_peer(row["boxes"], answer["boxes"])
        assert_close_to_peer(row["scores"], answer["scores"])
        if ours.has_masks:
            assert_close_to_peer(row["mask_crops"], answer["masks"][:, 0])
        for name, value in row.items():
            assert torch.equal(got[name][i, :count], value)
            assert not got[name][i, count:].any()
        number = len(want[i])
        kept = slice(0, number) if i == 0 else slice(len(want[0]), None)
        moved = peer.roi_heads.box_coder.decode(deltas, want)[kept]
        best = mine[0][kept, :-1].argmax(1) + 1  # of the classes, not background
        moved = clip_boxes_to_image(moved[torch.arange(number), best], SIZES[i])
        assert_close_to_peer(record["stages.0.boxes"][i, :number], moved)
        assert torch.equal(record["proposals"][i, :number], proposals[i])
        assert not record["proposals"][i, number:].any()
    assert got["boxes"].shape == (2, 100, 4)
    assert record["proposals"].shape == (2, 1000, 4)


@pytest.mark.parametrize("objects", [True, False])
def test_loss_terms_and_every_gradient_equal_torchvisions_on_the_same_samples(
    peer, ours, objects, monkeypatch
):
    # Both draw by it: here the last of many.
    monkeypatch.setattr(torch, "randperm", lambda n, device=None: torch.arange(n).flip(0))
    reckon = peer.rpn.compute_loss  # whose float32 labels would round the loss
    doubled = lambda o, d, labels, t: reckon(o, d, [x.double() for x in labels], t)  # noqa: E731
    monkeypatch.setattr(peer.rpn, "compute_loss", doubled)
    peer.train()
    ours.train()
    images, targets = batch_of(objects)
    listed = ImageList(images, list(SIZES))
    features = peer.backbone(images)
    proposals, want = peer.rpn(listed, features, theirs(targets))
    want |= peer.roi_heads(features, proposals, list(SIZES), theirs(targets))[1]
    got = ours.losses(images, targets, sizes=SIZES)
    assert {NAMES[n] for n in want} == set(got)
    assert ours.weight(targets) == 2
    for name, value in want.items():
        mine = got[NAMES[name]] / ours.weight(targets)
        assert mine.item() == pytest.approx(value.item(), rel=1e-9, abs=1e-12), name
        assert (value != 0) == (objects or name in ("loss_objectness", "loss_classifier"))
    for model, loss in ((peer, sum(want.values())), (ours, sum(got.values()) / 2)):
        model.zero_grad()
        loss.backward()
    grads = {k: p.grad for k, p in peer.named_parameters() if p.grad is not None}
    for key, grad in from_torchvision(grads).items():
        mine = ours.get_parameter(key).grad
        assert (mine - grad).abs().max() <= 1e-8 * grad.abs().max(), key
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
