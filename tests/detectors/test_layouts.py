"""Files of torchvision and mmdetection load by their keys."""

import pytest
import torch
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList

from tests.parity import assert_close_to_peer, randomise
from vitrail.detectors.keys import from_foreign, from_torchvision
from vitrail.models import create_model, load_dense, parse_name

MOBILE = {
    "strides": (),
    "anchor_pixels": (32.0, 64.0, 128.0, 256.0, 512.0),
    "proposal_score": 0.05,
    "frozen_norm": True,
}
V2 = {"neck_norm": True, "rpn_convs": 2, "box_convs": 4, "box_fcs": 1}
RELEASED = {
    "fasterrcnn_resnet50_fpn": ("faster_rcnn/resnet50", {}, {}),
    "fasterrcnn_resnet50_fpn_v2": ("faster_rcnn/resnet50", V2, {}),
    "fasterrcnn_mobilenet_v3_large_fpn": (
        "faster_rcnn/mobilenetv3_large",
        MOBILE,
        {"detection_maps": True},
    ),
    "maskrcnn_resnet50_fpn": ("mask_rcnn/resnet50", {}, {}),
    "maskrcnn_resnet50_fpn_v2": ("mask_rcnn/resnet50", {**V2, "mask_norm": True}, {}),
}


@pytest.mark.parametrize("name", RELEASED)
def test_every_key_of_torchvisions_detectors_has_its_place_and_shape(name):
    full, head, fields = RELEASED[name]
    with torch.device("meta"):
        peer = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=6)
        ours = create_model(full, num_classes=5, head=head, **fields)
    state = from_foreign(peer.state_dict())
    _, entry = parse_name(full)
    below = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    got = {k: v for k, v in state.items() if not k.startswith("backbone.")}
    got |= entry.layouts["torchvision"].convert(below, ours.info.parts["backbone"])
    mine = {k: v.shape for k, v in ours.state_dict().items() if "num_batches" not in k}
    assert {k: v.shape for k, v in got.items() if "num_batches" not in k} == mine


@pytest.mark.parametrize(
    ("name", "classes", "gain"),
    [
        ("fasterrcnn_mobilenet_v3_large_fpn", 5, 1.5),
        pytest.param("fasterrcnn_resnet50_fpn", 90, 0.7, marks=pytest.mark.slow),
        pytest.param("fasterrcnn_resnet50_fpn_v2", 90, 0.9, marks=pytest.mark.slow),
        pytest.param("maskrcnn_resnet50_fpn", 90, 0.7, marks=pytest.mark.slow),
    ],
)
def test_torchvisions_detectors_answer_the_same_from_a_file(name, classes, gain, tmp_path):
    """At full width."""
    full, head, fields = RELEASED[name]
    peer = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=classes + 1)
    randomise(peer, gain)
    peer.roi_heads.score_thresh = threshold = (
        0.05 if classes == 5 else 0.013
    )  # of 91 equal ones: 0.011
    for layer in (peer.rpn.head.bbox_pred, *peer.roi_heads.box_predictor.children()):
        layer.weight.data.mul_(0.02)  # else every box becomes the whole image
    torch.save(peer.state_dict(), tmp_path / "released.pth")
    ours = create_model(
        full,
        num_classes=classes,
        head=head | {"score": threshold},
        weights=tmp_path / "released.pth",
        **fields,
    )
    assert not ours.weights_report.new
    peer.double().eval()
    ours.double().eval()
    size = (128, 192)
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        features = peer.backbone(x)
        proposals, _ = peer.rpn(ImageList(x, [size]), features)
        (want,), _ = peer.roi_heads(features, proposals, [size])
        (got,) = ours(x)
        maps = ours.maps(x)
    for mine, other in zip(maps, features.values(), strict=True):
        # The file is in float32, in which 1e-3 goes off a variance and on again.
        assert_close_to_peer(mine, other, 1e-5)
    assert len(want["boxes"]) == len(got["boxes"]) > 3
    assert torch.equal(got["labels"], want["labels"] - 1)
    for mine, other in (("boxes", "boxes"), ("scores", "scores"), ("mask_crops", "masks")):
        if other in want:
            assert_close_to_peer(got[mine], want[other].reshape(got[mine].shape), 1e-4)


