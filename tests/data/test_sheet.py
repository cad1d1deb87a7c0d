"""A contact sheet as a reader sees it: dots, bars and images are found by their colours."""

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw

from vitrail.data import open_data, sheet

COLOURS = {"a": (200, 30, 30), "b": (30, 160, 30), "c": (200, 160, 30)}


def drawn(root, sizes: dict[str, list[tuple[int, int]]]) -> np.ndarray:
    """The sheet of images of one colour a class; `sizes` are (height, width). One class alone has company."""
    for name, shapes in (sizes | {"c": [(20, 20)]} if len(sizes) == 1 else sizes).items():
        (root / name).mkdir(parents=True)
        for i, (height, width) in enumerate(shapes):
            image = Image.new("RGB", (width, height), COLOURS[name])
            image.save(root / name / f"{i}.png")
    return np.array(sheet.contact_sheet([open_data(root, "all")], "three")).astype(int)


def of_colour(image: np.ndarray, colour) -> np.ndarray:
    given = np.array(ImageColor.getrgb(colour) if isinstance(colour, str) else colour)
    return np.abs(image - given).max(-1) <= 2


@pytest.mark.parametrize(
    "shapes", [[(40, 100), (20, 30), (10, 250)], [(200, 100), (20, 30), (350, 20)]]
)
def test_dots_stand_at_width_and_height_from_the_corner_of_the_axes(tmp_path, shapes):
    image = drawn(tmp_path / "set", {"a": shapes})[:160, sheet.WIDTH - sheet.MARGIN - 195 :]
    axes, dots = of_colour(image, sheet.RULE), of_colour(image, sheet.ACCENT)
    rows, columns = np.flatnonzero(axes.sum(1) > 90), np.flatnonzero(axes.sum(0) > 90)
    # The line under the header is no axis: the axis of widths is the first long row.
    origin = np.array([rows[:2].mean(), columns.mean()])
    box = np.array([axes[:, columns].sum(0).max(), axes[rows[0]].sum()])
    biggest = np.array(shapes).max(0)
    scale = 0.94 * (box / biggest).min()  # one scale for both, so that both fit
    wanted = origin + np.array([*shapes, (20, 20)]) * scale * [-1, 1]
    found = np.argwhere(dots)
    for place in wanted:
        assert np.abs(found - place).max(1).min() <= 1.5
    assert all(np.abs(wanted - place).max(1).min() <= 4.5 for place in found)


def test_bars_are_as_long_as_classes_are_large(tmp_path):
    counts = {"a": 6, "b": 3, "c": 1}
    image = drawn(tmp_path / "set", {name: [(30, 40)] * n for name, n in counts.items()})
    bars = of_colour(image[168:], sheet.ACCENT)[:, : sheet.MARGIN + sheet.LABELS]
    full = of_colour(image[168:], sheet.ACCENT) | of_colour(image[168:], sheet.RULE)
    rows = np.flatnonzero(bars.sum(1) > 10)
    lengths = [
        group.max() for group in np.split(bars.sum(1)[rows], np.flatnonzero(np.diff(rows) > 9) + 1)
    ]
    room = max(full[row, : sheet.MARGIN + sheet.LABELS].sum() for row in rows)
    assert np.allclose(lengths, [room * n / 6 for n in counts.values()], atol=3)


