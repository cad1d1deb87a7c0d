"""EfficientDet against the stored run of effdet, and what it promises beside."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torchvision.ops import batched_nms

import vitrail
from tests.golden.compare import check, load
from tests.golden.fill import image, value
from tests.parity import randomise
from vitrail.boxes import decode, encode, iou
from vitrail.detectors import matching
from vitrail.detectors.efficientdet import EfficientDet, EfficientDetConfig, from_effdet
from vitrail.detectors.efficientdet_scales import SCALES, compound_scale
from vitrail.detectors.matching import BACKGROUND, match
from vitrail.models import create_model, parse_name
from vitrail.registry import tiny_entries
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing, preprocessed_size

FACTS, ARRAYS = load("efficientdet_d0")
SWAPPED = [1, 0, 3, 2]  # effdet says y before x
STATE = {
    key: torch.from_numpy(value(key, shape, FACTS["fill"]["gain"])) if shape else torch.tensor(0)
    for key, shape, _ in FACTS["state_dict"]
}
SMALL = {"neck_dim": 8, "neck_cells": 1, "head_convs": 1}
RESNET = tiny_entries()["resnet"]


def make(family="resnet", classes=3, **fields):
    torch.manual_seed(0)
    entry = tiny_entries()[family]
    model = EfficientDet(
        entry.cls(entry.config), EfficientDetConfig(**{**SMALL, **fields}), classes
    )
    return model.eval()


def target(*boxes, labels=None):
    given = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    return {"boxes": given, "labels": torch.tensor(labels or [0] * len(given), dtype=torch.int64)}


def answering(model, monkeypatch, logits, deltas):
    """The model, saying this of its anchors whatever it is shown."""
    monkeypatch.setattr(model, "maps", lambda images: [])
    monkeypatch.setattr(model, "said", lambda maps: (logits, deltas))
    return model


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The model with the fixture's weights from a file, its input, and what it says of the anchors."""
    file = tmp_path_factory.mktemp("effdet") / "tf_efficientdet_d0.safetensors"
    save_file(STATE, file)
    model = create_model("efficientdet_d0", num_classes=11, weights=file)
    assert not model.weights_report.new
    assert len(model.weights_report.used) == len(STATE)
    model.double().eval()
    x, record = 15 * image(1, 128, 128).double(), {}
    with torch.no_grad():
        said = model.said(model.maps(x))
        model.forward_tensors(x, record)
    return model, x, said, record


@pytest.fixture(scope="module")
def objects():
    (given,) = FACTS["targets"]
    boxes = torch.tensor(given["boxes_yxyx"], dtype=torch.float64)[:, SWAPPED]
    return {"boxes": boxes, "labels": torch.tensor(given["classes"]) - 1}


def test_what_is_said_at_every_level_equals_effdets(official):
    model, _, _, record = official
    taps = {"anchors": model.anchors(128, 128, torch.zeros(1).double())[:, SWAPPED]}
    assert len(record) == 10
    for i in range(5):
        logits, deltas = record[f"p{i + 3}.logits"], record[f"p{i + 3}.deltas"][..., SWAPPED]
        taps[f"output#class{i}"] = logits.flatten(3).permute(0, 3, 1, 2)
        taps[f"output#box{i}"] = deltas.flatten(3).permute(0, 3, 1, 2)
    # In float64 the official run itself is as far from its float32 one as `float64_gap` says.
    check("efficientdet_d0", taps, rel=5e-6)


def test_anchors_stand_for_the_objects_that_effdets_stand_for(official, objects):
    model, x, _, _ = official
    matched = model.match(objects["boxes"], 128, 128)
    positive = (matched >= 0).nonzero()[:, 0]
    assert len(positive) == FACTS["positives"][0] == model.weight((objects,))
    assert torch.equal(positive, torch.from_numpy(ARRAYS["positive_anchor_index"])[:, 1])
    labels = objects["labels"][matched[positive]]
    assert torch.equal(labels, torch.from_numpy(ARRAYS["positive_class"]))
    deltas = encode(objects["boxes"][matched[positive]], model.anchors(128, 128, x)[positive])
    wanted = torch.from_numpy(ARRAYS["positive_box_target"])[:, SWAPPED].double()
    torch.testing.assert_close(deltas, wanted, rtol=1e-4, atol=1e-5)


