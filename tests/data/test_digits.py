"""The embedded digits: whole, reproducible, and with no digit on two sides."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.masks import class_maps
from vitrail.cli import main
from vitrail.data import digits, open_data, rle
from vitrail.data.mask_folders import MaskFolders
from vitrail_runtime.errors import InputError


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "set"
    assert main(["data", "make", "digits", str(folder)]) == 0
    return folder


def test_every_source_digit_is_in_exactly_one_split(made):
    names = Counter(p.stem for p in made.rglob("*.jpg"))
    assert len(names) == 1797
    assert set(names.values()) == {1}
    counts = {s: len(list((made / s).rglob("*.jpg"))) for s in ("train", "val", "test")}
    assert counts == {"train": 1438, "val": 179, "test": 180}


def test_the_set_opens_without_a_broken_picture_and_in_many_sizes(made):
    data = open_data(made, "train")
    assert data.classes == tuple("0123456789")
    assert np.bincount(data.truth.labels).min() >= 120
    assert len(np.unique(data.images.sizes, axis=0)) > 500


def test_the_same_seed_draws_the_same_bytes_and_another_does_not(made):
    images, labels, _ = digits._source()
    splits = digits.split_digits(labels, 0)
    for index in (0, 1000, 1796):
        path = made / splits[index] / str(labels[index]) / f"{index:04d}.jpg"
        again = path.with_suffix(".again.jpg")
        digits.draw_digit(images[index], np.random.default_rng([0, index])).save(again, quality=92)
        same = path.read_bytes() == again.read_bytes()
        again.unlink()
        assert same
    assert digits.split_digits(labels, 1) != splits


def test_the_source_is_small_and_names_its_licence():
    path = Path(digits.__file__).with_name("digits.npz")
    assert path.stat().st_size < 100_000
    assert "CC BY 4.0" in digits._source()[2]


def test_making_it_again_leaves_it_alone_and_other_folders_are_safe(made, tmp_path):
    def state() -> str:
        return hashlib.sha256(
            b"".join(p.read_bytes() for p in sorted(made.rglob("*.jpg"))[:50])
        ).hexdigest()

    before = state()
    assert digits.make_digits(made) == made
    assert state() == before
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="is not empty and does not hold these digits"):
        digits.make_digits(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        digits.make_digits(tmp_path / "mine.txt")
    around = tmp_path / "missing" / ".." / "mine"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").touch()
    with pytest.raises(InputError, match="is not empty and does not hold these digits"):
        digits.make_digits(around)
    assert not (tmp_path / "missing").exists()
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_the_attribution_lies_beside_the_pictures(made):
    assert "UCI Machine Learning Repository" in (made / "ABOUT.txt").read_text()


@pytest.fixture(scope="module")
def sheets(tmp_path_factory) -> tuple[Path, dict[str, list]]:
    """A small set for segmentation, and the source digits that went into each split."""
    folder, drawn = tmp_path_factory.mktemp("sheets") / "set", {}
    images, _, _ = digits._source()
    known = {image.tobytes(): i for i, image in enumerate(images)}  # a few digits are equal
    real = digits.draw_sheet

    def seen(inks, labels, rng):
        split = next(s for s in ("test", "val", "train") if (folder_of(s)).is_dir())
        drawn.setdefault(split, []).append([known[ink.tobytes()] for ink in inks])
        return real(inks, labels, rng)

    def folder_of(split: str) -> Path:
        (partial,) = folder.parent.glob(".set-*")
        return partial / "images" / split

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "draw_sheet", seen)
        patch.setattr(digits, "SHEETS", {"train": 20, "val": 60, "test": 6})
        assert digits.make_digits(folder, task="semantic") == folder
    return folder, drawn


def test_sheets_of_digits_are_images_with_masks_of_eleven_classes(sheets):
    folder, drawn = sheets
    source = MaskFolders(folder)
    assert source.classes() == ("background", *"0123456789")
    assert source.splits() == ("train", "val", "test")
    assert {s: source.count(s) for s in source.splits()} == {"train": 20, "val": 60, "test": 6}
    sizes = set()
    for split in source.splits():
        maps, problems, notes = class_maps(source, split)
        assert (problems, notes) == ({}, ())
        assert not maps.ignored.any()
        assert (maps.counts[:, 0] > 0).all()
        sizes |= {maps.read(i).shape for i in range(len(maps))}
        _, labels, _ = digits._source()
        for counts, mine in zip(maps.counts, drawn[split], strict=True):
            there = set(np.flatnonzero(counts[1:]).tolist())
            assert 2 <= len(mine) <= 6
            assert int(labels[mine[0]]) in there <= set(labels[mine].tolist())
    heights, widths = zip(*sizes, strict=True)
    assert 72 <= min(heights) < 80 < 136 < max(heights) <= 144
    assert 72 <= min(widths) < 80 < 155 < max(widths) <= 168
    assert maps.palette == tuple(digits.CLASSES.values())
    with Image.open(folder / "masks/val/0003.png") as mask:
        assert tuple(mask.getpalette()[3:6]) == digits.CLASSES["0"]


def test_sheets_share_no_source_digit_between_splits_and_use_all_before_one_again(sheets):
    _, drawn = sheets
    labels = digits._source()[1]
    splits = np.array(digits.split_digits(labels, 0))
    for split, of_sheets in drawn.items():
        used = [i for mine in of_sheets for i in mine]
        assert {splits[i] for i in used} == {split}
    first = [i for mine in drawn["val"] for i in mine][:175]
    assert len(set(first)) == 175  # of 179


def test_masks_lie_over_the_strokes_of_their_digits():
    images, labels, _ = digits._source()
    alike = 0
    for i in range(30):
        image, mask = digits.draw_sheet(
            images[i : i + 1], labels[i : i + 1], np.random.default_rng(i)
        )
        grey, ids = np.asarray(image.convert("L"), float), np.asarray(mask)
        assert set(np.unique(ids).tolist()) == {0, labels[i] + 1}
        assert grey[ids > 0].mean() < grey[ids == 0].mean() - 40
        part = ids > 0
        part = part[part.any(1)][:, part.any(0)]
        ink = images[i] / 16
        ink = ink[ink.any(1)][:, ink.any(0)]
        shape = Image.fromarray(part.astype(np.float32))
        shown = np.asarray(shape.resize(ink.shape[::-1], Image.Resampling.BOX))
        alike += np.corrcoef(shown.ravel(), ink.ravel())[0, 1] > 0.6
    assert alike >= 27


def test_digits_of_a_sheet_do_not_overlap():
    """A digit's pixels are as many as when it is drawn alone with the same random numbers."""
    inks, kinds = digits._source()[0][10:16], np.arange(6)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        pieces = []
        real = digits._lay

        def laid(place, pen, alpha, real=real, pieces=pieces):
            pieces.append(int((alpha > 0.3).sum()))
            real(place, pen, alpha)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(digits, "_lay", laid)
            _, mask = digits.draw_sheet(inks, kinds, rng)
        counts = np.bincount(np.asarray(mask).ravel(), minlength=7)[1:]
        assert sorted(counts[counts > 0].tolist()) == sorted(pieces)
        assert len(pieces) >= 2


