"""What the attention pages say and draw, on studies whose numbers are known."""

import re

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

import vitrail.backbones  # noqa: F401  (registers them)
from vitrail.analysis import page
from vitrail.analysis.attention import (
    AttentionStudy,
    LayerStudy,
    StageStudy,
    places_of,
    received,
    record_attention,
)
from vitrail.analysis.attention_page import (
    attention_pictures,
    collapse_page,
    collapse_words,
    heads_page,
    heads_words,
)
from vitrail.registry import tiny_entries
from vitrail_runtime.preprocess import Preprocessing


def blocks(neighbours, name="", prefix="blocks"):
    """A stage whose blocks are so similar to their next, and those further away by half as much."""
    size = len(neighbours) + 1
    similarity = np.full((size, size), 0.0)
    for p in range(size):
        for q in range(p + 1, size):
            value = neighbours[p] if q == p + 1 else neighbours[p] / 2
            similarity[p, q] = similarity[q, p] = value
    np.fill_diagonal(similarity, 1)
    return StageStudy(name, [f"{prefix}.{i}.attn" for i in range(size)], similarity)


def layer(name, similarity, distance, keys=4):
    """A layer of two heads, so similar to each other."""
    heads = np.array([[1, similarity], [similarity, 1]])
    away = None if distance is None else np.array(distance, dtype=np.float32)
    return LayerStudy(name, "", 0, 2, (4, keys), heads, away)


def study(*neighbours, name="net", layers=()):
    return AttentionStudy(name, 3, list(layers), [blocks(n) for n in neighbours])


def text_of(path):
    return path.read_text(encoding="utf-8")


@pytest.fixture
def figures(monkeypatch):
    """Every figure of a page, which is not rendered."""
    found = []

    def keep(fig):
        found.append(fig)
        page.plt.close(fig)
        return "<svg></svg>"

    monkeypatch.setattr(page, "svg", keep)
    return found


# ---- words


def test_collapse_is_told_by_how_many_blocks_and_the_mean_of_neighbours():
    said = collapse_words(study([0.95, 0.9, 0.5]), 0.9)
    assert said == (
        "net: 2 of 4 attention blocks have maps at least 0.90 similar to the block before; "
        "neighbours are 0.78 similar on average."
    )
    assert "1 of 4 attention blocks have maps at least 0.95" in collapse_words(
        study([0.95, 0.9, 0.5]), 0.95
    )
    assert "similar to one of the 2 blocks before; neighbours" in collapse_words(
        study([0.95, 0.9, 0.5]), 0.9, 2
    )


def test_stages_are_counted_together():
    said = collapse_words(study([0.95], [0.95, 0.2]), 0.9)
    assert said.startswith("net: 2 of 5 attention blocks")
    assert said.endswith("neighbours are 0.70 similar on average.")


@pytest.mark.parametrize(
    ("neighbours", "trend"),
    [
        ([0.2, 0.3, 0.5, 0.5, 0.6, 0.9], "rising from 0.25 in the first third of the depth to 0.75"),
        ([0.9, 0.6, 0.5, 0.5, 0.5, 0.3, 0.2], "falling from 0.75 in the first third of the depth to 0.25"),
        ([0.5, 0.5, 0.9, 0.9, 0.53, 0.53], "rising from 0.50"),
        ([0.5, 0.5, 0.9, 0.9, 0.51, 0.51], ""),  # as good as even
        ([0.53, 0.53, 0.9, 0.9, 0.5, 0.5], "falling from 0.53"),
        ([0.1, 0.2, 0.5, 0.7, 0.9], ""),  # too few for thirds
    ],
)  # fmt: skip
def test_a_trend_is_told_where_depth_and_difference_suffice(neighbours, trend):
    said = collapse_words(study(neighbours), 0.9)
    assert trend in said
    assert bool(trend) == ("third of the depth" in said)
    assert "third of the depth" not in collapse_words(study(neighbours, [0.1, 0.2]), 0.9)


def test_nothing_to_compare_is_said():
    said = "net: no two attention blocks have maps of one shape to compare."
    assert collapse_words(study(), 0.9) == said
    assert collapse_words(study([], []), 0.9) == said


def test_heads_are_told_by_mean_worst_layer_and_distances():
    layers = [
        layer("blocks.0.attn", 0.5, [10, 20]),
        layer("blocks.1.attn", 0.8, [40, 50]),
        layer("blocks.2.attn", 0.2, None),
        layer("blocks.3.attn", 0.6, [30, 70]),
    ]
    assert heads_words(study(layers=layers)) == (
        "net: a head's map is 0.53 similar to that of the head most like it, the mean over 4 layers; the "
        "most alike heads are in blocks.1.attn (0.80). A patch attends 15 pixels away on average in the "
        "first layer and 50 in the last."
    )


