"""What attention does, on maps whose answer is known, and on every family that records any."""

import math

import numpy as np
import pytest
import torch

from vitrail.analysis.attention import (
    LayerStudy,
    Places,
    StageStudy,
    attention_distance,
    places_of,
    received,
    record_attention,
    similarity_between_blocks,
    similarity_between_heads,
    study_attention,
)
from vitrail.analysis.attention_page import (
    attention_pictures,
    collapse_page,
    collapse_words,
    heads_page,
    heads_words,
)
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
    assert stage.to_next(2).tolist() == [0.99, 0.0]
    assert stage.to_next(4).size == 0


@pytest.mark.parametrize("family", WITH_ATTENTION)
@pytest.mark.parametrize(("height", "width"), [(64, 96), (50, 33)])
def test_the_places_of_every_family_are_known(family, height, width):
    backbone = tiny(family)
    layers, features = record_attention(backbone, picture(height, width))
    for name, weights in layers.items():
        places = places_of(backbone, name, weights, features)
        assert places is not None, (name, tuple(weights.shape))
        assert math.prod(places.groups) == weights.shape[0]
        assert math.prod(places.queries) + places.prefix == weights.shape[2]
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


@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_every_family_is_studied_stage_by_stage(family):
    study = study_attention(tiny(family), [picture(), picture(48, 40)])
    assert study.images == 2
    assert sum(len(stage.layers) for stage in study.stages) == len(study.layers) > 0
    for stage in study.stages:
        assert np.allclose(np.diag(stage.similarity), 1)
        assert (np.abs(stage.similarity) <= 1 + 1e-5).all()


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


def test_studying_leaves_the_model_in_training_mode():
    backbone = tiny("deepvit").train()
    statistics = {k: v.clone() for k, v in backbone.named_buffers()}
    study_attention(backbone, [picture()])
    assert backbone.training
    assert backbone.blocks[1].training
    assert all(torch.equal(v, statistics[k]) for k, v in backbone.named_buffers())


def test_a_model_without_attention_says_so_and_what_to_take():
    with pytest.raises(InputError, match=r"my_net has no attention maps .* has no attention; take"):
        study_attention(tiny("mobilenetv1"), [picture()], name="my_net")
    with pytest.raises(InputError, match="separable attention weighs each token once"):
        study_attention(tiny("mobilevitv2"), [picture()])


def test_no_pictures_is_an_error():
    with pytest.raises(InputError, match="there are none"):
        study_attention(tiny("vit"), [])
