"""What a checkup and a contact sheet say, against numbers counted by hand."""

import inspect
import json
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import picture
from vitrail.data import checkup, open_data, sheet
from vitrail.data.checkup import check


def write(root, name: str, size: tuple[int, int], number: int) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number, size).save(path)


@pytest.fixture
def uneven(tmp_path):
    """Sizes (height, width) of areas 1536, 1600, 2400, 3200 and 3300; the longest shape is 2 : 1."""
    sizes = [(40, 40), (32, 48), (80, 40), (60, 40), (50, 66)]
    for i, size in enumerate(sizes):
        write(tmp_path, f"set/train/{'ab'[i > 2]}/{i}.png", size, i)
        write(tmp_path, f"set/val/{'ab'[i % 2]}/{i}.png", (33, 35), 10 + i)
    return tmp_path / "set"


def test_sizes_and_counts_are_those_of_the_images(uneven):
    train, val = check(uneven).splits
    assert (train.name, train.pictures, train.per_class) == ("train", 5, {"a": 3, "b": 2})
    assert (val.name, val.pictures, val.per_class) == ("val", 5, {"a": 3, "b": 2})
    assert (train.smallest, train.median, train.largest) == ((32, 48), (60, 40), (50, 66))
    assert train.most_elongated == pytest.approx(2.0)
    assert (val.smallest, val.median, val.largest) == ((33, 35),) * 3
    assert val.most_elongated == pytest.approx(35 / 33)


def test_without_splits_the_one_part_is_called_all(class_folders):
    (whole,) = check(class_folders({"": {"a": 5, "b": 4}})).splits
    assert whole.name == "all"
    assert whole.pictures == 9


@pytest.mark.parametrize(("most", "told"), [(9, False), (10, True), (11, True)])
def test_ten_times_as_many_images_are_unbalanced(class_folders, most, told):
    found = check(class_folders({"train": {"a": 1, "b": most}, "val": {"a": 1, "b": 1}}))
    assert found.warnings.get("unbalanced classes", []) == (
        [f"train: b has {most} times as many pictures as a ({most} and 1)"] if told else []
    )


def test_a_side_of_32_pixels_is_not_small(tmp_path):
    for i, size in enumerate([(32, 90), (31, 90), (90, 31), (90, 32)]):
        write(tmp_path, f"{'ab'[i % 2]}/{i}.png", size, i)
    (lines,) = (v for k, v in check(tmp_path).warnings.items() if "a side under 32 pixels" in k)
    assert [line.rpartition("/")[2] for line in lines] == ["2.png: 90 x 31", "1.png: 31 x 90"]


def test_images_look_the_same_up_to_four_of_255(tmp_path):
    base = np.random.default_rng(0).integers(40, 200, (8, 8, 3))
    for i, shift in enumerate((0, 4, 40, 45)):  # 45 is 5 from its neighbour, and 4 is 4
        flat = np.kron(base + shift, np.ones((6, 6, 1))).astype(np.uint8)
        (tmp_path / "set" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(flat).save(tmp_path / "set" / "ab"[i % 2] / f"{i}.png")
    found = check(tmp_path / "set")
    (line,) = found.warnings["pictures that look the same under different labels"]
    assert "a/0.png  =  " in line
    assert line.endswith("b/1.png (a, b)")


def test_three_copies_are_one_finding_in_the_split_that_has_them(class_folders):
    root = class_folders({"train": {"a": 4, "b": 4}, "val": {"a": 2, "b": 2}})
    for name in ("x", "y"):
        (root / "train" / "b" / f"{name}.jpg").write_bytes((root / "train/b/000.jpg").read_bytes())
    found = check(root)
    assert found.errors == {}
    (line,) = found.warnings["duplicates: the same bytes more than once in a split"]
    assert [p.rpartition("/")[2] for p in line.split("  =  ")] == ["000.jpg", "x.jpg", "y.jpg"]
    assert not any("look the same" in what for what in found.warnings)


def test_the_sheet_tells_the_sizes_from_the_least_to_the_largest():
    assert sheet._size_range(np.array([[40, 50], [30, 90]])) == "30 to 40 high, 50 to 90 wide"
    assert sheet._size_range(np.array([[40, 50], [40, 90]])) == "40 high, 50 to 90 wide"
    assert sheet._size_range(np.array([[40, 50], [40, 50]])) == "all 40 high, 50 wide"


def test_the_sheet_shows_images_of_the_class_chosen_by_seed_and_content(class_folders):
    data = open_data(class_folders({"": {"a": 12, "b": 70}}), "all")
    for label, count in ((0, 12), (1, 60)):
        chosen = sheet._chosen(data, label, 0)
        assert len(set(chosen)) == len(chosen) == count
        assert (data.truth.labels[chosen] == label).all()
        assert sheet._chosen(data, label, 1)[:5] != chosen[:5]
    order = np.random.default_rng(0).permutation(len(data))
    other = data.subset(order)
    assert [other.keys[i] for i in sheet._chosen(other, 1, 0)] == [
        data.keys[i] for i in sheet._chosen(data, 1, 0)
    ]


def test_a_class_has_its_own_images_beside_its_name(tmp_path):
    """Rows of one colour each: where a row's images begin, its colour is."""
    colours = {"a": (200, 30, 30), "b": (30, 160, 30), "c": (30, 30, 200)}
    for name, colour in colours.items():
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (60 + i, 50), colour).save(tmp_path / "set" / name / f"{i}.png")
    data = open_data(tmp_path / "set", "all")
    rows = np.array(sheet._rows(data, np.array([2, 2, 2]), 0)).astype(int)
    cells = np.array(sheet._grid(data, 0)).astype(int)
    for label, colour in enumerate(colours.values()):
        x, y = sheet.MARGIN + sheet.LABELS + 20, 12 + label * (sheet.ROW + 14) + sheet.ROW // 2
        assert np.abs(rows[y, x] - colour).max() < 8
        step = (sheet.WIDTH - 2 * sheet.MARGIN + sheet.GAP) / sheet.CELLS_ACROSS
        x, y = round(sheet.MARGIN + label * step) + sheet.CELL // 2, 16 + sheet.CELL // 2
        assert np.abs(cells[y, x] - colour).max() < 8