def test_layers_of_one_key_are_left_out_of_the_words_on_heads():
    trivial = layer("blocks.0.attn", 1.0, [0, 0], keys=1)
    said = heads_words(study(layers=[trivial, layer("blocks.1.attn", 0.25, [8, 10])]))
    assert "0.25 similar to that of the head most like it, the mean over 1 layers" in said
    assert "9 pixels away on average in the first layer and 9 in the last" in said
    assert said.endswith("Left out: 1 layers where there is only one token to attend to.")


def test_single_heads_have_nothing_to_compare():
    single = LayerStudy("a", "", 0, 1, (4, 4), np.ones((1, 1)), np.array([12.0]))
    said = heads_words(AttentionStudy("net", 3, [single]))
    assert said.startswith("net: no layer has heads to compare. A patch attends 12 pixels")


# ---- the page on blocks


def test_the_page_has_the_words_the_counts_and_the_maps(tmp_path, figures):
    one = study([0.95, 0.9, 0.5])
    out = collapse_page(tmp_path / "a.html", [one], {"net": "<p>MAPS</p>"}, threshold=0.9)
    text = text_of(out)
    assert f'<p class="lead">{collapse_words(one, 0.9)}</p>' in text
    assert re.findall("<b>(.*?)</b><span>(.*?)</span>", text) == [
        ("2 of 4", "similar blocks, net"),
        ("0.78", "similarity of neighbours, net"),
    ]
    assert (
        "averaged over heads, tokens and 3 pictures. The dashed line is the threshold of 0.90"
        in text
    )
    assert "<p>MAPS</p>" in text
    assert "random" not in text
    assert "shifted" not in text
    assert [fig.axes[0].get_title() for fig in figures] == [
        "similarity to the next block",
        "similarity to the 4th next block",
        "blocks",
    ]


def test_similarities_are_drawn_against_depth_stage_after_stage(tmp_path, figures):
    one = study([0.95, 0.9], [0.5, 0.4, 0.3, 0.2])
    collapse_page(tmp_path / "a.html", [one], {}, threshold=0.7)
    near, far = (fig.axes[0] for fig in figures[:2])
    *lines, threshold = near.lines
    assert [line.get_xdata().tolist() for line in lines] == [[0, 1], [3, 4, 5, 6]]
    assert [line.get_ydata().tolist() for line in lines] == [[0.95, 0.9], [0.5, 0.4, 0.3, 0.2]]
    assert set(threshold.get_ydata()) == {0.7}
    *lines, _ = far.lines
    assert [line.get_ydata().tolist() for line in lines] == [[0.25]]
    assert lines[0].get_xdata().tolist() == [3]
    assert [t.get_text() for t in near.get_legend().get_texts()] == ["net"]


def test_every_pair_of_blocks_is_drawn_from_zero_to_one(tmp_path, figures):
    one = AttentionStudy("net", 3, [], [blocks([0.9, 0.8], "layers.0"), blocks([], "layers.1")])
    collapse_page(tmp_path / "a.html", [one], {}, threshold=0.7)
    assert len(figures) == 3  # a stage of one block has no pair
    (image,) = figures[2].axes[0].images
    np.testing.assert_array_equal(image.get_array(), one.stages[0].similarity)
    assert image.get_clim() == (0, 1)
    assert figures[2].axes[0].get_title() == "layers.0"


def test_models_stand_side_by_side_each_in_its_colour(tmp_path, figures):
    both = [study([0.95, 0.9, 0.5], name="one"), study([0.1, 0.95], name="two")]
    out = collapse_page(
        tmp_path / "a.html", both, {"two": "<p>MAPS</p>"}, threshold=0.7, within=2, random=["two"]
    )
    text = text_of(out)
    assert '<p class="lead"></p>' in text
    for each in both:
        assert f"<li>{collapse_words(each, 0.7, 2)}</li>" in text
    assert "<li>The weights of two are random" in text
    assert "The weights of one" not in text
    assert "Attention over a picture: two" in text
    assert "Attention over a picture: one" not in text
    counted = figures[2].axes[0]
    assert [tick.get_text() for tick in counted.get_yticklabels()] == ["one", "two"]
    assert [bar.get_width() for bar in counted.patches] == [4, 3, 2, 1]
    assert counted.yaxis_inverted()
    colours = [to_hex(line.get_color()) for line in figures[0].axes[0].lines[:2]]
    assert colours == [to_hex(bar.get_facecolor()) for bar in counted.patches[2:]]
    assert colours[0] != colours[1]