def test_losses_equal_effdets_but_for_the_one_that_it_adds_to_their_divisor(
    official, objects, monkeypatch
):
    model, x, (logits, deltas), _ = official
    answering(model, monkeypatch, 0.2 * logits, 0.2 * deltas)
    losses = {k: v.item() for k, v in model.losses(x, (objects,)).items()}
    effdets = FACTS["positives"][0] + 1
    assert losses["class"] / effdets == pytest.approx(FACTS["losses"]["cls"], rel=2e-6)
    assert losses["box"] / effdets == pytest.approx(50 * FACTS["losses"]["box"], rel=2e-6)
    assert sum(losses.values()) / effdets == pytest.approx(FACTS["losses"]["total"], rel=2e-6)


def test_losses_are_those_of_the_formulas_written_out(monkeypatch):
    """p_t of the class that is there or not, alpha_t (1 - p_t)^gamma (-log p_t); Huber's bend."""
    model = make(alpha=0.3, gamma=2.0, delta=0.2, box_weight=7.0)
    x, generator = torch.zeros(2, 3, 128, 128), torch.Generator().manual_seed(0)
    anchors = model.anchors(128, 128, torch.zeros(1).double())
    logits = 3 * torch.randn(2, len(anchors), 3, generator=generator, dtype=torch.float64)
    deltas = torch.randn(2, len(anchors), 4, generator=generator, dtype=torch.float64)
    targets = (target([10, 20, 60, 90], [40, 8, 120, 50], labels=[2, 1]), target())
    answering(model, monkeypatch, logits, deltas)
    losses = model.losses(x, targets)
    there = torch.zeros_like(logits)
    apart = 0.0
    matched = model.match(targets[0]["boxes"], 128, 128)
    for anchor in (matched >= 0).nonzero()[:, 0].tolist():
        of = matched[anchor]
        there[0, anchor, targets[0]["labels"][of]] = 1
        gap = (deltas[0, anchor] - encode(targets[0]["boxes"][of], anchors[anchor])).abs()
        apart += torch.where(gap < 0.2, gap**2 / 2, 0.2 * (gap - 0.1)).sum()
    p = logits.sigmoid()
    p_t = there * p + (1 - there) * (1 - p)
    alpha_t = there * 0.3 + (1 - there) * 0.7
    focal = (alpha_t * (1 - p_t) ** 2 * -p_t.log()).sum()
    torch.testing.assert_close(losses["class"], focal, rtol=1e-9, atol=0)
    torch.testing.assert_close(losses["box"], 7 * apart / 4, rtol=1e-9, atol=0)
    assert model.weight(targets) == there.sum()


def test_no_object_anywhere_is_all_background():
    model = make().double()
    x = torch.randn(2, 3, 70, 45, generator=torch.Generator().manual_seed(0)).double()
    losses = model.losses(x, (target(), target()))
    with torch.no_grad():
        p = model.said(model.maps(x))[0].sigmoid()
    torch.testing.assert_close(losses["class"], (0.75 * p**1.5 * -(1 - p).log()).sum())
    assert losses["box"] == model.weight((target(), target())) == 0


