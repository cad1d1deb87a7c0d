import math

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from tests.golden import compare
from vitrail import boxes as bx
from vitrail_runtime.errors import InputError


def random_boxes(n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g, dtype=torch.float64) * 90
    return torch.cat((corner, corner + 1 + torch.rand(n, 2, generator=g).double() * 60), dim=1)


@pytest.mark.parametrize("other", ["cxcywh", "xywh"])
def test_formats_convert_as_torchvision_and_back(other):
    boxes = random_boxes(6).reshape(2, 3, 4)
    there = getattr(bx, f"xyxy_to_{other}")(boxes)
    torch.testing.assert_close(there, torchvision.ops.box_convert(boxes, "xyxy", other))
    torch.testing.assert_close(getattr(bx, f"{other}_to_xyxy")(there), boxes)


def test_area_iou_and_giou_equal_torchvisions():
    a, b = random_boxes(7, 1), random_boxes(5, 2)
    torch.testing.assert_close(bx.area(a), torchvision.ops.box_area(a))
    torch.testing.assert_close(bx.iou(a, b), torchvision.ops.box_iou(a, b))
    want = torchvision.ops.generalized_box_iou(a, b)
    torch.testing.assert_close(bx.giou(a, b), want)
    torch.testing.assert_close(bx.paired_giou(a[:5], b), want[:5].diagonal())
    torch.testing.assert_close(bx.paired_iou(a[:5], b), bx.iou(a[:5], b).diagonal())
    torch.testing.assert_close(bx.iou(a.reshape(1, 7, 4), b.reshape(1, 5, 4))[0], bx.iou(a, b))


def test_clipping_equals_torchvisions():
    boxes = random_boxes(20) - 30
    want = torchvision.ops.clip_boxes_to_image(boxes, (50, 80))
    assert torch.equal(bx.clip(boxes, 50, 80), want)


def test_boxes_without_area_overlap_nothing_and_have_finite_gradients():
    point = torch.tensor([[3.0, 4.0, 3.0, 4.0]], requires_grad=True)
    other = torch.tensor([[0.0, 0.0, 10.0, 10.0], [3.0, 4.0, 3.0, 4.0]])
    assert bx.iou(point, other).tolist() == [[0.0, 0.0]]
    bx.giou(point, other).sum().backward()
    assert point.grad is not None
    assert point.grad.isfinite().all()


coordinate = st.floats(-50, 50, allow_nan=False, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[coordinate] * 4), min_size=2, max_size=6))
def test_giou_is_symmetric_bounded_and_at_most_iou(rows):
    raw = torch.tensor(rows, dtype=torch.float64)
    boxes = torch.cat(
        (torch.minimum(raw[:, :2], raw[:, 2:]), torch.maximum(raw[:, :2], raw[:, 2:])), 1
    )
    giou, iou = bx.giou(boxes, boxes), bx.iou(boxes, boxes)
    assert ((iou >= 0) & (iou <= 1 + 1e-9)).all()
    assert ((giou >= -1 - 1e-9) & (giou <= iou + 1e-9)).all()
    torch.testing.assert_close(giou, giou.T)


