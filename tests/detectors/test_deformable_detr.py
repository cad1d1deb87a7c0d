"""Deformable DETR against transformers' model, with its weights carried over."""

import pytest
import torch
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

from tests.detectors.test_detr import objects, targets_of
from tests.parity import assert_close_to_peer, randomise
from vitrail.boxes import cxcywh_to_xyxy
from vitrail.detectors.deformable_detr import DeformableDETR, DeformableDETRConfig
from vitrail.detectors.detr_keys import from_deformable_detr
from vitrail.features import Features, FeatureSpec
from vitrail_runtime.errors import InputError

STRIDES = {"c3": 8, "c4": 16, "c5": 32}
KINDS = {
    "plain": {},
    "refined": {"refine": True},
    "two_stage": {"refine": True, "two_stage": True},
}


class Ramps(torch.nn.Module):
    """A backbone of three maps, which are the image's pixels."""

    def __init__(self):
        super().__init__()
        self.feature_specs = {name: FeatureSpec(3, stride) for name, stride in STRIDES.items()}

    def forward(self, images):
        return Features({name: images[..., ::s, ::s] for name, s in STRIDES.items()})


class PeerRamps(Ramps):
    """The same, as transformers asks for it."""

    def forward(self, images, mask):
        out = []
        for x in super().forward(images).maps.values():
            kept = torch.nn.functional.interpolate(mask[None].double(), size=x.shape[2:])
            out.append((x, kept[0].bool()))
        return out


def tiny(kind="plain", **fields):
    torch.manual_seed(0)
    given = {"dim": 64, "num_heads": 2, "mlp_dim": 24, "num_queries": 5, "detections": 7}
    given |= {"encoder_layers": 2, "decoder_layers": 3, "encoder_points": 2, "decoder_points": 3}
    model = DeformableDETR(Ramps(), DeformableDETRConfig(**(given | KINDS[kind] | fields)), 4)
    randomise(model)
    return model.double().eval()


def peer_of(kind):
    config = DeformableDetrConfig(
        backbone="resnet18",
        d_model=64,
        num_queries=5,
        two_stage_num_proposals=5,
        num_labels=4,
        encoder_layers=2,
        decoder_layers=3,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_n_points=2,
        decoder_n_points=3,
        with_box_refine=kind != "plain",
        two_stage=kind == "two_stage",
        class_cost=2,
    )
    model = DeformableDetrForObjectDetection(config)
    model.model.backbone = PeerRamps()
    for i, width in enumerate((3, 3, 3)):
        model.model.input_proj[i][0] = torch.nn.Conv2d(width, 64, 1)
    model.model.input_proj[3][0] = torch.nn.Conv2d(3, 64, 3, 2, 1)
    if kind == "refined":  # which has a head of each layer in the official code
        model.class_embed = torch.nn.ModuleList(torch.nn.Linear(64, 4) for _ in range(3))
    randomise(model)
    return model.double().eval()


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def peer(kind):
    return peer_of(kind)


def ours_of(peer, kind):
    model = tiny(kind)
    state = {k: v for k, v in peer.state_dict().items() if ".backbone." not in k}
    state["model.backbone.model.x"] = torch.zeros(1)  # of a whole file
    state = from_deformable_detr(state)
    del state["backbone.x"]
    model.load_state_dict(state)
    return model


SIZES = [(64, 96), (40, 70), (33, 96)]


def padded_batch():
    images = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.zeros(3, 64, 96, dtype=torch.long)
    for own, kept, (height, width) in zip(images, mask, SIZES, strict=True):
        own[:, height:], own[:, :, width:], kept[:height, :width] = 0, 0, 1
    return images, mask


