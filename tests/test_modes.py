"""Eval mode for a while: every module in it, and each back in its own, also after an error."""

import pytest
from torch import nn

from vitrail.modes import eval_mode


def test_inside_all_is_in_eval_mode_and_each_module_comes_back_in_its_own_after_an_error_too():
    shared = nn.Dropout()
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(shared, nn.Linear(2, 2)), shared)
    model[1][1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert set(modes.values()) == {True, False}
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == modes
    model.eval()
    model[1].training = True
    with pytest.raises(KeyError), eval_mode(model):
        raise KeyError
    assert [name for name, module in model.named_modules() if module.training] == ["1"]
