"""Parts of detectors by themselves: matching, drawing, levels, crops of masks, first weights."""

import math

import pytest
import torch
import torchvision
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.ops.poolers import LevelMapper

from vitrail.detectors import matching, rcnn
from vitrail.detectors.cascade import CascadeMaskRCNNConfig, CascadeRCNNConfig
from vitrail.detectors.matching import BACKGROUND, match, sample
from vitrail.detectors.roi import BoxHead, MaskHead, RoIPooling, crop_masks, mask_entropy
from vitrail.detectors.rpn import RPN
from vitrail.features import FeatureSpec

SPECS = {f"p{i + 2}": FeatureSpec(16, 4 * 2**i) for i in range(4)}


def boxes_of(number, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 40, (number, 2), generator=generator).double()
    return torch.cat((corner, corner + torch.randint(4, 30, (number, 2), generator=generator)), 1)


@pytest.mark.parametrize("cells", [1 << 23, 700])  # at once, and a few objects after the other
@pytest.mark.parametrize("every", [False, True])
def test_boxes_stand_for_the_objects_that_torchvision_matches(every, cells, monkeypatch):
    monkeypatch.setattr(matching, "CELLS", cells)
    boxes, objects = boxes_of(300, 0), boxes_of(9, 1)
    objects[7] = objects[2]  # of equal ones the first
    boxes[0] = objects[3]
    peer = Matcher(0.5, 0.25, allow_low_quality_matches=every)
    want = peer(torchvision.ops.box_iou(objects, boxes))
    got = match(boxes, objects, high=0.5, low=0.25, every_object=every)
    assert torch.equal(got, want)
    assert {-2, -1, 3} <= set(got.tolist())
    assert 7 not in got


def test_bounds_of_overlap_belong_to_the_better_side():
    objects = torch.tensor([[0.0, 0.0, 8.0, 4.0]])
    boxes = torch.tensor([[0.0, 0, 8, 2], [0, 0, 4, 2], [0, 0, 2, 2]])  # IoU 1/2, 1/4 and 1/8
    got = match(boxes, objects, high=0.5, low=0.25)
    assert got.tolist() == [0, matching.BETWEEN, BACKGROUND]
    assert match(boxes, objects[:0], high=0.5, low=0.25).tolist() == [BACKGROUND] * 3
    assert match(boxes[:0], objects, high=0.5, low=0.25).shape == (0,)


def test_an_object_that_nothing_overlaps_claims_no_box():
    boxes, objects = boxes_of(5, 0), torch.tensor([[200.0, 200, 210, 210]]).double()
    got = match(boxes, objects, high=0.7, low=0.3, every_object=True)
    assert got.tolist() == [BACKGROUND] * 5


@pytest.mark.parametrize(("objects", "background"), [(50, 200), (3, 200), (50, 7), (0, 0)])
def test_as_many_are_drawn_as_torchvision_draws_and_every_one_may_be(objects, background):
    matched = torch.cat(
        (torch.arange(objects), torch.full((background,), -1), torch.full((9,), -2))
    )
    matched = matched[torch.randperm(len(matched))]
    kinds = torch.where(matched >= 0, 1, torch.where(matched == -1, 0, -1))
    want = [m[0].sum() for m in BalancedPositiveNegativeSampler(40, 0.3)([kinds])]
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        positive, negative = sample(matched, 40, 0.3)
        torch.manual_seed(seed)
        assert all(map(torch.equal, (positive, negative), sample(matched, 40, 0.3)))
        assert [len(positive), len(negative)] == want
        assert (matched[positive] >= 0).all()
        assert (matched[negative] == BACKGROUND).all()
        seen |= {*positive.tolist(), *negative.tolist()}
        assert len({*positive.tolist(), *negative.tolist()}) == len(positive) + len(negative)
    assert len(seen) >= 0.9 * (objects + background)


