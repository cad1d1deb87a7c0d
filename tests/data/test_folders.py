"""Class folders: what is found, how it is split, and what is said of what does not fit."""

import os
import pickle
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.damage import flipped, outcomes, zeroed
from tests.data.conftest import picture
from vitrail.data import index, open_data
from vitrail.data.cache import load_columns
from vitrail.data.checkup import check
from vitrail.data.index import read_index
from vitrail.data.opening import hold_out, open_source
from vitrail.models import create_model
from vitrail.predictor import Predictor
from vitrail_runtime.errors import InputError

BOTH = {"train": {"cat": 4, "dog": 3}, "val": {"cat": 2, "dog": 2}, "test": {"cat": 1, "dog": 1}}


def test_splits_beside_each_other_are_read_with_one_set_of_classes(class_folders):
    root = class_folders(BOTH)
    train, val, test = (open_data(root, s) for s in ("train", "val", "test"))
    assert train.classes == val.classes == test.classes == ("cat", "dog")
    assert train.truth.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert (len(val), len(test)) == (4, 2)
    assert train.notes == ()
    assert len(open_data(root, "all")) == 13


def test_sizes_are_known_without_decoding_and_equal_what_is_read(class_folders):
    data = open_data(class_folders(BOTH), "train")
    for i in range(len(data)):
        assert data.images.read(i).shape == (*data.images.sizes[i], 3)


def test_a_turned_photograph_is_indexed_upright(class_folders):
    root = class_folders(BOTH)
    image = picture(1, (20, 34))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(root / "train" / "cat" / "000.jpg", exif=exif)
    data = open_data(root, "train")
    assert data.images.sizes[0].tolist() == [34, 20]
    assert data.images.read(0).shape == (34, 20, 3)


def test_one_folder_is_split_by_class_without_overlap_and_says_so(class_folders):
    root = class_folders({"": {"cat": 10, "dog": 20}})
    train, val = open_data(root, "train"), open_data(root, "val")
    assert set(train.keys) & set(val.keys) == set()
    assert np.bincount(train.truth.labels).tolist() == [8, 16]
    assert np.bincount(val.truth.labels).tolist() == [2, 4]
    assert "held out" in train.notes[0]
    assert "held out" in val.notes[0]
    again = open_data(root, "val")
    assert again.keys == val.keys
    assert again.content_hash == val.content_hash
    assert open_data(root, "val", seed=1).keys != val.keys
    with pytest.raises(InputError, match="has no test split"):
        open_data(root, "test")


def test_a_missing_val_is_cut_from_train_and_never_taken_from_test(class_folders):
    root = class_folders({"train": {"cat": 5, "dog": 5}, "test": {"cat": 3, "dog": 3}})
    train, val = open_data(root, "train"), open_data(root, "val")
    assert len(train) == 8
    assert len(val) == 2
    assert all(k.startswith("train/") for k in val.keys)


def test_the_split_depends_on_content_not_on_names(class_folders):
    root = class_folders({"": {"cat": 10, "dog": 10}})
    before = sorted(open_data(root, "val").images.digests)
    for path in sorted(root.rglob("*.jpg")):
        path.rename(path.with_name("z" + path.name))
    assert sorted(open_data(root, "val").images.digests) == before


def test_exact_duplicates_stay_on_one_side_of_the_split():
    labels = np.zeros(40, np.int64)
    digests = [f"{i // 4}" for i in range(40)]  # ten pictures, four copies each
    held_out = hold_out(labels, digests, 0.2, seed=3)
    assert 0 < held_out.sum() < 40
    for start in range(0, 40, 4):
        assert len(set(held_out[start : start + 4].tolist())) == 1


@pytest.mark.parametrize("seed", range(5))
def test_copies_under_different_labels_stay_in_train(seed):
    labels = np.repeat([0, 1, 2], 10)
    digests = [f"{i}" for i in range(30)]
    digests[10:14] = digests[0:4]  # four pictures of class 0 are also in class 1
    digests[20:30] = ["5"] * 10  # all of class 2 is one picture of class 0
    held_out = hold_out(labels, digests, 0.2, seed)
    assert held_out.reshape(3, 10).sum(1).tolist() == [2, 2, 0]
    assert not set(np.array(digests)[held_out]) & set(np.array(digests)[~held_out])


