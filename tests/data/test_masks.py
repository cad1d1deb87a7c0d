"""Class maps against masks built by hand; what is said of masks that cannot be right; the index of masks."""

import io
import os
import time

import numpy as np
import pytest
from PIL import Image

from tests.data.masks import class_maps, mask_set, random_ids, write_pair
from vitrail.data import cache
from vitrail.data import masks as masks_module
from vitrail.data.mask_folders import MaskFolders
from vitrail.data.masks import class_weights, decode_mask
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import decode


def png(image: Image.Image, kind: str = "PNG", **more) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def one(root, mask, *, classes="a\nb\nc", **more):
    """A set whose last image has this mask; ClassMaps, problems and notes of it."""
    root = mask_set(root, {"train": 2})
    write_pair(root, "zzz", mask, **more)
    (root / "classes.txt").write_text(classes)
    return class_maps(MaskFolders(root), "train")


def test_masks_are_read_as_they_were_drawn_and_counted(tmp_path):
    root, drawn = tmp_path / "set", []
    for i in range(4):
        ids = random_ids(i, (20 + i, 30 - i), 4)
        ids[:i] = 255
        drawn.append(ids)
        write_pair(root, f"{i}", ids)
    (root / "classes.txt").write_text("a\nb\nc\nd\ne")
    maps, problems, notes = class_maps(MaskFolders(root), "train")
    assert (problems, notes) == ({}, ())
    assert maps.classes == ("a", "b", "c", "d", "e")
    assert (len(maps), maps.kind) == (4, "class maps")
    for i, ids in enumerate(drawn):
        assert maps.read(i).dtype == np.uint8
        assert np.array_equal(maps.read(i), ids)
        assert maps.counts[i].tolist() == np.bincount(ids.ravel(), minlength=256)[:5].tolist()
        assert maps.ignored[i] == (ids == 255).sum()
        assert maps.where(i) == str(root / f"masks/train/{i}.png")
    assert maps.missing() == ["e"]


def test_a_selection_keeps_everything_of_its_images(tmp_path):
    maps, _, _ = class_maps(MaskFolders(mask_set(tmp_path / "set", {"train": 4})), "train")
    some = maps.select([3, 1, 1])
    assert len(some) == 3
    assert some.classes == maps.classes
    for new, old in enumerate([3, 1, 1]):
        assert np.array_equal(some.read(new), maps.read(old))
        assert np.array_equal(some.counts[new], maps.counts[old])
        assert some.ignored[new] == maps.ignored[old]
        assert some.digest(new) == maps.digest(old)
        assert some.where(new) == maps.where(old)
    assert len(maps.select(np.array([], np.int64))) == 0


def test_class_maps_of_several_splits_are_joined_in_order(tmp_path):
    source = MaskFolders(mask_set(tmp_path / "set", {"train": 2, "val": 3}))
    parts = [class_maps(source, s)[0] for s in ("train", "val")]
    both = parts[0].joined(parts[1:])
    assert len(both) == 5
    assert (both.problems, both.notes) == ({}, ())
    for i in range(5):
        part, k = (parts[0], i) if i < 2 else (parts[1], i - 2)
        assert np.array_equal(both.read(i), part.read(k))
        assert both.counts[i].tolist() == part.counts[k].tolist()
        assert both.ignored[i] == part.ignored[k]
        assert both.digest(i) == part.digest(k)


def test_a_target_is_the_whole_map_or_what_a_view_shows_of_it(tmp_path):
    class Corner:
        def class_map(self, ids):
            return ids[2:5, 1:7]

    maps, _, _ = class_maps(MaskFolders(mask_set(tmp_path / "set", {"train": 2})))
    assert np.array_equal(maps.target(1, None), maps.read(1))
    assert np.array_equal(maps.target(1, Corner()), maps.read(1)[2:5, 1:7])
    assert not maps.every_class_needed


