"""Batches of images of one size and of several: put together, divided, brought to the device."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory
from torchvision.transforms.v2 import functional as oracle

from vitrail.data.batch import Dense, Padded, collate
from vitrail_runtime.preprocess import Geometry, Preprocessing

CPU = torch.device("cpu")
PRE = Preprocessing(mean=(0.5, 0.25, 0.125), std=(0.25, 0.5, 0.2))
SIZES = ((5, 9), (7, 4), (2, 3), (6, 6), (1, 8), (3, 3), (4, 2))


def image(number: int, height: int, width: int) -> torch.Tensor:
    """Noise without a zero, so that what is padded stands out."""
    made = torch.Generator().manual_seed(number)
    return torch.randint(1, 256, (3, height, width), generator=made, dtype=torch.uint8)


def geometry(number: int) -> Geometry:
    return Geometry((number + 1, number + 2), (1.0, 1.0), (0.0, 0.0))


def dense(count: int) -> Dense:
    images = torch.stack([image(i, 6, 8) for i in range(count)])
    geometries = tuple(map(geometry, range(count)))
    return Dense(images, torch.arange(count) + 50, torch.arange(count) + 100, 7, geometries)


def padded(sizes=SIZES) -> tuple[Padded, list[torch.Tensor]]:
    count = len(sizes)
    images = [image(i, *size) for i, size in enumerate(sizes)]
    batch = collate(
        images,
        tuple(torch.full((i,), i) for i in range(count)),  # as many boxes as an image has
        torch.arange(count) + 100,
        step=7,
        geometries=tuple(map(geometry, range(count))),
    )
    assert isinstance(batch, Padded)
    return batch, images


def normalised(pixels: torch.Tensor, pre: Preprocessing = PRE) -> torch.Tensor:
    """torchvision's."""
    return oracle.normalize(
        oracle.to_dtype(pixels, torch.float32, scale=True), list(pre.mean), list(pre.std)
    )


def test_images_of_one_size_are_dense_and_others_padded_to_the_largest_of_each_axis():
    images = [image(i, 4, 6) for i in range(3)]
    geometries = (geometry(1),)
    batch = collate(images, "targets", torch.arange(3), step=5, geometries=geometries)
    assert isinstance(batch, Dense)
    assert torch.equal(batch.images, torch.stack(images))
    assert (batch.targets, batch.step, batch.geometries) == ("targets", 5, geometries)
    assert batch.indices.tolist() == [0, 1, 2]
    assert isinstance(collate([image(0, 4, 6), image(1, 6, 4)], (), torch.arange(2)), Padded)
    assert isinstance(collate([image(0, 4, 6), image(1, 4, 5)], (), torch.arange(2)), Padded)

    batch, images = padded()
    assert batch.images.shape == (7, 3, 7, 9)
    assert batch.images.dtype == torch.uint8
    assert batch.sizes == SIZES
    assert (batch.step, batch.num_images) == (7, 7)
    assert batch.indices.tolist() == list(range(100, 107))
    assert batch.geometries == tuple(map(geometry, range(7)))
    for row, original in zip(batch.images, images, strict=True):
        _, height, width = original.shape
        assert torch.equal(row[:, :height, :width], original)
        assert row.count_nonzero() == original.numel(), "zeros right and below"


@given(st.integers(1, 20), st.integers(1, 25))
def test_a_dense_batch_is_split_as_torch_chunks(count, parts):
    batch = dense(count)
    made = batch.split(parts)
    for name in ("images", "targets", "indices"):
        expected = getattr(batch, name).chunk(parts)
        got = [getattr(part, name) for part in made]
        assert len(got) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert sum((part.geometries for part in made), ()) == batch.geometries
    assert [len(part.geometries) for part in made] == [part.num_images for part in made]
    assert all(part.step == 7 for part in made)


def test_targets_that_are_a_tuple_by_image_are_split_with_their_images():
    batch = replace(dense(5), targets=tuple("abcde"))
    assert [part.targets for part in batch.split(2)] == [("a", "b", "c"), ("d", "e")]
    training = replace(batch, geometries=())
    assert [part.geometries for part in training.split(2)] == [(), ()]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=9),
    st.integers(1, 10),
)
def test_each_part_of_a_padded_batch_is_as_small_as_its_own_images(sizes, parts):
    if len(set(sizes)) == 1:
        sizes = [*sizes, (10, 10)]
    batch, images = padded(tuple(sizes))
    rows = torch.arange(len(sizes)).chunk(parts)
    made = batch.split(parts)
    assert len(made) == len(rows)
    for part, chunk in zip(made, rows, strict=True):
        chosen = chunk.tolist()
        assert part.num_images == len(chosen)
        assert part.indices.tolist() == [100 + i for i in chosen]
        assert part.sizes == tuple(sizes[i] for i in chosen)
        assert part.geometries == tuple(geometry(i) for i in chosen)
        assert [len(target) for target in part.targets] == chosen
        assert part.step == 7
        tallest, widest = (max(sizes[i][axis] for i in chosen) for axis in (0, 1))
        assert part.images.shape == (len(chosen), 3, tallest, widest)
        for row, i in zip(part.images, chosen, strict=True):
            height, width = sizes[i]
            assert torch.equal(row[:, :height, :width], images[i])