def test_answers_and_losses_equal_transformers_in_a_padded_batch(peer, kind, monkeypatch):
    ours = ours_of(peer, kind)
    images, mask = padded_batch()
    record = {}
    # It codes proposals in float32 whatever the model's type.
    monkeypatch.setattr(torch, "float32", torch.float64)
    with torch.no_grad():
        want = peer(images, pixel_mask=mask, output_attentions=True)
    monkeypatch.undo()
    with torch.no_grad():
        found = ours.answers(images, SIZES, record)
    for i, own in enumerate(want.intermediate_reference_points.unbind(1)):
        if kind != "plain":
            assert_close_to_peer(found.boxes[i], own)
    if kind == "two_stage":
        assert found.proposals is not None
        assert_close_to_peer(found.proposals[0], want.enc_outputs_class)
        assert_close_to_peer(found.proposals[1], want.enc_outputs_coord_logits.sigmoid())
    seen = {"encoder.layers.{}.self_attn.weights": want.encoder_attentions}
    seen["decoder.layers.{}.cross_attn.weights"] = want.cross_attentions
    for name, every in seen.items():
        for i, weights in enumerate(every):
            assert_close_to_peer(record[name.format(i)], weights)
    assert record["cells"].tolist() == [[8, 12], [4, 6], [2, 3], [1, 2]]
    assert record["decoder.layers.2.cross_attn.locations"].shape == (3, 5, 2, 4, 3, 2)
    for seed, counts in enumerate(((2, 0, 5), (0, 1, 0))):
        check_losses(peer, ours, found, counts, seed, images)


def check_losses(peer, ours, found, counts, seed, images):
    wanted = objects(counts, seed=seed)
    labels = [
        {"class_labels": k, "boxes": b} for k, b in zip(wanted.labels, wanted.boxes, strict=True)
    ]
    config = DeformableDetrConfig(**(peer.config.to_dict() | {"auxiliary_loss": True}))
    logits, boxes = torch.stack(found.logits), torch.stack(found.boxes)
    _, terms, _ = DeformableDetrForObjectDetectionLoss(
        logits[-1], labels, torch.device("cpu"), boxes[-1], config, logits, boxes
    )
    if found.proposals is not None:  # transformers leaves out what these learn from
        things = [{**t, "class_labels": torch.zeros_like(t["class_labels"])} for t in labels]
        config.auxiliary_loss = False
        _, first, _ = DeformableDetrForObjectDetectionLoss(
            found.proposals[0], things, torch.device("cpu"), found.proposals[1], config
        )
        terms |= {f"{k}_proposals": v for k, v in first.items()}
    targets = []
    for k, b, (height, width) in zip(wanted.labels, wanted.boxes, SIZES, strict=True):
        size = torch.tensor([width, height, width, height])
        targets.append({"labels": k, "boxes": cxcywh_to_xyxy(b) * size})
    with torch.no_grad():
        got = ours.losses(images, targets, sizes=SIZES)
    ends = {"0": "_0", "1": "_1", "2": ""}
    ends |= {} if found.proposals is None else {"proposals": "_proposals"}
    assert got.keys() == {f"{k}.{end}" for k in ("class", "box", "giou") for end in ends}
    for name, end in ends.items():
        for mine, theirs, weight in (("class", "ce", 2), ("box", "bbox", 5), ("giou", "giou", 2)):
            value = got[f"{mine}.{name}"] / ours.weight(targets)
            want = terms[f"loss_{theirs}{end}"].item() * weight
            assert value.item() == pytest.approx(want, rel=1e-9), (mine, name)


def test_the_best_pairs_of_query_and_class_are_answered():
    """As the official post-processing: the highest scores of all queries and classes alike."""
    model = tiny()
    images, record = torch.randn(2, 3, 64, 96, dtype=torch.float64), {}
    with torch.no_grad():
        found = model.forward_tensors(images, record)
        said = model.answers(images)
        rows = model(images)
    scores = said.logits[-1].sigmoid()
    boxes = cxcywh_to_xyxy(said.boxes[-1]) * torch.tensor([96, 64, 96, 64])
    for i in range(2):
        every = sorted(
            ((scores[i, q, k].item(), q, k) for q in range(5) for k in range(4)), reverse=True
        )[:7]
        assert found["scores"][i].tolist() == pytest.approx([s for s, _, _ in every])
        assert record["queries"][i].tolist() == [q for _, q, _ in every]
        assert found["labels"][i].tolist() == [k for _, _, k in every]
        wanted = torch.stack([boxes[i, q] for _, q, _ in every])
        wanted = torch.minimum(wanted.clamp(min=0), torch.tensor([96, 64, 96, 64]))
        torch.testing.assert_close(found["boxes"][i], wanted)
        torch.testing.assert_close(rows[i]["boxes"], found["boxes"][i])
    assert found["count"].tolist() == [7, 7]


