import copy
import math

import pytest
import torch
from torch import nn

from vitrail.models import create_model
from vitrail.train.config import TrainConfig
from vitrail.train.ema import Ema
from vitrail.train.optim import create_optimizer, is_block, layer_numbers, parameter_groups
from vitrail.train.schedule import learning_rate


@pytest.fixture(scope="module")
def efficientvit() -> nn.Module:
    return create_model("efficientvit_m0", num_classes=3)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return create_model("vit_tiny_patch16", num_classes=3, depth=3, embed_dim=24, image_size=32)


def names_by(model: nn.Module, config: TrainConfig, key: str) -> dict[str, float]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        names[id(p)]: group[key]
        for group in parameter_groups(model, config)
        for p in group["params"]
    }


def test_biases_norms_tokens_and_tables_are_not_decayed(vit, efficientvit):
    decays = names_by(vit, TrainConfig(weight_decay=0.05), "weight_decay")
    assert decays.keys() == dict(vit.named_parameters()).keys()
    for name in ("cls_token", "pos_embed", "blocks.0.norm1.weight", "blocks.0.attn.qkv.bias"):
        assert decays[f"backbone.{name}"] == 0.0, name
    assert decays["backbone.blocks.0.attn.qkv.weight"] == 0.05
    memory = create_model("memory/vit_tiny_patch16", num_classes=3, depth=2, embed_dim=24)
    decays = names_by(memory, TrainConfig(weight_decay=0.05), "weight_decay")
    assert decays["head.memory"] == decays["head.token"] == 0.0
    assert decays["head.fc.weight"] == 0.05
    tables = [
        n for n in names_by(efficientvit, TrainConfig(), "weight_decay") if "attention_bias" in n
    ]
    decays = names_by(efficientvit, TrainConfig(weight_decay=0.05), "weight_decay")
    assert tables
    assert all(decays[n] == 0.0 for n in tables)


def test_layer_decay_falls_by_its_factor_from_block_to_block(vit):
    scales = names_by(vit, TrainConfig(layer_decay=0.5), "lr_scale")
    assert scales["backbone.cls_token"] == scales["backbone.patch_embed.proj.weight"] == 0.5**4
    assert [scales[f"backbone.blocks.{i}.mlp.fc1.weight"] for i in range(3)] == [0.125, 0.25, 0.5]
    head = [v for n, v in scales.items() if n.startswith(("backbone.norm", "head"))]
    assert set(head) == {1.0}


def test_a_backbone_may_learn_at_a_share_of_the_rate(vit):
    scales = names_by(vit, TrainConfig(backbone_lr=0.1), "lr_scale")
    below = [v for name, v in scales.items() if name.startswith("backbone.")]
    assert set(below) == {0.1}
    assert set(scales.values()) == {0.1, 1.0}
    both = names_by(vit, TrainConfig(backbone_lr=0.1, layer_decay=0.5), "lr_scale")
    assert both["backbone.blocks.2.mlp.fc1.weight"] == 0.1 * 0.5
    assert both["head.fc.weight"] == 1.0


def test_layers_of_a_staged_model_grow_from_stem_to_head(efficientvit):
    layers, last = layer_numbers(efficientvit)
    order = list(layers.values())
    assert order == sorted(order)
    assert order[0] == 0
    assert order[-1] == last == 7, "six blocks in three stages"


@pytest.mark.parametrize(
    ("name", "blocks"),
    [  # as many as the papers' tables have
        ("vit_base_patch16", 12),
        ("deepvit_s", 16),
        ("swin_tiny_patch4_window7", 2 + 2 + 6 + 2),
        ("cmt_ti", 2 + 2 + 10 + 2),
        ("efficientvit_m4", 1 + 2 + 3),
        ("resnet50", 3 + 4 + 6 + 3),
        ("resnet18", 2 + 2 + 2 + 2),
        ("vit_base_r50_s16", 3 + 4 + 9 + 12),
        ("efficientnet_b0", 1 + 2 + 2 + 3 + 3 + 4 + 1),
        ("mobilenetv1_025", 13),
        ("mobilenetv2_100", 1 + 2 + 3 + 4 + 3 + 3 + 1),
        ("mobilevit_xxs", 1 + 3 + 2 + 2 + 2),
    ],
)
def test_every_family_has_a_layer_for_each_of_its_blocks(name, blocks):
    with torch.device("meta"):
        model = create_model(name, num_classes=3)
    layers, last = layer_numbers(model)
    assert last == blocks + 1
    assert list(dict.fromkeys(layers.values())) == list(range(blocks + 2)), "from stem to head"
    assert sum(is_block(module) for module, _ in model.named_modules()) == blocks


