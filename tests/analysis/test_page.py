"""The parts that pages are made of."""

import base64
import io
import re
from datetime import datetime

import matplotlib
import numpy as np
import pytest
from PIL import Image

from vitrail.analysis import page
from vitrail.tasks.section import Bullets, Images, Plot, Rows, Section, Text, Tiles


def test_a_page_is_one_file_whose_text_is_no_markup(tmp_path):
    out = page.Page("a <b>", "1 < 2")
    out.tiles([("5 > 4", "what & why"), ("6", "seven")])
    out.section("<i>", page.paragraph("x < y"), page.preformatted("k: <v>"))
    out.section("List", page.bullets(["p & q", "runs/one_two"]))
    path = out.write(tmp_path / "page.html")
    assert path == tmp_path / "page.html"
    text = path.read_text(encoding="utf-8")
    assert text.startswith('<!doctype html><html lang="en"><head><meta charset="utf-8">')
    assert "<title>a &lt;b&gt;</title>" in text
    body = re.search("<body><main>(.*)</main></body></html>\n$", text, re.DOTALL)
    assert body
    assert body[1].replace("\n", "") == (
        '<h1>a &lt;b&gt;</h1><p class="lead">1 &lt; 2</p>'
        '<div class="tiles"><div class="tile"><b>5 &gt; 4</b><span>what &amp; why</span></div>'
        '<div class="tile"><b>6</b><span>seven</span></div></div>'
        '<section><h2>&lt;i&gt;</h2><p class="note">x &lt; y</p><pre>k: &lt;v&gt;</pre></section>'
        "<section><h2>List</h2><ul><li>p &amp; q</li><li>runs/<wbr>one_<wbr>two</li></ul></section>"
    )


def test_every_block_is_rendered_by_its_kind_and_a_section_without_title_has_no_card(tmp_path):
    image = Image.new("RGB", (2, 2))
    blocks = (
        Text("x < y"),
        Bullets(["p & q", "r"]),
        Rows(("a", "b"), [("x", 1000)]),
        Images([(image, "one\ntwo")]),
        Plot(lambda ax: ax.set_title("drawn"), 3.0, 2.0),
    )
    before, out = page.plt.get_fignums(), page.Page("title")
    out.add(Section("", (Tiles([("5", "five")]),)))
    out.add(Section("<i>", blocks))
    bare, card = out.parts
    assert bare == '<div class="tiles"><div class="tile"><b>5</b><span>five</span></div></div>'
    parts = [
        '<p class="note">x &lt; y</p>',
        "<ul><li>p &amp; q</li><li>r</li></ul>",
        page.table(("a", "b"), [("x", 1000)]),
        page.gallery([(image, "one\ntwo")]),
    ]
    begin = "<section><h2>&lt;i&gt;</h2>" + "".join(parts) + '<div class="plots"><svg'
    assert card.startswith(begin)
    assert card.endswith("</svg>\n</div></section>")
    assert ">drawn</text>" in card
    assert 'width="216pt" height="144pt"' in card
    assert page.plt.get_fignums() == before


def test_a_gallery_has_as_many_columns_as_are_asked_for():
    image = Image.new("RGB", (2, 2))
    assert page.gallery([(image, "a")]).startswith('<div class="gallery"><figure>')
    three = page.render(Images([(image, "a")], columns=3))
    style = 'style="grid-template-columns: repeat(3, 1fr)"'
    assert three.startswith(f'<div class="gallery" {style}><figure>')


def test_numbers_in_a_table_stand_right_with_separators_or_three_decimals():
    drawn = page.table(("a<b", "n"), [("x/y", 1234567), ("z & w", 0.12345)])
    assert drawn == (
        '<div class="wide"><table><tr><th>a&lt;b</th><th>n</th></tr>'
        '<tr><td>x/<wbr>y</td><td class="n">1,234,567</td></tr>'
        '<tr><td>z &amp; w</td><td class="n">0.123</td></tr></table></div>'
    )


def stored(address: str) -> Image.Image:
    kind, _, data = address.partition(",")
    assert kind == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    return image