@pytest.mark.parametrize("pre", [PRE, Preprocessing()])
def test_bytes_are_normalised_as_torchvision_does_and_floats_are_already(pre):
    batch = dense(4)
    moved = batch.to(CPU, pre)
    assert moved.images.dtype == torch.float32
    torch.testing.assert_close(moved.images, normalised(batch.images, pre), rtol=1e-6, atol=1e-6)
    assert batch.images.dtype == torch.uint8, "the batch given is left as it is"
    again = moved.to(CPU, pre)
    assert torch.equal(again.images, moved.images)
    assert torch.equal(moved.targets, batch.targets)
    assert (moved.indices, moved.step, moved.geometries) == (batch.indices, 7, batch.geometries)


def test_what_is_padded_is_zero_once_normalised():
    """As in torchvision's GeneralizedRCNNTransform: the mean colour, not black."""
    batch, images = padded()
    moved = batch.to(CPU, PRE)
    assert moved.images.dtype == torch.float32
    assert moved.sizes == SIZES
    for row, original in zip(moved.images, images, strict=True):
        expected = torch.zeros(3, 7, 9)
        expected[:, : original.shape[1], : original.shape[2]] = normalised(original)
        torch.testing.assert_close(row, expected, rtol=1e-6, atol=1e-6)
    assert (batch.images[0, :, 5:] == 0).all()
    # Divided before or after, the parts are the same.
    for a, b in zip(moved.split(3), batch.split(3), strict=True):
        assert torch.equal(a.images, b.to(CPU, PRE).images)


def test_targets_of_any_form_go_to_the_device():
    """The meta device stands for an accelerator: what was not moved would not be on it."""
    meta = torch.device("meta")
    targets = (
        {"boxes": torch.zeros(2, 4), "labels": torch.zeros(2), "name": "a.png"},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "name": "b.png"},
    )
    batch = Dense(torch.zeros(2, 3, 4, 4), targets, torch.arange(2))
    moved = batch.to(meta, PRE)
    assert moved.images.device == meta
    assert isinstance(moved.targets, tuple)
    for a, b in zip(moved.targets, targets, strict=True):
        assert a["boxes"].device == a["labels"].device == meta
        assert (a["boxes"].shape, a["name"]) == (b["boxes"].shape, b["name"])
    assert (
        Dense(torch.zeros(1, 3, 4, 4), torch.ones(1), torch.arange(1)).to(meta, PRE).targets.device
        == meta
    )
    said = (np.zeros((3, 4), np.uint8), 7)  # in evaluation: stays what it is
    (moved_map, label) = Dense(torch.zeros(2, 3, 4, 4), said, torch.arange(2)).to(meta, PRE).targets
    assert moved_map is said[0]
    assert label == 7


@pytest.mark.parametrize("kind", ["dense", "padded"])
def test_a_loader_can_pin_a_batch_with_its_targets(monkeypatch, kind):
    """torch pins objects that have the method, and leaves others where they are."""
    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    images, targets = torch.zeros(2, 3, 4, 4), {"a": torch.ones(2), "b": (torch.zeros(1), "name")}
    more = {} if kind == "dense" else {"sizes": ((4, 4), (2, 3))}
    batch = (Dense if kind == "dense" else Padded)(images, targets, torch.arange(2), **more)
    found = pin_memory(batch)
    assert [id(t) for t in pinned] == [id(images), id(targets["a"]), id(targets["b"][0])]
    assert torch.equal(found.images, images)
    assert found.targets["b"][1] == "name"


def test_the_losses_are_told_the_sizes_of_padded_images_alone():
    images, indices, sizes = torch.zeros(2, 3, 4, 5), torch.arange(2), ((4, 5), (2, 3))
    assert Dense(images, (), indices).padding == {}
    assert Padded(images, (), indices, sizes).padding == {"sizes": sizes}
    assert Dense(images, (), indices).layout == Padded(images, (), indices, sizes).layout == {}


def test_padded_is_the_share_of_pixels_without_an_image():
    images, indices = torch.zeros(2, 3, 6, 10), torch.zeros(2)
    assert Dense(images, (), indices).padded == 0
    batch = Padded(images, (), indices, ((6, 5), (3, 10)))
    assert batch.padded == pytest.approx(0.5)
