"""Images with masks through `open_data`, as a training and an evaluation open them."""

import shutil

import numpy as np
import pytest
from PIL import Image

from tests.data.masks import mask_set, random_ids, write_pair
from vitrail.data import open_data
from vitrail.data.masks import ClassMaps
from vitrail_runtime.errors import InputError


def test_examples_are_images_with_their_class_maps(tmp_path):
    root = mask_set(tmp_path / "set", {"train": 3, "val": 2})
    data = open_data(root, "val")
    assert isinstance(data.truth, ClassMaps)
    assert (len(data), data.classes, data.notes) == (2, ("a", "b", "c"), ())
    assert data.keys == ["images/val/000.jpg", "images/val/001.jpg"]
    for i in range(2):
        assert data.images.read(i).shape[:2] == data.truth.read(i).shape
        drawn = Image.open(root / "masks/val" / f"{i:03d}.png")
        assert np.array_equal(data.truth.target(i, None), np.array(drawn))
    everything = open_data(root, "all")
    assert len(everything) == 5
    assert np.array_equal(everything.truth.read(3), data.truth.read(0))


def test_a_changed_mask_is_another_data_set_and_a_renamed_class_too(tmp_path):
    root = mask_set(tmp_path / "set", {"train": 3, "val": 1})
    first = open_data(root, "train").content_hash
    assert open_data(root, "train").content_hash == first
    Image.fromarray(random_ids(50, (22, 32))).save(root / "masks/train/001.png")
    second = open_data(root, "train").content_hash
    (root / "classes.txt").write_text("a\nb\nd")
    assert len({first, second, open_data(root, "train").content_hash}) == 3


def test_images_whose_masks_cannot_be_used_stop_or_are_left_out(tmp_path):
    root = mask_set(tmp_path / "set", {"train": 5, "val": 1})
    (root / "images/train/000.jpg").write_bytes(b"no")
    (root / "masks/train/002.png").write_bytes(b"")
    (root / "masks/train/000.png").write_bytes(b"")
    Image.fromarray(random_ids(50, (9, 32))).save(root / "masks/train/003.png")
    with pytest.raises(InputError) as error:
        open_data(root, "train")
    lines = str(error.value).splitlines()
    assert lines[0] == "3 of 5 pictures are broken:"
    assert lines[1].startswith(f"  {root}/images/train/000.jpg: is not a picture")
    assert lines[2] == f"  {root}/masks/train/002.png: is empty (0 bytes)"
    assert lines[3].startswith(f"  {root}/masks/train/003.png: is 9 x 32 (height x width), but its")
    data = open_data(root, "train", skip_broken=True)
    assert data.keys == ["images/train/001.jpg", "images/train/004.jpg"]
    assert [where for where, _ in data.broken] == [
        f"{root}/images/train/000.jpg",
        f"{root}/masks/train/002.png",
        f"{root}/masks/train/003.png",
    ]
    assert "3 of 5 pictures are broken and left out" in data.notes
    assert np.array_equal(data.truth.read(1), np.array(Image.open(root / "masks/train/004.png")))


def test_without_a_val_split_rare_classes_are_on_both_sides(tmp_path):
    root = tmp_path / "set"
    for i in range(30):
        ids = np.zeros((20, 30), np.uint8)
        if i % 6 == 0:
            ids[0] = 1
        write_pair(root, f"{i:02d}", ids, "")
    (root / "classes.txt").write_text("a\nb")
    train, val = (open_data(root, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (24, 6)
    assert not set(train.keys) & set(val.keys)
    assert (train.truth.counts[:, 1] > 0).sum() == 4
    assert (val.truth.counts[:, 1] > 0).sum() == 1
    assert "no val split: 20% of the pictures" in val.notes[0]
    shutil.move(root / "images", root / "moved")  # names do not matter
    (root / "images").mkdir()
    for i, path in enumerate(sorted((root / "moved").iterdir(), reverse=True)):
        shutil.copy(path, root / "images" / f"n{i:02d}.jpg")
        shutil.move(root / "masks" / f"{path.stem}.png", root / "masks" / f"n{i:02d}.png")
    shutil.rmtree(root / "moved")
    again = open_data(root, "val")
    assert sorted(again.images.digests) == sorted(val.images.digests)


def test_what_is_inferred_is_told_once_for_all_splits(tmp_path):
    root = mask_set(tmp_path / "set", {"train": 2, "val": 2})
    (root / "classes.txt").unlink()
    (note,) = open_data(root, "all").notes
    assert "has no classes.txt: values 0 to 2" in note


def test_a_class_that_train_never_shows_is_told_but_no_error(tmp_path):
    root = mask_set(tmp_path / "set", {"train": 3, "val": 2})
    (root / "classes.txt").write_text("a\nb\nc\nd\ne")
    (note,) = open_data(root, "train").notes
    assert (
        note
        == f"no example of 2 of 5 classes in train of {root}, so nothing is learnt of them: d, e"
    )
    assert open_data(root, "val").notes == ()


def test_a_model_s_names_say_what_the_labels_are(tmp_path):
    root = mask_set(tmp_path / "set", {"train": 2, "test": 2})
    own = open_data(root, "test")
    data = open_data(root, "test", classes=("c", "b", "a"))
    assert np.array_equal(data.truth.read(0), 2 - own.truth.read(0))
    with pytest.raises(
        InputError, match=r"masks of .* have classes that are not among those to be"
    ):
        open_data(root, "test", classes=("c", "b"))


def test_an_archive_beside_images_with_masks_is_passed_over(tmp_path):
    root = mask_set(tmp_path / "set", {"train": 2, "val": 1})
    (root / "test.tar").touch()
    assert len(open_data(root, "train")) == 2
