"""What a checkup and a contact sheet say, against numbers counted by hand."""

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import picture
from vitrail.data import open_data, sheet
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
        assert (data.labels[chosen] == label).all()
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
