"""Importance against what removing a channel does, and pruning against the model it came from."""

import pytest
import torch
import torch.nn.functional as F

from tests.parity import randomise
from vitrail.analysis.importance import importance, slices
from vitrail.analysis.prune import propose, prune
from vitrail.models import create_model, load, save
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
WEIGHED = {  # families that are weighed and not made slimmer
    "swin_tiny_patch4_window7": {"embed_dim": 16, "depths": (1, 1, 2), "num_heads": (1, 2, 4)},
    "cmt_ti": {
        "embed_dims": (16, 24, 32),
        "depths": (1, 1, 2),
        "num_heads": (1, 2, 4),
        "sr_ratios": (4, 2, 1),
        "stem_dim": 8,
        "mlp_ratio": 2.0,
    },
    "mobilevit_xxs": {
        "dims": (8, 8, 16, 16, 24),
        "transformer_dims": (16, 24, 32),
        "transformer_depths": (1, 2, 1),
        "num_heads": 2,
    },
    "mobilevitv2_050": {"width_multiplier": 0.125, "transformer_depths": (1, 2, 1)},
}
HAVE_SIZE = [*SMALL, "cmt_ti"]


def model(name, **more):
    """A small model in float64 with weights that do something everywhere."""
    fields = (SMALL | WEIGHED)[name] | more
    if name in HAVE_SIZE:
        fields.setdefault("image_size", 64)
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


@pytest.mark.parametrize(
    ("name", "stages", "marks"),
    [
        ("swin_tiny_patch4_window7", [0, 1, 2], (".qkv.", ".fc1.")),
        ("cmt_ti", [0, 1, 2], (".q.", ".k.", ".v.", "conv1.", "mlp.proj")),
        ("mobilevit_xxs", [2, 3, 4], (".qkv.", ".fc1.")),
        ("mobilevitv2_050", [2, 3, 4], (".qkv_proj.", ".fc1.")),
    ],
)
def test_other_families_are_weighed_by_stage_and_part(name, stages, marks):
    made = model(name)
    found = importance(made, batches(1, 128, 192))  # several windows, patches and keys at the end
    assert found.stages == stages
    for stage in stages:
        for part in ("Q", "K", "V", "FFN"):
            scores = found.of(stage, part)
            assert len(scores), (stage, part)
            # A ReLU may silence some of MobileViTv2's.
            assert (scores > 0).float().mean() > 0.5, (stage, part)
    state = dict(made.state_dict())
    covered = {rows.key for part in found.slices for rows in part.made_by}
    blocks = [k for k in state if ".blocks." in k or ".transformer." in k]
    wanted = [k for k in blocks if any(m in k for m in marks) and "num_batches" not in k]
    assert sorted(covered) == sorted(k.removeprefix("backbone.") for k in wanted)


@pytest.mark.parametrize("name", WEIGHED)
def test_silent_values_and_hidden_channels_of_other_families_have_no_importance(name):
    made = model(name)
    state = made.state_dict()
    quiet = [next(a for a in slices(made.backbone) if a.part == part) for part in ("V", "FFN")]
    for part in quiet:
        for rows in part.read_by:  # nobody reads channel 1
            entries(state, rows).transpose(0, rows.dim)[1] = 0
    found = importance(made, batches(1))
    for part in quiet:
        score = found.scores[[a.name for a in found.slices].index(part.name)]
        assert score[1] == 0
        assert (score > 0).float().mean() > 0.5


@pytest.mark.parametrize("name", WEIGHED)
def test_a_family_without_a_width_of_queries_is_not_made_slimmer_and_that_is_said(name):
    made = model(name)
    found = importance(made, batches(1))
    with pytest.raises(InputError, match=f"{name} can be weighed, but not made slimmer"):
        propose(made, found, keep=0.5)


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


@pytest.mark.parametrize("name", SMALL)
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


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "efficientvit_m0"])
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
    with pytest.raises(InputError, match=r"MobileNetV1 has no queries.*swin, cmt, mobilevit"):
        importance(create_model("mobilenetv1_025", num_classes=3), batches(1))
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