@pytest.mark.parametrize("told", ["ignore\na\nb\nc", "1 a\n2 b\n3 c"])
def test_zero_without_a_class_is_mmsegmentations_reduce_zero_label(tmp_path, told):
    ids = random_ids(3, (20, 30), 4)
    ids[5] = 255
    root = tmp_path / "set"
    write_pair(root, "x", ids)
    (root / "classes.txt").write_text(told)
    reduced = ids.copy()  # mmseg.datasets.transforms.LoadAnnotations
    reduced[reduced == 0] = 255
    reduced = reduced - 1
    reduced[reduced == 254] = 255
    maps, problems, _ = class_maps(MaskFolders(root))
    assert problems == {}
    assert np.array_equal(maps.read(0), reduced)


def test_one_class_alone_is_refused(tmp_path):
    root = mask_set(tmp_path / "set", {"train": 2}, classes=1)
    with pytest.raises(
        InputError, match=r"one class only \(a\); a segmenter needs at least two: name"
    ):
        class_maps(MaskFolders(root))


@pytest.mark.parametrize("kind", ["L", "P", "I;16", "1", "LA", "RGB", "RGBA"])
def test_every_way_to_save_a_mask_gives_the_same_classes(tmp_path, kind):
    ids = random_ids(5, (21, 33), 2)
    colours = np.array([[10, 20, 30], [200, 100, 0]], np.uint8)
    if kind == "I;16":
        image = Image.fromarray(ids.astype(np.uint16))
    elif kind == "1":
        image = Image.fromarray(ids * 255).convert("1")
    elif kind == "P":
        image = Image.fromarray(ids)
        image.putpalette([9, 9, 9, 8, 8, 8])
    elif kind in ("RGB", "RGBA"):
        image = Image.fromarray(colours[ids]).convert(kind)
    else:
        image = Image.fromarray(ids).convert(kind)
    maps, problems, _ = one(tmp_path / "set", image, classes="a 10 20 30\nb 200 100 0\nc 1 1 1")
    assert problems == {}
    assert np.array_equal(maps.read(2), ids)
    assert maps.counts[2].tolist() == [*np.bincount(ids.ravel()).tolist(), 0]


def test_tiff_gives_sixteen_bits_too():
    values = np.array([[0, 300], [2, 65535]], np.uint16)
    found, colour, turn = decode_mask(png(Image.fromarray(values), "TIFF"), "m")
    assert found.tolist() == values.tolist()
    assert (colour, turn) == (False, 1)


def test_values_outside_the_classes_are_told_with_place_and_number(tmp_path):
    ids = random_ids(1, (20, 40))
    ids[3, 7:9], ids[2, 30], ids[19, 39] = 77, 31, 31
    _, problems, _ = one(tmp_path / "set", ids)
    where, what = problems[2]
    assert where == str(tmp_path / "set/masks/train/zzz.png")
    assert what == (
        "has values outside the classes, 0.5% of it: 2 pixels of 31 (first in row 2, column 30); 2 pixels of "
        "77 (first in row 3, column 7); classes are 0 to 2, without a class are 255 (classes.txt)"
    )


def test_many_strange_values_are_shortened_and_the_most_frequent_stand_first(tmp_path):
    ids = random_ids(1, (20, 40))
    ids[0, :21] = [200] * 1 + [201] * 2 + [202] * 3 + [203] * 4 + [204] * 5 + [205] * 6
    _, problems, _ = one(tmp_path / "set", ids)
    what = problems[2][1]
    assert "6 pixels of 205 (first in row 0, column 15); 5 pixels of 204" in what
    assert "2 pixels of 201 (first in row 0, column 1) and 1 other values; classes" in what
    assert " of 200 " not in what
    ids[0, 1:21] = 0
    _, problems, _ = one(tmp_path / "two", ids)
    assert ": 1 pixel of 200 (first in row 0, column 0); classes" in problems[2][1]


def test_sixteen_bits_are_read_and_what_is_above_the_classes_is_told(tmp_path):
    ids = random_ids(1, (20, 40)).astype(np.uint16)
    ids[5, 6] = 7001
    _, problems, _ = one(tmp_path / "set", Image.fromarray(ids))
    assert "1 pixel of 7001 (first in row 5, column 6); classes are 0 to 2" in problems[2][1]


