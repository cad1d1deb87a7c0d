"""Files of DETRs, official and transformers', by their keys."""

import pytest
import torch
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
)

from tests.parity import assert_close_to_peer, randomise
from vitrail.detectors.detr_keys import from_deformable_detr, from_detr
from vitrail.models import create_model
from vitrail_runtime.errors import InputError

SMALL = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 6}
KINDS = {"plain": {}, "refined": {"refine": True}, "two_stage": {"refine": True, "two_stage": True}}


def ours(name, **head):
    with torch.device("meta"):
        return create_model(name, num_classes=4, head=SMALL | {"frozen_norm": True} | head)


def deformable_peer(kind, **fields):
    flags = {"with_box_refine": kind != "plain", "two_stage": kind == "two_stage"}
    given = {"backbone": "resnet18", "num_labels": 4, "two_stage_num_proposals": 6}
    return DeformableDetrForObjectDetection(
        DeformableDetrConfig(**(given | SMALL | flags | fields))
    )


def shapes(state):
    return {k: v.shape for k, v in state.items() if "num_batches" not in k}


@pytest.mark.parametrize("backbone", ["timm", "transformers"])
def test_every_key_of_a_detr_of_transformers_has_its_place_and_shape(backbone):
    """Of version 5, and as version 4 and the files on the hub call them."""
    fields = {"backbone": "resnet50"}
    if backbone == "transformers":
        fields = {
            "use_timm_backbone": False,
            "backbone_config": ResNetConfig(out_features=["stage4"]),
        }
    with torch.device("meta"):
        peer = DetrForObjectDetection(DetrConfig(num_labels=4, **SMALL, **fields))
    state = shapes(from_detr(peer.state_dict()))
    assert state == shapes(ours("detr/resnet50").state_dict())
    older = {}
    for key, value in peer.state_dict().items():
        key = key.replace("backbone.model", "backbone.conv_encoder.model")
        older[key.replace("o_proj", "out_proj").replace("mlp.", "")] = value
    assert shapes(from_detr(older)) == state


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_of_a_deformable_detr_of_transformers_has_its_place_and_shape(kind):
    with torch.device("cpu" if kind == "plain" else "meta"):
        peer = deformable_peer(kind)
    want = ours("deformable_detr/resnet18", **KINDS[kind]).state_dict()
    state = peer.state_dict()
    assert shapes(from_deformable_detr(state)) == shapes(want)
    older = {}
    for key, value in state.items():
        key = key.replace("backbone.model", "backbone.conv_encoder.model")
        older[key.replace("o_proj", "out_proj").replace("mlp.", "")] = value
    assert shapes(from_deformable_detr(older)) == shapes(want)
    if kind == "refined":  # what version 5 writes where the class heads are alike
        one = {k: v for k, v in state.items() if not k.startswith(("class_embed.1", "bbox_embed."))}
        assert shapes(from_deformable_detr(one)) == shapes(want)


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_of_an_official_deformable_detr_has_its_place_and_value(kind):
    """Which names the heads of every layer, shared or not, and once more where the decoder moves boxes."""
    state = ours("deformable_detr/resnet18", **KINDS[kind]).state_dict()
    want = {k: torch.full(v.shape[:1], float(i)) for i, (k, v) in enumerate(state.items())}
    official = {}
    for key, value in want.items():
        if key.startswith("backbone."):
            official[key.replace("backbone.", "backbone.0.body.", 1)] = value
            continue
        official[key] = value
        head, _, *rest = key.split(".")
        if head not in ("class_embed", "bbox_embed"):
            continue
        if kind == "plain":
            official[".".join((head, "1", *rest))] = value
        elif head == "bbox_embed" or kind == "two_stage":
            official[f"transformer.decoder.{key}"] = value
    got = from_deformable_detr(official)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], value) for key, value in want.items())
    assert from_deformable_detr(want).keys() == want.keys()


@pytest.mark.parametrize("name", ["detr", pytest.param("deformable_detr", marks=pytest.mark.slow)])
def test_a_file_of_another_number_of_queries_is_refused_and_says_which(name, tmp_path):
    fields, backbone = {"dims": (16, 24, 32), "depths": (1, 1, 1), "key_dim": 8}, "efficientvit_m0"
    head = {**SMALL, "dim": 64, "mlp_dim": 8}
    model = create_model(f"{name}/{backbone}", num_classes=4, head=head, **fields)
    torch.save(model.state_dict(), tmp_path / "file.pth")
    given = fields | {"weights": tmp_path / "file.pth"}
    width = 64 if name == "detr" else 128
    said = (
        rf"1 of \d+ keys differ:\n  query_embed.weight: \(7, {width}\) in the model, \(6, {width}\)"
    )
    other = head | {"num_queries": 7}
    for classes in (4, 3):
        with pytest.raises(InputError, match=said):
            create_model(f"{name}/{backbone}", num_classes=classes, head=other, **given)
    fewer = create_model(f"{name}/{backbone}", num_classes=3, head=head, **given)
    assert fewer.weights_report.classes == (4, 3)
    assert {k.split(".")[0] for k in fewer.weights_report.dropped_head} == {"class_embed"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["detr/resnet50", *(f"deformable_detr/resnet18 {k}" for k in KINDS)]
)
def test_a_file_of_transformers_answers_as_there(name, tmp_path):
    """Whole, through the file: the 256 channels, six layers and hundred queries of DETR's."""
    name, _, kind = name.partition(" ")
    if kind:
        peer, head = deformable_peer(kind), {**SMALL, **KINDS[kind]}
        if kind == "refined":
            peer.class_embed = torch.nn.ModuleList(torch.nn.Linear(256, 4) for _ in range(2))
    else:
        peer, head = DetrForObjectDetection(DetrConfig(num_labels=4)), {}
    randomise(peer)
    torch.save(peer.state_dict(), tmp_path / "file.pth")
    peer = peer.double().eval()
    model = create_model(name, num_classes=4, head=head, weights=tmp_path / "file.pth")
    assert not [k for k in model.weights_report.new if "num_batches" not in k]
    model = model.double().eval()
    sizes = [(128, 160), (97, 130)]
    images = torch.randn(2, 3, 128, 160, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.zeros(2, 128, 160, dtype=torch.long)
    for own, kept, (height, width) in zip(images, mask, sizes, strict=True):
        own[:, height:], own[:, :, width:], kept[:height, :width] = 0, 0, 1
    with torch.no_grad():
        want = peer(images, pixel_mask=mask)
        if kind:
            said = model.answers(images, sizes)
            logits, boxes = said.logits[-1], said.boxes[-1]
        else:
            (logits,), (boxes,) = model.heads(model.decoded(images, sizes)[-1:])
    rel = 1e-9 if kind != "two_stage" else 1e-5  # which codes proposals in float32
    assert_close_to_peer(logits, want.logits, rel)
    assert_close_to_peer(boxes, want.pred_boxes, rel)