def test_what_a_backbone_adds_to_a_checkpoint_learns_at_the_full_rate():
    with torch.device("meta"):
        model = create_model("faster_rcnn/vit_comer_tiny", num_classes=3)
    layers, last = layer_numbers(model)
    assert list(layers).count("backbone.level_embed") == 1
    added = ("backbone.level_embed", "backbone.cnn.", "backbone.interactions.", "neck.", "rpn.")
    for name, layer in layers.items():
        if name.startswith(added):
            assert layer == last, name
    assert layers["backbone.pos_embed"] == layers["backbone.patch_embed.proj.weight"] == 0
    assert set(layers.values()) == set(range(last + 1))


def test_a_model_without_blocks_is_one_layer():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    layers, last = layer_numbers(model)
    assert last == 1
    assert set(layers.values()) == {1}


def test_without_layer_decay_there_are_two_groups(vit):
    assert len(parameter_groups(vit, TrainConfig())) == 2
    assert len(parameter_groups(vit, TrainConfig(layer_decay=0.9))) == 2 * 5


def test_frozen_parameters_are_in_no_group(vit):
    model = copy.deepcopy(vit)
    model.backbone.requires_grad_(False)
    names = names_by(model, TrainConfig(), "weight_decay")
    assert names
    assert all(n.startswith("head") for n in names)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_steps_as_torch_does(momentum):
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    config = TrainConfig(optimizer="sgd", lr=0.1, momentum=momentum, weight_decay=0.0)
    a = create_optimizer(ours, config)
    b = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum, nesterov=momentum > 0)
    for _ in range(3):
        x = torch.randn(4, 5)
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_the_rate_warms_up_linearly_then_falls_by_a_cosine():
    config = TrainConfig(lr=1.0, warmup_lr=0.0, min_lr=0.1)

    def rate(step: int, done: float | None = None) -> float:
        share = step / 100 if done is None else done
        return learning_rate(config, step, done=share, warmup_steps=20, total_steps=100)

    assert [rate(s) for s in (0, 5, 10, 20)] == pytest.approx([0.0, 0.25, 0.5, 1.0])
    assert rate(60) == pytest.approx(0.55), "half-way between lr and min_lr"
    assert rate(40) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert rate(100) == pytest.approx(0.1)
    assert rate(30, done=1.0) == pytest.approx(0.1), "a time limit that is reached first"


def test_the_average_follows_at_once_and_then_slowly():
    model = nn.BatchNorm1d(2)
    ema = Ema(model, 0.99)
    with torch.no_grad():
        model.weight.fill_(11.0)
        model.num_batches_tracked.fill_(3)
    ema.update(model, 0)
    # The first decay is (1 + 0) / (10 + 0): the random start keeps a tenth.
    torch.testing.assert_close(ema.shadow["weight"], torch.full((2,), 0.1 * 1 + 0.9 * 11))
    assert ema.shadow["num_batches_tracked"] == 3
    before = ema.shadow["weight"].clone()
    with torch.no_grad():
        model.weight.fill_(0.0)
    ema.update(model, 10_000)
    torch.testing.assert_close(ema.shadow["weight"], before * 0.99)


def test_the_average_is_lent_to_the_model_and_taken_back_bit_for_bit():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema = Ema(model, 0.9)
    own = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.weight.add_(0.1)
    changed = model.weight.clone()
    with ema.applied(model):
        assert torch.equal(model.weight, own["weight"])
    assert torch.equal(model.weight, changed)
