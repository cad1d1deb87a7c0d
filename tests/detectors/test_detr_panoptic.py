"""DETR with its mask head, whole: against transformers' with carried-over weights."""

import pytest
import torch
from torch import nn
from transformers import DetrConfig, DetrForSegmentation, ResNetConfig
from transformers.loss.loss_for_object_detection import ForSegmentationLoss

from tests.parity import assert_close_to_peer, randomise
from vitrail import models
from vitrail.adapt.freeze import freeze, train_mode
from vitrail.analysis.queries import answers
from vitrail.boxes import cxcywh_to_xyxy
from vitrail.detectors import detr_panoptic
from vitrail.detectors.detr_keys import from_detr_panoptic
from vitrail.detectors.detr_panoptic import DETRPanoptic, DETRPanopticConfig
from vitrail.features import Features, FeatureSpec
from vitrail.train.ranks import total_loss
from vitrail_runtime.errors import InputError

TINY = {"dim": 32, "num_heads": 8, "mlp_dim": 24, "encoder_layers": 1, "decoder_layers": 2}
STRIDES = (4, 8, 16, 32)
SIZES = [(96, 160), (72, 100), (33, 160)]


class Ramp(nn.Module):
    """A backbone of four maps that stand for their image."""

    def __init__(self):
        super().__init__()
        self.feature_specs = {f"c{i}": FeatureSpec(3, s) for i, s in enumerate(STRIDES, 2)}

    def forward(self, images):
        return Features({f"c{i}": images[..., ::s, ::s] for i, s in enumerate(STRIDES, 2)})


class PeerRamp(nn.Module):
    """The same, as transformers asks for it."""

    intermediate_channel_sizes = (3, 3, 3, 3)

    def forward(self, images, mask):
        out = []
        for s in STRIDES:
            small = images[..., ::s, ::s]
            kept = nn.functional.interpolate(mask[None].double(), size=small.shape[2:])
            out.append((small, kept[0].bool()))
        return out


def tiny(num_classes=4, queries=5, **fields):
    torch.manual_seed(0)
    config = DETRPanopticConfig(num_queries=queries, **(TINY | fields))
    model = DETRPanoptic(Ramp(), config, num_classes)
    randomise(model)
    return model.double().eval()


@pytest.fixture(scope="module")
def peer():
    config = DetrConfig(
        backbone="resnet18",
        d_model=32,
        num_queries=5,
        num_labels=4,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
    )
    model = DetrForSegmentation(config)
    model.detr.model.backbone = PeerRamp()
    model.detr.model.input_projection = nn.Conv2d(3, 32, 1)
    for i in range(3):
        width = model.mask_head.fpn_stages[i].fpn_adapter.out_channels
        model.mask_head.fpn_stages[i].fpn_adapter = nn.Conv2d(3, width, 1)
    randomise(model)
    return model.double().eval()


def ours_of(peer):
    model = tiny()
    model.load_state_dict(from_detr_panoptic(peer.state_dict()))
    return model


def batch(sizes=SIZES):
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(len(sizes), 3, height, width, generator=generator).double()
    mask = torch.zeros(len(sizes), height, width, dtype=torch.long)
    for own, kept, (h, w) in zip(images, mask, sizes, strict=True):
        own[:, h:], own[:, :, w:], kept[:h, :w] = 0, 0, 1
    return images, mask


