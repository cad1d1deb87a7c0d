"""Cascade R-CNN against what mmdetection's heads gave, and the law that one stage is no cascade."""

import pytest
import torch

from tests.golden.compare import check, load
from tests.golden.fill import array, value
from vitrail.detectors import rcnn, rpn
from vitrail.detectors.cascade import CascadeMaskRCNNConfig, CascadeRCNNConfig
from vitrail.detectors.keys import from_foreign
from vitrail.features import FeatureSpec
from vitrail_runtime.errors import InputError

FACTS, ARRAYS = load("cascade_rcnn")
SIZES = [tuple(size) for size in FACTS["config"]["picture_sizes"]]
K = FACTS["config"]["num_classes"]
SPECS = {f"c{i + 2}": FeatureSpec(8, 4 * 2**i) for i in range(4)}
MAPS = [
    array(f"cascade_rcnn.p{i}", 2, 8, *size).double()
    for i, size in enumerate(((32, 40), (16, 20), (8, 10), (4, 5)))
]
PROPOSALS = [torch.from_numpy(ARRAYS[f"proposals{i}"]).double() for i in range(2)]
IMAGES = torch.zeros(2, 3, *SIZES[0])
TARGETS = tuple(
    {"boxes": torch.tensor(t["boxes"], dtype=torch.float32), "labels": torch.tensor(t["labels"])}
    for t in FACTS["targets"]
)


class Nothing(torch.nn.Module):
    feature_specs = SPECS


def model_of(monkeypatch, config=CascadeRCNNConfig, **fields):
    """The fixture's heads, reading the fixture's maps and proposals."""
    model = rcnn.RCNN(Nothing(), config(neck_dim=8, box_dim=24, **fields), K)
    keys = {f"roi_head.{key}": shape for key, shape, _ in FACTS["state_dict"]}
    official = {
        key: torch.from_numpy(value(key.removeprefix("roi_head."), shape, 1.0))
        for key, shape in keys.items()
    }
    state = from_foreign(official)
    heads = {k: v for k, v in model.state_dict().items() if k.startswith("stages.")}
    assert state.keys() == heads.keys()
    model.load_state_dict(state, strict=False)
    monkeypatch.setattr(model, "maps", lambda images: MAPS)
    nothing = rpn.Found(torch.zeros(2, 0), torch.zeros(2, 0, 4), torch.zeros(0, 4), [])
    monkeypatch.setattr(model.rpn, "forward", lambda maps: nothing)
    monkeypatch.setattr(model.rpn, "propose", lambda found, sizes, training: PROPOSALS)
    monkeypatch.setattr(model.rpn, "losses", lambda found, targets: {})
    return model.double().eval()


def with_index(boxes):
    """Boxes (2, n, 4) -> (2 n, 5) with the image's number first, as mmdetection has them."""
    index = torch.arange(len(boxes), dtype=boxes.dtype).repeat_interleave(boxes.shape[1])
    return torch.cat((index[:, None], boxes.flatten(0, 1)), 1)


def test_every_stage_and_the_answers_equal_mmdetections(monkeypatch):
    model = model_of(monkeypatch)
    said = []
    for stage in model.stages:
        stage.register_forward_hook(lambda _, args, out: said.append(out))
    record = {}
    with torch.no_grad():
        found = model.forward_tensors(IMAGES, record, sizes=SIZES)
        check("cascade_rcnn", {"roi_features_stage0": model.pool(MAPS, PROPOSALS)})
    taps = {
        "stage0.rois": with_index(record["proposals"][:, :12]),
        "final_boxes": record["stages.2.boxes"][:, :12].flatten(0, 1),
        "mean_logits": torch.stack([logits for logits, _ in said]).mean(0),
        "mean_probabilities": torch.stack([logits.softmax(1) for logits, _ in said]).mean(0),
    }
    for i, (logits, deltas) in enumerate(said):
        taps |= {f"stage{i}.cls_score": logits, f"stage{i}.bbox_pred": deltas[:, 0]}
        if i:
            taps[f"stage{i}.rois"] = with_index(record[f"stages.{i - 1}.boxes"][:, :12])
    for i in range(2):
        n = found["count"][i]
        for name in ("boxes", "scores", "labels"):
            taps[f"det{i}.{name}"] = found[name][i, :n]
    check("cascade_rcnn", taps)
    assert record["stages.2.boxes"].shape == (2, 1000, 4)


