"""A detector whose weights are damaged says so: to drop what is no number would look like no object."""

import pytest
import torch

from vitrail.models import create_model
from vitrail_runtime.errors import NotFinite
from vitrail_runtime.finish import FINISH
from vitrail_runtime.preprocess import Geometry

PLACES = ("backbone.conv1.weight", "rpn.objectness.weight", "rpn.deltas.weight")


EFFICIENTDETS = ("neck.cells.0.down.3.weights", "class_net.predict.pointwise.weight")
CASES = [
    (name, place)
    for name in ("faster_rcnn/resnet18", "cascade_mask_rcnn/resnet18")
    for place in (*PLACES, "stages.0.classes.weight", "stages.0.deltas.weight")
]
CASES += [
    ("efficientdet/resnet18", place)
    for place in (PLACES[0], *EFFICIENTDETS, "box_net.predict.pointwise.bias")
]


def detector(name):
    torch.manual_seed(0)
    if name.startswith("efficientdet"):
        one_stage = {"neck_dim": 16, "neck_cells": 1, "head_convs": 1, "detections": 5}
        return create_model(name, num_classes=2, head=one_stage).eval()
    small = {"neck_dim": 16, "box_dim": 16, "proposals": (20, 20), "detections": 5, "score": 0.0}
    return create_model(name, num_classes=2, head=small).eval()


@pytest.mark.parametrize(("name", "place"), CASES)
def test_a_number_that_is_none_anywhere_is_an_answer_that_is_refused(name, place):
    model = detector(name)
    images = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sound = model.forward_tensors(images)
        dict(model.named_parameters())[place].view(-1)[0] = torch.nan
        found = model.forward_tensors(images)
    assert sound["scores"].isfinite().all()
    arrays = {key: value.numpy() for key, value in found.items()}
    way = Geometry((40, 56), (1.0, 1.0), (0.0, 0.0))
    with pytest.raises(NotFinite, match="not finite"):
        FINISH["detect"](arrays, [way, way], ("a", "b"), 5)


@pytest.mark.parametrize("name", ["faster_rcnn/resnet18", "efficientdet/resnet18"])
def test_an_image_that_is_sound_keeps_its_answers_beside_one_that_is_not(name):
    model = detector(name)
    images = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model.forward_tensors(images)
        images[1, 0, 3, 3] = torch.inf
        found = model.forward_tensors(images)
    assert torch.equal(found["boxes"][0], want["boxes"][0])
    assert found["boxes"][0].isfinite().all()
    assert found["scores"][1, 0].isnan()
    assert found["count"][1] >= 1
