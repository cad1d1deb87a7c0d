"""Tensors remember the keys that they were made from, through whatever a key map does."""

import torch
import torch.nn.functional as F

from vitrail.weights.traced import trace, traced


def state():
    return {key: trace(key, torch.randn(4, 4)) for key in "abc"}


def test_a_traced_tensor_has_its_own_key_and_the_files_values():
    value = torch.randn(2, 3)
    found = trace("x", value)
    assert found.origin == {"x"}
    assert not found.resampled
    assert torch.equal(found.as_subclass(torch.Tensor), value)


def test_what_is_joined_split_and_added_remembers_all_and_is_not_resampled():
    s = state()
    joined = torch.cat([s["a"], s["b"]])
    assert joined.origin == {"a", "b"}
    for part in joined.chunk(2):
        assert part.origin == {"a", "b"}
    assert (s["a"][:, 1:] + s["c"][:, 1:]).origin == {"a", "c"}
    assert s["a"].flip(0).T.reshape(2, 8).origin == {"a"}
    assert torch.stack([s["a"], torch.ones(4, 4)]).origin == {"a"}
    assert not joined.resampled
    assert s["a"].origin == {"a"}, "what was made from it changes nothing"


def test_resampling_is_remembered_on_either_side_and_handed_on():
    s, weights = state(), torch.randn(3, 4)
    made = [weights @ s["a"], s["a"] @ weights.T, torch.matmul(weights, s["a"])]
    made.append(F.interpolate(s["a"][None, None], (2, 2)))
    for tensor in made:
        assert tensor.resampled
        assert tensor.origin == {"a"}
    later = torch.cat([made[0], s["b"]])
    assert later.resampled
    assert later.origin == {"a", "b"}
    assert not s["b"].resampled


def test_traced_tensors_are_found_within_lists_and_dicts():
    s = state()
    inside = {"x": [s["a"], (s["b"], 3)], "y": torch.ones(1), "z": {"w": s["c"]}}
    assert [t.origin for t in traced(inside)] == [{"a"}, {"b"}, {"c"}]
