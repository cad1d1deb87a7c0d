"""Packing as a property: nothing is lost, no budget is broken, and neighbours do not matter."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.parity import randomise
from vitrail.backbones.vit import ViT, ViTConfig, ViTHead
from vitrail.classifiers import Classifier
from vitrail.features import Features
from vitrail.packing import Spans, pack, patch_grid, plan_packs, unpack
from vitrail.registry import config_class
from vitrail_runtime.errors import InputError

PATCH = 4
SIZES = st.lists(st.tuples(st.integers(1, 21), st.integers(1, 21)), min_size=1, max_size=7)


def pictures(sizes: list[tuple[int, int]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, h, w, generator=generator, dtype=dtype) for h, w in sizes]


def backbone(**fields) -> ViT:
    shape = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": PATCH, "image_size": 16}
    model = ViT(config_class(ViTConfig, fields)(**{**shape, "mlp_ratio": 2.0, **fields}))
    randomise(model)
    return model.eval()


MODELS = {
    "vit": backbone().double(),
    "deit": backbone(distillation_token=True, attn_every=2).double(),
    "dinov2": backbone(
        mlp="swiglu",
        layer_scale_init=0.5,
        num_reg_tokens=2,
        prefix_positions=False,
        pos_antialias=False,
        pos_offset=0.1,
        out_blocks=(0, 1),
    ).double(),
    "no prefix": backbone(class_token=False, pool="avg", out_blocks=(0,)).double(),
}


@given(sizes=SIZES, patch_size=st.integers(1, 9))
def test_unpacking_gives_back_every_image_bit_for_bit(sizes, patch_size):
    images = pictures(sizes)
    found = {}
    for packed in pack(images, patch_size, max_tokens=1000):
        assert packed.patches.shape == (sum(packed.lengths), 3 * patch_size**2)
        assert found.keys().isdisjoint(packed.image_ids)
        found |= unpack(packed)
    assert found.keys() == set(range(len(images)))
    assert all(torch.equal(found[i], image) for i, image in enumerate(images))


def test_a_patch_is_a_vector_of_channel_row_column():
    image = torch.arange(2 * 4 * 6.0).reshape(2, 4, 6)
    (packed,) = pack([image], patch_size=2)
    assert packed.grids == ((2, 3),)
    assert packed.patches[4].tolist() == image[:, 2:4, 2:4].flatten().tolist()


@given(sizes=SIZES, extra=st.integers(0, 30), prefix=st.integers(0, 5))
def test_every_pack_keeps_the_budget_prefix_tokens_included(sizes, extra, prefix):
    needs = [h * w + prefix for h, w in (patch_grid(size, PATCH) for size in sizes)]
    budget = max(needs) + extra
    packs = plan_packs(sizes, PATCH, budget, prefix)
    assert sorted(i for ids in packs for i in ids) == list(range(len(sizes)))
    for ids in packs:
        assert sum(needs[i] for i in ids) <= budget
        assert [needs[i] for i in ids] == sorted((needs[i] for i in ids), reverse=True)
    # No two packs would have fitted into one.
    loads = sorted(sum(needs[i] for i in ids) for ids in packs)
    assert len(loads) < 2 or loads[0] + loads[1] > budget


def test_an_image_goes_where_the_least_room_is_left_and_ties_to_the_lower_index():
    """Longest first; 6 of 10, then 5, then 4 beside the 6, which it fills, and 3 beside the 5."""
    sizes = [(PATCH, n * PATCH) for n in (3, 5, 4, 6)]
    assert plan_packs(sizes, PATCH, 10, 0) == [[3, 2], [1, 0]]
    # 2 fits beside 7 (3 left) and beside 6 (4 left): the fuller pack takes it.
    sizes = [(PATCH, n * PATCH) for n in (2, 6, 7)]
    assert plan_packs(sizes, PATCH, 10, 0) == [[2, 0], [1]]
    assert plan_packs([(PATCH, PATCH)] * 3, PATCH, 2, 0) == [[0, 1], [2]]
    # Without a word one token of prefix is counted for each.
    assert plan_packs([(PATCH, PATCH)] * 3, PATCH, 4) == [[0, 1], [2]]
    images = [torch.zeros(3, PATCH, PATCH)] * 3
    assert [p.image_ids for p in pack(images, PATCH, 4)] == [(0, 1), (2,)]
    assert [p.image_ids for p in pack(images, PATCH, 4, 0)] == [(0, 1, 2)]
    assert pack([torch.zeros(3, 20, 17)])[0].grids == ((2, 2),)  # patches of 16


def test_a_pack_moves_to_another_dtype_with_its_places():
    (packed,) = pack(pictures([(5, 9), (4, 4)]), PATCH)
    half = packed.to(torch.float16)
    assert half.patches.dtype == torch.float16
    assert torch.equal(half.patches, packed.patches.half())
    assert packed.patches.dtype == torch.float64
    assert (half.grids, half.image_ids, half.sizes) == (
        packed.grids,
        packed.image_ids,
        packed.sizes,
    )
    assert half.sizes == ((5, 9), (4, 4))
    assert half.lengths == [6, 1]


@pytest.mark.parametrize("name", MODELS)
@given(sizes=SIZES)
@example(sizes=[(8, 12), (12, 8), (24, 4), (1, 1)])  # equal lengths of unequal grids
def test_a_packed_image_equals_the_image_alone_whatever_its_neighbours(name, sizes):
    model = MODELS[name]
    images = pictures(sizes)
    found = {}
    with torch.no_grad():
        for packed in pack(images, PATCH, 60, model.num_prefix_tokens):
            found |= model.forward_packed(packed).unpack()
        for i, image in enumerate(images):
            alone = model(image[None])
            assert found[i].maps.keys() == alone.maps.keys()
            for key, want in alone.maps.items():
                torch.testing.assert_close(found[i].maps[key], want, atol=1e-12, rtol=1e-12)
            if alone.prefix is None:
                assert found[i].prefix is None
            else:
                torch.testing.assert_close(found[i].prefix, alone.prefix, atol=1e-12, rtol=1e-12)


def test_the_law_holds_in_float32_and_for_logits():
    model = backbone(pool="both")
    head = ViTHead(model.config, model.feature_specs, 5)
    randomise(head)
    classifier = Classifier(model, head).eval()
    images = pictures([(37, 53), (16, 16), (9, 80), (16, 16)], torch.float32)
    together = {}
    for packed in pack(images, PATCH, 400):
        together |= dict(zip(packed.image_ids, classifier.forward_packed(packed), strict=True))
    got = torch.stack([together[i] for i in range(4)])
    want = torch.cat([classifier(image[None]) for image in images])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    weights = list(classifier.parameters())
    ours, theirs = (torch.autograd.grad(y.square().sum(), weights) for y in (got, want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, b.abs().max().item()), rtol=0)


def test_packed_gradients_equal_those_of_the_images_alone():
    model = backbone(layer_scale_init=0.5).double().train()
    images = pictures([(9, 13), (16, 8), (8, 16)])
    weights = [p for p in model.parameters() if p.requires_grad]

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, weights))

    (packed,) = pack(images, PATCH)
    found = model.forward_packed(packed).unpack()
    together = gradients(sum(f.prefix.square().sum() for f in found.values()))
    model.grad_checkpointing = True
    saved = model.forward_packed(packed).prefix
    again = gradients(saved.square().sum())
    alone = gradients(sum(model(image[None]).prefix.square().sum() for image in images))
    for a, b, c in zip(together, alone, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(c, b, atol=1e-10, rtol=1e-10)


@settings(max_examples=6)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 21), st.integers(1, 21)), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    budget=st.integers(40, 120),
    name=st.sampled_from(list(MODELS)),
)
def test_gradients_are_those_of_the_images_alone_in_any_order_and_budget(
    sizes, order, budget, name
):
    model = MODELS[name]
    order.shuffle(sizes)
    images = [image.requires_grad_() for image in pictures(sizes)]

    def gradients(found: list[Features]) -> list[Tensor]:
        numbers = [
            t.flatten() for f in found for t in (*f.maps.values(), f.prefix) if t is not None
        ]
        flat = torch.cat(numbers)
        weights = torch.linspace(-1, 1, len(flat), dtype=flat.dtype)
        wanted = [*images, *model.parameters()]
        return list(torch.autograd.grad((flat * weights).sum(), wanted, materialize_grads=True))

    together = {}
    for packed in pack(images, PATCH, budget, model.num_prefix_tokens):
        together |= model.forward_packed(packed).unpack()
    got = gradients([together[i] for i in range(len(images))])
    for ours, want in zip(got, gradients([model(x[None]) for x in images]), strict=True):
        largest = max(1.0, want.abs().max().item())
        torch.testing.assert_close(ours, want, atol=1e-12 * largest, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_dropped_tokens_leave_the_others_with_their_positions(name):
    """Of one image and of a neighbour in its pack; a map of what is left is one row."""
    model = MODELS[name]
    (packed,) = pack(pictures([(8, 12), (12, 4)]), PATCH, 60, model.num_prefix_tokens)
    kept = ((0, 3, 4), (1,))
    places = [0, 3, 4, 6 + 1]
    some = replace(packed, patches=packed.patches[places], kept=kept)
    assert some.lengths == [3, 1]
    found = model.forward_packed(some)
    assert found.grids == ((1, 3), (1, 1))

    x = model.patch_embed.project(packed.patches)
    x = x + torch.cat([model.positions(grid)[0] for grid in packed.grids])
    prefix = model.prefix()
    for i, own in enumerate(([0, 3, 4], [7])):
        tokens = x[own][None]
        if prefix is not None:
            tokens = torch.cat([prefix, tokens], 1)
        for block in model.blocks:
            tokens = block(tokens)
        last = model.norm(tokens)
        features = found.unpack()[i]
        if prefix is not None:
            torch.testing.assert_close(features.prefix, last[:, : prefix.shape[1]])
        if model.config.depth - 1 in model.map_names:
            name = model.map_names[model.config.depth - 1]
            own_map = features.maps[name].flatten(2).transpose(1, 2)
            torch.testing.assert_close(own_map, last[:, model.num_prefix_tokens :])


def test_neighbours_of_equal_grid_come_as_one_batch():
    model = MODELS["deit"]
    sizes = [(8, 12), (8, 12), (12, 8), (4, 4)]
    (packed,) = pack(pictures(sizes), PATCH, 60, model.num_prefix_tokens)
    found = model.forward_packed(packed)
    batches = found.batches()
    assert [f.prefix.shape[0] for f in batches] == [2, 1, 1]
    single = found.unpack()
    at = 0
    for features in batches:
        for row in range(features.prefix.shape[0]):
            alone = single[packed.image_ids[at]]
            assert torch.equal(features.prefix[row], alone.prefix[0])
            for key, value in alone.maps.items():
                assert torch.equal(features.maps[key][row], value[0])
            at += 1
    assert at == 4


def test_spans_tell_where_images_begin_and_which_image_a_token_is_of():
    spans, cpu = Spans((2, 2, 1)), torch.device("cpu")
    assert spans.total == 5
    assert spans.runs == [(2, 2), (1, 1)]
    assert spans.offsets(cpu).tolist() == [0, 2, 4, 5]
    assert spans.offsets(cpu).dtype == torch.int32
    assert spans.images(cpu).tolist() == [0, 0, 1, 1, 2]
    assert spans.spread(torch.tensor([7, 8, 9])).tolist() == [7, 7, 8, 8, 9]
    with torch.inference_mode():
        first = Spans((1,)).images(cpu)
    assert not first.is_inference()


def test_stochastic_depth_drops_the_branch_of_whole_images():
    block = backbone(depth=2, drop_path_rate=0.5).train().blocks[1]
    spans = Spans((6, 6, 6, 1, 1, 1))
    torch.manual_seed(0)
    kept = torch.stack([block.drop_images(torch.ones(21, 2), spans)[:, 0] for _ in range(50)])
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    per_image = kept[:, :18].unflatten(1, (3, 6))
    assert torch.equal(per_image, per_image[..., :1].expand_as(per_image))
    assert not torch.equal(per_image[:, 0], per_image[:, 1])


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([torch.zeros(3, 40, 33)], {"max_tokens": 50}, r"image 0 of 40 x 33 .* 91 tokens .*to 91"),
        ([torch.zeros(1, 3, 8, 8)], {}, "without a batch axis"),
        ([torch.zeros(3, 0, 8)], {}, "non-empty"),
        ([torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)], {}, "image 1 has 1 channels"),
        ([torch.zeros(3, 8, 8)], {"patch_size": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_packed_is_said(images, options, message):
    with pytest.raises(InputError, match=message):
        pack(images, **{"patch_size": PATCH, **options})


@pytest.mark.parametrize(
    ("fields", "channels", "patch_size", "message"),
    [
        ({}, 3, 8, "patch_size=4"),
        ({}, 1, 4, "RGB"),
        ({"stem": "conv"}, 3, 4, "no plain patches"),
    ],
)
def test_a_pack_for_another_model_is_named(fields, channels, patch_size, message):
    (packed,) = pack([torch.zeros(channels, 8, 8)], patch_size)
    with pytest.raises(InputError, match=message):
        backbone(**fields).forward_packed(packed)


def test_no_images_make_no_packs():
    assert pack([]) == []
