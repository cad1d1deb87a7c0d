"""vitrail data check and show of images with masks, against numbers counted by hand and colours seen."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image, ImageColor

from tests.data.masks import mask_set, random_ids, write_pair
from vitrail.cli import main
from vitrail.data import open_data, sheet
from vitrail.data.checkup import check


@pytest.fixture
def root(tmp_path):
    return mask_set(tmp_path / "set", {"train": 3, "val": 2}, size=(40, 50))


def test_images_and_pixels_of_each_class_are_counted(tmp_path, capsys):
    root, rows = tmp_path / "set", {"a": (0, 30), "b": (1, 9), "c": ()}
    for split, names in {"train": "aab", "val": "b"}.items():
        for i, name in enumerate(names):
            ids = np.full((40, 50), 255, np.uint8)
            for k, count in enumerate(rows[name]):
                ids[20 * k : 20 * k + 1, :count] = k
            write_pair(root, f"{split}{i}", ids, split)
    (root / "classes.txt").write_text("a\nb\nc")
    train, val = check(root).splits
    assert train.pictures == 3
    assert train.per_class == {"a": 1, "b": 3, "c": 0}
    assert train.pixels == {"a": 1, "b": 30 + 30 + 9, "c": 0}
    assert train.ignored == 3 * 2000 - 70
    assert val.pixels == {"a": 1, "b": 9, "c": 0}
    assert (train.smallest, train.most_elongated) == ((40, 50), 1.25)
    assert main(["data", "check", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  train: 3 images" in lines
    assert "    b         in       3 images   1.15% of pixels" in lines
    assert "    no class                     98.83% of pixels" in lines
    assert "    a         in       1 images   0.05% of pixels" in lines
    assert "warning: classes without a pixel: 2" in lines
    assert lines[lines.index("warning: classes without a pixel: 2") + 1] == "    train: c"
    assert lines[-1] == "ready to train, with warnings"


def test_masks_that_cannot_be_used_are_errors_with_their_files(root, capsys):
    ids = np.array(Image.open(root / "masks/train/000.png"))
    ids[4, 5] = 99
    Image.fromarray(ids).save(root / "masks/train/000.png")
    Image.fromarray(ids[:10]).save(root / "masks/train/001.png")
    (root / "masks/val/000.png").write_bytes(b"no")
    found = check(root)
    first, second, third = found.errors["masks that cannot be used"]
    assert first.startswith(f"{root}/masks/train/000.png: has values outside the classes, ")
    assert "1 pixel of 99 (first in row 4, column 5)" in first
    assert second.startswith(f"{root}/masks/train/001.png: is 10 x 51 (height x width), but its")
    assert third.startswith(f"{root}/masks/val/000.png: is not a picture")
    assert list(found.errors) == ["masks that cannot be used"]
    assert main(["data", "check", str(root)]) == 1
    assert "ERROR: masks that cannot be used: 3" in capsys.readouterr().out


def test_what_was_inferred_and_what_to_look_at_are_told(root, capsys):
    (root / "classes.txt").unlink()
    write_pair(root, "empty", np.full((40, 50), 255, np.uint8))
    found = check(root)
    assert found.errors == {}
    assert "has no classes.txt: values 0 to 2" in found.notes[0]
    (looked_at,) = found.warnings["masks to look at"]
    assert looked_at.startswith(
        "train: 1 of 4 masks are all ignored, so their images teach nothing"
    )
    assert main(["data", "check", str(root), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["notes"] == list(found.notes)
    assert main(["data", "check", str(root)]) == 0
    assert f"note: {found.notes[0]}" in capsys.readouterr().out


def test_doubles_leaks_and_contradictions_of_images_with_masks_are_told_apart(root):
    for folder, end in (("images", "jpg"), ("masks", "png")):
        shutil.copy(root / folder / f"train/000.{end}", root / folder / f"train/copy.{end}")
        shutil.copy(root / folder / f"train/001.{end}", root / folder / f"val/leak.{end}")
    shutil.copy(root / "images/train/002.jpg", root / "images/train/other.jpg")
    shape = np.array(Image.open(root / "masks/train/002.png")).shape
    Image.fromarray(random_ids(99, shape)).save(root / "masks/train/other.png")
    found = check(root)
    (double,) = found.warnings["duplicates: the same bytes more than once in a split"]
    assert double == f"{root}/images/train/000.jpg  =  {root}/images/train/copy.jpg"
    (leak,) = found.errors["leaks: the same bytes in different splits"]
    assert leak == f"{root}/images/train/001.jpg  =  {root}/images/val/leak.jpg"
    (wrong,) = found.errors["the same bytes under different masks"]
    assert wrong == f"{root}/images/train/002.jpg  =  {root}/images/train/other.jpg"


def test_frames_that_look_the_same_may_have_different_masks(root):
    image = Image.open(root / "images/train/000.jpg")
    image.save(root / "images/train/frame.png")
    ids = random_ids(5, (image.height, image.width))
    Image.fromarray(ids).save(root / "masks/train/frame.png")
    found = check(root)
    assert found.errors == {}
    assert list(found.warnings) == [
        "duplicates: pictures that look the same more than once in a split"
    ]


def test_a_split_that_cannot_be_read_is_an_error_of_the_check_and_told_by_the_sheet(
    root, tmp_path, capsys
):
    lines = "images/train/000.jpg masks/train/000.png\nimages/train/001.jpg masks/train/001.png\n"
    (root / "train.txt").write_text(lines)
    (root / "test.txt").write_text("x.jpg x.png\n")
    (root / "test.tar").touch()
    found = check(root)
    (unread,) = found.errors["splits that cannot be read"]
    assert unread.startswith(f"test: {root}/test.txt lists 1 of 1 images that do not exist")
    assert [s.name for s in found.splits] == ["train"]
    out = tmp_path / "sheet.png"
    assert main(["data", "show", str(root), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"test cannot be read: {root}/test.txt lists 1 of 1 images" in said
    assert main(["data", "show", str(root), "--split", "test", "--out", str(out)]) == 2
    assert f"{root}/test.tar lies beside it: unpack it there" in capsys.readouterr().err


def test_masks_need_a_train_split_but_no_image_of_every_class_to_hold_out(tmp_path):
    one = mask_set(tmp_path / "one", {"": 4})
    ids = np.zeros((20, 30), np.uint8)
    ids[0, 0] = 3
    write_pair(one, "rare", ids, "")
    (one / "classes.txt").write_text("a\nb\nc\nd")
    assert check(one).errors == {}
    (only,) = check(mask_set(tmp_path / "two", {"val": 2})).errors.items()
    assert only == ("no train split; a model is trained on one", ["there is val"])


COLOURS = {"a": (200, 30, 30), "b": (30, 160, 30), "c": (30, 30, 200)}


@pytest.fixture
def plain(tmp_path):
    """Black images; masks of a and b alone, but for one of c; the lower half without a class."""
    root = tmp_path / "plain"
    for i in range(20):
        ids = np.full((40, 60), 255, np.uint8)
        ids[:20, :30], ids[:20, 30:] = 0, 2 if i == 13 else 1
        write_pair(root, f"{i:02d}", ids)
        black = Image.new("RGB", (60, 40))
        black.putpixel((i, 39), (9, 9, 9))  # images of their own
        black.save(root / f"images/train/{i:02d}.jpg", quality=95)
    lines = [f"{name} {r} {g} {b}" for name, (r, g, b) in COLOURS.items()]
    (root / "classes.txt").write_text("\n".join(lines))
    return root


def of_colour(image: np.ndarray, colour) -> np.ndarray:
    return np.abs(image.astype(int) - np.array(colour)).max(-1) <= 3


def test_a_sheet_shows_a_legend_and_images_beside_their_class_maps(plain):
    image = np.array(sheet.contact_sheet([open_data(plain, "all")], "plain"))
    legend = image[168 : 168 + sheet.ENTRY + 24]
    starts = []
    for colour in COLOURS.values():
        columns = np.flatnonzero(of_colour(legend, colour).any(0))
        starts.append(columns[0])
        assert columns[-1] - columns[0] == sheet.SWATCH - 2  # within its frame
    assert starts == sorted(starts)
    assert starts[0] == sheet.MARGIN + 1
    body = image[168 + sheet.ENTRY + 24 :]
    side = ((sheet.WIDTH - 2 * sheet.MARGIN - 2 * sheet.PAIR_GAP) // 3 - 2) // 2
    high = round(40 * side / 60)
    left, top = sheet.MARGIN, 0
    assert of_colour(body[top : top + high, left : left + side], (0, 0, 0)).mean() > 0.98
    shown = body[top : top + high, left + side + 2 : left + 2 * side + 2]
    mixed = {n: [round(sheet.OPACITY * c) for c in rgb] for n, rgb in COLOURS.items()}
    assert of_colour(shown[: high // 2 - 4, : side // 2 - 4], mixed["a"]).mean() > 0.98
    between = body[5 : high // 2 - 5, left + side : left + side + 3]
    paper = of_colour(between, ImageColor.getrgb(sheet.PAPER)).all(0)
    assert paper.tolist() == [True, True, False], "two pixels apart"
    second = [of_colour(shown[: high // 2 - 4, side // 2 + 4 :], mixed[n]).mean() for n in "bc"]
    assert max(second) > 0.98
    assert of_colour(shown[high // 2 + 4 :], (0, 0, 0)).mean() > 0.98, "no class: the image itself"
    # 12 of 20 images, 4 rows of 3, and the only one with c is among them.
    rows = np.flatnonzero(of_colour(body[:, left + 4], (0, 0, 0)))
    assert len(np.flatnonzero(np.diff(rows) > 1)) == 3
    assert of_colour(body, mixed["c"]).sum() > 0.9 * (side // 2) * (high // 2)


def test_images_are_chosen_by_content_and_seed_with_every_class_among_them(plain):
    data = open_data(plain, "all")
    first = sheet._every_class(data, data.truth.counts > 0, 0)
    assert len(first) == len(set(first)) == sheet.MOST_PAIRS
    assert 13 in first
    assert 13 in sheet._every_class(data, data.truth.counts > 0, 5)
    assert sheet._every_class(data, data.truth.counts > 0, 5) != first
    order = np.random.default_rng(0).permutation(20)
    other = data.subset(order)
    assert [other.keys[i] for i in sheet._every_class(other, other.truth.counts > 0, 0)] == [
        data.keys[i] for i in first
    ]


def test_classes_without_a_palette_have_colours_that_are_far_apart(root):
    truth = open_data(root, "train").truth
    found = sheet._colours(truth).astype(int)
    assert found.shape == (3, 3)
    assert min(np.abs(found[i] - found[j]).max() for i, j in [(0, 1), (0, 2), (1, 2)]) > 60


def test_the_sheet_of_masks_is_written_and_what_is_left_out_is_told(root, tmp_path, capsys):
    (root / "masks/train/001.png").write_bytes(b"no")
    out = tmp_path / "sheet.png"
    assert main(["data", "show", str(root), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "train: 2 pictures of 3 classes" in said
    assert f"broken: {root}/masks/train/001.png: is not a picture" in said
    assert Image.open(out).width == sheet.WIDTH


def test_a_legend_tells_colour_name_share_and_images_of_every_class_in_columns(
    tmp_path, monkeypatch
):
    """Six classes and no class: two rows of four columns, whose last one ends at the margin."""
    root, names = tmp_path / "set", "abcdef"
    for i in range(3):
        ids = np.zeros((10, 20), np.uint8)
        ids[:5] = 255 if i == 0 else 0
        for k in range(1, 6 - i):
            ids[9, k] = k
        write_pair(root, f"{i}", ids)
    (root / "classes.txt").write_text("\n".join(names))
    told, titles = {}, {}
    monkeypatch.setattr(
        "PIL.ImageDraw.ImageDraw.text",
        lambda self, at, text, ink, font: told.setdefault(at, (text, font.getlength(text))),
    )
    monkeypatch.setattr(
        sheet,
        "_write",
        lambda draw, at, name, size, width, ink: titles.setdefault(name, (at, width)),
    )
    body = sheet._legend(sheet._map_entries(open_data(root, "all").truth))
    assert body.size == (1600, 2 * 46 + 24)
    counts = {"a": 600 - 100 - 5 - 4 - 3, "b": 3, "c": 3, "d": 3, "e": 2, "f": 1, "no class": 100}
    images = {"a": 3, "b": 3, "c": 3, "d": 3, "e": 2, "f": 1, "no class": 1}
    assert list(titles) == list(counts)
    for k, (name, count) in enumerate(counts.items()):
        left, top = 56 + k % 4 * 378, 8 + k // 4 * 46
        (share, wide), place = next(
            ((text, at) for at, text in told.items() if at[1] == top and left < at[0] < left + 378)
        )
        assert share == f"{count / 600:.1%}"
        assert place[0] + wide == pytest.approx(left + 378 - 24)
        assert titles[name][0] == (left + 34, top - 2)
        assert titles[name][1] == pytest.approx(378 - 24 - 34 - wide - 12)
        assert told[left + 34, top + 18][0] == f"in {images[name]:,} images"