def test_a_box_is_pooled_from_torchvisions_level():
    pool = RoIPooling(SPECS, 7, samples=2, aligned=False)
    sides = torch.tensor([0.0, 3, 111, 112, 113, 223.9, 224, 447, 448, 449, 2000])
    boxes = torch.stack((sides * 0 + 5, sides * 0 + 9, 5 + sides / 2, 9 + sides * 2), 1)
    want = LevelMapper(2, 5)([boxes])
    assert torch.equal(pool.level_of(boxes), want)
    assert want.unique().tolist() == [0, 1, 2, 3]
    # Strides that are no powers of two, and that do not double: 14 cells of the level.
    odd = {"p2": FeatureSpec(4, 3.5), "p4": FeatureSpec(4, 14), "p5": FeatureSpec(4, 28)}
    pool = RoIPooling(odd, 7, samples=2, aligned=False)
    sides = torch.tensor([0.0, 195, 197, 391, 393])
    boxes = torch.stack((sides * 0, sides * 0, sides, sides), 1)
    assert pool.level_of(boxes).tolist() == [0, 0, 1, 1, 2]
    # Of two levels of one stride the first, as torchvision's for its MobileNet.
    same = {"p5a": FeatureSpec(4, 32), "p5": FeatureSpec(4, 32), "p6": FeatureSpec(4, 64)}
    pool = RoIPooling(same, 7, samples=2, aligned=False)
    sides = torch.tensor([100.0, 500, 800, 900])
    boxes = torch.stack((sides * 0, sides * 0, sides, sides), 1)
    assert pool.level_of(boxes).tolist() == [0, 0, 0, 2]


def test_pooled_boxes_keep_their_order_and_read_their_own_image_and_level():
    pool = RoIPooling(SPECS, 2, samples=2, aligned=False)
    maps = [torch.full((2, 1, 512 // 2**i, 512 // 2**i), float(i)) for i in range(2, 7)]
    maps = [m + torch.tensor([0.0, 0.5])[:, None, None, None] for m in maps]
    sides = [[500.0, 20, 130], [300, 30]]
    boxes = [torch.tensor([[1.0, 1, 1 + s, 1 + s] for s in row]) for row in sides]
    got = pool(maps, boxes)
    assert got.shape == (5, 1, 2, 2)
    want = torch.tensor([5.0, 2, 3, 4.5, 2.5])
    torch.testing.assert_close(got, want[:, None, None, None].expand(5, 1, 2, 2))
    assert pool([m.bfloat16() for m in maps], boxes).dtype == torch.bfloat16


def test_crops_of_masks_equal_roi_align_on_all_of_them():
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 2, (6, 40, 50), generator=generator, dtype=torch.uint8)
    corner = torch.rand(30, 2, generator=generator, dtype=torch.float64) * 30
    boxes = torch.cat((corner, corner + torch.rand(30, 2, generator=generator) * 20), 1)
    boxes[:, 2].clamp_(max=50)
    boxes[:, 3].clamp_(max=40)
    boxes[0] = torch.tensor([0, 0, 50, 40])
    boxes[1] = torch.tensor([49.5, 39.5, 50, 40])
    index = torch.randint(0, 6, (30,), generator=generator)
    index[:2] = torch.tensor([4, 5])
    rois = torch.cat((index[:, None].double(), boxes), 1)
    want = torchvision.ops.roi_align(masks[:, None].double(), rois, 28)[:, 0]
    torch.testing.assert_close(crop_masks(masks, boxes, index, 28), want, rtol=0, atol=1e-12)
    assert crop_masks(masks, boxes[:0], index[:0], 28).shape == (0, 28, 28)


def test_no_more_than_one_mask_becomes_numbers_of_32_bits(monkeypatch):
    sizes = []
    crop = torchvision.ops.roi_align
    monkeypatch.setattr(
        torchvision.ops, "roi_align", lambda x, *a: (sizes.append(x.numel()), crop(x, *a))[1]
    )
    masks = torch.zeros(300, 60, 80, dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 10, 30, 20]]).expand(300, 4)
    crop_masks(masks, boxes, torch.arange(300), 28)
    assert max(sizes) == 23 * 13  # what the box sees, with a pixel all around


@pytest.mark.parametrize("number", [0, 64, 150])
@pytest.mark.parametrize("norm", [False, True])
def test_the_loss_of_masks_and_every_gradient_are_those_of_all_boxes_at_once(norm, number):
    torch.manual_seed(0)
    config = CascadeMaskRCNNConfig(mask_convs=1, mask_dim=3, mask_norm=norm)
    head = MaskHead(config, 2, 4).double()
    head.convs[0].weight.requires_grad_(False)
    torch.nn.init.normal_(head.masks.weight)
    pooled = torch.randn(number, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (number,))
    wanted = torch.rand(number, 6, 6, dtype=torch.float64)
    if norm and not number:
        return  # BatchNorm knows no mean of nothing
    learnt = [p for p in head.parameters() if p.requires_grad]
    got = mask_entropy(head, pooled, labels, wanted)
    found = torch.autograd.grad(3 * got, (pooled, *learnt))
    mine = head(pooled)[torch.arange(number), labels]
    likely = mine.sigmoid()
    want = -(wanted * likely.log() + (1 - wanted) * (1 - likely).log()).sum()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(found, torch.autograd.grad(3 * want, (pooled, *learnt)))
    with torch.no_grad():
        torch.testing.assert_close(mask_entropy(head, pooled, labels, wanted), want)


