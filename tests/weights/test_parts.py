"""Parts of a model, filled from files in our names: what they may lack, drop and leave out of the names."""

import pytest
import torch
from torch import nn

from vitrail.weights import check_part, joined
from vitrail.weights.files import Checkpoint
from vitrail_runtime.errors import InputError


class TwoHeads(nn.Module):
    """A head with a norm before its classes, and an auxiliary one beside it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.ModuleDict({"norm": nn.BatchNorm1d(4), "classes": nn.Linear(4, num_classes)})
        self.aux = nn.ModuleDict({"classes": nn.Linear(2, num_classes)})


def state_of(num_classes: int, part: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(num_classes)
    state = TwoHeads(num_classes).state_dict()
    return {k: torch.rand(v.shape) for k, v in state.items() if k.startswith(part)}


def check(model, parts, state):
    return check_part(model, parts, Checkpoint(state, "here", ["a note"]))


@pytest.mark.parametrize("prefix", ["head.", ""])
def test_a_file_of_one_part_may_name_its_keys_without_it(prefix):
    model, state = TwoHeads(3), state_of(3, "head.")
    before = model.aux["classes"].weight.clone()
    ready = check(model, ["head"], {prefix + k.removeprefix("head."): v for k, v in state.items()})
    assert not torch.equal(model.head["classes"].weight, state["head.classes.weight"]), "not yet"
    report = ready.fill()
    assert set(report.used) == set(state)
    assert (report.left, report.new, report.dropped_head) == ((), (), ())
    assert (report.source, report.layout, report.notes) == ("here", "vitrail", ("a note",))
    for key in ("head.norm.weight", "head.norm.running_var", "head.classes.bias"):
        assert torch.equal(model.state_dict()[key], state[key])
    assert torch.equal(model.aux["classes"].weight, before)


def test_of_two_parts_the_names_are_asked_for():
    state = {k.removeprefix("head."): v for k, v in state_of(3, "head.").items()}
    with pytest.raises(InputError) as error:
        check(TwoHeads(3), ["head", "aux"], state)
    assert str(error.value) == (
        "here does not fit the head and aux of the model, all of 9 keys differ:\n"
        "  the file has norm.weight, norm.bias, norm.running_mean, norm.running_var, "
        "norm.num_batches_tracked, ... (7 in all)"
    )


def test_class_layers_of_other_classes_are_passed_over_and_said():
    model, state = TwoHeads(3), state_of(5, "head.")
    before = model.head["classes"].weight.clone()
    report = check(model, ["head"], state).fill()
    assert report.dropped_head == ("head.classes.weight", "head.classes.bias")
    assert report.classes == (5, 3)
    assert set(report.used) == set(state) - set(report.dropped_head)
    assert "head dropped: the file has 5 classes, the model 3 (head.classes.weight, " in str(report)
    assert torch.equal(model.head["classes"].weight, before)
    assert torch.equal(model.head["norm"].weight, state["head.norm.weight"])


def test_a_part_that_the_file_lacks_stays_and_a_count_of_batches_too():
    state = {**state_of(3, "head."), "neck.weight": torch.ones(1)}
    del state["head.norm.num_batches_tracked"]
    model = TwoHeads(3)
    report = check(model, ["head", "aux"], state).fill()
    assert report.new == ("head.norm.num_batches_tracked", "aux.classes.weight", "aux.classes.bias")
    assert report.left == ("neck.weight",)


def test_missing_keys_and_other_shapes_are_refused_before_anything_is_filled():
    state = state_of(3, "head.")
    del state["head.norm.bias"]
    state["head.classes.weight"] = torch.ones(3, 9)
    with pytest.raises(InputError) as error:
        check(TwoHeads(3), ["head"], state)
    assert str(error.value) == (
        "here does not fit the head of the model, 2 of 7 keys differ:\n"
        "  head.norm.bias: missing in the file\n"
        "  head.classes.weight: (3, 4) in the model, (3, 9) in the file"
    )


def test_accounts_of_parts_are_joined():
    first = check(TwoHeads(3), ["head"], state_of(5, "head.")).report
    second = check(TwoHeads(3), ["aux"], state_of(3, "aux.")).report
    both = joined([second, first])
    assert (both.source, both.layout, both.notes) == ("here", "vitrail", ("a note",))
    assert both.used == second.used + first.used
    assert both.dropped_head == first.dropped_head
    assert both.classes == (5, 3)
