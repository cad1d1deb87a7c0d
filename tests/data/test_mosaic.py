"""Mosaics: every object lies where it is shown, and none that is shown is lost."""

import math

import numpy as np
import pytest
import torch

from vitrail.data.augment import generator
from vitrail.data.batch import Dense, Padded
from vitrail.data.mosaic import draw_parts, mosaic
from vitrail_runtime.errors import InputError

SIZE = (40, 56)


def batch_of(count: int = 4, sizes=None, masks: bool = True, size=SIZE):
    """Image i is of the value i + 1, and object k of label k a rectangle of 100 * 4 ** k."""
    images = torch.zeros(count, 3, *size)
    targets = []
    for i in range(count):
        height, width = size if sizes is None else sizes[i]
        images[i, :, :height, :width] = i + 1
        rng = np.random.default_rng(i)
        boxes, shown = [], torch.zeros(3, *size, dtype=torch.uint8)
        for k in range(3):
            y1, x1 = int(rng.integers(0, height - 8)), (width // 3) * k
            y2, x2 = y1 + 8, x1 + width // 3 - 2
            images[i, :, y1:y2, x1:x2] = 100 * 4**k
            shown[k, y1:y2, x1:x2] = 1
            boxes.append([x1, y1, x2, y2])
        target = {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.arange(3)}
        targets.append({**target, "masks": shown} if masks else target)
    indices = torch.arange(count) + 50
    if sizes is None:
        return Dense(images, tuple(targets), indices, step=3)
    return Padded(images, tuple(targets), indices, tuple(sizes), step=3)


@pytest.mark.parametrize("position", range(6))
def test_objects_lie_where_they_are_shown(position):
    made = mosaic(batch_of(), (1, 2, position), 1.0)
    assert isinstance(made, Dense)
    assert made.images.shape == (4, 3, *SIZE)
    assert (made.step, made.indices.tolist()) == (3, [50, 51, 52, 53])
    objects = 0
    for image, target in zip(made.images, made.targets, strict=True):
        assert {k: v.dtype for k, v in target.items()} == {
            "boxes": torch.float32,
            "labels": torch.int64,
            "masks": torch.uint8,
        }
        assert {int(v) for v in image[0].unique() if v in (1, 2, 3, 4)} == {1, 2, 3, 4}
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        for box, label, mask in zip(*target.values(), strict=True):
            objects += 1
            x1, y1, x2, y2 = box.tolist()
            assert 0 <= x1 < x2 <= SIZE[1]
            assert 0 <= y1 < y2 <= SIZE[0]
            rows, columns = torch.nonzero(mask.any(1))[:, 0], torch.nonzero(mask.any(0))[:, 0]
            around = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_allclose([x1, y1, x2, y2], [int(v) for v in around], atol=1.01)
            inner = image[0][mask.bool()]
            assert round(math.log(inner.max().item() / 100, 4)) == label
            assert inner.median() > 50
    assert objects > 12


def test_every_part_shows_an_image_of_its_own_in_its_own_place():
    """Image m of four shows image m + q in corner q."""
    made = mosaic(batch_of(masks=False), (0, 0, 1), 1.0)
    rng = generator((0, 0, 1), 2)
    rng.random()
    parts = draw_parts(*SIZE, rng)
    for m, image in enumerate(made.images):
        for q, part in enumerate(parts):
            top, left, high, wide = part.place
            shown = image[0, top : top + high, left : left + wide]
            ground = shown[shown < 50].round().mode().values.item()
            assert ground == (m + q) % 4 + 1


def test_the_parts_tile_the_mosaic_and_meet_within():
    for position in range(50):
        parts = draw_parts(40, 56, generator((0, 0, position), 2))
        taken = np.zeros((40, 56), int)
        for part in parts:
            top, left, high, wide = part.place
            assert high > 0
            assert wide > 0
            taken[top : top + high, left : left + wide] += 1
            assert all(0 <= share < 1 for share in part.cut)
        assert (taken == 1).all()
        assert 10 <= parts[0].place[2] <= 30
        assert 14 <= parts[0].place[3] <= 42
        assert (parts[1].place[0], parts[2].place[1]) == (0, 0)


def test_padding_is_not_shown():
    sizes = [(40, 30), (20, 56), (33, 50), (40, 56)]
    made = mosaic(batch_of(sizes=sizes), (1, 1, 2), 1.0)
    assert isinstance(made, Dense)
    assert (made.images > 0.5).all()
    assert sum(len(target["boxes"]) for target in made.targets) > 12


def test_images_that_four_do_not_divide_stay_as_they_are():
    sizes = [(40, 30), (20, 56), (33, 50), (40, 56), (31, 22)]
    batch = batch_of(5, sizes)
    made = mosaic(batch, (1, 1, 2), 1.0)
    assert isinstance(made, Padded)
    assert made.sizes == ((40, 56),) * 4 + ((31, 22),)
    assert torch.equal(made.images[4], batch.images[4])
    assert made.targets[4] is batch.targets[4]
    assert not torch.equal(made.images[3], batch.images[3])
    three = batch_of(3)
    assert mosaic(three, (1, 1, 2), 1.0) is three


def test_a_batch_shared_among_processes_makes_the_same_mosaics():
    batch = batch_of(8)
    whole = mosaic(batch, (4, 0, 7), 1.0)
    parts = [mosaic(part, (4, 0, 7), 1.0) for part in batch.split(2)]
    assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
    for ours, theirs in zip(whole.targets, parts[0].targets + parts[1].targets, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_key_draws_everything_and_the_batch_is_left_alone():
    batch = batch_of()
    before = batch.images.clone()
    a, b, c = (mosaic(batch, (0, 0, step), 1.0).images for step in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(batch.images, before)


def test_it_is_drawn_as_often_as_is_said():
    batch = batch_of(masks=False)
    drawn = sum(mosaic(batch, (0, 0, step), 0.3) is not batch for step in range(300))
    assert 65 < drawn < 115
    assert all(mosaic(batch, (0, 0, step), 0.0) is batch for step in range(20))
    with pytest.raises(InputError, match="mosaic is a probability"):
        mosaic(batch, (0, 0, 0), 1.5)


def test_boxes_are_cut_at_their_part_and_dropped_by_the_rule_of_views():
    batch = batch_of(masks=False)
    rng = np.random.default_rng(8)
    corners = np.sort(rng.integers(0, 40, (30, 2, 2)), 1).reshape(30, 4)
    corners[:, 2:] += 1
    one = {"boxes": torch.tensor(corners, dtype=torch.float32), "labels": torch.arange(30)}
    batch = Dense(batch.images, (one,) * 4, batch.indices)
    kept, dropped = 0, 0
    for step in range(10):
        made = mosaic(batch, (0, 0, step), 1.0)
        drawn = generator((0, 0, step), 2)
        drawn.random()
        expected, labels = [], []
        for part in draw_parts(*SIZE, drawn):
            top, left, high, wide = part.place
            scale = max(high / 40, wide / 56)
            rows, columns = min(40, round(high / scale)), min(56, round(wide / scale))
            y = int(part.cut[0] * (40 - rows + 1))
            x = int(part.cut[1] * (56 - columns + 1))
            for k, (x1, y1, x2, y2) in enumerate(corners.tolist()):
                a, c = ((v - x) * wide / columns for v in (x1, x2))
                b, d = ((v - y) * high / rows for v in (y1, y2))
                area = (c - a) * (d - b)
                a, c = max(a, 0), min(c, wide)
                b, d = max(b, 0), min(d, high)
                if c - a >= 1 and d - b >= 1 and (c - a) * (d - b) >= 0.25 * area:
                    expected.append([left + a, top + b, left + c, top + d])
                    labels.append(k)
                elif c > a and d > b:
                    dropped += 1
        for target in made.targets[:1]:
            assert target["labels"].tolist() == labels
            np.testing.assert_allclose(target["boxes"], expected, atol=1e-3)
        kept += len(labels)
    assert kept > 100
    assert dropped > 20


def test_images_without_objects_are_legal():
    batch = batch_of()
    none = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, *SIZE, dtype=torch.uint8),
    }
    made = mosaic(Dense(batch.images, (none,) * 4, batch.indices), (0, 0, 1), 1.0)
    assert [v.shape for v in made.targets[0].values()] == [(0, 4), (0,), (0, *SIZE)]


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (2, 2), (3, 90)])
def test_small_images_are_legal(size):
    images = torch.rand(4, 3, *size)
    target = {"boxes": torch.tensor([[0.0, 0.0, size[1], size[0]]]), "labels": torch.tensor([0])}
    batch = Dense(images, (target,) * 4, torch.arange(4))
    made = mosaic(batch, (0, 0, 1), 1.0)
    assert (made is batch) == (min(size) < 2)
    assert made.images.shape == images.shape
