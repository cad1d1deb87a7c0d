"""DETR against the official code's stored runs and transformers' model."""

import pytest
import torch
from transformers import DetrConfig, DetrForObjectDetection
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

import vitrail
from tests.golden.compare import check, load
from tests.golden.fill import image, value
from tests.parity import assert_close_to_peer, randomise
from vitrail.boxes import cxcywh_to_xyxy
from vitrail.detectors import detr
from vitrail.detectors.detr import DETR, DETRConfig, Transformer, best_first
from vitrail.detectors.detr_keys import from_detr
from vitrail.detectors.hungarian import Objects
from vitrail.features import Features, FeatureSpec
from vitrail.layers.position import sine_positions
from vitrail_runtime.errors import InputError

TINY = {"dim": 16, "num_heads": 2, "mlp_dim": 24, "encoder_layers": 2, "decoder_layers": 3}


class Ramp(torch.nn.Module):
    """A backbone of one map of stride 32: what stands for its image."""

    def __init__(self):
        super().__init__()
        self.feature_specs = {"c5": FeatureSpec(3, 32)}

    def forward(self, images):
        return Features({"c5": images[..., ::32, ::32]})


def tiny(num_classes=4, queries=5, **fields):
    torch.manual_seed(0)
    model = DETR(Ramp(), DETRConfig(num_queries=queries, **(TINY | fields)), num_classes)
    randomise(model)
    return model.double().eval()


def objects(counts, classes=4, seed=0):
    """Objects relative to their images."""
    generator = torch.Generator().manual_seed(seed)
    boxes = [torch.rand(n, 4, generator=generator, dtype=torch.float64) for n in counts]
    boxes = [torch.cat((0.3 + 0.4 * b[:, :2], 0.1 + 0.3 * b[:, 2:]), 1) for b in boxes]
    labels = [torch.randint(classes, (n,), generator=generator) for n in counts]
    return Objects(labels, boxes)


def targets_of(wanted, height, width):
    size = torch.tensor([width, height, width, height])
    pairs = zip(wanted.labels, wanted.boxes, strict=True)
    return [{"labels": labels, "boxes": cxcywh_to_xyxy(b) * size} for labels, b in pairs]


@pytest.mark.parametrize(
    "name", [pytest.param("detr_tiny", marks=pytest.mark.slow), "detr_tiny_prenorm"]
)
def test_every_tap_equals_the_official_runs(name):
    facts, _ = load(name)
    given = facts["config"]
    head = {"dim": given["hidden_dim"], "num_heads": given["nheads"], "frozen_norm": True}
    head |= {"mlp_dim": given["dim_feedforward"], "pre_norm": given["pre_norm"]}
    head |= {f"{of}coder_layers": given[f"{of[:2]}c_layers"] for of in ("en", "de")}
    head["num_queries"] = given["num_queries"]
    classes = given["num_classes"]
    model = vitrail.create_model(f"detr/{given['backbone']}", num_classes=classes, head=head)
    assert sum(p.numel() for p in model.parameters()) == facts["params"]
    keys = facts["state_dict"]
    official = {k: torch.from_numpy(value(k, s, facts["fill"]["gain"])) for k, s, _ in keys}
    model.load_state_dict(from_detr(official))
    model.double().eval()
    taps = {}

    def tap(module, key, change=lambda out: out):
        module.register_forward_hook(lambda _, args, out: taps.update({key: change(out)}))

    tokens_first = lambda out: out.transpose(0, 1)  # noqa: E731
    tap(model.input_proj, "input_proj")
    tap(model.transformer.encoder.layers[0], "transformer.encoder.layers.0", tokens_first)
    tap(model.transformer.decoder.layers[0], "transformer.decoder.layers.0", tokens_first)
    last = model.transformer.encoder.norm or model.transformer.encoder.layers[-1]
    tap(last, "transformer.encoder", tokens_first)
    sizes = [tuple(size) for size in facts["picture_sizes"]]
    images = eval(facts["input"]["call"], {"image": image}).double()
    for own, (height, width) in zip(images, sizes, strict=True):
        own[:, height:], own[:, :, width:] = 0, 0
    with torch.no_grad():
        decoded = model.decoded(images, sizes)
        logits, boxes = model.heads(decoded)
    keep = detr.kept_cells(images, sizes, taps["input_proj"])
    positions = sine_positions(keep, given["hidden_dim"], dtype=torch.float64)
    taps |= {
        "output#pos": positions.permute(0, 3, 1, 2),
        "output#feature_mask": ~keep,
        "transformer.decoder": decoded.transpose(1, 2),
        "output#pred_logits": logits[-1],
        "output#pred_boxes": boxes[-1],
        "output#aux_logits_0": logits[0],
        "output#aux_boxes_0": boxes[0],
    }
    assert {k for k in facts["arrays"] if "backbone" not in k} == set(taps)
    check(name, taps)