def test_extreme_logits_have_finite_losses_and_gradients(monkeypatch):
    model = make()
    number = len(model.anchors(128, 128, torch.zeros(1)))
    logits = torch.full((1, number, 3), 200.0)
    logits[:, ::2] = -200.0
    logits.requires_grad_()
    answering(model, monkeypatch, logits, torch.zeros(1, number, 4))
    losses = model.losses(torch.zeros(1, 3, 128, 128), (target([10, 20, 60, 90]),))
    losses["class"].backward()
    assert losses["class"].isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_anchor_that_an_object_overlaps_most_stands_for_it_whatever_it_overlaps_itself():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 8, 10], [50, 50, 60, 60], [90, 90, 99, 99]])
    objects = torch.tensor([[0.0, 0, 10, 10], [0, 0, 9, 2], [0, 0, 9, 2], [70, 70, 80, 80]])
    plain = match(boxes, objects, high=0.5, low=0.5)
    assert plain.tolist() == [0, 0, BACKGROUND, BACKGROUND]
    # Objects 1 and 2 are alike and overlap box 0 (9 x 2 of 100) less than box 1 (8 x 2 of 82).
    alone = match(boxes, objects, high=0.5, low=0.5, every_object="alone")
    assert alone.tolist() == [0, 1, BACKGROUND, BACKGROUND]


def test_matching_an_object_after_the_other_gives_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    corner = torch.randint(0, 40, (310, 2), generator=generator).double()
    boxes = torch.cat((corner, corner + torch.randint(4, 30, (310, 2), generator=generator)), 1)
    boxes, objects = boxes[:300], boxes[300:]
    objects[7] = objects[2]
    how = {"high": 0.7, "low": 0.7, "every_object": "alone"}
    want = match(boxes, objects, **how)
    overlaps = iou(objects, boxes)
    plain = torch.where(overlaps.amax(0) >= 0.7, overlaps.argmax(0), BACKGROUND)
    for number in reversed(range(10)):  # the first of those that claim a box keeps it
        plain[overlaps[number].argmax()] = number
    assert torch.equal(want, plain)
    monkeypatch.setattr(matching, "CELLS", 700)
    assert torch.equal(match(boxes, objects, **how), want)


@pytest.mark.parametrize("seed", range(3))
def test_how_many_anchors_stand_for_objects_follows_from_the_objects_alone(seed):
    """However much is padded: the weight of a batch is known before it is."""
    generator = torch.Generator().manual_seed(seed)
    model = make("efficientvit" if seed else "vit")
    corner = torch.rand(12, 2, generator=generator) * torch.tensor([150.0, 90])
    size = 2 + torch.rand(12, 2, generator=generator) ** 3 * 200
    boxes = torch.cat((corner, corner + size), 1).clamp(max=200)
    counts = set()
    for height, width in ((200, 200), (256, 256), (201, 700), (900, 300)):
        matched = model.match(boxes, height, width)
        counts.add(int((matched >= 0).sum()))
        assert set(matched.tolist()) == {*range(12), BACKGROUND}  # each has one at least
    assert counts == {int(model.weight(({"boxes": boxes},)))}
    assert model.weight(({"boxes": boxes}, target(), {"boxes": boxes})) == 2 * max(counts)


def test_losses_of_parts_add_up_to_those_of_the_batch():
    """Norms aside, which see their part; and their weights, by which the sum is divided."""
    model = make("efficientvit").double()
    x = torch.randn(4, 3, 100, 128, generator=torch.Generator().manual_seed(0)).double()
    targets = (
        target([10, 20, 60, 90], [40, 8, 120, 50]),
        target(),
        target([70, 70, 95, 100]),
        target([3, 3, 30, 30]),
    )
    whole, parts = model.losses(x, targets), {"class": 0.0, "box": 0.0}
    for part in (slice(0, 1), slice(1, 2), slice(2, 4)):
        for name, loss in model.losses(x[part], targets[part]).items():
            parts[name] += loss
    torch.testing.assert_close(whole, parts, rtol=1e-9, atol=0)
    assert model.weight(targets) == sum(model.weight(targets[i : i + 1]) for i in range(4)) > 4