def test_a_row_shows_images_whole_in_their_shapes_side_by_side(tmp_path):
    shapes = [(92, 60), (46, 184), (92, 10), (10, 92)]
    image = drawn(tmp_path / "set", {"a": shapes})
    shown = of_colour(image[168:], COLOURS["a"])
    rows = np.flatnonzero(shown.any(1))
    assert rows[-1] - rows[0] + 1 == sheet.ROW
    middle = np.flatnonzero(shown[rows[0] + sheet.ROW // 2])
    gaps = np.flatnonzero(np.diff(middle) > 1)
    runs = [len(run) for run in np.split(middle, gaps + 1)]
    # As wide as they are at the row's height, from a third of it to four times.
    natural = [round(w * sheet.ROW / h) for h, w in shapes]
    limits = sheet.ROW // 3, 4 * sheet.ROW
    assert sorted(runs) == sorted(min(max(limits[0], n), limits[1]) for n in natural)
    assert set(np.diff(middle)[gaps].tolist()) == {sheet.GAP + 1}
    paper = of_colour(image[168:], sheet.PAPER)
    for last in middle[gaps].tolist():
        assert shown[rows, last - 15].all(), "no line of an image is missing"
        assert paper[[rows[0] - 1, rows[-1] + 1], last - 15].all(), "nor is there one more"


def test_the_last_image_of_a_row_is_cut_at_the_margin(tmp_path):
    image = drawn(tmp_path / "set", {"a": [(30, 100)] * 9})
    columns = np.flatnonzero(of_colour(image[168:], COLOURS["a"]).any(0))
    assert columns[0] == sheet.MARGIN + sheet.LABELS
    assert columns[-1] == sheet.WIDTH - sheet.MARGIN - 1


def test_names_stand_before_their_rows_and_long_ones_end_before_the_images(tmp_path):
    names = {"wide " * 12: 1, "b": 1}
    for name in names:
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (60, 50), (200, 30, 30)).save(tmp_path / "set" / name / "0.png")
    data = open_data(tmp_path / "set", "all")
    image = np.array(sheet.contact_sheet([data], "title " * 60)).astype(int)
    ink = of_colour(image, sheet.INK)
    columns = np.flatnonzero(ink[:160].any(0))
    assert columns[0] >= sheet.MARGIN
    assert sheet.WIDTH - 500 < columns[-1] < sheet.WIDTH - sheet.MARGIN - 195, "clear of the plot"
    step = sheet.ROW + 14
    for row, (least, most) in enumerate([(5, 30), (100, sheet.LABELS)]):  # "b" is sorted first
        columns = np.flatnonzero(ink[168 + row * step : 168 + (row + 1) * step].any(0))
        assert columns[0] >= sheet.MARGIN
        assert least <= columns[-1] - sheet.MARGIN < most


def test_of_many_classes_each_has_a_cell_with_its_name_below_and_the_rest_are_counted(tmp_path):
    count = sheet.MOST_CELLS + 10
    for i in range(count):
        (tmp_path / "set" / f"n{i:03d}").mkdir(parents=True)
        Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "set" / f"n{i:03d}" / "0.png")
    image = np.array(sheet.contact_sheet([open_data(tmp_path / "set", "all")], "many")).astype(int)
    body = image[168:]
    shown = of_colour(body, (200, 30, 30))
    rows = np.flatnonzero(shown.any(1))
    starts = rows[np.flatnonzero(np.diff(rows, prepend=-9) > 1)]
    assert len(starts) == sheet.MOST_CELLS // sheet.CELLS_ACROSS
    for start in starts.tolist():
        line = shown[start + sheet.CELL // 2]
        assert line.sum() == sheet.CELLS_ACROSS * sheet.CELL
        below = body[start + sheet.CELL : start + sheet.CELL + 28]
        assert of_colour(below, sheet.SOFT).any()
    assert of_colour(body[rows[-1] + 31 :], sheet.SOFT).any(), "and 10 more classes"


@pytest.mark.parametrize("shape", [(60, 180), (180, 60)])
def test_a_cell_shows_the_middle_of_an_image(tmp_path, shape):
    """Thirds of three colours: the middle one fills the cell."""
    pixels = np.zeros((*shape, 3), np.uint8)
    thirds = np.arange(max(shape)) // 60
    colours = np.array([[200, 30, 30], [30, 160, 30], [30, 30, 200]], np.uint8)[thirds]
    pixels[:] = colours[None] if shape[1] > shape[0] else colours[:, None]
    for i in range(sheet.MOST_ROWS + 1):
        (tmp_path / "set" / f"n{i:02d}").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "set" / f"n{i:02d}" / "0.png")
    image = np.array(sheet.contact_sheet([open_data(tmp_path / "set", "all")], "m")).astype(int)
    inner = image[
        168 + 16 + 4 : 168 + 16 + sheet.CELL - 4, sheet.MARGIN + 4 : sheet.MARGIN + sheet.CELL - 4
    ]
    assert of_colour(inner, (30, 160, 30)).mean() > 0.95


