"""Images with masks on disk: how the two are found and paired, and every message when they are not."""

import os
import pickle
import shutil
import time

import pytest

from tests.data.masks import class_maps, mask_set, random_ids, write_pair
from vitrail.data.index import read_index
from vitrail.data.mask_folders import MaskFolders, is_mask_folder
from vitrail.data.masks import MaskSource
from vitrail_runtime.errors import InputError


@pytest.fixture
def root(tmp_path):
    return mask_set(tmp_path / "set", {"train": 3, "val": 2})


def with_lists(root, **lines):
    for name, text in lines.items():
        (root / f"{name}.txt").write_text(text, encoding="utf-8")
    return root


def test_a_mask_folder_is_a_source_with_masks(root):
    source = MaskFolders(root)
    assert isinstance(source, MaskSource)
    assert source.name == str(root)
    assert source.splits() == ("train", "val")
    assert source.classes() == ("a", "b", "c")
    assert source.count("val") == 2
    assert source.pairs("train") == [
        (f"images/train/{i:03d}.jpg", f"masks/train/{i:03d}.png") for i in range(3)
    ]
    scanned = list(source.scan("val"))
    assert [(key, name, place) for key, name, place, _ in scanned] == [
        ("images/val/000.jpg", "", (0, 0, 0)),
        ("images/val/001.jpg", "", (0, 0, 0)),
    ]
    assert scanned[1][3] == (root / "images/val/001.jpg").read_bytes()
    assert source.read("masks/val/001.png", (0, 0, 0)) == (root / "masks/val/001.png").read_bytes()
    assert source.where("masks/val/001.png", (0, 0, 0)) == str(root / "masks/val/001.png")
    index = read_index(source, "val")
    assert index.keys == ["images/val/000.jpg", "images/val/001.jpg"]
    assert index.sizes.tolist() == [[21, 34], [22, 30]]


@pytest.mark.parametrize(
    ("images", "masks", "splits"),
    [
        ("images", "masks", ("train", "val", "test")),
        ("images", "annotations", ("training", "validation", "testing")),
        ("img_dir", "ann_dir", ("train", "val", "test")),
        ("imgs", "labels", ("Train", "valid", "Test")),
    ],
)
def test_the_usual_names_of_folders_and_splits_are_known(tmp_path, images, masks, splits):
    root = mask_set(tmp_path / "set", {s: 1 + i for i, s in enumerate(splits)})
    shutil.move(root / "images", root / "moved")
    shutil.move(root / "moved", root / images)
    shutil.move(root / "masks", root / "moved")
    shutil.move(root / "moved", root / masks)
    assert is_mask_folder(root)
    source = MaskFolders(root)
    assert source.splits() == ("train", "val", "test")
    assert [source.count(s) for s in source.splits()] == [1, 2, 3]
    assert source.pairs("val")[1] == (
        f"{images}/{splits[1]}/001.jpg",
        f"{masks}/{splits[1]}/001.png",
    )


def test_two_folders_without_splits_are_one_part(tmp_path):
    source = MaskFolders(mask_set(tmp_path / "set", {"": 3}))
    assert source.splits() == ("",)
    assert source.pairs("")[2] == ("images/002.jpg", "masks/002.png")


def test_files_lie_at_any_depth_and_hidden_ones_are_passed_over(tmp_path):
    root = mask_set(tmp_path / "set", {"train/bonn/west": 1, "train/ulm": 1})
    (root / "images" / "train" / ".hidden.jpg").write_bytes(b"x")
    (root / "masks" / ".cache").mkdir()
    shutil.copy(root / "masks/train/ulm/000.png", root / "masks" / ".cache" / "x.png")
    (root / "masks" / "train" / "ulm" / "notes.txt").touch()
    assert MaskFolders(root).pairs("train") == [
        ("images/train/bonn/west/000.jpg", "masks/train/bonn/west/000.png"),
        ("images/train/ulm/000.jpg", "masks/train/ulm/000.png"),
    ]


@pytest.mark.parametrize("tab", [False, True])
def test_lists_say_what_belongs_together_and_in_which_order(root, tab):
    between, name = ("\t", "x y.png") if tab else (" ", "x.png")
    shutil.move(root / "masks/train/000.png", root / name)
    shutil.copy(root / "images/val/001.jpg", root / "other.jpg")
    with_lists(
        root,
        train=f"\ufeffimages/train/002.jpg{between}masks/train/002.png\n\n"
        f"images/train/000.jpg{between}{name}\n",
        validation=f"other.jpg{between}masks/val/001.png",
    )
    assert is_mask_folder(root)
    source = MaskFolders(root)
    assert source.splits() == ("train", "val")
    assert source.pairs("train") == [
        ("images/train/002.jpg", "masks/train/002.png"),
        ("images/train/000.jpg", name),
    ]
    assert source.pairs("val") == [("other.jpg", "masks/val/001.png")]
    maps, problems, _ = class_maps(source, "train")
    assert (len(maps), problems) == (2, {})


def test_other_folders_are_not_taken_for_masks(tmp_path, class_folders, root):
    assert not is_mask_folder(class_folders({"train": {"a": 1, "b": 1}}, tmp_path / "classes"))
    for path in (root / "masks").rglob("*.png"):  # boxes as text, one file an image
        path.unlink()
    shutil.move(root / "masks", root / "labels")
    (root / "labels" / "000.txt").touch()
    assert not is_mask_folder(root)
    shutil.rmtree(root / "labels")
    assert not is_mask_folder(root)
    (root / "train.txt").write_text("images/train/000.jpg 3\n")
    assert not is_mask_folder(root)
    (root / "train.txt").write_text("these two.\n")
    assert not is_mask_folder(root)
    (root / "train.txt").write_bytes(b"\xff\xfe\x00")
    assert not is_mask_folder(root)
    with pytest.raises(InputError, match="holds no images with masks; expected images/ and masks/"):
        MaskFolders(root)