def test_long_names_leave_room_for_the_plots_and_are_told_apart_by_their_end(tmp_path, figures):
    runs = "runs/an_experiment_with_a_long_name/"
    both = [
        study([0.9, 0.8], name=f"{runs}seed_{i}", layers=[layer("a", 0.5, [1, 2])])
        for i in range(2)
    ]
    text = text_of(collapse_page(tmp_path / "a.html", both, {}, threshold=0.7))
    heads_page(tmp_path / "b.html", both, {})
    labels = [page.shortened(f"{runs}seed_{i}") for i in range(2)]
    assert labels[0] != labels[1]
    assert max(map(len, labels)) < 30
    for fig in (figures[0], figures[-3]):
        assert [t.get_text() for t in fig.axes[0].get_legend().get_texts()] == labels
    bars = figures[2].axes[0]
    assert [tick.get_text() for tick in bars.get_yticklabels()] == labels
    assert [bar.get_width() for bar in bars.patches] == [3, 3, 2, 2]
    assert page.flowing(f"{runs}seed_0: 2 of 3") in text  # in words the name is whole


def test_shifted_windows_are_explained(tmp_path, figures):
    one = AttentionStudy("net", 3, [], [blocks([0.9, 0.8], "layers.0", "layers.0.blocks")])
    assert "Windows are shifted from block to block" in text_of(
        collapse_page(tmp_path / "a.html", [one], {}, threshold=0.7)
    )


# ---- the page on heads


def test_the_page_on_heads_has_a_row_for_each_layer(tmp_path, figures):
    layers = [
        layer("blocks.0.attn", 0.5, [20, 10.4]),
        layer("blocks.1.attn", 0.25, None),
        LayerStudy("blocks.2.attn", "", 2, 1, (9, 4), np.ones((1, 1)), np.array([7.0])),
        layer("blocks.3.attn", 1.0, [1, 2], keys=1),
    ]
    out = heads_page(tmp_path / "a.html", [study(layers=layers)], {"net": "<p>MAPS</p>"})
    text = text_of(out)
    rows = [re.findall("<td.*?>(.*?)</td>", row) for row in text.split("<tr>")[2:]]
    assert rows == [
        ["blocks.0.attn", "4 x 4", "2", "0.500", "0.500", "10 to 20"],
        ["blocks.1.attn", "4 x 4", "2", "0.250", "0.250", "not known"],
        ["blocks.2.attn", "9 x 4", "1", "one head", "", "7 to 7"],
        ["blocks.3.attn", "4 x 1", "2", "1.000", "1.000", "1 to 2"],
    ]
    assert "the mean over the layer&#x27;s heads and 3 pictures" in text
    assert "Layers of one token, or whose geometry is not known, are left out." in text
    assert "<p>MAPS</p>" in text
    alike, far = (fig.axes[0] for fig in figures)
    assert alike.get_title() == "similarity of a head to the one most like it"
    assert (far.get_title(), far.get_ylabel()) == ("mean attention distance of each head", "pixels")
    (line,) = alike.lines
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([0, 1], [0.5, 0.25])
    dots = np.concatenate([c.get_offsets() for c in far.collections])
    np.testing.assert_allclose(dots, [[0, 10.4], [0, 20], [1, 7]], rtol=1e-6)


@pytest.mark.parametrize(
    ("distances", "top"), [((30, 20), 31.5), ((32.06, 32.05), 33.663), ((0, 0), 1.0)]
)
def test_dots_are_drawn_whole_on_an_axis_from_zero(tmp_path, figures, distances, top):
    layers = [layer("blocks.0.attn", 0.5, distances), layer("blocks.1.attn", 0.5, [0, 0])]
    heads_page(tmp_path / "a.html", [study(layers=layers)], {})
    (axes,) = figures[1].axes
    assert axes.get_ylim() == pytest.approx((0, top))
    assert not any(dots.get_clip_on() for dots in axes.collections)