def test_losses_their_gradients_and_answers_equal_the_official_ones(monkeypatch):
    facts, arrays = load("detr_losses")
    names = [("aux_logits_0", "aux_boxes_0"), ("pred_logits", "pred_boxes")]
    every = [[torch.from_numpy(arrays[key]).double() for key in pair] for pair in names]
    logits, boxes = (torch.stack(both).requires_grad_() for both in zip(*every, strict=True))
    given = facts["targets"]
    wanted = Objects(
        [torch.tensor(t["labels"]) for t in given],
        [torch.tensor(t["boxes"], dtype=torch.float64) for t in given],
    )
    model = tiny(facts["config"]["num_classes"], facts["config"]["queries"], decoder_layers=2)
    losses = model.losses_of(logits, boxes, wanted)
    weight = model.weight([{"labels": labels} for labels in wanted.labels])
    got = torch.stack(list(losses.values())) / weight
    want, official = [], facts["losses"]
    for end in ("_0", ""):
        want += [official[f"loss_{k}{end}"] for k in ("ce", "bbox", "giou")]
    scale = torch.tensor([1, 5, 2] * 2)
    assert list(losses) == ["class.0", "box.0", "giou.0", "class.1", "box.1", "giou.1"]
    assert (got / scale).tolist() == pytest.approx(want, rel=1e-6)
    assert got.sum().item() == pytest.approx(facts["total"], rel=1e-6)
    got.sum().backward()
    check("detr_losses", {"grad_pred_logits": logits.grad[-1], "grad_pred_boxes": boxes.grad[-1]})
    monkeypatch.setattr(model, "decoded", lambda *args: torch.zeros(1))
    monkeypatch.setattr(model, "heads", lambda _: (logits.detach(), boxes.detach()))
    sizes = [tuple(size) for size in facts["target_sizes"]]
    found = model(torch.zeros(2, 3, 60, 80), sizes=sizes)
    for i, (row, (height, width)) in enumerate(zip(found, sizes, strict=True)):
        post = {k: torch.from_numpy(arrays[f"post{i}_{k}"]) for k in ("scores", "labels", "boxes")}
        order = post["scores"].argsort(descending=True)
        size = torch.tensor([width, height, width, height])
        assert torch.equal(row["labels"], post["labels"][order])
        torch.testing.assert_close(row["scores"].float(), post["scores"][order])
        clipped = torch.minimum(post["boxes"][order].clamp(min=0), size)
        torch.testing.assert_close(row["boxes"].float(), clipped)


class PeerRamp(torch.nn.Module):
    """Ramp, as transformers asks for it."""

    def forward(self, images, mask):
        small = images[..., ::32, ::32]
        kept = torch.nn.functional.interpolate(mask[None].double(), size=small.shape[2:])
        return [(small, kept[0].bool())]


