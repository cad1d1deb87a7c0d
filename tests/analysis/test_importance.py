"""Importance against what removing a channel does, and pruning against the model it came from."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.parity import randomise
from vitrail.analysis.importance import Importance, Slice, importance, slices
from vitrail.analysis.prune import Slimming, propose, prune, slim_config
from vitrail.backbones.efficientvit import EfficientViTConfig
from vitrail.backbones.vit import ViTConfig
from vitrail.models import create_backbone, create_model, load, save
from vitrail_runtime.errors import InputError

SMALL = {
    "vit_tiny_patch16": {"embed_dim": 32, "depth": 3, "num_heads": 2, "attn_every": 2},
    "vit_small_patch14_dinov2": {  # SwiGLU, LayerScale
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "patch_size": 8,
        "mlp": "swiglu",
        "mlp_ratio": 1.5,
        "layer_scale_init": 0.1,
    },
    "deepvit_s": {"embed_dim": 32, "depth": 2, "num_heads": 2, "mix_from": 1},
    "deit_tiny_distilled_patch16": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "efficientvit_m0": {
        "dims": (32, 48, 64),
        "depths": (1, 1, 2),
        "num_heads": (4, 3, 2),
        "image_size": 224,
    },
    "vit_tiny_r_s16_p8": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16},
}


def model(name, **more):
    """A small model in float64 with weights that do something everywhere."""
    fields = {"image_size": 64} | SMALL[name.removeprefix("memory/")] | more
    if name.startswith("memory/"):
        fields["attn_every"] = 1  # a block that does not attend reads no memory
    made = create_model(name, num_classes=3, **fields).double().eval()
    randomise(made)
    for key, value in made.state_dict().items():
        if key.endswith("pw1.bn.bias"):
            value.abs_().add_(9)  # well above zero, so that no ReLU silences a channel
        elif key.endswith("pw1.bn.weight"):
            value.mul_(0.1)
    return made


def batches(count=2, height=64, width=48):
    g = torch.Generator().manual_seed(0)
    for _ in range(count):
        images = torch.randn(4, 3, height, width, generator=g, dtype=torch.float64)
        yield images, torch.randint(3, (4,), generator=g)


def entries(state, rows):
    return state[f"backbone.{rows.key}"].narrow(rows.dim, rows.start, rows.count)


def silence(made, name, channels):
    """Let these channels of a slice do nothing."""
    part = {a.name: a for a in slices(made.backbone)}[name]
    state = made.state_dict()  # shares memory
    weights = part.gain or tuple(
        r for r in part.made_by if "conv" not in r.key and "running" not in r.key
    )
    for rows in weights:
        entries(state, rows)[channels] = 0


@pytest.mark.parametrize("name", SMALL)
def test_every_hidden_query_key_and_value_channel_is_a_slice_of_its_own(name):
    made = model(name)
    state = dict(made.state_dict())
    seen = {k: torch.zeros_like(v) for k, v in state.items()}
    for part in slices(made.backbone):
        for rows in part.made_by:
            assert entries(state, rows).shape[0] == part.count
            entries(seen, rows).add_(1)
    covered = [k for k, v in seen.items() if bool(v.any())]
    assert all(bool((seen[k] == 1).all()) for k in covered)
    marks = (".qkv.", ".fc1.") if "efficientvit" not in name else (".qkvs.", ".dws.", ".pw1.")
    wanted = [k for k in state if any(m in k for m in marks) and "num_batches" not in k]
    assert sorted(covered) == sorted(wanted)


def attention_slices(name, stage, heads, counts):
    return {
        f"{name}.heads.{head}.{part}": (stage, part, count)
        for head in range(heads)
        for part, count in zip("QKV", counts, strict=True)
    }


def hidden(name, stage, count):
    return {f"{name}.FFN": (stage, "FFN", count)}


CHANNELS = {
    "vit_tiny_patch16": attention_slices("blocks.0.attn", 0, 2, (16, 16, 16))
    | attention_slices("blocks.2.attn", 0, 2, (16, 16, 16))  # every second block attends
    | {k: v for b in range(3) for k, v in hidden(f"blocks.{b}.mlp", 0, 128).items()},
    "efficientvit_m0": attention_slices("stages.0.blocks.0.attn", 0, 4, (16, 16, 8))
    | attention_slices("stages.1.blocks.0.attn", 1, 3, (16, 16, 16))
    | attention_slices("stages.2.blocks.0.attn", 2, 2, (16, 16, 32))
    | attention_slices("stages.2.blocks.1.attn", 2, 2, (16, 16, 32))
    | {
        f"{name}.FFN": (stage, "FFN", 2 * (32, 48, 64)[stage])
        for name, stage in {
            "stages.0.blocks.0.ffn0": 0,
            "stages.0.blocks.0.ffn1": 0,
            "stages.1.downsample.ffn0": 0,  # before the map shrinks: of the stage before
            "stages.1.downsample.ffn1": 1,
            "stages.1.blocks.0.ffn0": 1,
            "stages.1.blocks.0.ffn1": 1,
            "stages.2.downsample.ffn0": 1,
            "stages.2.downsample.ffn1": 2,
            "stages.2.blocks.0.ffn0": 2,
            "stages.2.blocks.0.ffn1": 2,
            "stages.2.blocks.1.ffn0": 2,
            "stages.2.blocks.1.ffn1": 2,
        }.items()
    },
}


@pytest.mark.parametrize("name", CHANNELS)
def test_slices_have_the_widths_and_stages_of_the_config(name):
    found = {a.name: (a.stage, a.part, a.count) for a in slices(model(name).backbone)}
    assert found == CHANNELS[name]


@pytest.mark.parametrize("name", SMALL)
def test_a_query_channel_matters_through_its_key_channel_alone(name):
    """Channel 2 of the last head's keys is silenced: channel 2 of its queries has no effect, and no other."""
    made = model(name)
    key = [a for a in slices(made.backbone) if a.part == "K"][-1]
    silence(made, key.name, torch.tensor([2]))
    found = importance(made, batches(1, 128, 96))
    scores = dict(zip([a.name for a in found.slices], found.scores, strict=True))
    quiet = [k for k, v in scores.items() if k[-1] in "QK" and bool((v == 0).any())]
    assert quiet == [key.name[:-1] + "Q", key.name]
    for part in quiet:
        assert (scores[part] == 0).nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("name", SMALL)