def test_colours_without_a_palette_and_colours_outside_it_are_told(tmp_path):
    colours = np.array([[10, 20, 30], [200, 100, 0], [0, 0, 9]], np.uint8)
    ids = random_ids(5, (20, 30))
    ids[:], ids[4, 5], ids[6, 7] = 0, 1, 2
    image = Image.fromarray(colours[ids])
    _, problems, _ = one(tmp_path / "set", image)
    assert problems[2][1].startswith("is RGB, and classes.txt gives no colours; write lines `NAME ")
    _, problems, _ = one(tmp_path / "two", image, classes="a 10 20 30\nb 1 2 3\nc 0 0 9")
    assert problems[2][1] == (
        "has values outside the classes, 0.2% of it: 1 pixel of (200, 100, 0) (first in row 4, column 5); "
        "classes.txt gives 3 colours"
    )


def test_a_mask_of_another_size_is_told_with_both_sizes(tmp_path):
    root = mask_set(tmp_path / "set", {"train": 3})
    path = root / "masks/train/001.png"
    Image.fromarray(random_ids(1, (20, 30))).save(path)
    maps, problems, _ = class_maps(MaskFolders(root), "train")
    assert maps.select([1, 0]).problems == {}
    assert problems == {
        1: (
            str(path),
            f"is 20 x 30 (height x width), but its image {root}/images/train/001.jpg is 22 x 32; a mask has "
            "its image's size",
        )
    }
    assert maps.counts[1].sum() == 0
    assert maps.counts[0].sum() > 0
    assert maps.counts[2].sum() > 0


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "is empty (0 bytes)"),
        (b"no image", "is not a picture in a format that is read here"),
        (png(Image.fromarray(random_ids(1, (21, 31))))[:90], "is broken or truncated: "),
        (png(Image.new("L", (31, 21)), "JPEG"), "is a JPEG, whose compression changes the values"),
        (
            png(Image.new("RGBA", (31, 21), (0, 0, 0, 9))),
            "is partly transparent, which says nothing",
        ),
        (png(Image.new("LA", (31, 21), (0, 254))), "is partly transparent, which says nothing"),
        (
            png(Image.new("CMYK", (31, 21)), "TIFF"),
            "has pixels of kind CMYK; a mask is greyscale of 8 or 16 bits, has a palette, or is RGB",
        ),
        (png(Image.new("F", (31, 21)), "TIFF"), "has pixels of kind F; a mask is greyscale"),
    ],
)
def test_a_file_that_is_no_mask_is_told_and_the_others_are_read(tmp_path, payload, message):
    root = mask_set(tmp_path / "set", {"train": 3})
    (root / "masks/train/000.png").write_bytes(payload)
    maps, problems, _ = class_maps(MaskFolders(root), "train")
    assert list(problems) == [0]
    assert problems[0][0] == str(root / "masks/train/000.png")
    assert problems[0][1].startswith(message)
    assert maps.counts.any(1).tolist() == [False, True, True]
    assert maps.read(2).shape == (20, 33)


def test_a_mask_that_is_gone_or_has_changed_stops_the_reading(tmp_path):
    root = mask_set(tmp_path / "set", {"train": 2})
    maps, _, _ = class_maps(MaskFolders(root), "train")
    Image.fromarray(random_ids(9, (21, 31))).save(root / "masks/train/000.png")
    with pytest.raises(InputError, match=r"000\.png has changed since it was indexed; start again"):
        maps.read(0)
    (root / "masks/train/001.png").unlink()
    with pytest.raises(InputError, match=r"001\.png cannot be read: No such file"):
        maps.read(1)
    root = mask_set(tmp_path / "two", {"train": 2})
    (root / "masks/train/001.png").unlink()
    (root / "masks/train/001.png").symlink_to("gone")
    _, problems, _ = class_maps(MaskFolders(root), "train")
    assert problems[1] == (str(root / "masks/train/001.png"), "No such file or directory")