def test_anchors_in_the_padding_neither_teach_nor_answer(monkeypatch):
    """An image in a padded batch has the anchors that it has alone."""
    model = make(detections=30, candidates=200)
    x = torch.zeros(2, 3, 200, 300)
    sizes = ((200, 300), (120, 130))
    alone = [len(model.anchors(*size, torch.zeros(1))) for size in sizes]
    own = model._own_anchors(x, sizes)
    assert own.sum(1).tolist() == alone
    anchors = model.anchors(200, 300, torch.zeros(1))
    wanted = {tuple(a) for a in model.anchors(120, 130, torch.zeros(1)).tolist()}
    assert {tuple(a) for a in anchors[own[1]].tolist()} == wanted
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, len(anchors), 3, generator=generator)
    deltas = 0.1 * torch.randn(2, len(anchors), 4, generator=generator)
    targets = (target([10, 20, 60, 90]), target([30, 8, 120, 110], labels=[1]))
    answering(model, monkeypatch, logits, deltas)
    both, found = model.losses(x, targets, sizes=sizes), model.forward_tensors(x, sizes=sizes)
    apart = {"class": 0.0, "box": 0.0}
    for i, (height, width) in enumerate(sizes):
        answering(model, monkeypatch, logits[i : i + 1, own[i]], deltas[i : i + 1, own[i]])
        shown = torch.zeros(1, 3, height, width)
        for name, loss in model.losses(shown, targets[i : i + 1]).items():
            apart[name] += loss
        for name, rows in model.forward_tensors(shown).items():
            torch.testing.assert_close(found[name][i : i + 1], rows)
    torch.testing.assert_close(both, apart)