def test_a_channel_that_nobody_reads_has_no_importance_and_no_other_loses_its_own(name):
    made = model(name)
    state = made.state_dict()
    parts = list(slices(made.backbone))
    asked = [[a for a in parts if a.part == part][-1] for part in ("V", "FFN")]
    for part in asked:
        for rows in part.read_by:
            entries(state, rows).transpose(0, rows.dim)[1] = 0
    before = importance(model(name), batches(1, 128, 96))
    found = importance(made, batches(1, 128, 96))
    for part in asked:
        i = parts.index(part)
        gone = ((found.scores[i] == 0) & (before.scores[i] > 0)).nonzero().flatten()
        assert gone.tolist() == [1], part.name


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "efficientvit_m0"])
def test_importance_is_summed_over_all_of_a_channels_own_weights(name):
    """Batches of unequal sizes: the mean is over batches, as the loss is the mean over a batch."""
    made = model(name)
    given = [(x[: 4 - i], y[: 4 - i]) for i, (x, y) in enumerate(batches(2))]
    found = importance(made, iter(given))
    assert found.images == 7
    for i in (0, len(found.slices) // 2, len(found.slices) - 1):
        part, expected = found.slices[i], 0.0
        for images, labels in given:
            made.zero_grad()
            F.cross_entropy(made(images), labels).backward()
            parameters = dict(made.backbone.named_parameters())
            for rows in part.made_by:
                if rows.key not in parameters:
                    assert "running" in rows.key
                    continue
                weight = parameters[rows.key]
                term = (weight.grad * weight).detach().abs().reshape(len(weight), -1).sum(1)
                expected += term[rows.start : rows.start + rows.count] / 2
        assert found.scores[i].dtype == torch.float32
        torch.testing.assert_close(found.scores[i].double(), expected, rtol=1e-6, atol=0)


def test_the_loss_of_the_task_may_be_given():
    made = model("vit_tiny_patch16")
    part = 0
    usual = importance(made, batches(1)).scores[part]
    asked = []

    def twice(logits, labels):
        asked.append((logits.shape, labels.shape))
        return 2 * F.cross_entropy(logits, labels)

    twofold = importance(made, batches(1), loss=twice).scores[part]
    torch.testing.assert_close(twofold, 2 * usual)
    assert asked == [((4, 3), (4,))]


def test_the_share_that_holds_so_much_is_the_smallest():
    parts = tuple(Slice(f"{i}", i // 2, "K" if i < 3 else "V", 2, ()) for i in range(4))
    scores = tuple(torch.tensor(s) for s in ([4.0, 1.0], [2.0, 3.0], [0.0, 0.0], [5.0, 5.0]))
    found = Importance(parts, scores, 8)
    assert found.stages == [0, 1]
    assert found.of(0, "K").tolist() == [4, 1, 2, 3]
    assert found.of(1, "V").tolist() == [5, 5]
    assert found.of(1, "Q").tolist() == []
    assert found.share_for(0, "K") == 0.75  # 4 + 3 + 2 are nine tenths of 10
    assert found.share_for(0, "K", 0.91) == 1.0
    assert found.share_for(0, "K", 0.4) == 0.25
    assert found.share_for(0, "K", 0.41) == 0.5
    assert found.share_for(0, "K", 1.0) == 1.0
    assert found.share_for(1, "V", 0.5) == 0.5
    assert found.share_for(1, "K") == 0.0
    assert found.share_for(1, "Q") == 0.0


def test_measuring_runs_in_eval_mode_also_where_gradients_are_off_and_ends_clean_after_an_error():
    made = model("efficientvit_m0")
    expected = importance(made, batches(1)).scores
    made.train()
    made.head.eval()
    key = made.backbone.stages[0].blocks[0].ffn0.pw1.conv.weight.requires_grad_(False)
    with torch.no_grad():
        found = importance(made, batches(1)).scores
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (made.training, made.head.training) == (True, False)

    def broken():
        yield from batches(1)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        importance(made, broken())
    assert (made.training, made.head.training, key.requires_grad) == (True, False, False)


def test_importance_is_the_sum_of_gradient_times_weight():
    made = model("vit_tiny_patch16")
    found = importance(made, batches())
    part = next(a for a in found.slices if a.name == "blocks.2.attn.heads.1.K")
    expected = torch.zeros(16, dtype=torch.float64)
    for images, labels in batches():
        made.zero_grad()
        F.cross_entropy(made(images), labels).backward()
        qkv = made.backbone.blocks[2].attn.qkv
        own = slice(32 + 16, 64)  # queries are 32 wide, then come the keys of head 0
        expected += (qkv.weight.grad * qkv.weight).abs().sum(1)[own] / 2
        expected += (qkv.bias.grad * qkv.bias).abs()[own] / 2
    score = found.scores[found.slices.index(part)]
    torch.testing.assert_close(score.double(), expected.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "efficientvit_m0"])
def test_silent_channels_have_no_importance_and_the_others_have(name):
    made = model(name)
    part = next(a for a in slices(made.backbone) if a.part == "FFN")
    silence(made, part.name, torch.tensor([1, 5]))
    found = importance(made, batches())
    score = found.scores[[a.name for a in found.slices].index(part.name)]
    assert not score[[1, 5]].any()
    assert (score > 0).sum() == len(score) - 2


def test_measuring_leaves_the_model_as_it_was():
    made = model("efficientvit_m0").train()
    made.backbone.stages[0].blocks[0].ffn0.pw1.conv.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in made.state_dict().items()}
    importance(made, batches(1))
    assert made.training
    assert made.backbone.stages[0].training
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
    assert all(p.grad is None for p in made.parameters())
    assert not made.backbone.stages[0].blocks[0].ffn0.pw1.conv.weight.requires_grad


@pytest.mark.parametrize("name", SMALL)
def test_keeping_everything_changes_no_bit(name):
    made = model(name)
    plan = propose(made, importance(made, batches(1)), keep=1.0)
    assert plan.config == made.info.config
    same = prune(made, plan)
    state = made.state_dict()
    assert same.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in same.state_dict().items())
    images, _ = next(batches(1))
    with torch.no_grad():
        assert torch.equal(same(images), made(images))


