"""What attention does, on maps whose answer is known, and on every family that records any."""

import json
import math
from typing import ClassVar

import numpy as np
import pytest
import torch

import vitrail.backbones  # noqa: F401  (registers them)
from vitrail.analysis.attention import (
    AttentionStudy,
    LayerStudy,
    Places,
    StageStudy,
    attention_distance,
    places_of,
    received,
    record_attention,
    similarity_between_blocks,
    similarity_between_heads,
    stage_of,
    study_attention,
)
from vitrail.analysis.attention_page import (
    attention_pictures,
    collapse_page,
    collapse_words,
    heads_page,
    heads_words,
)
from vitrail.backbones.vit import Attention
from vitrail.features import Features, FeatureSpec
from vitrail.registry import tiny_entries
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing

WITH_ATTENTION = (
    "vit",
    "deit",
    "dinov2",
    "vithybrid",
    "deepvit",
    "cmt",
    "swin",
    "efficientvit",
    "mobilevit",
)


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def picture(height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(1))


def tiny(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    entry = tiny_entries()[family]
    return entry.cls(entry.config).eval()


def test_equal_maps_are_similar_by_one_and_orthogonal_ones_by_zero():
    a, b = torch.eye(4)[None, None], torch.eye(4).roll(1, 0)[None, None]
    expected = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(similarity_between_blocks([a, a.clone(), b]), expected)


def test_similarity_of_blocks_is_the_papers_sum_over_heads_and_tokens():
    a, b = maps(2, 3, 5, 7), maps(2, 3, 5, 7, seed=1)
    cosines = [
        torch.cosine_similarity(a[g, h, :, t], b[g, h, :, t], dim=0)
        for g in range(2)
        for h in range(3)
        for t in range(7)
    ]
    found = similarity_between_blocks([a, b])[0, 1]
    torch.testing.assert_close(found, torch.stack(cosines).mean())


def test_maps_in_half_precision_are_compared_in_full():
    a, b = maps(1, 2, 50, 50).half(), maps(1, 2, 50, 50, seed=1).half()
    exact = similarity_between_blocks([a.double(), b.double()])
    torch.testing.assert_close(similarity_between_blocks([a, b]), exact, rtol=1e-6, atol=0)
    exact = similarity_between_heads(a.double())
    torch.testing.assert_close(similarity_between_heads(a), exact, rtol=1e-6, atol=0)


def test_maps_of_unequal_shapes_are_refused():
    with pytest.raises(InputError, match=r"unequal shapes .* compare the blocks of one stage"):
        similarity_between_blocks([maps(1, 2, 4, 4), maps(1, 2, 9, 9)])


def test_a_head_that_repeats_another_is_found():
    weights = maps(1, 3, 6, 6)
    weights[:, 2] = weights[:, 0]
    similarity = similarity_between_heads(weights)
    assert similarity[0, 2] == pytest.approx(1.0, abs=1e-6)
    assert similarity[0, 1] < 0.95
    layer = LayerStudy("blocks.0.attn", "", 0, 3, (6, 6), similarity.numpy(), None)
    middle = float(similarity[1, [0, 2]].max())
    assert layer.most_alike == pytest.approx((1 + 1 + middle) / 3, abs=1e-6)


def test_attention_to_oneself_has_distance_zero_and_to_the_neighbour_one_patch():
    places = Places(1, (1, 4), (1, 4), 16, 16, size=(1, 4))
    weights = torch.zeros(1, 2, 5, 5)
    weights[0, 0] = torch.eye(5)
    weights[0, 1, torch.arange(5), torch.tensor([0, 2, 1, 4, 3])] = 1
    weights[..., 0] = 0.5  # the class token stands nowhere and must not count
    torch.testing.assert_close(attention_distance(weights, places), torch.tensor([0.0, 16.0]))


def test_even_attention_reaches_the_mean_distance_of_the_grid():
    places = Places(0, (3, 4), (3, 4), 8, 8, size=(3, 4))
    weights = torch.full((1, 1, 12, 12), 1 / 12)
    points = [(8 * y, 8 * x) for y in range(3) for x in range(4)]
    expected = np.mean([math.dist(p, q) for p in points for q in points])
    assert float(attention_distance(weights, places)) == pytest.approx(expected, rel=1e-5)


def test_distance_is_the_papers_mean_over_patches_weighted_by_attention():
    """Written out: class and distillation token left out, keys on a coarser grid, weights of either sign."""
    weights = torch.randn(2, 3, 2 + 6, 2 + 2, generator=torch.Generator().manual_seed(0))
    places = Places(2, (3, 2), (2, 1), 8, 16, size=(3, 2))
    q = [(8 * y + 4, 8 * x + 4) for y in range(3) for x in range(2)]
    k = [(16 * y + 8, 16 * x + 8) for y in range(2) for x in range(1)]
    for head in range(3):
        found = []
        for group in weights[:, head, 2:, 2:].abs():
            for i, row in enumerate(group):
                away = [math.dist(q[i], point) for point in k]
                found.append(float((row * torch.tensor(away)).sum() / row.sum()))
        expected = np.mean(found)
        assert float(attention_distance(weights, places)[head]) == pytest.approx(expected, rel=1e-5)


def test_a_patch_that_attends_to_the_class_token_alone_counts_as_near():
    weights = torch.zeros(1, 1, 3, 3)
    weights[..., 0] = 1
    places = Places(1, (1, 2), (1, 2), 16, 16, size=(1, 2))
    assert attention_distance(weights, places).tolist() == [0.0]


def test_heads_are_compared_by_the_cosine_of_their_whole_maps():
    weights = maps(3, 2, 4, 5) ** 2
    cosines = [
        torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        for a, b in zip(weights[:, 0], weights[:, 1], strict=True)
    ]
    found = similarity_between_heads(weights)
    torch.testing.assert_close(found[0, 1], torch.stack(cosines).mean())
    torch.testing.assert_close(found, found.T)
    torch.testing.assert_close(found.diag(), torch.ones(2))


def test_patches_receive_what_the_class_token_gives_or_the_mean_of_all():
    weights = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    places = Places(2, (2, 3), (2, 3), 8, 8, size=(2, 3))
    expected = weights[0, :, 0, 2:].abs().reshape(2, 2, 3)
    torch.testing.assert_close(received(weights, places), expected)
    weights = maps(4, 2, 4, 4) - 0.3  # windows side by side
    places = Places(0, (2, 2), (2, 2), 8, 8, size=(3, 4), groups=(2, 2))
    found = received(weights, places)
    assert found.shape == (2, 3, 4)
    mean = weights.abs().mean(2).reshape(4, 2, 2, 2)
    torch.testing.assert_close(found[:, :2, :2], mean[0])
    torch.testing.assert_close(found[:, :2, 2:], mean[1])
    torch.testing.assert_close(found[:, 2:, :2], mean[2][:, :1])


def test_a_layer_tells_how_alike_its_heads_are():
    similarity = np.array([[1, -0.5, 0.2], [-0.5, 1, 0.1], [0.2, 0.1, 1]])
    layer = LayerStudy("blocks.0.attn", "", 0, 3, (6, 2), similarity, None)
    assert layer.most_alike == pytest.approx((0.2 + 0.1 + 0.2) / 3)
    assert layer.mean_alike == pytest.approx((-0.5 + 0.2 + 0.1) / 3)
    assert not layer.trivial
    single = LayerStudy("blocks.0.attn", "", 0, 1, (6, 1), np.ones((1, 1)), None)
    assert (single.most_alike, single.mean_alike, single.trivial) == (0.0, 0.0, True)
    pair = LayerStudy("blocks.0.attn", "", 0, 2, (1, 2), similarity[:2, :2], None)
    assert (pair.most_alike, pair.mean_alike, pair.trivial) == (-0.5, -0.5, False)


def test_windows_and_interleaved_groups_are_laid_out_where_they_stand():
    numbers = torch.arange(24.0).reshape(4, 6)
    windows = numbers.reshape(2, 2, 3, 2).permute(0, 2, 1, 3).reshape(6, 4)
    cut = Places(0, (2, 2), (2, 2), 4, 4, size=(4, 6), groups=(2, 3))
    assert torch.equal(cut.lay_out(windows), numbers)
    rolled = numbers.roll((-1, -1), (0, 1)).reshape(2, 2, 3, 2).permute(0, 2, 1, 3).reshape(6, 4)
    moved = Places(0, (2, 2), (2, 2), 4, 4, size=(4, 6), groups=(2, 3), shift=(1, 1))
    assert torch.equal(moved.lay_out(rolled), numbers)
    unfolded = numbers.reshape(2, 2, 3, 2).permute(1, 3, 0, 2).reshape(4, 6)
    spread = Places(0, (2, 3), (2, 3), 8, 8, size=(4, 6), groups=(2, 2), interleaved=True)
    assert torch.equal(spread.lay_out(unfolded), numbers)


def test_blocks_like_the_one_before_are_counted():
    similarity = np.eye(4)
    for p, q, value in ((0, 1, 0.95), (1, 2, 0.5), (2, 3, 0.9), (0, 2, 0.99)):
        similarity[p, q] = similarity[q, p] = value
    stage = StageStudy("", ["a", "b", "c", "d"], similarity)
    assert stage.similar(0.9) == ["b", "d"]
    assert stage.similar(0.9, within=2) == ["b", "c", "d"]
    assert stage.similar(0.9, within=3) == ["b", "c", "d"]
    assert stage.similar(-1) == ["b", "c", "d"]  # the first has none before it
    assert stage.to_next().tolist() == [0.95, 0.5, 0.9]
    assert stage.to_next(2).tolist() == [0.99, 0.0]
    assert stage.to_next(3).tolist() == [0.0]
    assert stage.to_next(4).size == 0


def test_a_study_counts_over_its_stages_and_never_from_one_to_the_next():
    near = np.array([[1, 0.75], [0.75, 1]])
    stages = [StageStudy("a", ["a.0", "a.1"], near), StageStudy("b", ["b.0", "b.1"], near / 2)]
    study = AttentionStudy("net", 3, [], stages)
    assert study.neighbours().tolist() == [0.75, 0.375]
    assert study.neighbours(2).tolist() == []
    assert study.similar(0.75) == ["a.1"]
    assert study.similar(0.3, within=2) == ["a.1", "b.1"]
    third = StageStudy("c", ["c.0", "c.1", "c.2"], np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1.0]]))
    study.stages.append(third)
    assert study.similar(0.9) == []
    assert study.similar(0.9, within=2) == ["c.2"]
    assert AttentionStudy("net", 3).neighbours().tolist() == []