@pytest.mark.parametrize(
    ("text", "keep", "shown"),
    [("abcdefgh", 5, "abc…gh"), ("abcdefgh", 4, "ab…gh"), ("abcdefgh", 2, "a…h")],
)
def test_a_long_name_loses_its_middle(text, keep, shown):
    assert sheet._shortened(text, keep) == shown


def row(label: str, split: str, name: str) -> checkup._Seen:
    return checkup._Seen(split, label, name, name)


@pytest.mark.parametrize(
    ("group", "errors", "warnings"),
    [
        ([("a", "train"), ("a", "train")], [], ["duplicates: the same more than once in a split"]),
        ([("a", "train"), ("a", "val")], ["leaks: the same in different splits"], []),
        ([("a", "train"), ("b", "train")], ["the same under different labels"], []),
        (
            [("b", "train"), ("a", "val")],
            ["the same under different labels", "leaks: the same in different splits"],
            [],
        ),
    ],
)
def test_copies_are_filed_by_their_labels_and_splits(group, errors, warnings):
    found, told = defaultdict(list), defaultdict(list)
    checkup._file_group([row(*g, f"{i}") for i, g in enumerate(group)], "the same", found, told)
    assert list(found) == errors
    assert list(told) == warnings
    for what, (line,) in {**found, **told}.items():
        assert line == "0  =  1" + (" (a, b)" if "labels" in what else "")


def looks(*images: np.ndarray) -> list[checkup._Seen]:
    return [
        checkup._Seen("", "a", f"{i}", f"{i}", image.astype(np.uint8).tobytes())
        for i, image in enumerate(images)
    ]


def groups(*images: np.ndarray) -> list[list[str]]:
    return [[s.where for s in group] for group in checkup._looking_the_same(looks(*images))]


def test_what_looks_the_same_is_within_four_of_255_on_the_mean_directly_or_by_another():
    base = np.random.default_rng(0).integers(40, 200, (8, 8, 3))
    other = np.random.default_rng(1).integers(40, 200, (8, 8, 3))
    assert groups() == []
    assert groups(base) == []
    assert groups(base, other) == []
    assert groups(base, other, base + 4) == [["0", "2"]]
    assert groups(base, other, base + 5) == []
    assert groups(base, base - 4, other, base - 8, other) == [["0", "1", "3"], ["2", "4"]]
    # On the mean: one thumbnail's pixel may differ much, where the others agree.
    speck = base.copy()
    speck[0, 0] += 30
    assert groups(base, speck) == [["0", "1"]]
    # Half is brighter and half is darker by five: five apart, though the mean is the same.
    sign = np.where(np.indices((8, 8)).sum(0) % 2, 1, -1)[..., None]
    assert groups(base, base + 5 * sign) == []
    assert groups(base, base + 4 * sign) == [["0", "1"]]
    # A part of 2 x 2 that is 8 off is near enough to look at, one that is 9 off is not.
    for off, same in ((8, [["0", "1"]]), (9, [])):
        corner = base.copy()
        corner[:2, :2] += off
        assert groups(base, corner) == same


def test_flat_images_are_not_compared():
    """A standard deviation of 16 or less over the thumbnail."""
    half = np.zeros((8, 8, 3)) + 100
    half[:4] += 34  # a standard deviation of 17
    assert groups(half, half) == [["0", "1"]]
    half[:4] -= 2  # and of 16
    assert groups(half, half) == []


def test_sizes_of_a_split_without_a_readable_image_are_nothing(class_folders):
    root = class_folders({"train": {"a": 2, "b": 2}, "val": {"a": 1, "b": 2}})
    for path in (root / "val").rglob("*.jpg"):
        path.write_bytes(b"")
    (root / "train" / "a" / "000.jpg").write_bytes(b"")
    train, val = check(root).splits
    assert (val.name, val.pictures, val.per_class) == ("val", 3, {"a": 1, "b": 2})
    assert (val.smallest, val.median, val.largest, val.most_elongated) == ((0, 0),) * 3 + (0.0,)
    assert train.pictures == 4
    assert min(train.smallest) > 0