def test_the_header_ends_in_a_line_from_margin_to_margin(tmp_path):
    image = drawn(tmp_path / "set", {"a": [(30, 40)]})
    rule = of_colour(image[145:168], sheet.RULE)
    rows, columns = np.flatnonzero(rule.any(1)), np.flatnonzero(rule.any(0))
    assert len(rows) == 2, "two pixels high, and level"
    assert np.abs(columns[[0, -1]] - [sheet.MARGIN, sheet.WIDTH - sheet.MARGIN]).max() <= 2
    ground = of_colour(image, sheet.PAPER)
    assert ground[:, 0].all()
    assert ground[:, -1].all()


@pytest.mark.parametrize("more", [0, 1])
def test_only_a_sheet_that_leaves_classes_out_has_room_for_saying_so(tmp_path, more):
    count = sheet.MOST_CELLS + more
    for i in range(count):
        (tmp_path / "set" / f"n{i:03d}").mkdir(parents=True)
        Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "set" / f"n{i:03d}" / "0.png")
    image = np.array(sheet.contact_sheet([open_data(tmp_path / "set", "all")], "many")).astype(int)
    below = image[np.flatnonzero(of_colour(image, (200, 30, 30)).any(1))[-1] + 31 :]
    assert of_colour(below, sheet.SOFT).any() == bool(more)
    assert len(below) - sheet.MARGIN < (60 if more else 25)
    assert len(below) - sheet.MARGIN > (30 if more else 0), "the note stands above the margin"


def test_the_header_counts_each_split_or_the_whole(class_folders, monkeypatch):
    written = []
    real = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda self, at, text, *a, **g: (written.append(text), real(self, at, text, *a, **g)),
    )
    root = class_folders({"train": {"a": 5, "b": 3}, "val": {"a": 2, "b": 1}})
    splits = [open_data(root, split) for split in ("train", "val")]
    sheet.contact_sheet(splits, "both")
    facts = next(text for text in written if "classes" in text)
    assert facts.startswith("train 8 · val 3 ")
    assert "2 classes" in facts
    assert "both" in written
    assert [text for text in written if text.isdigit()] == ["5", "3"]
    written.clear()
    sheet.contact_sheet(splits[1:], "one")
    facts = next(text for text in written if "classes" in text)
    assert facts.startswith("3 ")
    assert "val" not in facts


def test_an_image_is_a_third_of_a_row_wide_at_least_and_four_rows_at_most(tmp_path):
    image = drawn(tmp_path / "set", {"a": [(10, 400), (400, 10)]})
    row = of_colour(image[168 + 12 + sheet.ROW // 2], COLOURS["a"])
    columns = np.flatnonzero(row)
    runs = [len(run) for run in np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)]
    assert sorted(runs) == [sheet.ROW // 3, 4 * sheet.ROW]


def test_a_class_that_a_split_lacks_has_a_row_without_a_bar(class_folders):
    root = class_folders({"train": {"a": 2, "b": 2, "c": 2}, "test": {"a": 4, "b": 1}})
    classes = open_data(root, "train").classes
    data = open_data(root, "test", classes=classes)
    image = np.array(sheet.contact_sheet([data], "held")).astype(int)
    bars = of_colour(image[168:], sheet.ACCENT)[:, : sheet.MARGIN + sheet.LABELS]
    step = sheet.ROW + 14
    lengths = [bars[i * step : (i + 1) * step].sum(1).max() for i in range(3)]
    assert lengths[0] > 3 * lengths[1] > 0
    assert lengths[2] == 0