def test_of_a_mask_head_nothing_is_kept_but_its_gradients():
    head = MaskHead(CascadeMaskRCNNConfig(mask_convs=2, mask_dim=8), 8, 2)
    pooled = torch.randn(70, 8, 4, 4, requires_grad=True)
    loss = mask_entropy(head, pooled, torch.zeros(70, dtype=torch.long), torch.rand(70, 8, 8))
    kept = loss.grad_fn.saved_tensors
    assert [t.shape for t in kept] == [t.shape for t in (pooled, *head.parameters())]


def test_anchors_stand_by_true_strides():
    specs = {"p2": FeatureSpec(16, 3.5), "p3": FeatureSpec(16, 7)}
    maps = [torch.zeros(1, 16, 3, 2), torch.zeros(1, 16, 2, 1)]
    config = rcnn.RCNNConfig(
        anchor_sizes=(2.0, 4.0), anchor_ratios=(0.25, 1.0), anchor_rounding=False
    )
    first, second = RPN(config, specs).anchors(maps)
    for anchors, stride, (height, width) in ((first, 3.5, (3, 2)), (second, 7, (2, 1))):
        want = [
            (x * stride, y * stride, size * stride / math.sqrt(r), size * stride * math.sqrt(r))
            for y in range(height)
            for x in range(width)
            for r in (0.25, 1.0)
            for size in (2.0, 4.0)
        ]
        got = torchvision.ops.box_convert(anchors, "xyxy", "cxcywh")
        torch.testing.assert_close(got, torch.tensor(want))
    rounded = RPN(rcnn.RCNNConfig(anchor_pixels=(7.0,)), specs).anchors(maps)
    assert rounded[1][1].tolist() == [-4, -4, 4, 4]  # half to even
    assert torch.equal(rounded[0][:3], rounded[1][:3])


def test_weights_are_drawn_as_detectron2_draws_them():
    torch.manual_seed(0)
    specs = {"p2": FeatureSpec(64, 4), "p3": FeatureSpec(64, 8)}
    config = CascadeMaskRCNNConfig(neck_dim=64, box_dim=256, mask_dim=64)
    rpn, head, mask = RPN(config, specs), BoxHead(config, 64, 90), MaskHead(config, 64, 90)
    wanted = {
        rpn.convs[0]: 0.01,
        rpn.objectness: 0.01,
        rpn.deltas: 0.01,
        head.fcs[0]: math.sqrt(2 / (64 * 49 + 256)),
        head.classes: 0.01,
        head.deltas: 0.001,
        mask.convs[2]: math.sqrt(2 / (64 * 9)),
        mask.grow: math.sqrt(2 / (64 * 4)),
        mask.masks: 0.001,
    }
    for layer, std in wanted.items():
        assert layer.weight.std().item() == pytest.approx(std, rel=0.15)
        assert not layer.bias.any()
    with torch.device("meta"):
        RPN(config, specs), BoxHead(config, 64, 90), MaskHead(config, 64, 90)


def test_proposals_are_the_best_of_each_level_without_near_doubles():
    specs = {"p2": FeatureSpec(4, 8), "p3": FeatureSpec(4, 16)}
    fields = {"anchor_sizes": (1.0,), "anchor_ratios": (1.0,), "proposals_before_nms": (9, 3)}
    rpn = RPN(rcnn.RCNNConfig(proposals=(5, 2), proposal_nms=0.6, **fields), specs)
    found = rpn([torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 2, 2)])
    assert found.levels == [16, 4]
    torch.manual_seed(0)
    found.logits = torch.randn(1, 20)
    found.deltas = 0.3 * torch.randn(1, 20, 4)
    for training, before, after in ((True, 9, 5), (False, 3, 2)):
        (got,) = rpn.propose(found, [(30, 31)], training=training)
        assert len(got) == after
        boxes, scores = [], []
        for start, end in ((0, 16), (16, 20)):
            best = found.logits[0, start:end].argsort(descending=True)[:before] + start
            own = torchvision.models.detection._utils.BoxCoder((1, 1, 1, 1)).decode(
                found.deltas[0, best], [found.anchors[best]]
            )[:, 0]
            own = torchvision.ops.clip_boxes_to_image(own, (30, 31))
            large = ((own[:, 2:] - own[:, :2]) >= 1e-3).all(1)
            own, score = own[large], found.logits[0, best][large]
            kept = torchvision.ops.nms(own, score, 0.6)
            boxes.append(own[kept])
            scores.append(score[kept])
        want = torch.cat(boxes)[torch.cat(scores).argsort(descending=True)][:after]
        torch.testing.assert_close(got, want)
    assert not got.requires_grad
    few = RPN(rcnn.RCNNConfig(proposal_score=0.7, **fields), specs)
    (got,) = few.propose(found, [(30, 31)], training=True)
    assert 0 < len(got) <= (found.logits.sigmoid() >= 0.7).sum()