@pytest.mark.parametrize("name", [*SMALL, "memory/vit_tiny_patch16"])
def test_silent_channels_go_without_any_change_of_the_result(name):
    """Half of the channels are silenced at random; importance finds them, pruning takes them."""
    made = model(name)
    g = torch.Generator().manual_seed(2)
    parts = {a.name: a for a in slices(made.backbone)}
    half = {}
    for part in parts.values():
        if part.part in ("K", "FFN"):
            half[part.name] = torch.randperm(part.count, generator=g)[: part.count // 2]
            quiet = [part.name] if part.part == "FFN" else [part.name, part.name[:-1] + "Q"]
            for each in quiet:
                silence(made, each, half[part.name])
    found = importance(made, batches())
    plan = propose(made, found, keep=0.5)
    for part, silent in half.items():
        everything = set(range(parts[part].count))
        assert set(plan.kept[part].tolist()) == everything - set(silent.tolist()), part
    slim = prune(made, plan)
    count = sum(p.numel() for p in slim.parameters())
    assert count < sum(p.numel() for p in made.parameters())
    images, _ = next(batches(1, 50, 33))
    with torch.no_grad():
        want, got = made(images), slim(images)
    assert (got - want).abs().max() <= 1e-9 * want.abs().max()


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16", "vit_small_patch14_dinov2", "efficientvit_m0"]
)
def test_a_pruned_model_is_the_model_whose_other_channels_are_silent(name):
    """Any plan, whatever importance says of it: here channels from the middle and the end go."""
    made = model(name).train()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    kept, silent = {}, model(name)
    for part in slices(made.backbone):
        if part.part == "V":
            continue
        stay = torch.tensor([0, 3, *range(5, part.count - 5), part.count - 2])
        kept[part.name] = stay
        gone = torch.tensor([i for i in range(part.count) if i not in stay])
        silence(silent, part.name, gone)
    widths = [
        (a.stage, "QK" if a.part == "Q" else "FFN", a.count, len(kept[a.name]))
        for a in slices(made.backbone)
        if a.part in ("Q", "FFN")
    ]
    slim = prune(made, Slimming(slim_config(made.info.config, widths), kept, tuple(widths)))
    assert slim.training
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
    assert slim.info.name == made.info.name
    assert slim.info.classes == made.info.classes
    assert slim.info.preprocessing == made.info.preprocessing
    assert all(p.requires_grad for p in slim.parameters())
    slim.eval()
    assert not slim.backbone.training
    images, _ = next(batches(1, 50, 33))
    with torch.no_grad():
        want, got = silent(images), slim(images)
    assert (got - want).abs().max() <= 1e-9 * want.abs().max()
    memory = {v.untyped_storage().data_ptr() for v in made.state_dict().values()}
    assert not memory & {v.untyped_storage().data_ptr() for v in slim.state_dict().values()}