@pytest.mark.parametrize("family", WITH_ATTENTION)
@pytest.mark.parametrize(("height", "width"), [(64, 96), (50, 33)])
def test_the_places_of_every_family_are_known(family, height, width):
    backbone = tiny(family)
    layers, features = record_attention(backbone, picture(height, width))
    for name, weights in layers.items():
        places = places_of(backbone, name, features)
        assert places is not None, (name, tuple(weights.shape))
        assert_fits(places, weights)
        drawn = received(weights, places)
        assert drawn.shape[0] == weights.shape[1]
        if places.keys == places.queries and not places.interleaved:
            stride = places.query_stride
            assert drawn.shape[1:] == (math.ceil(height / stride), math.ceil(width / stride))
        distance = attention_distance(weights, places)
        assert distance.isfinite().all()
        # Windows may reach beyond the picture, but not by more than themselves.
        rows, columns = places.keys
        assert (distance <= places.key_stride * math.hypot(rows, columns)).all()


def assert_fits(places, weights):
    assert math.prod(places.groups) == weights.shape[0]
    assert math.prod(places.queries) + places.prefix == weights.shape[2]


def places(prefix, queries, stride, keys=None, thinned=1, size=None, **more):
    return Places(
        prefix, queries, keys or queries, stride, thinned * stride, size or queries, **more
    )