def test_names_of_the_first_releases_are_those_of_today():
    today = {
        "backbone.fpn.inner_blocks.2.0.weight": 1,
        "backbone.fpn.layer_blocks.0.0.bias": 2,
        "rpn.head.conv.0.0.weight": 3,
        "roi_heads.mask_head.0.0.weight": 4,
        "roi_heads.mask_head.3.0.bias": 5,
    }
    then = {
        "backbone.fpn.inner_blocks.2.weight": 1,
        "backbone.fpn.layer_blocks.0.bias": 2,
        "rpn.head.conv.weight": 3,
        "roi_heads.mask_head.mask_fcn1.weight": 4,
        "roi_heads.mask_head.mask_fcn4.bias": 5,
    }
    want = {
        "neck.lateral.2.weight": 1,
        "neck.smooth.0.bias": 2,
        "rpn.convs.0.weight": 3,
        "mask_stages.0.convs.0.weight": 4,
        "mask_stages.0.convs.3.bias": 5,
    }
    assert from_torchvision(today) == from_torchvision(then) == want


def test_epsilons_of_released_norms_are_taken_into_the_variances():
    key, one = "backbone.body.bn1.running_var", torch.ones(2, dtype=torch.float64)
    other = {"backbone.body.bn1.running_mean": one, "roi_heads.x.running_var": one}
    first = from_torchvision({key: one, "rpn.head.conv.weight": one, **other})
    assert first["backbone.bn1.running_var"].tolist() == [1 - 1e-5] * 2
    assert torch.equal(first["backbone.bn1.running_mean"], one)
    assert torch.equal(first["roi_heads.x.running_var"], one)
    now = from_torchvision({key: one, "rpn.head.conv.0.0.weight": one})
    assert torch.equal(now["backbone.bn1.running_var"], one)
    mobile = {"backbone.body.0.1.running_var": one, "backbone.body.0.0.weight": one}
    for old in ({}, {"rpn.head.conv.weight": one}):
        got = from_torchvision({**mobile, **old})["backbone.features.0.1.running_var"]
        assert got.tolist() == [1 - (1e-3 - 1e-5)] * 2


def test_names_of_mmdetections_whole_detectors_are_known():
    """As its `cascade-mask-rcnn_r50_fpn` and `mask-rcnn_r50_fpn` have them."""
    layers = {"shared_fcs.1": "fcs.1", "fc_cls": "classes", "fc_reg": "deltas"}
    masks = {"convs.3.conv": "convs.3", "upsample": "grow", "conv_logits": "masks"}
    foreign = {"backbone.layer1.0.conv1.weight": "backbone.layer1.0.conv1.weight"}
    foreign |= {"neck.lateral_convs.2.conv.weight": "neck.lateral.2.weight"}
    foreign |= {"neck.fpn_convs.0.conv.bias": "neck.smooth.0.bias"}
    for theirs, mine in (("conv", "convs.0"), ("cls", "objectness"), ("reg", "deltas")):
        foreign[f"rpn_head.rpn_{theirs}.bias"] = f"rpn.{mine}.bias"
    for stage, number in (("", 0), ("0.", 0), ("2.", 2)):
        heads = {f"bbox_head.{stage}{k}": f"stages.{number}.{v}" for k, v in layers.items()}
        heads |= {f"mask_head.{stage}{k}": f"mask_stages.{number}.{v}" for k, v in masks.items()}
        given = foreign | {f"roi_head.{k}.weight": f"{v}.weight" for k, v in heads.items()}
        assert from_foreign(given) == {v: v for v in given.values()}


def test_a_state_of_ours_stays_as_it_is():
    state = {"neck.lateral.0.weight": 1, "stages.0.classes.bias": 2, "backbone.conv1.weight": 3}
    assert from_foreign(state) == state


def test_a_whole_file_loads_by_name_and_a_file_of_other_classes_too(tmp_path):
    peer = detection.fasterrcnn_mobilenet_v3_large_fpn(
        weights=None, weights_backbone=None, num_classes=4
    )
    full, head, fields = RELEASED["fasterrcnn_mobilenet_v3_large_fpn"]
    with torch.device("cpu"):
        ours = create_model(full, num_classes=5, head=head, **fields)
    report = load_dense(ours, peer.state_dict(), full)
    assert report.classes == (3, 5)
    assert {k.split(".")[2] for k in report.dropped_head} == {"classes", "deltas"}