def test_images_without_masks_and_masks_without_images_are_named(root):
    (root / "masks/train/001.png").unlink()
    with pytest.raises(InputError) as error:
        MaskFolders(root).pairs("train")
    assert str(error.value) == (
        f"1 of 3 images in {root}/images/train have no mask in {root}/masks/train: 001.jpg; the two have the "
        "same name up to the ending: add what is missing, or move these away"
    )
    assert MaskFolders(root).count("val") == 2
    (root / "images/val/000.jpg").unlink()
    with pytest.raises(InputError) as error:
        MaskFolders(root).pairs("val")
    assert str(error.value) == (
        f"1 of 2 masks in {root}/masks/val have no image in {root}/images/val: 000.png; the two have the "
        "same name up to the ending: add what is missing, or move these away"
    )


def test_two_files_of_one_name_are_named(root):
    shutil.copy(root / "images/train/001.jpg", root / "images/train/001.png")
    with pytest.raises(InputError, match=r"two files of one name, 001\.jpg and 001\.png; keep one"):
        MaskFolders(root).pairs("train")


def test_an_empty_folder_of_images_is_named(root):
    for path in (root / "images/val").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"images/val holds no images; expected NAME\.jpg"):
        MaskFolders(root).pairs("val")


def test_splits_of_one_folder_only_are_named(root):
    shutil.move(root / "masks/val", root / "masks/test")
    with pytest.raises(InputError) as error:
        MaskFolders(root)
    assert str(error.value) == (
        f"{root} has splits in one of its folders only: images has train, val, masks has test, train; give "
        "both the same"
    )


def test_two_folders_or_lists_of_one_split_are_named(root):
    (root / "images/training").mkdir()
    with pytest.raises(
        InputError, match="two folders for the split 'train': 'train' and 'training'"
    ):
        MaskFolders(root)
    line = "images/train/000.jpg masks/train/000.png"
    with_lists(root, train=line, training=line)
    with pytest.raises(
        InputError, match=r"two lists of the split 'train': train.txt and training.t"
    ):
        MaskFolders(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{0}\nimages/a b.jpg m.png",
            r"line 2: expected an image and its mask, but got 'images/a b",
        ),
        (
            "{0}\nimages/train/001.jpg",
            r"line 2: expected an image and its mask, but got 'images/tr",
        ),
        ("{0}\n\n{0}", r"line 3: images/train/000.jpg is also in line 1; list each image once"),
        (
            "{0}\nx.jpg masks/train/001.png",
            r"lists 1 of 2 images that do not exist below .*: x.jpg$",
        ),
        (
            "{0}\nimages/train/001.jpg y.png",
            r"lists 1 of 2 masks that do not exist below .*: y.png$",
        ),
    ],
)
def test_a_list_that_cannot_be_right_is_named_with_its_line(root, text, message):
    with_lists(root, train=text.format("images/train/000.jpg masks/train/000.png"))
    with pytest.raises(InputError, match=message) as error:
        MaskFolders(root).pairs("train")
    assert str(error.value).startswith(str(root / "train.txt"))


def test_a_list_that_is_not_utf8_is_named(root):
    (root / "train.txt").write_bytes(b"a.jpg b.png\n\xff.jpg c.png")
    with pytest.raises(InputError, match=r"train.txt is not UTF-8 text .*; save it as UTF-8"):
        MaskFolders(root).pairs("train")


def test_a_split_in_an_archive_beside_its_list_is_no_hindrance_to_the_others(root):
    with_lists(
        root,
        train="images/train/000.jpg masks/train/000.png",
        test="images/test/a.jpg masks/test/a.png",
    )
    (root / "test.tar").touch()
    source = MaskFolders(root)
    assert source.splits() == ("train", "test")
    assert source.count("train") == 1
    with pytest.raises(InputError, match=r"a\.jpg; .*test\.tar lies beside it: unpack it there$"):
        source.pairs("test")


def test_fingerprints_follow_the_files_they_are_of(root):
    def prints():
        source = MaskFolders(root)
        return source.fingerprint("train"), source.masks_fingerprint("train")

    first = prints()
    assert prints() == first
    assert first[0] != first[1]
    later = time.time_ns() + 10**9
    os.utime(root / "masks/train/001.png", ns=(later, later))
    second = prints()
    assert second[0] == first[0]
    assert second[1] != first[1]
    os.utime(root / "images/train/001.jpg", ns=(later, later))
    third = prints()
    assert third[0] != first[0]
    assert third[1] == second[1]
    with open(root / "masks/train/000.png", "ab") as file:
        file.write(b"x")
    os.utime(root / "masks/train/000.png", ns=(later, later))
    assert prints()[1] != third[1]
    write_pair(root, "new", random_ids(1, (20, 30)))
    assert prints()[0] != third[0]


def test_a_link_to_nothing_is_a_broken_image_not_a_missing_one(root):
    (root / "images/train/001.jpg").unlink()
    (root / "images/train/001.jpg").symlink_to(root / "gone.jpg")
    source = MaskFolders(root)
    assert source.count("train") == 3
    assert isinstance(list(source.scan("train"))[1][3], OSError)
    assert list(read_index(source, "train").problems) == [1]
    with_lists(root, train="images/train/001.jpg masks/train/001.png")
    assert MaskFolders(root).count("train") == 1


def test_a_copy_for_a_worker_carries_no_listing(root):
    source = MaskFolders(root)
    source.pairs("train")
    copy = pickle.loads(pickle.dumps(source))
    assert copy._pairs == {}
    assert copy.pairs("train") == source.pairs("train")