def test_the_losses_of_every_stage_equal_mmdetections(monkeypatch):
    model = model_of(monkeypatch)
    losses = model.losses(IMAGES, TARGETS, sizes=SIZES)
    want = {}
    for i in range(3):
        want[f"class.{i}"] = FACTS["losses"][f"s{i}.loss_cls"]
        want[f"box.{i}"] = FACTS["losses"][f"s{i}.loss_bbox"]
    got = {name: (loss / model.weight(TARGETS)).item() for name, loss in losses.items()}
    assert got == pytest.approx(want, rel=2e-6)


def test_scores_may_be_averaged_as_probabilities(monkeypatch):
    model = model_of(monkeypatch, average="probabilities", detections=200, nms=1.0, score=0.0)
    with torch.no_grad():
        found = model.forward_tensors(IMAGES, sizes=SIZES)
    wanted = torch.from_numpy(ARRAYS["mean_probabilities"])[:, :K].double()
    for i in range(2):
        n = found["count"][i]
        want = wanted[12 * i : 12 * (i + 1)].flatten().sort(descending=True).values
        assert n == len(want)
        torch.testing.assert_close(found["scores"][i, :n], want, rtol=0, atol=1e-6)


def test_what_stages_regress_and_at_which_weight():
    model = rcnn.RCNN(Nothing(), CascadeRCNNConfig(ious=(0.4, 0.5, 0.6, 0.7)), K)
    assert len(model.stages) == 4
    stds = [(0.1, 0.2), (0.05, 0.1), (0.033, 0.067), (0.025, 0.05)]
    for i, (centre, size) in enumerate(stds):
        assert model.code_weights(i) == pytest.approx((1 / centre, 1 / centre, 1 / size, 1 / size))
        assert model.stage_weight(i) == 0.5**i
    assert not model.has_masks


@pytest.mark.parametrize("ious", [(), (0.0,), (0.5, 1.1)])
def test_overlaps_that_cannot_be_asked_for_are_refused(ious):
    with pytest.raises(InputError, match="ious has the overlap of each stage"):
        CascadeRCNNConfig(ious=ious)


def test_a_cascade_of_one_stage_is_faster_rcnn(monkeypatch):
    same = {"class_agnostic": False, "pool_samples": 2, "pool_aligned": False, "box_beta": 1 / 9}
    same |= {"clamp_small": False, "anchor_rounding": True, "neck_dim": 8, "box_dim": 16}
    one = rcnn.RCNN(Nothing(), CascadeRCNNConfig(ious=(0.5,), **same), K).eval()
    faster = rcnn.RCNN(Nothing(), rcnn.RCNNConfig(neck_dim=8, box_dim=16), K).eval()
    faster.load_state_dict(one.state_dict())
    out = []
    for model in (one, faster):
        maps = [m.float() for m in MAPS]
        pyramid = [*maps, maps[-1][..., ::2, ::2]]
        monkeypatch.setattr(model, "maps", lambda images, pyramid=pyramid: pyramid)
        torch.manual_seed(0)
        out.append((model.losses(IMAGES, TARGETS, sizes=SIZES), model.forward_tensors(IMAGES)))
    for mine, other in zip(*out, strict=True):
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            assert torch.equal(tensor, other[name]), name


def test_between_stages_added_objects_go_and_the_rest_is_moved_by_its_own_class(monkeypatch):
    """Classes with boxes of their own: an object's box is moved as its label says, background as it is
    guessed."""
    model = rcnn.RCNN(Nothing(), CascadeRCNNConfig(class_agnostic=False, neck_dim=8), 2)
    boxes = torch.tensor([[10.0, 10, 30, 30], [40, 40, 60, 60], [0, 0, 20, 20]])
    drawn = [
        rcnn.Drawn(
            boxes,
            torch.tensor([1, 0, 2]),
            boxes[:2],
            torch.tensor([0, 1]),
            torch.tensor([False, True, False]),
        )
    ]
    deltas = torch.zeros(3, 2, 4)
    deltas[:, 1, 0] = 1.0  # the second class goes right by 0.1 of the width
    logits = torch.tensor(
        [[9.0, 0, 0], [0, 0, 0], [0, 1, 9]]
    )  # guessed: 0, 0 and (not background) 1
    (moved,) = model._refined(logits, deltas, drawn, [(100, 21)], 0)
    torch.testing.assert_close(moved, torch.tensor([[12.0, 10, 21, 30], [2, 0, 21, 20]]))
    assert CascadeMaskRCNNConfig().has_masks