@pytest.fixture(scope="module")
def peer():
    config = DetrConfig(
        backbone="resnet18",
        d_model=16,
        num_queries=5,
        num_labels=4,
        encoder_layers=2,
        decoder_layers=3,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    model = DetrForObjectDetection(config)
    model.model.backbone = PeerRamp()
    model.model.input_projection = torch.nn.Conv2d(3, 16, 1)
    randomise(model)
    return model.double().eval()


def ours_of(peer):
    model = tiny()
    model.load_state_dict(from_detr(peer.state_dict()))
    return model


SIZES = [(96, 160), (70, 100), (33, 160)]


def padded_batch():
    images = torch.randn(3, 3, 96, 160, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.zeros(3, 96, 160, dtype=torch.long)
    for own, kept, (height, width) in zip(images, mask, SIZES, strict=True):
        own[:, height:], own[:, :, width:], kept[:height, :width] = 0, 0, 1
    return images, mask


@pytest.fixture
def wide():
    """Whose class weights are of the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_answers_attention_and_losses_equal_transformers_in_a_padded_batch(peer, wide):
    ours = ours_of(peer)
    images, mask = padded_batch()
    record = {}
    peer.set_attn_implementation("eager")
    with torch.no_grad():
        want = peer(images, pixel_mask=mask, output_attentions=True)
        decoded = ours.decoded(images, SIZES, record)
        logits, boxes = ours.heads(decoded)
        plain = ours.decoded(images, SIZES)
    assert_close_to_peer(logits[-1], want.logits)
    assert_close_to_peer(boxes[-1], want.pred_boxes)
    assert_close_to_peer(plain, decoded)
    for kind, name, seen in (
        ("encoder", "self_attn", want.encoder_attentions),
        ("decoder", "self_attn", want.decoder_attentions),
        ("decoder", "multihead_attn", want.cross_attentions),
    ):
        for i, weights in enumerate(seen):
            assert_close_to_peer(record[f"{kind}.layers.{i}.{name}.weights"], weights)
    assert record["cells"].tolist() == [3, 5]
    for seed, counts in enumerate(((2, 0, 5), (0, 1, 0), (5, 5, 5))):
        wanted = objects(counts, seed=seed)
        labels = [
            {"class_labels": k, "boxes": b}
            for k, b in zip(wanted.labels, wanted.boxes, strict=True)
        ]
        peer.config.auxiliary_loss = True
        loss, terms, _ = ForObjectDetectionLoss(
            logits[-1], labels, torch.device("cpu"), boxes[-1], peer.config, logits, boxes
        )
        peer.config.auxiliary_loss = False
        targets = []
        for k, b, (height, width) in zip(wanted.labels, wanted.boxes, SIZES, strict=True):
            size = torch.tensor([width, height, width, height])
            targets.append({"labels": k, "boxes": cxcywh_to_xyxy(b) * size})
        got = torch.stack(list(ours.losses(images, targets, sizes=SIZES).values()))
        got = got / ours.weight(targets)
        assert got.sum().item() == pytest.approx(loss.item(), rel=1e-9)
        for i, end in enumerate(("_0", "_1", "")):
            names = (f"loss_{k}{end}" for k in ("ce", "bbox", "giou"))
            theirs = [terms[k].item() * w for k, w in zip(names, (1, 5, 2), strict=True)]
            assert got[3 * i : 3 * i + 3].tolist() == pytest.approx(theirs, rel=1e-9)


def test_padded_cells_change_nothing_whatever_is_in_them():
    """Bit by bit, on the transformer alone: the maps of a backbone know of the padding around them."""
    torch.manual_seed(0)
    for pre_norm in (False, True):
        model = Transformer(DETRConfig(pre_norm=pre_norm, **TINY))
        randomise(model)
        model.eval()
        x, positions = torch.randn(2, 2, 12, 16)
        queries = torch.randn(2, 5, 16)
        mask = torch.zeros(2, 12, dtype=torch.bool)
        mask[0, 7:] = True
        with torch.no_grad():
            want = model(x, queries, positions, mask)
            x[0, 7:], positions[0, 7:] = 1e3 * torch.randn(5, 16), torch.randn(5, 16)
            assert torch.equal(model(x, queries, positions, mask), want)
            alone = model(x[:1, :7], queries[:1], positions[:1, :7])
        torch.testing.assert_close(alone, want[:, :1])


def test_the_best_come_first_and_of_equal_ones_the_first():
    """As by PyTorch's stable sort, of scores of which many are the same and some are no numbers."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (6, 40), generator=generator) / 4.0
    scores[0, ::7] = torch.nan
    scores[1, ::5] = torch.inf
    scores[2] = 0.25
    scores[3] = torch.rand(40, generator=generator)
    found, order = best_first(scores)
    want, places = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(order, places)
    assert torch.equal(found.nan_to_num(nan=9), want.nan_to_num(nan=9))
    assert order.dtype == torch.int64


def test_an_image_may_have_as_many_objects_as_there_are_queries_and_no_more():
    model = tiny()
    images = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    for counts in ((0, 0, 0), (0, 1, 0), (5, 0, 5)):
        model.zero_grad()
        targets = targets_of(objects(counts), 64, 96)
        losses = model.losses(images, targets)
        assert all(loss.isfinite() for loss in losses.values())
        assert (losses["box.2"] > 0) == (losses["giou.0"] > 0) == (sum(counts) > 0)
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    many = targets_of(objects((1, 0, 6)), 64, 96)
    said = "image 2 of the batch has 6 objects, but the model has 5 queries.* num_queries=6 or more"
    with pytest.raises(InputError, match=said):
        model.losses(images, many)
    with pytest.raises(InputError, match=said):
        model.weight(many)


def test_losses_of_parts_add_up_to_those_of_the_batch_over_weights_that_add_up():
    model = tiny()
    images = torch.randn(4, 3, 64, 96, dtype=torch.float64)
    targets = targets_of(objects((3, 0, 1, 5)), 64, 96)
    whole = torch.stack(list(model.losses(images, targets).values()))
    parts = [
        torch.stack(list(model.losses(images[some], targets[some]).values()))
        for some in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)
    weights = model.weight(targets[:1]) + model.weight(targets[1:])
    torch.testing.assert_close(weights, model.weight(targets))
    # Nine boxes, and a tenth of each of the 11 queries of 4 images that have none.
    assert weights.tolist() == pytest.approx([9 + 0.1 * 11, 9, 9] * 3)


def test_positions_are_those_of_the_kept_part_at_any_size():
    """By the paper's formula, cell by cell, of a map larger than any that a table is made for."""
    keep = torch.zeros(1, 70, 90, dtype=torch.bool)
    keep[:, :60, :81] = True
    got = sine_positions(keep, 12, dtype=torch.float64, offset=-0.5)
    for row, column in ((0, 0), (59, 80), (17, 33)):
        want = []
        for place, last in ((row + 0.5, 60), (column + 0.5, 81)):
            for i in range(3):
                angle = place / (last + 1e-6) * 2 * torch.pi / 10000 ** (2 * i / 6)
                angle = torch.tensor(angle, dtype=torch.float64)
                want += [angle.sin(), angle.cos()]
        torch.testing.assert_close(got[0, row, column], torch.stack(want))
    assert sine_positions(keep, 8, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_dilated_last_stage_is_read_at_its_stride_of_sixteen():
    head = {"dim": 8, "num_heads": 1, "encoder_layers": 1, "decoder_layers": 1}
    with torch.device("meta"):
        plain = vitrail.create_model("detr/resnet50", num_classes=2, head=head)
        dilated = vitrail.create_model("detr/resnet50", num_classes=2, head=head, dilated_c5=True)
        vit = vitrail.create_model("detr/deit_tiny_patch16", num_classes=2, head=head)
        x = torch.empty(1, 3, 64, 96)
        cells = []
        for model in (plain, dilated, vit):
            (level,) = model.levels(model.backbone(x)).values()
            cells.append((*level.shape[1:], model.levels.feature_specs["c5"].stride))
    assert cells == [(2048, 2, 3, 32), (2048, 4, 6, 16), (192, 2, 3, 32)]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dim": 18, "num_heads": 2}, "dim is 18, but must be a multiple of 4"),
        ({"dim": 16, "num_heads": 3}, "dim is 16.* and of the 3 heads"),
        ({"num_queries": 0}, "num_queries is 0, but must be at least 1"),
    ],
)
def test_a_transformer_that_cannot_be_built_is_refused(fields, said):
    with pytest.raises(InputError, match=said):
        DETRConfig(**fields)