def test_answers_are_the_best_of_each_class_after_suppression(monkeypatch):
    model = make(candidates=150, detections=20, score=0.6, nms=0.4)
    x = torch.zeros(1, 3, 100, 90)
    anchors = model.anchors(100, 90, torch.zeros(1).double())
    assert len(anchors) == 9 * (16**2 + 8**2 + 4**2 + 2**2 + 1)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, len(anchors), 3, generator=generator).double()
    deltas = 0.3 * torch.randn(1, len(anchors), 4, generator=generator).double()
    answering(model, monkeypatch, logits, deltas)
    (found,) = model(x)
    scores, place = logits[0].sigmoid().flatten().sort(descending=True)
    scores, place = scores[:150], place[:150]
    boxes = decode(deltas[0], anchors)[place // 3]
    boxes = boxes.clamp(min=0).minimum(torch.tensor([90.0, 100, 90, 100]).double())
    good = (scores > 0.6) & (boxes[:, 2] - boxes[:, 0] > 0.01) & (boxes[:, 3] - boxes[:, 1] > 0.01)
    boxes, scores, labels = boxes[good], scores[good], (place % 3)[good]
    keep = batched_nms(boxes, scores, labels, 0.4)[:20]
    assert len(found["boxes"]) == 20 < len(boxes)
    torch.testing.assert_close(found["boxes"], boxes[keep])
    torch.testing.assert_close(found["scores"], scores[keep])
    assert torch.equal(found["labels"], labels[keep])
    (few,) = answering(make(candidates=12), monkeypatch, logits, deltas)(x)
    taken = int(good[:12].sum())  # of the best twelve
    best = batched_nms(boxes[:taken], scores[:taken], labels[:taken], 0.5)
    torch.testing.assert_close(few["scores"], scores[best])
    answering(model, monkeypatch, logits - 5, deltas)
    rows = model.forward_tensors(x)
    assert rows["count"].tolist() == [0]
    assert not rows["boxes"].any()
    assert {k: tuple(v.shape) for k, v in rows.items()} == {
        "boxes": (1, 20, 4),
        "scores": (1, 20),
        "labels": (1, 20),
        "count": (1,),
    }


def test_images_are_padded_with_zeros_to_a_multiple_of_the_coarsest_stride():
    model = make().double()
    assert model.multiple == 128
    x = torch.randn(2, 3, 70, 150, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        got, want = model.maps(x), model.maps(F.pad(x, (0, 106, 0, 58)))
    assert [tuple(m.shape[-2:]) for m in got] == [(16 // 2**i, 32 // 2**i) for i in range(5)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert make("vit", levels=6).multiple == 256


def test_fresh_parameters_are_drawn_as_the_official_code_draws_them():
    model = make(neck_dim=64, head_convs=2, neck_cells=2, classes=20)
    # p = 0.01 for every class of every anchor: background does not drown the first updates.
    bias = model.class_net.predict.pointwise.bias
    torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, 0.01))
    for net in (model.class_net, model.box_net):
        for conv in (*net.convs, net.predict):
            assert conv.depthwise.weight.std().item() == pytest.approx(1 / 3, rel=0.1)
            assert conv.pointwise.weight.std().item() == pytest.approx(1 / 8, rel=0.1)
            assert conv.depthwise.bias is None
    for conv in (*model.class_net.convs, *model.box_net.convs, model.box_net.predict):
        assert not conv.pointwise.bias.any()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module not in [*model.backbone.modules()]:
            assert (module.eps, module.momentum) == (1e-3, 0.01)


# Of Table 1, with COCO's 90 classes, in millions; and to the last one, as effdet counts.
PARAMETERS = {
    "d0": (3.9, 3880067),
    "d1": (6.6, 6625898),
    "d2": (8.1, 8097039),
    "d3": (12, 12032296),
    "d4": (21, 20723675),
    "d5": (34, 33653315),
    "d6": (52, 51871782),
    "d7": (52, 51871782),
    "d7x": (77, 77147166),
}


@pytest.mark.parametrize(
    "scale", [s if s < "d2" else pytest.param(s, marks=pytest.mark.slow) for s in PARAMETERS]
)
def test_published_scales_have_as_many_parameters_as_the_papers_table(scale):
    millions, count = PARAMETERS[scale]
    name = f"efficientdet_{scale}"
    with torch.device("meta"):
        model = create_model(name, num_classes=90)
    own = sum(p.numel() for p in model.parameters())
    assert own == count
    assert round(own / 1e6, 1 if millions < 10 else None) == millions
    assert model.backbone.config.drop_path_rate == 0.2
    assert model.preprocessing.size == (SCALES[name].size,) * 2


def test_published_scales_are_those_of_table_1():
    rows = {name: tuple(vars(scale).values()) for name, scale in SCALES.items()}
    b = "tf_efficientnet_b"
    assert rows == {
        "efficientdet_d0": (f"{b}0", 512, 64, 3, 3, 5, "fast", 4.0),
        "efficientdet_d1": (f"{b}1", 640, 88, 4, 3, 5, "fast", 4.0),
        "efficientdet_d2": (f"{b}2", 768, 112, 5, 3, 5, "fast", 4.0),
        "efficientdet_d3": (f"{b}3", 896, 160, 6, 4, 5, "fast", 4.0),
        "efficientdet_d4": (f"{b}4", 1024, 224, 7, 4, 5, "fast", 4.0),
        "efficientdet_d5": (f"{b}5", 1280, 288, 7, 4, 5, "fast", 4.0),
        "efficientdet_d6": (f"{b}6", 1280, 384, 8, 5, 5, "sum", 4.0),
        "efficientdet_d7": (f"{b}6", 1536, 384, 8, 5, 5, "sum", 5.0),
        "efficientdet_d7x": (f"{b}7", 1536, 384, 8, 5, 6, "sum", 4.0),
    }


def test_one_number_scales_everything_and_the_table_is_near_it():
    off = {}
    for phi in range(8):
        scale, published = compound_scale(phi), SCALES[f"efficientdet_d{phi}"]
        assert abs(scale.neck_dim - 64 * 1.35**phi) <= 4
        assert scale.neck_dim % 8 == 0
        assert scale.neck_cells == 3 + phi
        assert scale.head_convs == 3 + math.floor(phi / 3)
        assert scale.size == 512 + 128 * phi
        assert scale.backbone == f"tf_efficientnet_b{phi}"
        off[phi] = [k for k, v in vars(scale).items() if v != getattr(published, k)]
    assert off == {
        0: [],
        1: [],
        2: ["neck_dim"],
        3: [],
        4: ["neck_dim"],
        5: ["size", "neck_cells"],
        6: ["neck_cells", "fusion"],
        7: ["backbone", "size", "neck_dim", "neck_cells", "fusion", "anchor_scale"],
    }
    for wrong in (-1, 8, 1.5):
        with pytest.raises(InputError, match="phi is a whole number from 0 to 7"):
            compound_scale(wrong)
    fields = compound_scale(1).fields()
    assert fields.keys().isdisjoint({"backbone", "size"})
    assert EfficientDetConfig(**fields) == EfficientDetConfig(neck_dim=88, neck_cells=4)


def test_what_cannot_be_built_is_refused():
    with pytest.raises(InputError, match="levels is at least 4, but is 3"):
        EfficientDetConfig(levels=3)
    with pytest.raises(InputError, match="fusion is 'fast', 'softmax' or 'sum', but is 'mean'"):
        EfficientDetConfig(fusion="mean")


def test_images_keep_their_shape_and_their_long_edge_becomes_the_scales_size():
    """effdet's ResizePad, without the square around it where the name is not the paper's."""
    head, entry = parse_name("efficientdet_d1")
    assert (head.mode, head.size, entry.name) == ("letterbox", (640, 640), "tf_efficientnet_b1")
    model = create_model("efficientdet/mobilevitv2_050", num_classes=2, head=SMALL)
    pre = Preprocessing(mode="edges", size=(512, 512), interpolation="bilinear")
    assert model.preprocessing == replace(pre, mean=(0, 0, 0), std=(1, 1, 1), crop_pct=0.888)
    for height, width in ((480, 640), (375, 500), (640, 427), (100, 100), (333, 1000)):
        scale = 512 / max(height, width)
        want = (int(height * scale), int(width * scale))
        assert preprocessed_size(height, width, pre) == want


def test_a_saved_model_comes_back_under_its_papers_name(tmp_path):
    stages = ((3, 1, 16, 1, 2), (3, 2, 24, 1, 2), (5, 2, 32, 1, 2), (5, 2, 48, 1, 2))
    model = create_model(
        "efficientdet_d2", classes=("cat", "dog"), head={**SMALL, "levels": 4}, stages=stages
    )
    randomise(model)
    again = vitrail.load(vitrail.save(model.eval(), tmp_path / "model"))
    assert again.info == model.info
    assert (again.info.name, again.task) == ("efficientdet_d2", "detect")
    assert again.config.head_convs == 1
    assert again.preprocessing.size == (768, 768)
    x = torch.randn(1, 3, 70, 56)
    with torch.no_grad():
        mine, other = model.forward_tensors(x), again.forward_tensors(x)
    assert mine["count"] > 0
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    fewer = create_model(
        "efficientdet_d2",
        classes=("cat", "dog", "hare"),
        head={**SMALL, "levels": 4},
        stages=stages,
        weights=tmp_path / "model",
    )
    assert fewer.weights_report.classes == (2, 3)
    assert {key.split(".")[0] for key in fewer.weights_report.dropped_head} == {"class_net"}
    assert torch.equal(
        fewer.box_net.predict.pointwise.weight, model.box_net.predict.pointwise.weight
    )


def test_a_state_of_ours_stays_as_it_is():
    state = {"neck.extra.conv.weight": 1, "class_net.norms.0.1.weight": 2, "backbone.bn1.bias": 3}
    assert from_effdet(state) == state