def interleaved(queries, stride, size):
    return places(0, queries, stride, size=size, groups=(2, 2), interleaved=True)


WHERE = {  # family -> the places at 50 x 33 pixels, layer by layer
    "vit": [places(1, (7, 5), 8)] * 2,
    "deit": [places(2, (7, 5), 8)] * 2,  # class and distillation token
    "dinov2": [places(3, (8, 5), 7)] * 2,  # class token and two registers
    "vithybrid": [places(1, (4, 3), 16)] * 2,
    "deepvit": [places(1, (7, 5), 8)] * 2,
    "cmt": [
        places(0, (13, 9), 4, keys=(2, 2), thinned=8),
        places(0, (7, 5), 8, keys=(2, 2), thinned=4),
        places(0, (4, 3), 16, keys=(2, 2), thinned=2),
        places(0, (4, 3), 16, keys=(2, 2), thinned=2),
        places(0, (2, 2), 32),
    ],
    "swin": [
        places(0, (3, 3), 4, size=(13, 9), groups=(5, 3)),
        places(0, (3, 3), 4, size=(13, 9), groups=(5, 3), shift=(1, 1)),
        places(0, (3, 3), 8, size=(7, 5), groups=(3, 2)),
        places(0, (3, 3), 8, size=(7, 5), groups=(3, 2), shift=(1, 1)),
        places(0, (3, 3), 16, size=(4, 3), groups=(2, 1)),
        places(0, (3, 3), 16, size=(4, 3), groups=(2, 1), shift=(1, 0)),  # one window across
    ],
    "efficientvit": [
        places(0, (7, 7), 16, size=(4, 3)),
        places(0, (7, 7), 32, size=(2, 2)),
        places(0, (4, 4), 64, size=(1, 1)),
    ],
    "mobilevit": [
        interleaved((4, 3), 16, size=(7, 5)),
        interleaved((2, 2), 32, size=(4, 3)),
        interleaved((2, 2), 32, size=(4, 3)),
        interleaved((1, 1), 64, size=(2, 2)),
    ],
    "vitcomer": [  # on the image padded to 64 x 64
        places(0, (2, 2), 16, size=(4, 4), groups=(2, 2)),
        places(0, (4, 4), 16),
    ],
}