def test_an_image_of_fewer_cells_than_queries_is_answered_and_learnt_from_by_all_queries():
    """One process would raise alone, where the others wait for it."""
    model = tiny("two_stage", num_queries=60, detections=50)
    images = torch.randn(1, 3, 9, 9, dtype=torch.float64)  # 2 x 2 and three times 1 x 1 cells
    with torch.no_grad():
        found, said = model.forward_tensors(images), model.answers(images)
        memory = torch.randn(1, 7, 64, dtype=torch.float64)
        logits, ends = model._propose(memory, model.cells(images, None)[2])
        queries, _, boxes = model._begin(logits, ends)
    assert found["boxes"].shape == (1, 50, 4)
    assert found["count"].tolist() == [50]
    assert [x.shape[1] for x in (*said.logits, *said.boxes)] == [60] * 6
    chosen = logits[0, :, 0].argsort(descending=True)  # the cells themselves come first
    torch.testing.assert_close(boxes[0, :7], ends[0, chosen].sigmoid())
    assert (boxes[0, 7:] == 1).all()
    assert queries.isfinite().all()
    targets = targets_of(objects((8,)), 9, 9)
    losses = model.losses(images, targets)
    assert all(loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_from_images_with_and_without_objects(kind):
    model = tiny(kind)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for counts in ((0, 0), (1, 0), (5, 3)):
        model.zero_grad()
        targets = targets_of(objects(counts), 64, 96)
        losses = model.losses(images, targets)
        assert (losses["box.2"] > 0) == (losses["giou.0"] > 0) == (sum(counts) > 0)
        sum(losses.values()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        assert model.weight(targets) == sum(counts)
    many = targets_of(objects((1, 6)), 64, 96)
    with pytest.raises(InputError, match=r"image 1 of the batch has 6 objects.* 5 queries"):
        model.weight(many)


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_unsure_with_small_boxes_where_its_queries_are(kind):
    config = DeformableDETRConfig(dim=64, num_heads=2, num_queries=5, **KINDS[kind])
    model = DeformableDETR(Ramps(), config, 4).eval()
    with torch.no_grad():
        said = model.answers(torch.zeros(1, 3, 64, 96))
    torch.testing.assert_close(
        torch.stack(said.logits).sigmoid().mean(), torch.tensor(0.01), rtol=1, atol=0
    )
    if kind == "two_stage":
        assert said.proposals is not None
        sides = said.proposals[1][0, :, 2]
        want = torch.tensor([0.05] * 96 + [0.1] * 24 + [0.2] * 6 + [0.4] * 2)
        inside = sides < 1
        torch.testing.assert_close(sides[inside], want[inside])
        assert inside.sum() > 100
    else:
        small = torch.tensor(-2.0).sigmoid()
        torch.testing.assert_close(said.boxes[0][..., 2:], small.expand(1, 5, 2))
        queries = model.query_embed.weight[:, :64]
        places = model.transformer.reference_points(queries).sigmoid()
        torch.testing.assert_close(said.boxes[0][0, :, :2], places)
        torch.testing.assert_close(said.boxes[1], said.boxes[0])


@pytest.mark.parametrize(
    ("levels", "cells"),
    [(1, [(2, 3)]), (2, [(4, 6), (2, 3)]), (5, [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)])],
)
def test_as_many_levels_as_asked_for_are_read(levels, cells):
    model = tiny(num_levels=levels)
    with torch.no_grad():
        _, _, where = model.cells(torch.zeros(1, 3, 64, 96).double(), None)
    assert where.shapes == cells
    assert where.pad_mask is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dim": 80}, "dim is 80, but must be a multiple of 32"),
        ({"dim": 32}, "dim is 32.* and at least 64"),
        ({"two_stage": True}, "it needs refine=True"),
        ({"num_levels": 0}, "num_levels is 0, but must be at least 1"),
    ],
)
def test_what_cannot_be_built_is_refused(fields, said):
    with pytest.raises(InputError, match=said):
        DeformableDETRConfig(**fields)


def test_a_layer_refines_boxes_without_teaching_the_layer_before():
    """The official code lets no gradient through the points that a layer starts from."""
    model = tiny("refined")
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    found = model.answers(images.to(next(model.parameters()).dtype), None, None)
    for i, boxes in enumerate(found.boxes):
        model.zero_grad()
        boxes.sum().backward(retain_graph=True)
        taught = [
            any(p.grad is not None and p.grad.any() for p in head.parameters())
            for head in model.bbox_embed
        ]
        assert taught[: len(found.boxes)] == [j == i for j in range(len(found.boxes))]