def test_copies_under_different_labels_are_said(class_folders):
    root = class_folders({"": {"cat": 5, "dog": 5}})
    (root / "dog" / "000.jpg").write_bytes((root / "cat" / "000.jpg").read_bytes())
    train, val = open_data(root, "train"), open_data(root, "val")
    assert {"cat/000.jpg", "dog/000.jpg"} <= set(train.keys)
    assert not set(train.images.digests) & set(val.images.digests)
    assert "2 pictures stand under several labels" in train.notes[1]


def test_the_content_hash_follows_the_pixels(class_folders):
    root = class_folders(BOTH)
    before = open_data(root, "train").content_hash
    picture(99).save(root / "train" / "dog" / "000.jpg")
    assert open_data(root, "train").content_hash != before


def test_a_second_start_reads_no_picture(class_folders, monkeypatch):
    root = class_folders(BOTH)
    first = open_data(root, "train")
    monkeypatch.setattr("vitrail.data.index.make_index", None)
    second = open_data(root, "train")
    assert second.keys == first.keys
    assert second.content_hash == first.content_hash
    assert (second.images.sizes == first.images.sizes).all()


def test_a_damaged_cache_is_made_again(class_folders, own_cache):
    root = class_folders(BOTH)
    first = open_data(root, "train")
    for path in (own_cache / "index").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert open_data(root, "train").content_hash == first.content_hash


