"""HEAD/BACKBONE: detectors by name, saved, loaded, and filled from files of other libraries."""

import json

import pytest
import torch

import vitrail
from tests.parity import randomise
from vitrail.cli import main
from vitrail.cli.models import count
from vitrail.models import HEADS, list_models
from vitrail.registry import list_backbones
from vitrail.tasks.task import task_of_model
from vitrail_runtime.errors import InputError

NAMES = ("cat", "dog", "hare")
SMALL = {"dims": (16, 24, 32), "depths": (1, 1, 1), "key_dim": 8}
DETECTORS = ("faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn")
ONE_STAGE = ("efficientdet",)
QUERIES = ("detr", "deformable_detr")
NAMED = tuple(f"efficientdet_d{scale}" for scale in (0, 1, 2, 3, 4, 5, 6, 7, "7x"))


def fields_of(head):
    fields = {"neck_dim": 8, "box_dim": 16, "proposals": (60, 40)}
    return fields | ({"mask_dim": 8} if "mask" in head else {})


def make(kind, **given):
    torch.manual_seed(0)
    settings = {"classes": NAMES, "head": fields_of(kind), **SMALL, **given}
    return vitrail.create_model(f"{kind}/efficientvit_m0", **settings)


def test_every_detector_goes_with_every_backbone_by_name():
    every = [f"{h}/{b}" for h in (*DETECTORS, *ONE_STAGE, *QUERIES) for b in list_backbones()]
    assert list_models(task="detect") == [*every, *NAMED]
    of_m0 = [f"{h}/efficientvit_m0" for h in (*DETECTORS, *ONE_STAGE, *QUERIES)]
    assert list_models("*m0", task="detect") == of_m0
    assert not set(list_models()) & set(list_models(task="detect"))


def test_a_papers_own_name_is_listed_where_no_backbone_fits():
    assert list_models("efficientdet_d?") == list(NAMED[:-1])
    assert list_models("efficientdet_d*", task="detect") == list(NAMED)
    assert not set(NAMED) & {*list_models("efficient*"), *list_models(task="segment")}
    assert (
        task_of_model("efficientdet_d3").name
        == task_of_model("efficientdet/cmt_s").name
        == "detect"
    )
    assert task_of_model("efficientnet_b0").name == "classify"


def test_models_shows_what_a_detector_costs_where_that_follows_from_the_size_alone(capsys):
    params, macs = count("efficientdet_d0", 90)
    assert (params, round(macs / 1e9, 1)) == (3880067, 2.5)  # the paper's Table 2
    assert main(["models", "faster_rcnn/resnet18"]) == 0
    # Behind the proposals it depends on what is seen.
    assert "faster_rcnn/resnet18     29.04            800  4, 8, 16, 32" in capsys.readouterr().out


@pytest.mark.parametrize("head", DETECTORS)
def test_a_saved_detector_comes_back_bit_for_bit(head, tmp_path):
    model = make(head)
    randomise(model)
    folder = vitrail.save(model.eval(), tmp_path / "model")
    again = vitrail.load(folder)
    assert again.info == model.info
    assert (again.task, again.classes) == ("detect", NAMES)
    assert (again.preprocessing.mode, again.preprocessing.size) == ("edges", (800, 1333))
    assert again.has_masks == model.has_masks == ("mask" in head)
    assert len(again.stages) == (3 if "cascade" in head else 1)
    assert len(again.mask_stages) == len(again.stages) * again.has_masks
    x = torch.randn(1, 3, 70, 56)
    with torch.no_grad():
        mine, other = model.forward_tensors(x), again.forward_tensors(x)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    said = json.loads((folder / "config.json").read_text())["parts"]["head"]
    assert said["neck_dim"] == 8
    assert again.config == HEADS[head].config.__class__(**fields_of(head))


def test_stages_neck_and_thresholds_are_fields_of_the_head():
    model = make("cascade_rcnn", head={"ious": (0.4, 0.6), "neck": "simple_pyramid", "neck_dim": 8})
    assert len(model.stages) == 2
    assert type(model.neck).__name__ == "SimplePyramid"
    with pytest.raises(InputError, match=r"config field of the head of .* did you mean 'ious'"):
        make("cascade_rcnn", head={"iou": 0.4})
    assert make("cascade_rcnn", head={"ious": [0.5, 1]}).config.ious == (0.5, 1.0)
    with pytest.raises(InputError, match=r"head of .*anchor_sizes is '\(4,\)', but must be a list"):
        make("cascade_rcnn", head={"anchor_sizes": "(4,)"})


def test_a_mask_head_says_that_it_needs_masks():
    model = make("mask_rcnn")
    target = {"boxes": torch.tensor([[2.0, 2, 20, 20]]), "labels": torch.tensor([0])}
    with pytest.raises(InputError, match=r"learns from masks, but image 0 of the batch has boxes"):
        model.losses(torch.randn(2, 3, 64, 64), (target, target))
    make("faster_rcnn").losses(torch.randn(2, 3, 64, 64), (target, target))


def test_weights_by_part_and_heads_of_other_classes(tmp_path):
    model = make("cascade_mask_rcnn")
    randomise(model)
    vitrail.save(model, tmp_path / "model")
    backbone = make("faster_rcnn", weights={"backbone": tmp_path / "model"})
    assert torch.equal(
        backbone.backbone.state_dict()[k := next(iter(model.backbone.state_dict()))],
        model.backbone.state_dict()[k],
    )
    fewer = make("cascade_mask_rcnn", classes=NAMES[:2], weights=tmp_path / "model")
    report = fewer.weights_report
    assert report.classes == (3, 2)
    dropped = {key.split(".", 2)[2] for key in report.dropped_head}
    assert dropped == {"classes.weight", "classes.bias", "masks.weight", "masks.bias"}
    assert torch.equal(fewer.stages[2].fcs[0].weight, model.stages[2].fcs[0].weight)


def test_frozen_norms_take_the_weights_of_others_and_come_back(tmp_path):
    plain = make("faster_rcnn")
    randomise(plain)
    vitrail.save(plain, tmp_path / "plain")
    head = {**fields_of("faster_rcnn"), "frozen_norm": True}
    model = make("faster_rcnn", head=head, weights=tmp_path / "plain")
    again = vitrail.load(vitrail.save(model, tmp_path / "frozen"))
    assert not [m for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    x = torch.randn(1, 3, 70, 56)
    with torch.no_grad():
        want = plain.eval().forward_tensors(x)
        for other in (model.train(), again):  # in training mode too
            found = other.forward_tensors(x)
            torch.testing.assert_close(found["boxes"], want["boxes"], rtol=1e-3, atol=1e-2)
            torch.testing.assert_close(found["scores"], want["scores"], rtol=1e-3, atol=1e-4)