def targets_of(counts, sizes, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for n, (height, width) in zip(counts, sizes, strict=True):
        boxes = torch.rand(n, 4, generator=generator, dtype=torch.float64)
        boxes = torch.cat((0.3 + 0.4 * boxes[:, :2], 0.1 + 0.3 * boxes[:, 2:]), 1)
        size = torch.tensor([width, height, width, height])
        labels = torch.randint(classes, (n,), generator=generator)
        masks = (torch.rand(n, height, width, generator=generator) > 0.7).to(torch.uint8)
        targets.append({"labels": labels, "boxes": cxcywh_to_xyxy(boxes) * size, "masks": masks})
    return targets


def test_masks_and_answers_equal_transformers_in_a_padded_batch(peer):
    ours = ours_of(peer)
    images, mask = batch()
    with torch.no_grad():
        want = peer(images, pixel_mask=mask)
        features = ours.backbone(images)
        seen = ours.read(features, images, SIZES)
        logits, boxes = ours.heads(seen.decoded)
        order = torch.arange(5).expand(3, 5)
        record = {}
        maps = ours.finer_maps(features, images)
        masks = ours.masks(maps, seen, order, SIZES, record)
    assert_close_to_peer(logits[-1], want.logits)
    assert_close_to_peer(boxes[-1], want.pred_boxes)
    assert_close_to_peer(masks, want.pred_masks.sigmoid())
    assert_close_to_peer(masks.logit(), want.pred_masks)
    assert record["bbox_attention.weights"].shape == (3, 5, 8, 3, 5)


@pytest.mark.parametrize("at_once", [16, 2])
def test_answers_are_the_best_queries_with_their_own_masks(peer, monkeypatch, at_once):
    monkeypatch.setattr(detr_panoptic, "AT_ONCE", at_once)
    ours = ours_of(peer)
    ours.config = DETRPanopticConfig(num_queries=5, segments=3, stuff=(1, 3), sure=0.3, **TINY)
    images, mask = batch()
    record = {}
    with torch.no_grad():
        want = peer(images, pixel_mask=mask)
        found = ours.forward_tensors(images, record, sizes=SIZES)
        listed = ours(images, sizes=SIZES)
    scores, labels = want.logits.softmax(-1)[..., :-1].max(-1)
    order = scores.argsort(1, descending=True)[:, :3]
    assert torch.equal(record["queries"], order)
    assert_close_to_peer(found["scores"], scores.gather(1, order))
    assert torch.equal(found["labels"], labels.gather(1, order))
    assert found["stuff"].tolist() == [[False, True, False, True]] * 3
    assert_close_to_peer(found["masks"], want.pred_masks.sigmoid()[torch.arange(3)[:, None], order])
    assert found["input_size"].tolist() == [[96, 160]] * 3
    assert found["count"].tolist() == (scores > 0.3).sum(1).clamp(max=3).tolist()
    assert 0 < found["count"].sum() < 9
    boxes = cxcywh_to_xyxy(want.pred_boxes.gather(1, order[..., None].expand(-1, -1, 4)))
    for i, (height, width) in enumerate(SIZES):
        size = torch.tensor([width, height, width, height])
        assert_close_to_peer(found["boxes"][i], boxes[i].clamp(0, 1) * size)
        n = int(found["count"][i])
        for name in ("boxes", "labels", "scores", "masks"):
            torch.testing.assert_close(listed[i][name], found[name][i, :n])


@pytest.fixture
def wide():
    """Whose class weights are of the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("counts", [(2, 4), (0, 5), (0, 0)])
def test_losses_equal_transformers_where_images_are_of_one_size(peer, wide, counts):
    ours = ours_of(peer)
    sizes = [(96, 160)] * 2
    images, mask = batch(sizes)
    targets = targets_of(counts, sizes)
    with torch.no_grad():
        want = peer(images, pixel_mask=mask)
        seen = ours.read(ours.backbone(images), images, None)
        logits, boxes = ours.heads(seen.decoded)
        got = ours.losses(images, targets)
    whole = torch.tensor([160, 96, 160, 96])
    labels = []
    for target in targets:
        x1, y1, x2, y2 = (target["boxes"] / whole).unbind(1)
        own = torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), 1)
        masks = target["masks"].double()
        labels.append({"class_labels": target["labels"], "boxes": own, "masks": masks})
    assert list(got)[-2:] == ["mask", "dice"]
    weight = ours.weight(targets)
    assert weight[-3:].tolist() == [sum(counts)] * 3
    if not sum(counts):
        assert got["mask"] == got["dice"] == 0
        return
    peer.config.auxiliary_loss = True
    given = (logits[-1], labels, torch.device("cpu"), boxes[-1], want.pred_masks, peer.config)
    loss, terms, _ = ForSegmentationLoss(*given, logits, boxes)
    peer.config.auxiliary_loss = False
    own = dict(zip(got, torch.stack(list(got.values())) / weight, strict=True))
    assert own["mask"].item() == pytest.approx(terms["loss_mask"].item(), rel=1e-9)
    assert own["dice"].item() == pytest.approx(terms["loss_dice"].item(), rel=1e-9)
    assert total_loss(got, weight).item() == pytest.approx(loss.item(), rel=1e-9)


def test_the_losses_of_a_mask_are_those_of_its_images_own_pixels(monkeypatch):
    """Whatever stands in the padding: the same map is given for the padded batch and for the image alone."""
    ours = tiny(mask_weight=2.0, dice_weight=3.0)
    sizes = [(96, 160), (48, 80)]
    images, _ = batch(sizes)
    targets = targets_of((3, 2), sizes)
    drawn = torch.randn(5, 24, 40, generator=torch.Generator().manual_seed(1)).double()
    monkeypatch.setattr(ours, "mask_logits", lambda f, s, image, query, z: (drawn, None))
    got = ours.losses(images, targets, sizes=sizes)
    pairs = ours.matched(
        *ours.heads(ours.decoded(images, sizes)), detr_panoptic.objects_of(images, targets, sizes)
    )[-1]
    focal = dice = 0
    for row, (image, which) in enumerate(zip(pairs.image, pairs.object, strict=True)):
        wanted = targets[image]["masks"][which - 3 * image].double()
        height, width = sizes[image]
        large = nn.functional.interpolate(drawn[row][None, None], (96, 160), mode="bilinear")
        x = large[0, 0, :height, :width]
        p = x.sigmoid()
        right = torch.where(wanted > 0, p, 1 - p)
        weight = torch.where(wanted > 0, 0.25, 0.75).double()
        focal += (-weight * (1 - right) ** 2 * right.log()).mean()
        dice += 1 - (2 * (p * wanted).sum() + 1) / (p.sum() + wanted.sum() + 1)
    assert got["mask"].item() == pytest.approx(2 * focal.item(), rel=1e-9)
    assert got["dice"].item() == pytest.approx(3 * dice.item(), rel=1e-9)


def test_masks_teach_the_queries_and_the_cells_too():
    ours = tiny().train()
    images, _ = batch(SIZES)
    losses = ours.losses(images, targets_of((2, 1, 0), SIZES), sizes=SIZES)
    ours.zero_grad()
    (losses["mask"] + losses["dice"]).backward()
    for name, parameter in ours.named_parameters():
        none = name.startswith(("class_embed", "bbox_embed"))
        assert (parameter.grad is None or not parameter.grad.any()) == none, name


def test_in_the_second_step_the_mask_head_alone_is_trained():
    model = tiny()
    freeze(model, "masks")
    train_mode(model)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"bbox_attention", "mask_head"}
    assert not model.transformer.training
    assert model.mask_head.training
    freeze(model, "head")
    assert model.transformer.encoder.layers[0].linear1.weight.requires_grad
    with torch.device("meta"):
        plain = models.create_model("faster_rcnn/mobilenetv3_small", num_classes=2)
    with pytest.raises(InputError, match="RCNN has no part that draws masks and is trained by"):
        freeze(plain, "masks")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stuff": (1, 4)}, r"stuff names the labels \[4\], but the model's 4 classes are 0 to 3"),
        ({"sure": 1.0}, "sure is 1.0, but must be from 0 to below 1"),
        ({"segments": 0}, "segments is 0, but must be at least 1"),
    ],
)
def test_a_config_of_which_no_model_can_be_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        tiny(**fields)


SLIM = {"dims": (16, 24, 32), "depths": (1, 1, 1), "key_dim": 8}
SMALL = {**TINY, "num_queries": 6}


def slim(name, **given):
    return models.create_model(f"{name}/efficientvit_m0", num_classes=4, **SLIM, **given)


def test_a_detr_of_boxes_is_the_first_step(tmp_path):
    first = slim("detr", head=SMALL)
    models.save(first, tmp_path / "first")
    second = slim("detr_panoptic", head=SMALL, weights=str(tmp_path / "first"))
    own, before = second.state_dict(), first.state_dict()
    assert all(torch.equal(own[key], value) for key, value in before.items())
    assert {key.split(".")[0] for key in own.keys() - before.keys()} == {
        "bbox_attention",
        "mask_head",
    }
    assert set(second.weights_report.new) == own.keys() - before.keys()


def test_what_is_stuff_is_saved_with_the_model(tmp_path):
    model = slim("detr_panoptic", head=SMALL)
    assert (model.task, model.stuff) == ("panoptic", ())
    model.stuff = [2, 3]
    models.save(model, tmp_path)
    again = models.load(tmp_path)
    assert (again.stuff, again.config) == ((2, 3), model.config)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for mine, theirs in zip(
            model.eval().forward_tensors(images).values(),
            again.forward_tensors(images).values(),
            strict=True,
        ):
            assert torch.equal(mine, theirs)
    with pytest.raises(InputError, match=r"stuff names the labels \[7\]"):
        model.stuff = (7,)


@pytest.mark.parametrize("backbone", ["timm", "transformers"])
def test_every_key_of_transformers_has_its_place_and_shape(backbone):
    small = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 6}
    fields = {"backbone": "resnet50"}
    if backbone == "transformers":
        stages = [f"stage{i}" for i in range(1, 5)]
        fields = {"use_timm_backbone": False, "backbone_config": ResNetConfig(out_features=stages)}
    head = {**small, "frozen_norm": True}
    with torch.device("meta"):
        peer = DetrForSegmentation(DetrConfig(num_labels=4, **small, **fields))
        ours = models.create_model("detr_panoptic/resnet50", num_classes=4, head=head)
    want = {k: v.shape for k, v in ours.state_dict().items() if "num_batches" not in k}
    got = from_detr_panoptic(peer.state_dict())
    assert {k: v.shape for k, v in got.items() if "num_batches" not in k} == want


def test_every_key_of_an_official_file_has_its_place():
    """Which holds the detector below "detr.", and the mask head by our names."""
    with torch.device("meta"):
        state = slim("detr_panoptic", head=SMALL).state_dict()
    want = {k: torch.full(v.shape[:1], float(i)) for i, (k, v) in enumerate(state.items())}
    official = {}
    for key, value in want.items():
        inner = key if key.startswith(("bbox_attention", "mask_head")) else f"detr.{key}"
        official[inner.replace("detr.backbone.", "detr.backbone.0.body.")] = value
    got = from_detr_panoptic(official)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], value) for key, value in want.items())
    assert from_detr_panoptic(want).keys() == want.keys()


@pytest.mark.slow
def test_a_file_of_transformers_answers_as_there(tmp_path):
    """Whole, through the file: the ResNet-50, 256 channels, six layers and a hundred queries."""
    peer = DetrForSegmentation(DetrConfig(num_labels=4, backbone="resnet50"))
    randomise(peer)
    torch.save(peer.state_dict(), tmp_path / "file.pth")
    name = "detr_panoptic/resnet50"
    model = models.create_model(name, num_classes=4, weights=tmp_path / "file.pth")
    assert not [k for k in model.weights_report.new if "num_batches" not in k]
    peer, model = peer.double().eval(), model.double().eval()
    images, mask = batch([(128, 160), (97, 130)])
    sizes = [(128, 160), (97, 130)]
    with torch.no_grad():
        want = peer(images, pixel_mask=mask)
        found = model.forward_tensors(images, sizes=sizes)
    scores = want.logits.softmax(-1)[..., :-1].amax(-1)
    order = scores.argsort(1, descending=True)
    assert_close_to_peer(found["scores"], scores.gather(1, order))
    own = want.pred_masks.sigmoid()[torch.arange(2)[:, None], order]
    assert_close_to_peer(found["masks"], own)


def test_where_the_best_query_looks_is_told_though_it_is_not_sure():
    model = slim("detr_panoptic", head=SMALL).eval()
    image = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model.forward_tensors(image[None])
    (answer,) = answers(model, image, count=3, score=0.5)
    assert found["count"].item() == 0
    assert answer.score == pytest.approx(found["scores"][0, 0].item(), abs=1e-6)
    assert answer.looked.shape == answer.around.shape == (2, 3)


@pytest.mark.parametrize("size", [(1, 1), (70, 45)])
def test_any_size_from_one_pixel_is_answered(size):
    model = slim("detr_panoptic", head=SMALL).eval()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model.forward_tensors(images)
        alone = model.forward_tensors(images[1:])
    assert found["boxes"].shape == (2, 6, 4)
    assert found["masks"].shape == (2, 6, *(-(-side // 4) for side in size))
    assert found["input_size"].tolist() == [list(size)] * 2
    assert all(value.isfinite().all() for value in found.values())
    for name, value in alone.items():
        torch.testing.assert_close(found[name][1:], value, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_exported_model_answers_as_it_does_itself():
    """By torch.export, with the number of images left open; batch mates change nothing."""
    model = slim("detr_panoptic", head=SMALL | {"stuff": (1,)}).eval()

    class Outputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model.forward_tensors(images)

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 64, 96, generator=generator)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Outputs().eval(), (images,), dynamic_shapes=({0: batch},))
    other = torch.randn(3, 3, 64, 96, generator=generator)
    with torch.no_grad():
        want = model.forward_tensors(other)
    got = program.module()(other)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