def weighed(scores):
    """(one ViT of two blocks, its importance): {slice's end: scores}, 1 for all others."""
    made = model("deit_tiny_distilled_patch16")
    parts = tuple(slices(made.backbone))
    each = []
    for part in parts:
        given = [v for k, v in scores.items() if part.name.endswith(k)]
        each.append(torch.tensor(given[0]) if given else torch.ones(part.count))
    return made, Importance(parts, tuple(each), 1)


def test_query_and_key_channels_go_in_pairs_by_the_sum_of_their_scores():
    rising, falling = [float(i) for i in range(16)], [2.0 * (15 - i) for i in range(16)]
    made, found = weighed({"blocks.0.attn.heads.1.Q": rising, "blocks.0.attn.heads.1.K": falling})
    plan = propose(made, found, keep=0.5)
    ((stage, kind, before, after), ffn) = plan.widths
    assert (stage, kind, before) == (0, "QK", 16)
    assert ffn[:3] == (0, "FFN", 128)
    assert after == 8
    for part in ("Q", "K"):  # the sum falls from the first to the last
        assert plan.kept[f"blocks.0.attn.heads.1.{part}"].tolist() == list(range(after))
    assert not any(".V" in name for name in plan.kept)
    best_last, found = weighed({"blocks.1.mlp.FFN": [float(i) for i in range(128)]})
    plan = propose(best_last, found, keep=0.5)
    (width,) = [after for _, kind, _, after in plan.widths if kind == "FFN"]
    assert plan.kept["blocks.1.mlp.FFN"].tolist() == list(range(128 - width, 128))
    assert plan.kept["blocks.0.mlp.FFN"].tolist() == list(range(width))  # of equal ones the first
    assert plan.config.mlp_ratio == width / 32