@pytest.mark.parametrize("family", WHERE)
def test_the_places_of_every_layer_are_those_of_the_paper(family):
    backbone = tiny(family)
    layers, features = record_attention(backbone, picture(50, 33))
    found = [places_of(backbone, name, features) for name in layers]
    assert found == WHERE[family]
    for places, weights in zip(found, layers.values(), strict=True):
        assert_fits(places, weights)


def test_the_axis_that_one_window_covers_is_not_shifted():
    backbone = tiny("swin")
    _, features = record_attention(backbone, picture(33, 50))
    found = places_of(backbone, "layers.2.blocks.1.attn", features)
    assert (found.groups, found.shift) == ((1, 2), (0, 1))


def test_a_stage_is_what_stands_before_a_blocks_number():
    assert stage_of("layers.2.blocks.5.attn") == ("layers.2", 5)
    assert stage_of("stages.3.1.transformer.10.attn") == ("stages.3.1", 10)
    assert stage_of("blocks.3.attn") == ("", 3)


@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_every_family_is_studied_stage_by_stage(family):
    study = study_attention(tiny(family), [picture(), picture(48, 40)])
    assert study.images == 2
    assert sum(len(stage.layers) for stage in study.stages) == len(study.layers) > 0
    for stage in study.stages:
        assert np.allclose(np.diag(stage.similarity), 1)
        assert (np.abs(stage.similarity) <= 1 + 1e-5).all()


class Recording(torch.nn.Module):
    """Two stages of attention over a picture; the second has maps of one key below 64 pixels."""

    feature_specs: ClassVar = {"c3": FeatureSpec(3, 8), "c5": FeatureSpec(3, 32)}

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(2))
        self.unknown = ""

    def get_submodule(self, target: str) -> torch.nn.Module:
        if target == "layers":
            return self.layers
        return torch.nn.Identity() if target.startswith(self.unknown or "none") else Attention(4, 2)

    def forward(self, images, record=None):
        found = {"c3": images[..., ::8, ::8], "c5": images[..., ::32, ::32]}
        for i, x in enumerate(found.values()):
            tokens = x[0, 0].numel()
            seed = int(images.shape[-1])
            record[f"layers.{i}.blocks.0.attn.weights"] = maps(1, 2, tokens, tokens, seed=seed)
            record[f"layers.{i}.blocks.1.attn.weights"] = maps(
                1, 2, tokens, tokens, seed=seed + i + 1
            )
            record[f"layers.{i}.blocks.0"] = x
        return Features(found)


def test_a_study_is_the_mean_over_the_pictures_that_a_stage_is_comparable_on():
    net = Recording()
    study = study_attention(net, [picture(32, 32), picture(32, 64), picture(64, 64)], name="net")
    assert (study.model, study.images) == ("net", 3)
    found = [(a.name, a.stage, a.block, a.heads, a.tokens) for a in study.layers]
    assert found == [
        ("layers.0.blocks.0.attn", "layers.0", 0, 2, (64, 64)),
        ("layers.0.blocks.1.attn", "layers.0", 1, 2, (64, 64)),
        ("layers.1.blocks.0.attn", "layers.1", 0, 2, (4, 4)),
        ("layers.1.blocks.1.attn", "layers.1", 1, 2, (4, 4)),
    ]
    # At 32 x 32 the second stage has one token, and nothing to compare.
    for stage, sizes in zip(
        study.stages, [(32 * 32, 32 * 64, 64 * 64), (32 * 64, 64 * 64)], strict=True
    ):
        i = int(stage.name[-1])
        assert stage.layers == [f"layers.{i}.blocks.{b}.attn" for b in range(2)]
        expected = []
        for size in sizes:
            width = 32 if size == 32 * 32 else 64
            tokens = size // (1024 if i else 64)
            one = maps(1, 2, tokens, tokens, seed=width)
            other = maps(1, 2, tokens, tokens, seed=width + i + 1)
            expected.append(similarity_between_blocks([one, other])[0, 1])
        assert stage.similarity[0, 1] == pytest.approx(float(np.mean(expected)), rel=1e-6)
    last = study.layers[2]
    each = [maps(1, 2, n, n, seed=w) for n, w in ((1, 32), (2, 64), (4, 64))]
    heads = np.mean([similarity_between_heads(w).numpy() for w in each], axis=0)
    np.testing.assert_allclose(last.head_similarity, heads, rtol=1e-6)
    grids = [(1, 1), (1, 2), (2, 2)]
    away = [
        attention_distance(w, Places(0, g, g, 32, 32, size=g)).numpy()
        for w, g in zip(each, grids, strict=True)
    ]
    np.testing.assert_allclose(last.distance, np.mean(away, axis=0), rtol=1e-5)
    written = json.loads(json.dumps(study.to_dict()))
    assert written == {
        "model": "net",
        "images": 3,
        "stages": [
            {"name": s.name, "layers": s.layers, "similarity": s.similarity.tolist()}
            for s in study.stages
        ],
        "layers": [
            {
                "name": a.name,
                "heads": 2,
                "head_similarity": a.head_similarity.tolist(),
                "most_alike": a.most_alike,
                "distance": a.distance.tolist(),
            }
            for a in study.layers
        ],
    }