def test_one_folder_holds_the_digits_of_one_task(sheets, capsys):
    folder, _ = sheets
    assert digits.make_digits(folder, task="semantic") == folder
    assert main(["data", "make", "digits", str(folder)]) == 2
    assert "is not empty and does not hold these digits" in capsys.readouterr().err
    assert main(["data", "make", "digits", str(folder), "--task", "semantic"]) == 0
    out = capsys.readouterr().out
    assert "900 sheets of handwritten digits with masks in train, val and test" in out
    assert "--model semantic_fpn/efficientvit_m0" in out
    assert main(["data", "make", "digits", str(folder), "--task", "boxes"]) == 2
    assert (
        "made for one of classify, semantic, detect, instances, panoptic, pairs, but the task is 'boxes'"
        in capsys.readouterr().err
    )
    assert digits.SHEETS == {"train": 720, "val": 90, "test": 90}


def test_sheets_are_the_same_for_a_seed(sheets, tmp_path, monkeypatch):
    folder, _ = sheets
    monkeypatch.setattr(digits, "SHEETS", {"train": 2, "val": 1, "test": 1})
    again = digits.make_digits(tmp_path / "again", task="semantic")
    other = digits.make_digits(tmp_path / "other", task="semantic", seed=1)
    for name in ("images/train/0001.jpg", "masks/train/0001.png", "masks/test/0000.png"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
        assert (other / name).read_bytes() != (folder / name).read_bytes()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> tuple[Path, dict[str, list[list[int]]]]:
    """A small set of scenes with masks, and the source digits of each scene by split."""
    folder = tmp_path_factory.mktemp("scenes") / "set"
    known = {ink.tobytes(): i for i, ink in enumerate(digits._source()[0])}
    drawn: list[list[int]] = []
    real = digits.draw_scene

    def seen(inks, labels, rng):
        drawn.append([known[ink.tobytes()] for ink in inks])
        return real(inks, labels, rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "draw_scene", seen)
        patch.setattr(digits, "SHEETS", {"train": 30, "val": 50, "test": 6})
        assert digits.make_digits(folder, task="instances") == folder
    return folder, {"train": drawn[:30], "val": drawn[30:80], "test": drawn[80:]}


def test_scenes_are_images_with_a_box_and_a_mask_of_every_digit(scenes):
    folder, drawn = scenes
    _, labels, _ = digits._source()
    empty = 0
    for split, mine in drawn.items():
        data = open_data(folder, split)
        truth = data.truth
        assert (data.classes, data.notes, data.bad) == (tuple("0123456789"), (), ())
        assert data.keys == [f"images/{split}/{n:04d}.jpg" for n in range(1, len(mine) + 1)]
        for i, digit in enumerate(mine):
            told = truth.target(i, None)
            there = labels[digit].tolist()
            assert len(digit) <= 8
            assert len(told) == len(digit) or 1 <= len(told) < len(digit)
            rest = iter(there)
            assert all(label in rest for label in told.labels.tolist())  # in their order
            assert not told.crowd.any()
            grey = np.asarray(Image.fromarray(data.images.read(i)).convert("L"), float)
            inside = np.zeros(grey.shape, bool)
            for box, area, mask in zip(told.boxes, told.areas, told.masks, strict=True):
                around, pixels = rle.box_and_area(mask["counts"], mask["size"][0])
                assert (box.tolist(), area) == (list(around), pixels)
                x1, y1, x2, y2 = around
                assert not inside[y1:y2, x1:x2].any()
                inside[y1:y2, x1:x2] = True
                shown = rle.columns(mask["counts"], mask["size"][0])[1][y1:y2].astype(bool)
                part = grey[y1:y2, x1:x2]
                assert part[shown].mean() < part[~shown].mean() - 20
            empty += not digit
    assert 0 < empty < 10
    heights, widths = data.images.sizes.T
    assert 112 <= heights.min() <= heights.max() <= 192
    assert 112 <= widths.min() <= widths.max() <= 224


def test_a_digit_is_told_where_its_strokes_lie():
    strokes = np.zeros((7, 9), bool)
    strokes[2:5, 3:8] = np.random.default_rng(0).random((3, 5)) > 0.3
    strokes[2, 5] = strokes[4, 6] = strokes[3, 3] = strokes[3, 7] = True
    placed = digits._tight(4, 20, 30, strokes)
    assert (placed.label, placed.top, placed.left) == (4, 22, 33)
    assert np.array_equal(placed.strokes, strokes[2:5, 3:8])


def test_scenes_share_no_source_digit_between_splits_and_use_all_before_one_again(scenes):
    _, drawn = scenes
    splits = np.array(digits.split_digits(digits._source()[1], 0))
    for split, of_scenes in drawn.items():
        assert {splits[i] for mine in of_scenes for i in mine} == {split}
    first = [i for mine in drawn["val"] for i in mine][:172]
    assert len(set(first)) == 172  # of 179
    assert max(len(mine) for mine in drawn["val"]) == 8


def test_scenes_for_detection_are_the_same_without_masks(scenes, tmp_path, monkeypatch):
    folder, _ = scenes
    monkeypatch.setattr(digits, "SHEETS", {"train": 4, "val": 2, "test": 1})
    boxes = digits.make_digits(tmp_path / "boxes", task="detect")
    name = "images/train/0003.jpg"
    assert (boxes / name).read_bytes() == (folder / name).read_bytes()
    ours, theirs = open_data(boxes, "train").truth, open_data(folder, "train").truth
    assert (ours.has_masks, theirs.has_masks) == (False, True)
    count = len(ours.labels)
    assert count > 5
    assert ours.boxes.tolist() == theirs.boxes[:count].tolist()
    assert ours.labels.tolist() == theirs.labels[:count].tolist()
    assert ours.areas.tolist() == (ours.boxes[:, 2:] - ours.boxes[:, :2]).prod(1).tolist()
    assert ours.category_ids.tolist() == list(range(1, 11))
    other = digits.make_digits(tmp_path / "other", task="detect", seed=1)
    assert (other / name).read_bytes() != (folder / name).read_bytes()


@pytest.mark.parametrize("task", ["detect", "instances"])
def test_what_scenes_are_made_for_is_said(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(digits, "SHEETS", {"train": 2, "val": 1, "test": 1})
    assert main(["data", "make", "digits", str(tmp_path / "x"), "--task", task]) == 0
    out = capsys.readouterr().out
    head = {"detect": "faster_rcnn", "instances": "mask_rcnn"}[task]
    what = {"detect": "with boxes in train", "instances": "with boxes and masks in train"}[task]
    assert f"--model {head}/efficientvit_m0" in out
    assert f"900 scenes of handwritten digits {what}" in out
    about = (tmp_path / "x" / "ABOUT.txt").read_text()
    assert f"`vitrail data make digits --task {task}`" in about


def test_an_unknown_action_is_one_message(capsys):
    assert main(["data", "mak"]) == 2
    assert "unknown action 'mak'" in capsys.readouterr().err


def test_every_class_is_split_in_the_same_proportions():
    _, labels, _ = digits._source()
    splits = np.array(digits.split_digits(labels, 0))
    for label, count in enumerate(np.bincount(labels).tolist()):
        train, val = round(0.8 * count), round(0.1 * count)
        of_class = Counter(splits[labels == label].tolist())
        assert of_class == {"train": train, "val": val, "test": count - train - val}


def test_a_drawn_digit_is_its_source_in_dark_ink_on_light_paper():
    images, _, _ = digits._source()
    sizes, alike = [], 0
    for i in range(40):
        drawn = digits.draw_digit(images[i], np.random.default_rng([0, i]))
        sizes.append(drawn.size[::-1])
        grey = np.asarray(drawn.convert("L"), float)
        dark = grey < (grey.min() + np.median(grey)) / 2
        rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
        part = dark[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        ink = images[i] / 16
        ink = ink[ink.any(1)][:, ink.any(0)]
        shown = np.asarray(
            Image.fromarray(part.astype(np.float32)).resize(ink.shape[::-1], Image.Resampling.BOX)
        )
        alike += np.corrcoef(shown.ravel(), ink.ravel())[0, 1] > 0.6
    assert alike >= 36
    heights, widths = zip(*sizes, strict=True)
    assert 56 <= min(heights) < 65 < 120 < max(heights) <= 128
    assert 56 <= min(widths) < 65 < 120 < max(widths) <= 144


def test_others_may_read_the_folder(made):
    assert made.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("index", "size", "means"),
    [
        (0, (118, 100), [[169.9, 144.7, 173.8], [165.1, 138.4, 148.1], [171.6, 139.6, 170.4]]),
        (500, (101, 75), [[234.8, 217.1, 223.6], [223.7, 62.2, 219.1], [249.4, 177.7, 228.7]]),
        (1000, (83, 103), [[220.8, 197.5, 216.1], [219.0, 166.9, 219.7], [220.0, 163.8, 217.3]]),
        (1700, (68, 56), [[184.5, 186.1, 183.3], [150.7, 102.8, 189.9], [202.8, 139.3, 204.3]]),
    ],
)
def test_a_seed_draws_the_same_digits_for_ever(index, size, means):
    """Scores are told of this set: a digit is bent, shaded and blurred as it was when they were measured.
    Means of ninths; a tenth of a grey level of 256 is room for another release of Pillow."""
    image = digits.draw_digit(digits._source()[0][index], np.random.default_rng([0, index]))
    pixels = np.array(image).astype(float)
    assert pixels.shape == (*size, 3)
    rows = np.array_split(pixels, [size[0] // 3, 2 * size[0] // 3])
    ninths = [np.array_split(row, [size[1] // 3, 2 * size[1] // 3], 1) for row in rows]
    found = np.array([[part.mean() for part in row] for row in ninths])
    assert np.abs(found - means).max() < 0.16


def test_digits_are_56_to_128_high_and_56_to_144_wide(made):
    sizes = np.concatenate(
        [open_data(made, split).images.sizes for split in ("train", "val", "test")]
    )
    assert (sizes.min(0).tolist(), sizes.max(0).tolist()) == ([56, 56], [128, 144])