@pytest.mark.parametrize(
    ("keep", "qk", "ffn"),
    [
        (1.0, 16, 128),
        (0.9, 16, 112),  # 14.4 and 115.2 to the nearest multiple of 4 and 8
        (0.8, 12, 104),
        (0.5, 8, 64),
        (0.1, 4, 16),
        (0.01, 4, 8),  # one step at least
    ],
)
def test_widths_are_multiples_of_four_and_eight_and_never_nothing(keep, qk, ffn):
    # All scores differ, alike in each layer, so that the best share is the same in all.
    parts = {"Q": [1 + i / 100 for i in range(16)], "FFN": [1 + i / 1000 for i in range(128)]}
    made, found = weighed({**parts, "K": [0.0] * 16})
    plan = propose(made, found, keep)
    assert [after for _, _, _, after in plan.widths] == [qk, ffn]
    assert (getattr(plan.config, "qk_dim", None), plan.config.mlp_ratio) == (
        None if qk == 16 else 2 * qk // 2,
        ffn / 32,
    )


def test_narrow_parts_shrink_by_single_channels():
    made = model("efficientvit_m0", key_dim=6)
    found = importance(made, batches(1))
    for score in found.scores:
        score[:] = 1 + torch.arange(len(score)) / 1000
    plan = propose(made, found, 0.5)
    assert {after for _, kind, _, after in plan.widths if kind == "QK"} == {3}


def test_channels_compete_relative_to_the_root_mean_square_of_their_layer():
    """Scores of one block are 100 times those of the other: nothing changes. In one block half of them are
    nothing: they go, whatever may be kept."""
    rising = [1 + i / 1000 for i in range(128)]
    made, found = weighed(
        {"blocks.0.mlp.FFN": [100 * x for x in rising], "blocks.1.mlp.FFN": rising}
    )
    assert [w[3] for w in propose(made, found, 0.5).widths if w[1] == "FFN"] == [64]
    nothing = [0.0] * 96 + [1.0] * 32
    made, found = weighed({"mlp.FFN": nothing})
    assert [w[3] for w in propose(made, found, 0.9).widths if w[1] == "FFN"] == [32]


def test_the_width_of_a_layer_does_not_count_when_channels_compete():
    """Scores from 1 to 2 in layers of 64, 96 and 128 channels: each keeps as large a share."""
    made = model("efficientvit_m0")
    found = importance(made, batches(1))
    for part, score in zip(found.slices, found.scores, strict=True):
        score[:] = torch.linspace(1, 2, part.count)
    widths = propose(made, found, 0.5).widths
    assert [w[3] for w in sorted(widths) if w[1] == "FFN"] == [32, 48, 64]