def test_a_layer_of_unknown_geometry_has_no_distance_and_a_model_its_class_as_name():
    net = Recording()
    net.unknown = "layers.0."
    study = study_attention(net, [picture(64, width) for width in (32, 64)])
    assert [a.distance is None for a in study.layers] == [True, True, False, False]
    assert study.model == "Recording"
    assert study.to_dict()["layers"][0]["distance"] is None


def test_the_mean_over_pictures_is_taken_of_each_picture_alone():
    backbone = tiny("deit")
    one, other = (study_attention(backbone, [picture(h, 64)]) for h in (32, 64))
    both = study_attention(backbone, [picture(32, 64), picture(64, 64)])
    for a, b, c in zip(one.layers, other.layers, both.layers, strict=True):
        assert np.allclose((a.head_similarity + b.head_similarity) / 2, c.head_similarity)
        assert np.allclose((a.distance + b.distance) / 2, c.distance)


def test_maps_of_one_token_are_trivial_and_are_not_compared(tmp_path):
    study = study_attention(tiny("efficientvit"), [picture(16, 16)], name="net")
    assert [layer.trivial for layer in study.layers] == [
        False,
        False,
        False,
    ]  # windows are filled up
    study = study_attention(tiny("mobilevit"), [picture(16, 16)], name="net")
    assert all(layer.trivial for layer in study.layers)
    assert study.stages == []
    assert study.similar(0.9) == []
    assert "no two attention blocks" in collapse_words(study, 0.9)
    assert "Left out: 4 layers" in heads_words(study)
    shown = {"net": attention_pictures(tiny("mobilevit"), picture(16, 16), Preprocessing())}
    assert collapse_page(tmp_path / "collapse.html", [study], shown, threshold=0.9).is_file()
    assert heads_page(tmp_path / "heads.html", [study], shown).is_file()


def test_studying_is_done_in_eval_mode_and_leaves_each_module_in_its_own():
    backbone = tiny("deepvit")
    expected, _ = record_attention(backbone, picture())
    backbone.train().blocks[0].eval()
    modes = {name: module.training for name, module in backbone.named_modules()}
    statistics = {k: v.clone() for k, v in backbone.named_buffers()}
    found, features = record_attention(backbone, picture())
    assert found.keys() == expected.keys() == {"blocks.0.attn", "blocks.1.attn"}
    assert all(torch.equal(v, expected[k]) for k, v in found.items())
    assert not features.maps["c3"].requires_grad
    assert {name: module.training for name, module in backbone.named_modules()} == modes
    assert all(torch.equal(v, statistics[k]) for k, v in backbone.named_buffers())
    with pytest.raises(InputError, match="batch axis"):
        record_attention(backbone, picture()[0])
    assert {name: module.training for name, module in backbone.named_modules()} == modes


def test_a_model_without_attention_says_so_and_what_to_take():
    with pytest.raises(InputError, match=r"my_net has no attention maps .* has no attention; take"):
        study_attention(tiny("mobilenetv1"), [picture()], name="my_net")
    with pytest.raises(InputError, match="separable attention weighs each token once"):
        study_attention(tiny("mobilevitv2"), [picture()])


def test_no_pictures_is_an_error():
    with pytest.raises(InputError, match="there are none"):
        study_attention(tiny("vit"), [])