WEIGHTS = [(10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (1.0, 1.0, 1.0, 1.0)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_code_equals_torchvisions_also_for_wild_outputs(weights):
    anchors, boxes = random_boxes(9, 3), random_boxes(9, 4)
    coder = BoxCoder(weights)
    deltas = bx.encode(boxes, anchors, weights)
    torch.testing.assert_close(deltas, coder.encode_single(boxes, anchors))
    torch.testing.assert_close(bx.decode(deltas, anchors, weights), boxes)
    wild = deltas * 40
    torch.testing.assert_close(
        bx.decode(wild, anchors, weights), coder.decode_single(wild, anchors)
    )
    assert bx.decode(torch.full((1, 4), 1e30), anchors[:1].float(), weights).isfinite().all()


@pytest.mark.parametrize("stage", range(3))
def test_the_code_of_each_cascade_stage_equals_mmdetections(stage):
    facts, arrays = compare.load("cascade_rcnn")
    weights = [1 / s for s in facts["config"]["stds"][stage]]
    proposals = torch.from_numpy(arrays["coder.boxes"])
    objects = torch.tensor(facts["targets"][0]["boxes"], dtype=torch.float32)
    deltas = bx.encode(objects, proposals, weights)
    # "decodes 1.5 * encoded + 3": raw network output, before the standard deviations.
    decoded = bx.decode(1.5 * deltas + 3, proposals, weights, clamp_small=True)
    height, width = facts["config"]["picture_sizes"][0]
    decoded = bx.clip(decoded, height, width)
    compare.check(
        "cascade_rcnn", {f"coder{stage}.encoded": deltas, f"coder{stage}.decoded": decoded}
    )


def test_the_bound_from_below_is_mmdetections_choice():
    anchor = torch.tensor([[0.0, 0.0, 1000.0, 1000.0]])
    deltas = torch.tensor([[0.0, 0.0, -9.0, -9.0]])
    size = lambda boxes: float(boxes[0, 2] - boxes[0, 0])  # noqa: E731  (a formula of this test)
    assert size(bx.decode(deltas, anchor)) == pytest.approx(1000 * math.exp(-9.0), rel=1e-2)
    assert size(bx.decode(deltas, anchor, clamp_small=True)) == pytest.approx(16.0, rel=1e-4)


def test_anchors_equal_torchvisions_on_maps_that_are_not_square():
    sizes, ratios = ((32.0,), (64.0, 100.0)), (0.5, 1.0, 2.0)
    theirs = AnchorGenerator(sizes, (ratios,) * 2)
    images = ImageList(torch.zeros(1, 3, 96, 160), [(96, 160)])
    maps = [torch.zeros(1, 1, 12, 20), torch.zeros(1, 1, 6, 10)]
    (want,) = theirs(images, maps)
    ours = [
        # torchvision rounds its shapes; the papers and mmdetection do not.
        bx.anchor_grid(bx.anchor_shapes(s, ratios).round(), *m.shape[-2:], stride)
        for s, m, stride in zip(sizes, maps, (8, 16), strict=True)
    ]
    torch.testing.assert_close(torch.cat(ours), want)


def test_anchors_take_strides_that_are_not_whole_and_a_centre_offset():
    shapes = bx.anchor_shapes([10], [1.0])
    grid = bx.anchor_grid(shapes, 2, 3, 3.5, offset=0.5)
    assert grid.shape == (6, 4)
    centres = bx.xyxy_to_cxcywh(grid)[:, :2].tolist()
    assert centres[:4] == [[1.75, 1.75], [5.25, 1.75], [8.75, 1.75], [1.75, 5.25]]
    assert torch.equal(bx.anchor_grid(shapes, 1, 1, (4, 8)), shapes)
    both = bx.xyxy_to_cxcywh(bx.anchor_grid(shapes, 2, 2, (4, 8), offset=0.5))[:, :2]
    assert both.tolist() == [[4, 2], [12, 2], [4, 6], [12, 6]]  # (vertical, horizontal)


def test_an_anchor_shape_keeps_its_area_over_ratios():
    shapes = bx.anchor_shapes([32, 64], [0.5, 1, 2])
    torch.testing.assert_close(bx.area(shapes), torch.tensor([1024.0, 4096.0] * 3))
    size = shapes[:, 2:] - shapes[:, :2]
    torch.testing.assert_close(size[:, 1] / size[:, 0], torch.tensor([0.5, 0.5, 1, 1, 2, 2]))
    with pytest.raises(InputError, match="positive"):
        bx.anchor_shapes([32], [0])


def test_boxes_turned_inside_out_have_no_area_and_an_empty_target_has_a_finite_code():
    assert bx.area(torch.tensor([[5.0, 5, 1, 9], [5, 5, 9, 1], [5, 5, 1, 1]])).tolist() == [0, 0, 0]
    anchor, point = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[3.0, 4, 3, 4]])
    deltas = bx.encode(point, anchor)
    assert deltas.isfinite().all()
    torch.testing.assert_close(bx.decode(deltas, anchor), point, atol=1e-6, rtol=0)


def test_without_a_word_deltas_are_not_weighted_and_sizes_end_at_62_and_a_half():
    anchor = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    wide = bx.decode(torch.tensor([[0.0, 0.0, 9.0, 0.0]]), anchor)
    torch.testing.assert_close(wide, torch.tensor([[-492.0, 0.0, 508.0, 16.0]]))
    own = bx.decode(torch.tensor([[0.0, 0.0, 9.0, 0.0]]), anchor, max_log_ratio=math.log(2))
    torch.testing.assert_close(own, torch.tensor([[-8.0, 0.0, 24.0, 16.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_boxes_in_half_precision_overlap_themselves_wholly(dtype):
    box = torch.tensor([[0, 0, 300, 300.0]], dtype=dtype)
    assert bx.iou(box, box).item() == 1
    assert bx.giou(box, box).item() == 1
