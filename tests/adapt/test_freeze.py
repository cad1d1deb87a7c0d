"""What is trained and what stays: by `requires_grad`, and by a mode that drops nothing and counts nothing."""

import copy

import pytest
import torch
from torch import nn

from vitrail.adapt.freeze import freeze, train_mode
from vitrail.models import create_model
from vitrail_runtime.errors import InputError


class Net(nn.Module):
    """Three parts with parameters, one without, statistics and dropout in each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.neck = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.noise = nn.Dropout(0.5)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, images):
        return self.head(self.noise(self.neck(self.backbone(images))))


def trained(model: nn.Module) -> set[str]:
    return {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def test_the_head_is_all_but_the_backbone_and_full_is_all_again():
    model = Net()
    freeze(model, "head")
    assert trained(model) == {"neck", "head"}
    assert not any(p.requires_grad for p in model.backbone.parameters())
    freeze(model, "full")
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_frozen_neither_drops_nor_counts_nor_learns_and_the_rest_does_all_three():
    model = Net()
    freeze(model, "head")
    train_mode(model.eval())
    modes = {name: module.training for name, module in model.named_modules() if "." not in name}
    assert modes == {"": True, "backbone": False, "neck": True, "noise": True, "head": True}
    assert not any(module.training for module in model.backbone.modules())

    before = copy.deepcopy(model.state_dict())
    images = torch.rand(5, 3, 4, 6)
    assert torch.equal(model.backbone(images), model.backbone(images))
    model(images).square().sum().backward()
    for p in model.parameters():
        if p.requires_grad:
            p.data -= 0.1 * p.grad
    after = model.state_dict()
    assert model.backbone[0].weight.grad is None
    for key, value in before.items():
        assert torch.equal(value, after[key]) == key.startswith("backbone."), key


def test_the_mode_follows_the_parameters_and_one_trainable_parameter_is_enough():
    model = Net()
    train_mode(model.eval())
    assert all(module.training for module in model.modules())
    freeze(model, "head")
    model.backbone[1].weight.requires_grad_(True)
    train_mode(model)
    assert all(module.training for module in model.modules())


def test_a_capsule_is_what_a_task_with_memory_owns_and_other_models_have_none():
    fields = {"embed_dim": 32, "depth": 2, "num_heads": 2, "stem": "conv", "image_size": 32}
    model = create_model("memory/deepvit_16b", num_classes=2, **fields)
    freeze(model, "capsule")
    train_mode(model)
    assert trained(model) == {"head"}
    assert not any(module.training for module in model.backbone.modules())
    assert model.head.training
    plain = create_model("deepvit_16b", num_classes=2, **fields)
    with pytest.raises(InputError, match=r"Classifier has no capsule, .*, as memory/\.\.\. has"):
        freeze(plain, "capsule")


def test_another_word_and_a_model_without_a_head_are_refused():
    with pytest.raises(InputError, match=r"unknown part to train 'heads'; did you mean 'head'\?"):
        freeze(Net(), "heads")
    model = Net()
    model.neck = model.noise = model.head = nn.Identity()
    with pytest.raises(
        InputError, match=r"Net has nothing to train beside backbone; take a model with a head"
    ):
        freeze(model, "head")
    assert trained(model) == {"backbone"}
    freeze(model, "full")