@pytest.mark.parametrize(
    ("size", "seen"),
    [
        ((640, 330), (320, 165)),
        ((330, 640), (165, 320)),
        ((321, 107), (320, 106)),
        ((1000, 1), (320, 1)),
        ((1, 1000), (1, 320)),
        ((320, 9), (320, 9)),
        ((161, 90), (161, 90)),
        ((160, 90), (320, 180)),  # whole factors, so that single pixels stay visible
        ((107, 30), (214, 60)),
        ((30, 106), (90, 318)),
        ((4, 2), (320, 160)),
    ],
)
def test_an_image_is_stored_at_most_320_pixels_long_and_small_ones_enlarged(size, seen):
    assert stored(page.data_uri(Image.new("RGBA", size))).size == seen


def test_enlarged_pixels_are_squares_of_one_colour_and_reduced_ones_are_averaged():
    pixels = np.array([[[250, 0, 0], [0, 0, 250]]], np.uint8)
    seen = np.asarray(stored(page.data_uri(Image.fromarray(pixels))), int)
    assert seen.shape == (160, 320, 3)
    for half, colour in ((seen[8:-8, 8:150], pixels[0, 0]), (seen[8:-8, 170:-8], pixels[0, 1])):
        assert abs(half - colour).max() < 12
    stripes = np.zeros((640, 640, 3), np.uint8)
    stripes[:, ::2] = 200
    seen = np.asarray(stored(page.data_uri(Image.fromarray(stripes))), int)
    assert abs(seen[:, 4:-4] - 100).max() < 12


def inferno(level: np.ndarray) -> np.ndarray:
    return matplotlib.colormaps["inferno"](level)[..., :3] * 255


def test_a_veil_darkens_where_nothing_is_and_glows_where_most_is():
    """At strength s in [0, 1]: 0.85 (1 - 0.75 s) of the image and 0.75 s of the colour."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    values = rng.random((6, 9)) * 7
    values[0, 0] = 0
    level = (values / values.max() * 255).astype(np.uint8)
    share = level[..., None] / 255
    expected = (1 - 0.75 * share) * image * 0.85 + 0.75 * share * inferno(level)
    seen = page.heat(image, values)
    assert (seen.size, seen.mode) == ((9, 6), "RGB")
    assert abs(np.asarray(seen, float) - expected).max() <= 1
    nothing = np.asarray(page.heat(image, np.zeros((2, 3))), float)
    assert abs(nothing - 0.85 * image).max() <= 1


def test_a_coarse_map_is_smoothed_over_the_image():
    image = np.zeros((40, 60, 3), np.uint8)
    values = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    level = Image.fromarray(np.array([[0, 0, 0], [0, 0, 255]], np.uint8))
    level = np.asarray(level.resize((60, 40), Image.Resampling.BICUBIC))
    seen = np.asarray(page.heat(image, values), float)
    assert abs(seen - 0.75 * level[..., None] / 255 * inferno(level)).max() <= 1


def drawn() -> str:
    fig, ax = page.figure(3.0, 2.0)
    ax.plot([0, 1], [1, 3])
    ax.set_title("a name")
    return page.svg(fig)


def test_the_same_numbers_draw_the_same_lines_without_a_date_and_leave_no_figure_open():
    before = page.plt.get_fignums()
    first = drawn()
    assert first == drawn()
    assert page.plt.get_fignums() == before
    assert first.startswith("<svg")
    assert ">a name</text>" in first
    assert str(datetime.now().year) not in re.sub("<style.*?</style>", "", first)
    assert 'width="216pt" height="144pt"' in first  # 72 points an inch


def test_a_figure_has_no_frame_and_its_grid_lies_behind():
    fig, ax = page.figure()
    assert tuple(fig.get_size_inches()) == (5.0, 3.4)
    shown = [side for side, spine in ax.spines.items() if spine.get_visible()]
    assert shown == ["left", "bottom"]
    assert ax.get_axisbelow() is True
    assert ax.xaxis.get_gridlines()[0].get_visible()
    page.plt.close(fig)


def test_a_map_of_nothing_is_a_dark_veil_without_a_word(recwarn):
    image = np.full((4, 6, 3), 200, np.uint8)
    dark = np.asarray(page.heat(image, np.zeros((2, 3))))
    assert (dark == 170).all()  # 0.85 of it
    assert not recwarn.list
