"""How tests compare a model of ours with its reference."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.golden.compare import load
from tests.golden.fill import fill, value
from vitrail.classifiers import Classifier
from vitrail.models import create_model
from vitrail.registry import BackboneEntry, backbone_entry


def randomise(model: nn.Module, gain: float = 1.0) -> None:
    """Give every parameter and buffer non-trivial values, by the fixtures' rule: zero-initialised heads,
    unit norms and fresh running statistics would hide a wrong eps or a missing scale."""
    model.load_state_dict(fill(model.state_dict(), gain))


def assert_close_to_peer(ours: Tensor, theirs: Tensor, rel: float = 1e-9) -> None:
    """max|a - b| <= rel * max|b|, in float64."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    assert ours.dtype == torch.float64, "compare in float64: float32 hides a wrong eps"
    gap = (ours - theirs).abs().max().item()
    size = theirs.abs().max().item()
    assert gap <= rel * size, (
        f"differs by {gap:.3g}, allowed {rel * size:.3g} ({rel:g} of {size:.3g})"
    )
    assert size > 1e-6, "the reference output is zero: nothing was compared"


def fill_by_key_map(
    entry: BackboneEntry, layout: str, keys: dict[str, tuple[int, ...]], gain: float
) -> dict[str, Tensor]:
    """A state dict of ours, filled by the OFFICIAL keys of a fixture and carried over by the key map."""
    foreign = {k: torch.from_numpy(value(k, shape, gain)) for k, shape in keys.items()}
    return entry.layouts[layout].convert(foreign, entry.config)


def filled_officially(name: str, fixture: str | None = None, **config_fields: Any) -> Classifier:
    """Our classifier in eval mode with the weights of a fixture (by default of the model's name): filled by
    the OFFICIAL keys, carried over by the key map, none left over. In float64: what is then
    left between the two is the rounding of the official run."""
    facts, _ = load(fixture or name)
    model = create_model(name, **config_fields)
    keys = {key: tuple(shape) for key, shape, dtype in facts["state_dict"] if dtype == "float32"}
    state = fill_by_key_map(backbone_entry(name), "official", keys, facts["fill"]["gain"])
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    return model.double().eval()