@pytest.mark.parametrize("small", [False, True])
def test_sizes_are_bounded_from_below_where_the_config_says_so(small):
    specs = {"p2": FeatureSpec(4, 8), "p3": FeatureSpec(4, 16)}
    config = rcnn.RCNNConfig(anchor_sizes=(400.0,), anchor_ratios=(1.0,), clamp_small=small)
    rpn = RPN(config, specs)
    found = rpn([torch.zeros(1, 4, 1, 1), torch.zeros(1, 4, 1, 1)])
    found.deltas = torch.zeros(1, 2, 4) - 6
    found.deltas[..., :2] = 0.25
    (got,) = rpn.propose(found, [(9000, 9000)], training=True)
    want = [400 * stride * (16 / 1000 if small else math.exp(-6)) for stride in (8, 16)]
    assert sorted((got[:, 2] - got[:, 0]).tolist()) == pytest.approx(want, rel=1e-3)
    model = rcnn.RCNN(_Empty(), config, 3)
    moved = model._decode(torch.full((1, 1, 4), -60.0), torch.tensor([[0.0, 0, 100, 100]]), 0)
    want = 100 * (16 / 1000 if small else math.exp(-60 * 0.2))
    assert (moved[0, 0, 2] - moved[0, 0, 0]).item() == pytest.approx(want, rel=1e-2, abs=1e-5)


def test_masks_of_a_cascade_are_the_mean_of_its_stages():
    config = CascadeMaskRCNNConfig(ious=(0.5, 0.6), neck_dim=8, box_dim=8, mask_dim=8)
    model = rcnn.RCNN(_Empty(), config, 3).eval()
    assert model.mask_pool.size == 14
    for stage in model.mask_stages:
        torch.nn.init.normal_(stage.masks.weight)
    maps = [torch.randn(1, 8, 16 // 2**i, 16 // 2**i) for i in range(4)]
    boxes = torch.tensor([[2.0, 3, 30, 40], [5, 5, 20, 20]])
    labels = torch.tensor([[2, 0, 0]])
    with torch.no_grad():
        (got,) = model._masks([maps], [boxes], labels, [2])
        pooled = model.mask_pool(maps, [boxes])
        each = [stage(pooled).sigmoid() for stage in model.mask_stages]
    want = torch.stack([(each[0][i, c] + each[1][i, c]) / 2 for i, c in enumerate((2, 0))])
    torch.testing.assert_close(got, want)


class _Empty(torch.nn.Module):
    feature_specs = {f"c{i + 2}": FeatureSpec(8, 4 * 2**i) for i in range(4)}  # noqa: RUF012


def test_a_cascade_follows_mmdetections_settings():
    config = CascadeRCNNConfig()
    assert config.ious == (0.5, 0.6, 0.7)
    assert config.class_agnostic
    assert (config.pool_samples, config.pool_aligned) == (0, True)
    assert (config.box_beta, config.clamp_small, config.anchor_rounding) == (1.0, True, False)
    assert (config.score, config.nms, config.detections) == (0.05, 0.5, 100)
    assert config.average == "logits"


@pytest.mark.parametrize("neck", ["fpn", "simple_pyramid"])
def test_levels_are_those_that_the_head_asks_for(neck):
    model = rcnn.RCNN(_Empty(), rcnn.RCNNConfig(neck=neck, neck_dim=8, strides=(8, 16)), 3)
    assert model.rpn.strides == [8, 16, 32]
    assert model.pool.strides == [8, 16]


def test_at_most_the_asked_share_of_boxes_stands_for_objects():
    model = rcnn.RCNN(_Empty(), rcnn.RCNNConfig(samples=40, positive_share=0.25, neck_dim=8), 3)
    objects = torch.tensor([[0.0, 0, 20, 20]])
    boxes = torch.cat((objects.expand(50, 4), objects.expand(50, 4) + 60))
    target = {"boxes": objects, "labels": torch.tensor([2])}
    drawn = model.draw(boxes, target, 0.5)
    assert drawn.labels.tolist() == [2] * 10 + [3] * 30
    assert torch.equal(drawn.wanted, objects.expand(10, 4))