def test_masks_that_are_all_ignored_are_told(tmp_path):
    maps, problems, notes = one(tmp_path / "set", np.full((20, 30), 255, np.uint8))
    assert problems == {}
    assert maps.ignored[2] == 600
    assert maps.select([2]).notes == ()
    assert notes == (
        "1 of 3 masks are all ignored, so their images teach nothing: "
        + str(tmp_path / "set/masks/train/zzz.png"),
    )


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def marked(size=(24, 36)) -> np.ndarray:
    """Classes that differ in every corner, so that no two orientations are alike."""
    ids = np.zeros(size, np.uint8)
    ids[:8, :8], ids[:8, -8:], ids[-8:, :8] = 1, 2, 1
    ids[:4, :4] = 0
    return ids


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("stored", [False, True])
def test_a_mask_is_turned_with_its_image_where_it_lies_over_the_stored_pixels(
    tmp_path, orientation, stored
):
    """The image's pixels show the class, so the upright image says what the upright mask is."""
    root, ids = tmp_path / "set", marked()
    write_pair(root, "a", ids, exif=exif(orientation))
    Image.fromarray(ids * 100).save(root / "images/train/a.jpg", quality=95, exif=exif(orientation))
    (root / "classes.txt").write_text("a\nb\nc")
    upright = np.rint(decode(root / "images/train/a.jpg")[..., 0] / 100).astype(np.uint8)
    assert upright.shape == (36, 24)
    if not stored:
        Image.fromarray(upright).save(root / "masks/train/a.png")
    maps, problems, notes = class_maps(MaskFolders(root), "train")
    assert (problems, notes) == ({}, ())
    assert np.array_equal(maps.read(0), upright)
    assert maps.select([0]).read(0).shape == (36, 24)


def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path):
    ids = random_ids(3, (20, 30))
    root = mask_set(tmp_path / "set", {"train": 1})
    write_pair(root, "a", ids, exif=exif(9))
    Image.fromarray(ids).save(root / "masks/train/a.png", exif=exif(9))
    maps, problems, notes = class_maps(MaskFolders(root))
    assert (problems, notes) == ({}, ())
    assert np.array_equal(maps.read(1), ids)


@pytest.mark.parametrize("orientation", [2, 3, 4, 8])
def test_a_mask_with_an_orientation_of_its_own_is_turned_by_it(tmp_path, orientation):
    root, ids = tmp_path / "set", marked()
    write_pair(root, "a", ids, exif=exif(orientation))
    Image.fromarray(ids * 100).save(root / "images/train/a.jpg", quality=95, exif=exif(orientation))
    Image.fromarray(ids).save(root / "masks/train/a.png", exif=exif(orientation))
    (root / "classes.txt").write_text("a\nb\nc")
    upright = np.rint(decode(root / "images/train/a.jpg")[..., 0] / 100).astype(np.uint8)
    maps, problems, notes = class_maps(MaskFolders(root), "train")
    assert (problems, notes) == ({}, ())
    assert np.array_equal(maps.read(0), upright)


@pytest.mark.parametrize(
    ("orientation", "size", "told"),
    [(1, (20, 30), False), (2, (20, 30), True), (4, (20, 30), True), (6, (30, 30), True)],
)
def test_a_mask_that_fits_both_ways_is_taken_as_upright_and_told(tmp_path, orientation, size, told):
    ids = random_ids(3, size)
    maps, problems, notes = one(tmp_path / "set", ids, exif=exif(orientation))
    assert problems == {}
    assert np.array_equal(maps.read(2), ids)
    assert [
        f"fit both ways; the masks are taken to be upright: {maps.where(2)}" in n for n in notes
    ] == ([True] if told else [])


def test_a_broken_image_is_not_held_against_its_mask(tmp_path):
    root = mask_set(tmp_path / "set", {"train": 2})
    (root / "images/train/000.jpg").write_bytes(b"no")
    maps, problems, _ = class_maps(MaskFolders(root), "train")
    assert problems == {}
    assert maps.counts[0].sum() == 21 * 31


def test_masks_without_names_are_counted_up_to_the_highest_value_of_train(tmp_path):
    root = mask_set(tmp_path / "set", {"train": 2, "val": 1})
    (root / "classes.txt").unlink()
    ids = random_ids(0, (20, 30))
    ids[0, 0] = 9
    write_pair(root, "z", ids, "val")
    source = MaskFolders(root)
    assert source.classes() == ("class 0", "class 1", "class 2")
    _, problems, notes = class_maps(source, "val")
    assert "1 pixel of 9 (first in row 0, column 0); classes are 0 to 2" in problems[1][1]
    assert "(values of the masks)" in problems[1][1]
    assert "has no classes.txt: values 0 to 2 of its masks" in notes[0]