def test_of_two_images_the_larger_is_the_median(tmp_path):
    for i, size in enumerate([(40, 41), (50, 51)]):
        write(tmp_path, f"{'ab'[i]}/{i}.png", size, i)
    assert check(tmp_path).splits[0].median == (50, 51)


def test_classes_are_compared_with_those_of_train(class_folders):
    root = class_folders({"train": {"a": 11, "b": 2, "c": 1}, "val": {"a": 1, "d": 3}})
    found = check(root)
    assert found.classes == ("a", "b", "c")
    assert found.errors["classes without a picture"] == ["val: b", "val: c"]
    assert found.errors["classes that train does not have"] == ["val: d (3)"]
    assert found.warnings["unbalanced classes"] == [
        "train: a has 11 times as many pictures as c (11 and 1)"
    ]
    assert found.splits[1].per_class == {"a": 1, "b": 0, "c": 0, "d": 3}


def test_a_class_that_a_training_could_not_hold_out_is_named_without_its_broken_images(
    class_folders,
):
    root = class_folders({"train": {"a": 2, "b": 2, "c": 3}, "test": {"a": 1, "b": 1, "c": 1}})
    assert check(root).errors == {}
    (root / "train" / "b" / "001.jpg").write_bytes(b"")
    errors = check(root).errors
    assert list(errors) == [
        "broken pictures",
        "classes with too few pictures to hold out some for validation",
    ]
    assert list(errors.values())[1] == ["b (1); add some, or give a val split"]


def test_one_class_and_no_train_split_are_errors(class_folders, tmp_path):
    one = class_folders({"train": {"a": 3}, "val": {"a": 1}})
    assert check(one).errors == {"one class only; a classifier needs at least two": ["a"]}
    measured = class_folders({"val": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}}, tmp_path / "m")
    assert check(measured).errors == {
        "no train split; a model is trained on one": ["there is val, test"]
    }


def test_an_image_that_changes_during_the_check_is_told(class_folders, monkeypatch):
    root = class_folders({"": {"a": 3, "b": 3}})
    check(root)  # the index is made
    real = checkup.read_index

    def then_change(source, split):
        made = real(source, split)
        picture(99).save(root / "a" / "001.jpg")
        (root / "b" / "002.jpg").unlink()
        return made

    monkeypatch.setattr(checkup, "read_index", then_change)
    first, second = check(root).errors["broken pictures"]
    assert first == f"{root / 'a' / '001.jpg'}: changed while it was checked"
    assert second.startswith(f"{root / 'b' / '002.jpg'}: [Errno 2] No such file")


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_of_a_check_is_shown_on_a_terminal_alone(class_folders, monkeypatch, terminal):
    titles = []

    def track(positions, title, **given):
        titles.append((title, given["transient"], given["console"].stderr))
        return positions

    monkeypatch.setattr("rich.progress.track", track)
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: terminal, write=print))
    root = class_folders({"train": {"a": 2, "b": 2}, "val": {"a": 1, "b": 1}})
    check(root)
    assert titles == (
        [("checking train", True, True), ("checking val", True, True)] if terminal else []
    )


def test_the_finding_as_plain_data_has_every_field(class_folders):
    found = check(class_folders({"": {"a": 3, "b": 3}}))
    plain = json.loads(json.dumps(found.to_dict()))
    assert list(plain) == ["source", "classes", "splits", "errors", "warnings", "notes"]
    assert plain["source"].endswith("set")
    assert plain["splits"][0]["per_class"] == {"a": 3, "b": 3}
    assert list(plain["warnings"]) == ["pictures with a side under 32 pixels"]


def test_a_check_holds_out_as_much_as_a_training_does():
    default = inspect.signature(open_data).parameters["val_fraction"].default
    assert default == checkup.VAL_FRACTION == 0.2


@pytest.mark.parametrize(("few", "most", "told"), [(2, 19, False), (2, 20, True), (4, 9, False)])
def test_imbalance_is_how_many_times_the_largest_class_holds_the_smallest(
    class_folders, few, most, told
):
    found = check(class_folders({"train": {"a": few, "b": most}, "val": {"a": 1, "b": 1}}))
    assert ("unbalanced classes" in found.warnings) == told


def test_a_class_is_too_small_for_validation_only_where_a_training_would_say_so(tmp_path):
    """Four copies and another image: which are held out hangs on their contents."""
    for i in range(8):
        for copy in range(4):
            write(tmp_path, f"c{i}/{copy}.png", (40, 50), 2 * i)
        write(tmp_path, f"c{i}/other.png", (40, 50), 2 * i + 1)
    assert set(open_data(tmp_path, "val").truth.labels.tolist()) == set(range(8))
    assert set(open_data(tmp_path, "train").truth.labels.tolist()) == set(range(8))
    assert not any("hold out" in what for what in check(tmp_path).errors)