def test_a_stored_index_is_what_was_made_whatever_bit_of_it_is_flipped(
    class_folders, own_cache, monkeypatch
):
    root = class_folders(BOTH)
    (root / "train" / "cat" / "broken.jpg").write_bytes(b"no picture")
    source = open_source(root)
    written = read_index(source, "train")
    assert list(written.problems) == [4], "a problem is stored too"
    (path,) = (own_cache / "index").iterdir()
    whole = path.read_bytes()
    real, made = index.make_index, []
    monkeypatch.setattr(index, "make_index", lambda *a: made.append(a) or real(*a))

    def read() -> bool:
        again = read_index(source, "train")
        return all(
            np.array_equal(getattr(again, f.name), getattr(written, f.name))
            for f in fields(written)
        )

    assert read()
    assert not made
    for damaged, count in ((flipped(whole, 100), 100), (zeroed(whole), -(-len(whole) // 4096))):
        made.clear()
        found = outcomes(path, damaged, read)
        assert found["equal"] == found.total() == count
        assert len(made) == count, "made again each time"
    other = path.with_name("0" * 32 + ".npz")
    other.write_bytes(whole)
    assert load_columns(path) is not None
    assert load_columns(other) is None, "of another data set"
    path.unlink()
    path.mkdir()
    assert read()


def test_hidden_files_and_other_files_are_passed_over(class_folders):
    root = class_folders(BOTH)
    (root / ".DS_Store").write_bytes(b"x")
    (root / "train" / ".DS_Store").write_bytes(b"x")
    (root / "train" / "cat" / "._000.jpg").write_bytes(b"x")
    (root / "train" / "cat" / "notes.txt").write_text("x")
    (root / "train" / ".git").mkdir()
    assert len(open_data(root, "train")) == 7


def test_names_of_any_script_and_any_bytes_are_read(class_folders):
    root = class_folders({"": {"猫": 3, "Hündchen": 3}})
    os.rename(root / "猫" / "000.jpg", os.fsencode(root / "猫") + b"/\xff\xfe.jpg")
    data = open_data(root, "all")
    assert data.classes == ("Hündchen", "猫")
    assert len(data) == 6
    for _ in range(2):  # also from the cache
        data = open_data(root, "all")
        assert [data.images.read(i).shape[2] for i in range(6)] == [3] * 6


def test_a_class_may_be_called_test(class_folders):
    root = class_folders({"": {"test": 4, "control": 4}})
    assert open_data(root, "train").classes == ("control", "test")


def broken(root):
    folder = root / "train" / "cat"
    whole = (folder / "000.jpg").read_bytes()
    (folder / "001.jpg").write_bytes(b"")
    (folder / "002.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "003.jpg").write_text("this is no picture")
    return folder


def test_broken_pictures_are_named_and_counted(class_folders):
    root = class_folders(BOTH)
    broken(root)
    with pytest.raises(InputError) as caught:
        open_data(root, "train")
    message = str(caught.value)
    assert message.startswith("3 of 7 pictures are broken")
    for name in (
        "001.jpg: is empty",
        "002.jpg: is broken or truncated",
        "003.jpg: is not a picture",
    ):
        assert name in message
    assert "--skip-broken" in message


def test_broken_pictures_are_left_out_when_asked(class_folders):
    root = class_folders(BOTH)
    broken(root)
    data = open_data(root, "train", skip_broken=True)
    assert np.bincount(data.truth.labels).tolist() == [1, 3]
    assert [os.path.basename(k) for k, _ in data.broken] == ["001.jpg", "002.jpg", "003.jpg"]
    assert data.notes == ("3 of 7 pictures are broken and left out",)


def test_a_png_with_a_flipped_bit_in_its_middle_is_broken(class_folders):
    root = class_folders(BOTH)
    picture = root / "train" / "cat" / "extra.png"
    Image.effect_noise((40, 30), 60).convert("RGB").save(picture)
    assert len(open_data(root, "train")) == 8
    damaged = bytearray(picture.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    picture.write_bytes(damaged)
    assert open_data(root, "train", skip_broken=True).broken[0][0].endswith("extra.png")


def test_a_link_to_nothing_is_a_broken_picture(class_folders):
    root = class_folders(BOTH)
    (root / "train" / "cat" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    with pytest.raises(InputError, match=r"gone\.jpg: No such file"):
        open_data(root, "train")


def test_an_opened_source_gives_the_same_splits_and_lists_its_files_once(
    class_folders, monkeypatch
):
    root = class_folders({"": {"cat": 8, "dog": 6}})
    (root / "cat" / "deep" / "er").mkdir(parents=True)
    picture(77, (20, 30)).save(root / "cat" / "deep" / "er" / "x.jpg")
    alone = [open_data(root, split) for split in ("train", "val")]
    assert sorted(k for data in alone for k in data.keys) == sorted(
        str(p.relative_to(root)) for p in root.rglob("*.jpg")
    )
    opened = open_source(root)
    train = open_data(opened, "train")
    monkeypatch.setattr(os, "scandir", None)  # any further look would fail
    shared = [train, open_data(opened, "val", classes=train.classes)]
    assert [d.content_hash for d in shared] == [d.content_hash for d in alone]
    assert [d.notes for d in shared] == [d.notes for d in alone]


def test_training_checking_and_predicting_agree_on_links_that_lead_nowhere(class_folders):
    root = class_folders(BOTH)
    links = [root / "train" / "cat" / name for name in ("gone.jpg", "loop.jpg")]
    links[0].symlink_to("nowhere.jpg")
    links[1].symlink_to("loop.jpg")
    files = sorted(root.glob("train/*/*.jpg"))
    rows = [f"{file.relative_to(root)},{file.parent.name}\n" for file in files]
    (root / "list.csv").write_text("".join(["file,label\n", *rows]))
    for source in (root, root / "list.csv"):
        with pytest.raises(InputError, match="2 of 9 pictures are broken") as refused:
            open_data(source, "train", val_fraction=0.5)
        data = open_data(source, "all", skip_broken=True)
        assert [where for where, _ in data.broken] == [str(link) for link in links]
        assert all(f"{link}: " in str(refused.value) for link in links)
        assert check(source).errors["broken pictures"] == [
            f"{link}: {what}" for link, what in data.broken
        ]
    small = {"dims": (16, 24, 32), "depths": (1, 1, 1), "key_dim": 8}
    predict = Predictor(create_model("efficientvit_m0", num_classes=2, **small), skip_broken=True)
    good = {p.source for p in predict(root / "train")}
    assert [name for name, _ in predict.skipped] == [str(link) for link in links]
    assert good == {str(file) for file in files} - set(map(str, links))
    predict.skip_broken = False
    with pytest.raises(InputError, match="2 of 9 pictures could not be read") as refused:
        list(predict(root / "train"))
    assert all(
        f"{link} cannot be read: no such file (a link to nothing)" in str(refused.value)
        for link in links
    )


def test_a_picture_that_changes_after_indexing_is_refused(class_folders):
    data = open_data(class_folders(BOTH), "train")
    path = data.where(2)
    picture(99, (40, 50)).save(path)
    with pytest.raises(InputError, match=r"002\.jpg has changed since it was indexed"):
        data.images.read(2)
    os.remove(path)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        data.images.read(2)


def loop(root):
    (root / "train" / "cat" / "again").symlink_to(root / "train", target_is_directory=True)


def test_links_to_folders_elsewhere_are_followed(class_folders, tmp_path):
    root = class_folders(BOTH)
    shutil.move(root / "train" / "cat", tmp_path / "elsewhere")
    (root / "train" / "cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert len(open_data(root, "train")) == 7


@pytest.mark.parametrize(
    ("splits", "change", "split", "message"),
    [
        (BOTH, lambda r: shutil.rmtree(r), "train", "set: no such file or folder"),
        (BOTH, lambda r: shutil.rmtree(r / "test"), "test", "has no test split; it has train, val"),
        (BOTH, lambda r: None, "tests", "split must be one of train, val, test, all, but is 'tests'"),
        (BOTH, lambda r: shutil.rmtree(r / "train" / "cat"), "train", r"one class only \(dog\)"),
        (BOTH, lambda r: shutil.rmtree(r / "val" / "cat"), "val", "no picture of 1 of 2 classes: cat"),
        (BOTH, lambda r: (r / "val" / "cta").mkdir(), "val", "cta holds no pictures"),
        (BOTH, lambda r: (r / "val" / "cat").rename(r / "val" / "cta"), "val", "among.*: cta; known are cat"),
        (BOTH, lambda r: (r / "extra").mkdir(), "train", "others beside them"),
        (BOTH, lambda r: shutil.copytree(r / "val", r / "valid"), "val", "two folders for the split 'val'"),
        (BOTH, loop, "train", "again is a symbolic link that leads back"),
        ({"": {"cat": 1, "dog": 4}}, lambda r: None, "val", r"too few pictures to hold out .*: cat"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_in_one_message(class_folders, splits, change, split, message):
    root = class_folders(splits)
    change(root)
    with pytest.raises(InputError, match=message):
        open_data(root, split)


def test_an_empty_folder_and_loose_pictures_are_told_apart(tmp_path):
    with pytest.raises(InputError, match="holds no pictures; expected CLASS"):
        open_data(tmp_path, "train")
    picture(1).save(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="holds pictures but no class folders"):
        open_data(tmp_path, "train")


def test_a_link_to_itself_is_named(class_folders):
    root = class_folders(BOTH)
    (root / "train" / "cat" / "self").symlink_to("self")
    with pytest.raises(InputError, match="self is a symbolic link that leads to itself"):
        open_data(root, "train")


def test_given_classes_fix_the_labels_and_test_may_lack_some(class_folders):
    root = class_folders(BOTH)
    data = open_data(root, "test", classes=("dog", "bird", "cat"))
    assert data.truth.labels.tolist() == [2, 0]
    with pytest.raises(InputError, match="no picture of 1 of 3 classes: bird"):
        open_data(root, "val", classes=("dog", "bird", "cat"))


def test_a_root_whose_name_is_not_utf_8_is_read(class_folders, tmp_path):
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    data = open_data(class_folders({"train": {"cat": 2, "dog": 2}}, root), "all")
    assert data.images.read(0).shape[2] == 3


@pytest.mark.parametrize(
    ("folder", "split"),
    [("train", "train"), ("Training", "train"), ("val", "val"), ("VALID", "val"),
     ("validation", "val"), ("test", "test"), ("testing", "test")],
)  # fmt: skip
def test_a_split_folder_has_many_names(class_folders, folder, split):
    root = class_folders({folder: {"a": 1, "b": 1}})
    source = open_source(root)
    assert source.splits() == (split,)
    assert source.classes() == ("a", "b")
    assert source.count(split) == 2
    assert [key for key, *_ in source.scan(split)] == [f"{folder}/{c}/000.jpg" for c in "ab"]


def test_splits_come_in_their_order_with_the_classes_of_the_first(class_folders):
    root = class_folders({"val": {"a": 1, "c": 1}, "test": {"d": 1}, "train": {"b": 2, "a": 1}})
    source = open_source(root)
    assert source.splits() == ("train", "val", "test")
    assert source.classes() == ("a", "b")
    shutil.rmtree(root / "train")
    assert open_source(root).splits() == ("val", "test")
    assert open_source(root).classes() == ("a", "c")


def test_one_split_folder_among_class_folders_is_a_class_but_train_never_is(class_folders):
    root = class_folders({"": {"val": 1, "test": 1, "cat": 1}})
    assert open_source(root).splits() == ("",)
    assert open_source(root).classes() == ("cat", "test", "val")
    (root / "train").mkdir()
    message = r"has split folders \(test, train, val\) and others beside them \(cat\); move"
    with pytest.raises(InputError, match=message):
        open_source(root)


def test_files_go_by_their_path_whatever_the_folder_gives(class_folders):
    root = class_folders({"": {"b": 3, "a": 2, "ab": 1}})
    (root / "a" / "z").mkdir()
    for name in ("a/z/0.PNG", "a/Z.jpg", "a/é.png"):
        picture(50, (7, 8)).save(root / name)
    source = open_source(root)
    files = source.files("")
    paths = [path for _, path, _, _ in files]
    assert paths == sorted(str(p.relative_to(root)) for p in root.rglob("*.*"))
    for name, path, size, changed in files:
        assert name == path.split("/")[0]
        info = (root / path).stat()
        assert (size, changed) == (info.st_size, info.st_mtime_ns)
    assert source.count("") == len(files) == 9


def test_a_copy_for_a_worker_lists_nothing_and_reads_the_same(class_folders):
    data = open_data(class_folders({"": {"a": 2, "b": 2}}), "all")
    assert data.images.source._files
    copy = pickle.loads(pickle.dumps(data.images.source))
    assert copy._files == {}
    assert copy.read(data.keys[1], (0, 0, 0)) == data.images.read_bytes(1)
    assert copy.name == data.images.source.name


def test_a_link_back_to_any_folder_above_is_named_and_one_aside_is_followed(class_folders):
    root = class_folders({"": {"a": 2, "b": 2}})
    deep = root / "a" / "deep" / "er"
    deep.mkdir(parents=True)
    (deep / "aside").symlink_to(root / "b", target_is_directory=True)
    assert len(open_data(root, "all").keys) == 6
    for target in (deep, deep.parent, root / "a", root, root.parent):
        (deep / "back").symlink_to(target, target_is_directory=True)
        with pytest.raises(
            InputError, match=rf"er/back is a symbolic link that leads back to {target}, which"
        ):
            open_data(root, "all")
        (deep / "back").unlink()


def test_a_class_without_images_is_named_and_hidden_ones_do_not_count(class_folders):
    root = class_folders({"": {"a": 2, "b": 1}})
    (root / "b" / "000.jpg").rename(root / "b" / ".000.jpg")
    (root / "b" / ".deep").mkdir()
    picture(1).save(root / "b" / ".deep" / "x.jpg")
    with pytest.raises(
        InputError, match=rf"^class folder {root / 'b'} holds no pictures; add some"
    ):
        open_data(root, "all")


def test_an_empty_split_folder_is_told(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(
        InputError, match=rf"^{tmp_path / 'train'} holds no pictures; expected CLASS"
    ):
        open_data(tmp_path, "train")
    picture(1).save(tmp_path / "train" / "A.JPG")
    with pytest.raises(InputError, match=rf"^{tmp_path / 'train'} holds pictures but no class f"):
        open_data(tmp_path, "train")


def test_images_are_named_as_the_folder_was_given(class_folders, tmp_path, monkeypatch):
    root = class_folders({"": {"a": 2, "b": 2}})
    monkeypatch.chdir(tmp_path)
    data = open_data("set", "all")
    assert data.where(1) == "set/a/001.jpg"
    monkeypatch.chdir("/")  # what was opened is still found
    assert data.images.read_bytes(1) == (root / "a" / "001.jpg").read_bytes()


def test_images_stand_in_the_order_of_their_paths_not_of_their_classes(class_folders):
    """A hyphen sorts before the slash: "a-b/" comes before "a/"."""
    data = open_data(class_folders({"": {"a": 2, "a-b": 1}}), "all")
    assert data.keys == ["a-b/000.jpg", "a/000.jpg", "a/001.jpg"]
    assert data.truth.labels.tolist() == [1, 0, 0]