def test_the_page_on_heads_tells_random_weights_and_draws_several_models(tmp_path, figures):
    both = [
        study(layers=[layer("a", 0.5, [1, 2])], name="one"),
        study(layers=[layer("b", 0.4, None)], name="two"),
    ]
    text = text_of(heads_page(tmp_path / "a.html", both, {}, random=["one"]))
    assert "<li>The weights of one are random" in text
    assert text.count("<h2>How far do heads reach? one</h2>") == 1  # whose geometry is known
    assert text.count("How far do heads reach?") == 1
    assert '<p class="lead"></p>' in text
    assert "are left out" not in text
    assert "Attention over a picture" not in text
    assert [line.get_label() for line in figures[0].axes[0].lines] == ["one", "two"]
    one = study(layers=[layer("a", 0.5, [1, 2])])
    text = text_of(heads_page(tmp_path / "a.html", [one], {}))
    assert f'<p class="lead">{heads_words(one)}</p>' in text.replace("&#x27;", "'")


# ---- maps over a picture


def tiny(family):
    torch.manual_seed(0)
    entry = tiny_entries()[family]
    return entry.cls(entry.config).eval()


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: pictures with captions, and (picture, map) of each veil."""
    shown, veils = [], []
    veil = page.heat

    def heat(picture, values):
        veils.append((picture, values))
        return veil(picture, values)

    monkeypatch.setattr(page, "heat", heat)
    monkeypatch.setattr(page, "gallery", lambda pictures: shown.extend(pictures) or "GALLERY")
    return shown, veils


@pytest.mark.parametrize(
    ("family", "who"),
    [("deit", "the class token attends to"), ("mobilevit", "all patches, on average, attend to")],
)
def test_maps_are_drawn_over_the_picture_as_it_was_before_it_was_normalised(family, who, drawn):
    shown, veils = drawn
    backbone = tiny(family)
    mean, std = (0.5, 0.25, 0.125), (0.25, 0.5, 0.125)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 48, 3), dtype=np.uint8)
    image = torch.from_numpy((pixels / 255 - mean) / std).float().permute(2, 0, 1)
    said = attention_pictures(backbone, image, Preprocessing(mean=mean, std=std), heads=1)
    assert f"Bright: what {who}." in said
    assert said.endswith("GALLERY")
    assert shown[0][1] == "the picture, as the model gets it"
    np.testing.assert_array_equal(np.asarray(shown[0][0]), pixels)
    layers, features = record_attention(backbone, image)
    names = [name for name, weights in layers.items() if weights.shape[-1] > 1]
    assert [caption for _, caption in shown[1:]] == [f"{name}, head 0" for name in names]
    for name, (picture, values) in zip(names, veils, strict=True):
        np.testing.assert_array_equal(picture, pixels)
        places = places_of(backbone, name, features)
        np.testing.assert_array_equal(values, received(layers[name], places)[0].numpy())


def test_a_picture_of_one_token_is_drawn_and_colours_out_of_range_end_at_black_and_white(drawn):
    image = torch.stack([torch.full((16, 16), v) for v in (-0.5, 0.5, 1.5)])
    plain = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    attention_pictures(tiny("mobilevit"), image, plain, heads=1)
    (picture, _), *maps = drawn[0]
    assert np.asarray(picture)[0, 0].tolist() == [0, 128, 255]
    assert len(maps) == 4


def test_a_few_heads_of_a_few_blocks_from_the_first_to_the_last_are_drawn(drawn):
    entry = tiny_entries()["deit"]
    config = type(entry.config)(embed_dim=32, depth=6, num_heads=4, patch_size=8, image_size=32)
    backbone = entry.cls(config)
    attention_pictures(backbone, torch.zeros(3, 32, 48), Preprocessing())
    asked = [f"blocks.{b}.attn, head {h}" for b in (0, 2, 3, 5) for h in range(3)]
    assert [caption for _, caption in drawn[0][1:]] == asked
    drawn[0].clear()
    attention_pictures(backbone, torch.zeros(3, 32, 48), Preprocessing(), blocks=2, heads=9)
    asked = [f"blocks.{b}.attn, head {h}" for b in (0, 5) for h in range(4)]
    assert [caption for _, caption in drawn[0][1:]] == asked


def test_layers_whose_geometry_is_not_known_are_named_and_not_drawn(drawn, monkeypatch):
    known = places_of

    def some(backbone, name, features):
        return None if name == "blocks.0.attn" else known(backbone, name, features)

    monkeypatch.setattr("vitrail.analysis.attention_page.places_of", some)
    said = attention_pictures(tiny("vit"), torch.zeros(3, 32, 48), Preprocessing(), heads=1)
    assert "Not drawn, for their geometry is not known: blocks.0.attn." in said
    assert [caption for _, caption in drawn[0][1:]] == ["blocks.1.attn, head 0"]
