"""Where a classifier looks, against the papers' formulas."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitrail.analysis.saliency import attention_rollout, smooth_gradient, where_it_looks
from vitrail.features import Features
from vitrail.models import create_model

SMALL = {
    "vit_tiny_patch16": {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8},
    "deit_tiny_distilled_patch16": {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8},
    "deepvit_s": {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8, "mix_from": 1},
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, image_size=32, **SMALL[name])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def rollout(layers: list[np.ndarray]) -> np.ndarray:
    """Abnar & Zuidema, equation 1: A = W + I with its rows scaled to one; the last block multiplies first."""
    rolled = np.eye(layers[0].shape[-1])
    for weights in layers:
        mixed = np.abs(weights).mean(0) + np.eye(weights.shape[-1])
        rolled = mixed / mixed.sum(1, keepdims=True) @ rolled
    return rolled


def test_rollout_multiplies_the_blocks_from_the_last_to_the_first():
    layers = [draw(2, 3, 5, 5, seed=i).double().mul(2).softmax(-1) for i in range(3)]
    rolled = attention_rollout(layers)
    for b in range(2):
        halves = [(w[b].mean(0) + torch.eye(5)) / 2 for w in layers]
        torch.testing.assert_close(rolled[b], halves[2] @ halves[1] @ halves[0])
        assert not torch.allclose(rolled[b], halves[0] @ halves[1] @ halves[2], atol=1e-3)


def test_rollout_of_weights_with_signs_is_of_their_size_and_rows_are_shares():
    layers = [draw(1, 2, 6, 6, seed=i).double() for i in range(2)]
    rolled = attention_rollout(layers)[0]
    np.testing.assert_allclose(rolled, rollout([w[0].numpy() for w in layers]))
    assert (rolled >= 0).all()
    torch.testing.assert_close(rolled.sum(1), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("name", SMALL)
def test_a_token_model_is_shown_by_what_its_class_token_draws_on(name):
    model, image = small(name), draw(3, 40, 24)
    record: dict[str, Tensor] = {}
    with torch.no_grad():
        model(image[None], record=record)
    weights = [v[0].numpy() for k, v in record.items() if k.endswith("attn.weights")]
    assert len(weights) == 3
    prefix = weights[0].shape[-1] - 5 * 3
    how, seen = where_it_looks(model, image, 1)
    assert how == "attention rollout"
    np.testing.assert_allclose(seen, rollout(weights)[0, prefix:].reshape(5, 3), rtol=1e-4)


@pytest.mark.parametrize("name", ["deepvit_s", "efficientvit_m0"])
def test_looking_is_done_in_eval_mode_and_each_module_keeps_its_own(name):
    fields = SMALL.get(name) or {"dims": (16, 24, 32), "depths": (1, 1, 1), "key_dim": 8}
    model, image = (
        create_model(name, num_classes=3, image_size=32, **fields).eval(),
        draw(3, 40, 24),
    )
    for parameter in model.head.parameters():
        nn.init.normal_(parameter)
    expected = where_it_looks(model, image, 2)
    model.train()
    model.head.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = where_it_looks(model, image, 2)
    assert (model.training, model.backbone.training, model.head.training) == (True, True, False)
    assert seen[0] == expected[0]
    assert torch.equal(seen[1], expected[1])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class Recording(nn.Module):
    """A backbone that says what a test wants."""

    def __init__(self, tokens: tuple[tuple[int, int], ...], prefix: bool) -> None:
        super().__init__()
        self.tokens, self.prefix = tokens, prefix

    def forward(self, images: Tensor, record: dict[str, Tensor] | None = None) -> Features:
        if record is not None:
            for i, (queries, keys) in enumerate(self.tokens):
                record[f"blocks.{i}.attn.weights"] = draw(1, 2, queries, keys, seed=i).softmax(-1)
        maps = {"c3": images[:, :, ::4, ::4], "c4": images[:, :, ::8, ::8]}
        return Features(maps, images.new_zeros(1, 1, 3) if self.prefix else None)


class Classifier(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack((images.square().sum((1, 2, 3)), images.sum((1, 2, 3))), 1)


@pytest.mark.parametrize(
    ("tokens", "prefix", "how"),
    [
        (((7, 7), (7, 7)), True, "attention rollout"),
        (((7, 7), (7, 7)), False, "smoothed gradient"),
        (((7, 7), (5, 5)), True, "smoothed gradient"),
        (((7, 4), (7, 4)), True, "smoothed gradient"),
        ((), True, "smoothed gradient"),
    ],
)
def test_rollout_is_for_square_maps_over_a_class_token_and_patches(tokens, prefix, how):
    image = draw(3, 16, 24)
    found, seen = where_it_looks(Classifier(Recording(tokens, prefix)), image, 0)
    assert found == how
    if how == "attention rollout":
        weights = [draw(2, 7, 7, seed=i).softmax(-1).numpy() for i in range(2)]
        np.testing.assert_allclose(seen, rollout(weights)[0, 1:].reshape(2, 3), rtol=1e-5)
    else:  # of the score that was asked for
        assert torch.equal(seen, smooth_gradient(Classifier(nn.Identity()), image, 0))
        assert not torch.equal(seen, smooth_gradient(Classifier(nn.Identity()), image, 1))


def gaussian(values: np.ndarray, sigma: float) -> np.ndarray:
    """Blurred, each axis for itself, out to four deviations; the rim goes on outside."""
    reach = int(4 * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    for axis in (0, 1):
        padded = np.pad(values, [(reach, reach) if a == axis else (0, 0) for a in (0, 1)], "edge")
        values = np.apply_along_axis(np.convolve, axis, padded, kernel / kernel.sum(), "valid")
    return values


@pytest.mark.parametrize("shape", [(48, 72), (72, 48)])
def test_the_gradient_map_is_smoothgrads_mean_over_noisy_copies(shape):
    """Smilkov et al.: noise of a share of the image's range; the score is sum w x^2, its gradient 2 w x."""
    image, weight = 3 * draw(3, *shape).double() + 5, draw(3, *shape, seed=1).double()

    class Model(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.stack((images.sum((1, 2, 3)), (weight * images**2).sum((1, 2, 3))), 1)

    for draws, noise in ((8, 0.1), (3, 0.5)):
        spread = noise * float(image.max() - image.min())
        copies = image + spread * draw(draws, 3, *shape, seed=0).double()
        expected = (2 * weight * copies).abs().mean(0).sum(0).numpy()
        options = {} if draws == 8 else {"draws": draws, "noise": noise}
        before = torch.get_rng_state()
        seen = smooth_gradient(Model(), image, 1, **options)
        assert torch.equal(torch.get_rng_state(), before)
        np.testing.assert_allclose(seen, gaussian(expected, 48 / 24), rtol=1e-9)
    assert not image.requires_grad
