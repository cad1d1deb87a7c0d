"""What the page on importance says and draws, on scores that are known."""

import re

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from vitrail.analysis import page
from vitrail.analysis.importance import Importance, Slice
from vitrail.analysis.importance_page import COLOURS, changes, importance_page, importance_words
from vitrail.analysis.prune import Slimming
from vitrail.backbones.efficientvit import StudiedViTConfig
from vitrail.backbones.vit import ViTConfig

VIT = ViTConfig(embed_dim=32, depth=2, num_heads=2)


def found(scores):
    """scores: (stage, part) -> scores of one layer."""
    parts = tuple(
        Slice(f"{i}.{part}", stage, part, len(values), ())
        for i, ((stage, part), values) in enumerate(scores.items())
    )
    return Importance(parts, tuple(torch.tensor(v) for v in scores.values()), 24)


EVEN, FEW = [1.0] * 10, [100.0] + [1.0] * 9  # nine of ten, and one of ten, hold nine tenths


def test_the_words_name_where_few_channels_hold_most_and_where_all_matter():
    assert importance_words("net", found({(0, "Q"): FEW, (0, "V"): EVEN, (0, "FFN"): EVEN[:9]})) == (
        "net: importance is gathered in the fewest channels in Q, where 10 % of them hold 90 % of it, and is "
        "spread most evenly in FFN (100 %)."
    )  # fmt: skip
    said = importance_words("net", found({(0, "K"): EVEN, (1, "K"): FEW}))
    assert "fewest channels in K of stage 1, where 10 %" in said
    assert "most evenly in K of stage 0 (90 %)." in said


def test_parts_without_effect_are_named_and_not_compared():
    said = importance_words("net", found({(0, "Q"): [0.0, 0.0], (1, "V"): EVEN, (2, "K"): [0.0]}))
    assert "fewest channels in V of stage 1, where 90 %" in said
    assert said.endswith("(90 %). Without any effect on the loss: Q of stage 0, K of stage 2.")
    assert "Without" not in importance_words("net", found({(1, "V"): EVEN}))


@pytest.fixture
def figures(monkeypatch):
    """Every figure of a page, which is not rendered."""
    drawn = []

    def keep(fig):
        drawn.append(fig)
        page.plt.close(fig)
        return "<svg></svg>"

    monkeypatch.setattr(page, "svg", keep)
    return drawn


def rows_of(text):
    rows = [re.findall("<td.*?>(.*?)</td>", row) for row in text.split("<tr>")]
    return [row for row in rows if row]


def test_the_page_has_a_row_and_a_curve_for_each_stage_and_part(tmp_path, figures):
    scores = found(
        {(0, "V"): [0.001, 0.003], (0, "Q"): [0.0, 0.004], (1, "FFN"): EVEN, (1, "K"): [0.0]}
    )
    text = importance_page(tmp_path / "a.html", "net", scores).read_text(encoding="utf-8")
    assert f'<p class="lead">{importance_words("net", scores)}</p>' in text
    assert "batches of 24 pictures" in text
    assert "A small share that holds 90 % of it says that the part is wider" in text
    header = ["stage", "part", "channels", "share for 90 %", "mean x 1000", "no effect"]
    assert re.findall("<th>(.*?)</th>", text) == header
    assert rows_of(text) == [
        ["0", "Q", "2", "0.500", "2.000", "1"],
        ["0", "V", "2", "1.000", "2.000", "0"],
        ["1", "K", "1", "0.000", "0.000", "1"],
        ["1", "FFN", "10", "0.900", "1000.000", "0"],
    ]
    assert "slimmer" not in text
    first, second = (fig.axes[0] for fig in figures)
    assert (first.get_title(), second.get_title()) == (
        "importance held, stage 0",
        "importance held, stage 1",
    )
    q, v, even = first.lines
    assert [q.get_label(), v.get_label()] == ["Q", "V"]
    assert [to_hex(q.get_color()), to_hex(v.get_color())] == [COLOURS["Q"], COLOURS["V"]]
    np.testing.assert_allclose(v.get_xdata(), [0, 0.5, 1])
    np.testing.assert_allclose(v.get_ydata(), [0, 0.75, 1], rtol=1e-6)
    np.testing.assert_allclose(q.get_ydata(), [0, 1, 1])
    assert [*even.get_xdata(), *even.get_ydata()] == [0, 1, 0, 1]
    assert [line.get_label() for line in second.lines[:-1]] == ["FFN"]  # no curve of nothing
    importance_page(tmp_path / "a.html", "net", found({(0, "V"): EVEN}))
    assert figures[-1].axes[0].get_title() == "importance held"


def test_a_slimmer_model_is_described_by_widths_costs_and_config(tmp_path, figures):
    slim = StudiedViTConfig(embed_dim=32, depth=2, num_heads=2, qk_dim=8)
    plan = Slimming(slim, {}, ((0, "QK", 16, 8), (0, "FFN", 128, 128)))
    scores = found({(0, "V"): EVEN})
    out = importance_page(
        tmp_path / "a.html",
        "net",
        scores,
        plan=plan,
        costs=[("parameters", "2 M", "1 M")],
        config=VIT,
    )
    text = out.read_text(encoding="utf-8")
    assert rows_of(text)[1:] == [
        ["0", "Q and K, a head", "16", "8"],
        ["0", "FFN", "128", "128"],
        ["parameters", "2 M", "1 M"],
    ]
    assert "<pre>qk_dim: None -&gt; 8</pre>" in text
    plan = Slimming(VIT, {}, ((0, "QK", 16, 16),))
    out = importance_page(tmp_path / "a.html", "net", scores, plan=plan, config=VIT)
    assert "<pre>nothing changes</pre>" in out.read_text(encoding="utf-8")


def test_changes_are_the_fields_that_differ():
    other = ViTConfig(embed_dim=32, depth=3, num_heads=2, mlp_ratio=2.0)
    assert changes(VIT, other) == [("depth", 2, 3), ("mlp_ratio", 4.0, 2.0)]
    assert changes(VIT, VIT) == []
