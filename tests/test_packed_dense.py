"""Segmenters and detectors on packs: what an image is said to show, and teaches, is as of the image alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import vitrail
from tests.parity import randomise
from vitrail.detectors import rcnn, rpn
from vitrail.models import at_own_shape, check_takes_packs
from vitrail.packing import PackedImages, pack
from vitrail.segmenters.inference import Inference, InferredSegmenter
from vitrail_runtime.errors import InputError
from vitrail_runtime.finish import finish_segmentation
from vitrail_runtime.preprocess import Geometry, prepare

PATCH, K = 4, 3
TINY = {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": PATCH, "image_size": 16}
RCNN = {
    "neck": "simple_pyramid",
    "neck_dim": 8,
    "strides": (4, 8),
    "anchor_sizes": (2.0,),
    "proposals": (12, 12),
    "proposals_before_nms": (20, 20),
    "pool_size": 2,
    "box_dim": 8,
    "score": 0.0,
    "detections": 5,
    "samples": 12,
    "proposal_samples": 8,
}
MASKS = {"mask_pool_size": 3, "mask_convs": 1, "mask_dim": 8}
HEADS: dict[str, dict[str, Any]] = {
    "faster_rcnn": RCNN,
    "mask_rcnn": RCNN | MASKS | {"neck": "fpn"},
    "cascade_mask_rcnn": RCNN | MASKS,
}
SIZES = st.lists(st.tuples(st.integers(1, 25), st.integers(1, 25)), min_size=1, max_size=4)


def built(name: str, dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    torch.manual_seed(0)
    head = HEADS.get(name)
    made = vitrail.create_model(
        f"{name}/vit_tiny_patch16", num_classes=K, head=head, **TINY, **fields
    )
    randomise(made)
    return made.to(dtype).eval()


DETECTORS = {name: built(name) for name in HEADS}
LINEAR = built("linear", out_blocks=(0,))


def images_of(sizes: list[tuple[int, int]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, h, w, generator=generator, dtype=dtype) for h, w in sizes]


def in_packs(images: list[Tensor], budget: int = 90) -> list[PackedImages]:
    return pack(images, PATCH, budget, num_prefix_tokens=1)


def asked(model: Any, packed: PackedImages) -> dict[str, Any]:
    packing = {"sizes": packed.sizes, "patch_size": PATCH}
    return model.forward_tensors(packed.patches, packing=packing)


def same(ours: Any, want: Any, within: float = 1e-12) -> None:
    largest = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    torch.testing.assert_close(ours, want, atol=within * largest, rtol=0)


def objects_of(size: tuple[int, int], seed: int, count: int = 2) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    h, w = size
    low = rng.random((count, 2)) * (w / 2, h / 2)
    high = low + 1 + rng.random((count, 2)) * (w / 2 - 1, h / 2 - 1)
    masks = (rng.random((count, h, w)) < 0.5).astype(np.uint8)
    return {
        "boxes": torch.from_numpy(np.concatenate([low, high], 1)),
        "labels": torch.from_numpy(rng.integers(0, K, count)),
        "masks": torch.from_numpy(masks),
    }


@settings(max_examples=15)
@given(sizes=SIZES, budget=st.integers(50, 120))
@example(sizes=[(5, 9), (8, 12), (7, 10), (12, 5)], budget=90)  # one grid, of images of other sizes
def test_a_segmenter_says_of_packed_images_what_it_says_of_each_alone(sizes, budget):
    images = images_of(sizes)
    for packed in in_packs(images, budget):
        found = asked(LINEAR, packed)["logits"]
        for one, i in zip(found, packed.image_ids, strict=True):
            assert one.shape == (K, *sizes[i])
            same(one[None], LINEAR(images[i][None]))


@pytest.mark.parametrize("name", DETECTORS)
@settings(max_examples=4)
@given(sizes=SIZES)
@example(sizes=[(23, 9), (24, 12), (9, 23), (1, 1)])
def test_a_detector_says_of_packed_images_what_it_says_of_each_alone(name, sizes):
    model, images = DETECTORS[name], images_of(sizes)
    with torch.no_grad():
        for packed in in_packs(images):
            found = asked(model, packed)
            rows = model.forward_packed(packed)
            for row, i in enumerate(packed.image_ids):
                alone = model.forward_tensors(images[i][None])
                assert found.keys() == alone.keys()
                count = int(alone["count"])
                for key, want in alone.items():
                    same(found[key][row : row + 1], want)
                    if key != "count":
                        same(rows[row][key], want[0, :count])


@pytest.mark.parametrize("name", ["linear", *HEADS])
def test_the_law_holds_in_float32(name):
    model, images = built(name, torch.float32), images_of([(21, 30), (32, 17)], torch.float32)
    with torch.no_grad():
        (packed,) = in_packs(images)
        found = asked(model, packed)
        for row, i in enumerate(packed.image_ids):
            for key, want in model.forward_tensors(images[i][None]).items():
                same(found[key][row][None], want, 1e-5)


def gradients(model: Any, losses: dict[str, Tensor], images: list[Tensor]) -> list[Tensor]:
    wanted = [*images, *model.parameters()]
    total = torch.stack(list(losses.values())).sum()
    return list(torch.autograd.grad(total, wanted, materialize_grads=True))


@settings(max_examples=10)
@given(sizes=SIZES)
@example(sizes=[(6, 9), (6, 9)])  # whose class maps come as one tensor
def test_a_segmenters_loss_and_gradients_are_the_sums_of_the_images_alone(sizes):
    model, images = LINEAR, [image.requires_grad_() for image in images_of(sizes)]
    rng = np.random.default_rng(1)
    truth = [torch.from_numpy(rng.choice([0, 1, 2, 255], size)) for size in sizes]
    model.class_weights = (1.0, 0.5, 2.0)
    alone = [
        model.losses(image[None], target[None])["segment"]
        for image, target in zip(images, truth, strict=True)
    ]
    want = gradients(model, {"segment": torch.stack(alone).sum()}, images)
    together, weight = torch.zeros((), dtype=torch.float64), 0.0
    for packed in in_packs(images):
        targets: Any = tuple(truth[i] for i in packed.image_ids)
        if len({target.shape for target in targets}) == 1:
            targets = torch.stack(targets)
        packing = {"sizes": packed.sizes, "patch_size": PATCH}
        together = together + model.losses(packed.patches, targets, packing=packing)["segment"]
        weight += float(model.weight(targets))
    assert weight == pytest.approx(sum(float(model.weight(target[None])) for target in truth))
    same(together, torch.stack(alone).sum())
    for ours, theirs in zip(gradients(model, {"": together}, images), want, strict=True):
        same(ours, theirs)


def two_and_six(matched: Tensor, number: int, share: float) -> tuple[Tensor, Tensor]:
    """As many boxes of every image, none by chance: what is a mean over boxes is a sum over images then."""
    positive, negative = (matched >= 0).nonzero()[:, 0], (matched == -1).nonzero()[:, 0]
    assert len(positive)
    assert len(negative)
    return positive[torch.arange(2) % len(positive)], negative[torch.arange(6) % len(negative)]


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detectors_losses_and_gradients_are_the_sums_of_the_images_alone(name, monkeypatch):
    monkeypatch.setattr(rpn, "sample", two_and_six)
    monkeypatch.setattr(rcnn, "sample", two_and_six)
    model, sizes = DETECTORS[name], [(21, 30), (32, 17), (24, 32), (22, 29)]
    images = [image.requires_grad_() for image in images_of(sizes)]
    truth = [objects_of(size, seed) for seed, size in enumerate(sizes)]
    if not model.has_masks:
        truth = [{k: v for k, v in target.items() if k != "masks"} for target in truth]
    alone = [model.losses(x[None], [t]) for x, t in zip(images, truth, strict=True)]
    summed = {key: torch.stack([one[key] for one in alone]).sum() for key in alone[0]}
    (packed,) = in_packs(images, 200)
    packing = {"sizes": packed.sizes, "patch_size": PATCH}
    targets = tuple(truth[i] for i in packed.image_ids)
    together = model.losses(packed.patches, targets, packing=packing)
    assert together.keys() == summed.keys()
    for key, want in summed.items():
        assert want > 0
        same(together[key], want)
    ours, want = gradients(model, together, images), gradients(model, summed, images)
    for one, other in zip(ours, want, strict=True):
        same(one, other)
    assert float(model.weight(targets)) == len(sizes)


def test_in_training_norms_are_over_all_of_the_pack_as_over_a_batch():
    model = built("linear").train()
    images = images_of([(8, 12)] * 3)
    truth = torch.from_numpy(np.random.default_rng(0).integers(0, K, (3, 8, 12)))
    want = model.losses(torch.stack(images), truth)["segment"]
    moved = model.head.norm.running_mean.clone()
    again = built("linear").train()
    (packed,) = in_packs(images)
    packing = {"sizes": packed.sizes, "patch_size": PATCH}
    same(again.losses(packed.patches, truth, packing=packing)["segment"], want)
    same(again.head.norm.running_mean, moved)
    # Of images of several sizes every token counts alike.
    mixed = built("linear").train()
    start = mixed.head.norm.running_mean.clone()
    (packed,) = in_packs(images_of([(8, 12), (16, 5)]))
    tokens = mixed.backbone.forward_packed(packed).maps["c2"]
    asked(mixed, packed)
    same(mixed.head.norm.running_mean, 0.9 * start + 0.1 * tokens.mean(0))


def test_a_pack_of_one_token_has_no_variance_to_learn_from():
    model = built("linear")
    (one,), (two,) = in_packs(images_of([(3, 4)])), in_packs(images_of([(4, 5)]))
    asked(model, one)
    asked(model.train(), two)
    with pytest.raises(InputError, match=r"one image of one patch.*--packing.packs"):
        asked(model, one)
    model.head.norm.eval()  # frozen, it knows one
    asked(model, one)


def test_dropout_drops_whole_channels_of_an_image():
    model = vitrail.create_model(
        "linear/vit_tiny_patch16", num_classes=16, head={"dropout": 0.5}, **TINY
    )
    head = model.head
    with torch.no_grad():
        head.fc.weight.copy_(torch.eye(16)[..., None, None])
    (packed,) = in_packs(images_of([(8, 12), (9, 3), (8, 4)], torch.float32))
    tokens = torch.rand(sum(packed.lengths), 16) + 1
    head.train()
    head.norm.eval()
    torch.manual_seed(0)
    factors = (
        head.forward_packed({"c2": tokens}, packed.spans())
        / head.norm(tokens.T[None, ..., None])[0, ..., 0].T
    )
    pieces = factors.split(packed.lengths)
    for piece in pieces:
        assert torch.equal(piece.round().unique(), torch.tensor([0.0, 2.0]))
        torch.testing.assert_close(piece, piece[:1].expand_as(piece))
    assert not torch.equal(pieces[0][0], pieces[1][0])
    head.eval()
    same(
        head.forward_packed({"c2": tokens}, packed.spans()),
        head.norm(tokens.T[None, ..., None])[0, ..., 0].T,
        1e-6,
    )


def test_predictions_of_packed_images_come_in_order_at_their_own_size():
    model = built("linear", torch.float32)
    rng = np.random.default_rng(0)
    pixels = [
        rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        for h, w in ((9, 30), (40, 21), (9, 30), (17, 4))
    ]
    seen = at_own_shape(model, 20)
    for found, image in zip(
        vitrail.Predictor(model, tokens_per_image=20)(pixels), pixels, strict=True
    ):
        prepared, geometry = prepare(image, seen)
        with torch.no_grad():
            logits = model(torch.from_numpy(prepared)[None])
        (want,) = finish_segmentation(logits.numpy(), [geometry], model.classes)
        assert found.size == image.shape[:2]
        assert np.mean(found.segmentation == want.segmentation) > 0.99
    detector = built("faster_rcnn", torch.float32)
    for found, image in zip(
        vitrail.Predictor(detector, max_tokens=60)(pixels), pixels, strict=True
    ):
        prepared, geometry = prepare(image, at_own_shape(detector, 59))
        with torch.no_grad():
            (want,) = detector(torch.from_numpy(prepared)[None])
        boxes = geometry.boxes_to_original(want["boxes"].numpy())
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
        np.testing.assert_allclose(found.boxes, boxes, atol=1e-3)


def test_logits_of_several_sizes_are_finished_one_by_one_and_checked():
    geometry = [Geometry((h, 4), (1.0, 1.0), (0, 0)) for h in (4, 8)]
    logits = [np.zeros((2, h, 4), np.float32) for h in (4, 8)]
    logits[1][1] = 1
    found = finish_segmentation(logits, geometry, ["a", "b"])
    assert [p.names for p in found] == [["a"], ["b"]]
    assert found[1].segmentation.shape == (8, 4)
    with pytest.raises(InputError, match=r"\(2, 2, 4, 4\) do not fit 3"):
        finish_segmentation(logits, geometry, ["a", "b", "c"])


def test_heads_and_packings_that_do_not_go_together_are_named():
    for name in ("upernet", "semantic_fpn", "detr"):
        with torch.device("meta"):
            other = vitrail.create_model(
                f"{name}/vit_tiny_patch16", num_classes=2, **TINY | {"depth": 4}
            )
        with pytest.raises(
            InputError, match=f"{name}/vit_tiny.* cannot take packed images: its head reads"
        ):
            check_takes_packs(other)
    with torch.device("meta"):
        normed = vitrail.create_model(
            "faster_rcnn/vit_tiny_patch16", num_classes=2, head={"neck_norm": True}, **TINY
        )
    with pytest.raises(InputError, match="cannot take packed images"):
        check_takes_packs(normed)
    for model in (LINEAR, DETECTORS["faster_rcnn"]):
        check_takes_packs(model)
        with pytest.raises(
            InputError, match=r"reads maps, in which token dropping leaves holes.*--packing.drop 0"
        ):
            check_takes_packs(model, drops=True)
        (packed,) = in_packs(images_of([(8, 8)]))
        some = replace(packed, patches=packed.patches[:2], kept=((0, 1),))
        with pytest.raises(InputError, match="token dropping leaves holes"):
            model.forward_packed(some)
    with pytest.raises(InputError, match=r"windows, scales and flips.*without --tokens-per-image"):
        check_takes_packs(InferredSegmenter(LINEAR, Inference(window=8)))