def test_a_width_that_stays_leaves_its_field():
    vit = ViTConfig(embed_dim=32, depth=2, num_heads=2)
    assert slim_config(vit, [(0, "QK", 16, 16), (0, "FFN", 128, 128)]) == vit
    assert slim_config(vit, [(0, "QK", 16, 8), (0, "FFN", 128, 128)]).qk_dim == 8
    slim = slim_config(vit, [(0, "QK", 16, 16), (0, "FFN", 128, 48)])
    assert slim == replace(vit, mlp_ratio=1.5)
    pyramid = EfficientViTConfig(
        dims=(32, 48, 64), depths=(1, 1, 1), num_heads=(4, 3, 2), kernels=(7, 5, 3, 3)
    )
    widths = [(1, "FFN", 96, 48), (0, "FFN", 64, 64), (2, "FFN", 128, 32), (0, "QK", 16, 16)]
    slim = slim_config(pyramid, widths)
    assert slim.ffn_ratio == (2.0, 1.0, 0.5)
    assert slim.key_dim == pyramid.key_dim
    slim = slim_config(pyramid, [(0, "QK", 16, 16), (2, "QK", 16, 4), (1, "QK", 16, 8)])
    assert slim.key_dim == (16, 8, 4)


def test_a_stage_where_fewer_channels_matter_gets_narrower():
    made = model("efficientvit_m0")
    found = importance(made, batches(1))
    for i, part in enumerate(found.slices):
        # In stage 1 all matter alike, in stage 2 a few hold all; a scale of a layer's own does not count.
        power, scale = {0: 1, 1: 0, 2: 20}[part.stage], 10.0**part.stage
        scores = torch.rand(part.count, generator=torch.Generator().manual_seed(i))
        found.scores[i][:] = scale * scores**power
    plan = propose(made, found, keep=0.5)
    key_dims, ffn_dims = plan.config.key_dims(), plan.config.ffn_dims()
    assert key_dims[1] == 16
    assert key_dims[1] > key_dims[0] >= key_dims[2] >= 4
    assert ffn_dims[1] == 96
    assert ffn_dims[2] < 128 / 2
    assert all(w % 8 == 0 for w in ffn_dims)


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "efficientvit_m0", "memory/vit_tiny_patch16"])
def test_a_slim_model_is_saved_loaded_and_trained_like_any_other(name, tmp_path):
    made = model(name)
    slim = prune(made, propose(made, importance(made, batches(1)), keep=0.5)).float()
    again = load(save(slim, tmp_path / "slim"))
    images, labels = next(batches(1))
    with torch.no_grad():
        torch.testing.assert_close(again(images.float()), slim(images.float()))
    assert again.info.config == slim.info.config != made.info.config
    F.cross_entropy(again.train()(images.float()), labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in again.parameters())


def test_what_cannot_be_measured_or_planned_is_said():
    for name, cls in (("mobilenetv1_025", "MobileNetV1"), ("swin_tiny_patch4_window7", "Swin")):
        with pytest.raises(
            InputError, match=f"{cls} cannot be made slimmer.*deepvit, hybrids.*efficientvit"
        ):
            next(iter(slices(create_backbone(name))))
    with pytest.raises(InputError, match="that of a trained model"):
        importance(create_model("vit_tiny_patch16", num_classes=3).double(), batches(1))
    made = model("vit_tiny_patch16")
    with pytest.raises(InputError, match="there are none"):
        importance(made, [])
    found = importance(made, batches(1))
    with pytest.raises(InputError, match=r"lie in \(0, 1\]"):
        propose(made, found, keep=1.5)
    with pytest.raises(InputError, match="plan for this model"):
        prune(model("efficientvit_m0"), propose(made, found, keep=0.5))