def test_rgb_masks_without_names_are_classes_by_colour(tmp_path):
    root = tmp_path / "set"
    colours = np.array([[0, 0, 0], [128, 0, 0], [0, 64, 0]], np.uint8)
    ids = random_ids(4, (20, 30))
    write_pair(root, "a", Image.fromarray(colours[ids]))
    maps, problems, notes = class_maps(MaskFolders(root), "train")
    assert problems == {}
    assert maps.palette == ((0, 0, 0), (0, 64, 0), (128, 0, 0))
    assert np.array_equal(maps.read(0), np.array([0, 2, 1], np.uint8)[ids])
    assert "no classes.txt gives their colours: each colour is a class" in notes[0]
    write_pair(root, "b", ids)  # one among them that holds values
    maps, problems, _ = class_maps(MaskFolders(root), "train")
    assert maps.classes == ("class 0", "class 1", "class 2")
    assert problems[0][1].startswith(
        "is RGB, and values of the masks gives no colours; write lines"
    )


def test_a_set_whose_masks_are_all_broken_says_so(tmp_path):
    root = mask_set(tmp_path / "set", {"train": 2})
    (root / "classes.txt").unlink()
    for path in (root / "masks/train").iterdir():
        path.write_bytes(b"no")
    with pytest.raises(
        InputError, match=r"no mask of .* can be read; the first: .*000\.png is not a"
    ):
        MaskFolders(root).classes()


def test_given_names_decide_what_the_labels_refer_to(tmp_path):
    source = MaskFolders(mask_set(tmp_path / "set", {"train": 2}))
    own, _, _ = class_maps(source, "train")
    maps, _, _ = class_maps(source, "train", ("c", "new", "b", "a"))
    assert maps.classes == ("c", "new", "b", "a")
    assert np.array_equal(maps.read(1), np.array([3, 2, 0], np.uint8)[own.read(1)])
    a, b, c = own.counts[1].tolist()
    assert maps.counts[1].tolist() == [c, 0, b, a]
    with pytest.raises(InputError, match="classes that are not among those to be learnt: b, c"):
        class_maps(source, "train", ("a", "x"))


def test_a_digest_follows_the_mask_and_its_meaning(tmp_path):
    root = mask_set(tmp_path / "set", {"train": 3})

    def digests():
        maps, _, _ = class_maps(MaskFolders(root), "train")
        return [maps.digest(i) for i in range(3)]

    first = digests()
    assert digests() == first
    assert len(set(first)) == 3
    ids = random_ids(77, (22, 32))
    Image.fromarray(ids).save(root / "masks/train/001.png")
    second = digests()
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, True]
    (root / "classes.txt").write_text("ignore\na\nb")
    assert not set(digests()) & set(second)
    (root / "classes.txt").write_text("a 1 1 1\nb 2 2 2\nc 3 3 3")  # of use for RGB masks alone
    assert digests() == second


def test_a_digest_of_an_rgb_mask_follows_the_meaning_of_its_colours(tmp_path):
    root = tmp_path / "set"
    write_pair(root, "a", Image.fromarray(np.array([[[1, 1, 1], [2, 2, 2]]], np.uint8)))
    found = []
    for text in ("a 1 1 1\nb 2 2 2", "a 2 2 2\nb 1 1 1", "0 a 1 1 1\n7 b 2 2 2"):
        (root / "classes.txt").write_text(text)
        found.append(class_maps(MaskFolders(root), "train")[0].digest(0))
    assert found[0] == found[2] != found[1]


def test_strata_are_the_rarest_class_of_each_image(tmp_path):
    root = tmp_path / "set"
    holds = [(0,), (0, 1), (0, 2), (0, 1, 2), (0, 3), (0, 1), ()]
    for i, classes in enumerate(holds):
        ids = np.full((20, 30), 255, np.uint8)
        for row, k in enumerate(classes):
            ids[row, : 30 - row] = k
        write_pair(root, f"{i}", ids)
    (root / "classes.txt").write_text("a\nb\nc\nd")
    maps, _, _ = class_maps(MaskFolders(root), "train")
    # In images: a in 6, b in 3, c in 2, d in 1.
    assert maps.strata().tolist() == [0, 1, 2, 2, 3, 1, 4]
    assert maps.strata().dtype == np.int64
    # Of this part b and c are in one image each; c has fewer pixels.
    assert maps.select([3, 0]).strata().tolist() == [2, 0]


def test_balanced_weights_are_the_median_frequency_over_each():
    counts = np.array([[90, 10, 0, 0], [50, 0, 50, 0], [60, 20, 20, 0]])
    f = [200 / 300, 30 / 200, 70 / 200]  # pixels of a class / pixels of the images that contain it
    expected = [0.35 / f[0], 0.35 / f[1], 1.0, 0.0]
    np.testing.assert_allclose(class_weights(counts), expected, rtol=1e-6)
    one = class_weights(np.array([[1, 3], [0, 4]]))  # f is 1 / 4 and 7 / 8
    np.testing.assert_allclose(one, [0.5625 / 0.25, 0.5625 / 0.875], rtol=1e-6)
    assert class_weights(counts).dtype == np.float32
    assert class_weights(np.zeros((2, 3), np.int64)).tolist() == [0, 0, 0]


def test_an_index_of_masks_is_made_once_and_again_when_a_mask_changes(tmp_path, monkeypatch):
    root = mask_set(tmp_path / "set", {"train": 3})
    (root / "masks/train/001.png").write_bytes(b"no")
    made = []
    real = masks_module.make_mask_index

    def counted(source, split):
        made.append(split)
        return real(source, split)

    monkeypatch.setattr(masks_module, "make_mask_index", counted)
    first = class_maps(MaskFolders(root), "train")
    second = class_maps(MaskFolders(root), "train")
    assert made == ["train"]
    assert second[1:] == first[1:]
    assert np.array_equal(second[0].counts, first[0].counts)
    assert np.array_equal(second[0].turns, first[0].turns)
    assert second[0].digests == first[0].digests
    assert np.array_equal(second[0].read(2), first[0].read(2))
    Image.fromarray(random_ids(1, (22, 32))).save(root / "masks/train/001.png")
    later = class_maps(MaskFolders(root), "train")
    assert made == ["train", "train"]
    assert later[1] == {}


def test_the_names_of_classes_may_change_without_a_new_index(tmp_path, monkeypatch):
    root = mask_set(tmp_path / "set", {"train": 2})
    class_maps(MaskFolders(root), "train")
    (root / "classes.txt").write_text("x\ny\nz")
    monkeypatch.setattr(masks_module, "make_mask_index", None)
    assert class_maps(MaskFolders(root), "train")[0].classes == ("x", "y", "z")


def test_a_damaged_index_is_made_anew(tmp_path, own_cache):
    source = MaskFolders(mask_set(tmp_path / "set", {"train": 2}))
    maps, _, _ = class_maps(source, "train")
    (path,) = (own_cache / "index").glob("*.npz")
    whole = path.read_bytes()
    for damaged in (whole[:-30], b"", b"no", whole[:200] + bytes(60) + whole[260:]):
        path.write_bytes(damaged)
        assert np.array_equal(class_maps(source, "train")[0].counts, maps.counts)
        assert len(path.read_bytes()) == len(whole)


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path, monkeypatch):
    def full(path, payload):
        raise OSError("no space left")

    monkeypatch.setattr(cache, "write_atomically", full)
    maps, problems, _ = class_maps(MaskFolders(mask_set(tmp_path / "set", {"train": 2})), "train")
    assert (len(maps), problems) == (2, {})


def test_an_index_that_serves_is_kept_longest(tmp_path, own_cache):
    source = MaskFolders(mask_set(tmp_path / "set", {"train": 2}))
    class_maps(source, "train")
    (path,) = (own_cache / "index").glob("*.npz")
    os.utime(path, (1, 1))
    class_maps(source, "train")
    assert path.stat().st_mtime > time.time() - 1000
