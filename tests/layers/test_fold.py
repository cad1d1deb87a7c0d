import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.parity import randomise
from vitrail.layers.fold import fold_batchnorm
from vitrail.models import build_classifier
from vitrail.registry import tiny_entries

TINY = tiny_entries()
# Convolution, activation, norm, and then something that no weight can take up: a convolution that pads with
# zeros, or two readers. In ViT-CoMer what is normed are convolutions side by side, or a sum. Deformable
# convolutions are no layer that it knows.
STAYS = {
    "cmt": ["stem.2", "stem.5", "stem.8", "mlp.conv1.2"],
    "convstemvit": ["stem.2", "stem.5", "stem.8"],
    "resnetdcn": [f"layer{i}.0.bn2" for i in (2, 3, 4)],
    "vitcomer": [f"norms.{name}" for name in ("0", "1", "2", "c2", "c3", "c4", "c5")],
}


def norms(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, _BatchNorm)]


def assert_same(model: nn.Module, folded: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        want, got = model.eval()(x), folded(x)
    scale = want.abs().max()
    torch.testing.assert_close(got / scale, want / scale, atol=1e-5, rtol=0)


def picture(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", TINY)
def test_every_family_folds_and_gives_the_same_logits_at_another_size(family):
    entry = TINY[family]
    model = build_classifier(entry, entry.config, 5).eval()
    randomise(model)
    folded = fold_batchnorm(model)
    for size in [(97, 130), (33, 20)]:
        assert_same(model, folded, picture(2, 3, *size))
    stays = tuple(STAYS.get(family, ()))
    assert [n for n in norms(folded) if not n.endswith(stays)] == []


def sequential(*layers: nn.Module) -> nn.Module:
    model = nn.Sequential(*layers)
    randomise(model)
    return model.eval()


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.Conv2d(3, 8, 3, 2, bias=True), nn.BatchNorm2d(8, affine=False), nn.ReLU()],
        lambda: [nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6, eps=1e-3)],
        lambda: [nn.GELU(), nn.BatchNorm2d(3), nn.Conv2d(3, 9, 1, groups=3)],
        lambda: [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)],
        lambda: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, 5)],
        lambda: [
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.BatchNorm1d(3),
            nn.Dropout(),
            nn.Linear(3, 5),
        ],
        lambda: [
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(3, 5, bias=False),
            nn.BatchNorm1d(5),
        ],
    ],
)
def test_a_norm_beside_one_layer_disappears(layers):
    model = sequential(*layers())
    folded = fold_batchnorm(model)
    assert norms(folded) == []
    assert_same(model, folded, picture(2, 3, 10, 13))


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.GELU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)],
        lambda: [nn.GELU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1, padding=(1, 0))],
        lambda: [nn.GELU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1, padding=(0, 1))],
        lambda: [nn.GELU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 2, 2)],  # padded at other sizes
        lambda: [nn.GELU(), nn.BatchNorm2d(3), nn.Sigmoid()],
        lambda: [nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(4)],
        lambda: [nn.GELU(), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1)],
    ],
)
def test_a_norm_that_no_weight_can_take_up_stays(layers):
    model = sequential(*layers())
    folded = fold_batchnorm(model)
    assert len(norms(folded)) == 1
    assert_same(model, folded, picture(2, 3, 10, 14))


class Twice(nn.Module):
    """One layer for two norms; an output with two readers; a weight that is computed; one whole pair."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.read_twice, self.standardised, self.pair = (
            nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)
        )
        self.a, self.b, self.c, self.d, self.e = (nn.BatchNorm2d(3) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.shared(self.a(self.shared(x))))
        y = self.read_twice(x)
        y = self.c(y) + y
        weight = self.standardised.weight - self.standardised.weight.mean((1, 2, 3), keepdim=True)
        y = self.d(nn.functional.conv2d(y, weight))
        return self.e(self.pair(y))


def test_shared_layers_second_readers_and_computed_weights_keep_their_norms():
    model = Twice()
    randomise(model)
    folded = fold_batchnorm(model.eval())
    assert norms(folded) == ["a", "b", "c", "d"]
    assert_same(model, folded, picture(2, 3, 11, 9))


def test_the_model_itself_is_left_as_it_was():
    model = sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = fold_batchnorm(model)
    assert model.training
    assert not folded.training
    assert norms(model) == ["1"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_an_example_of_inference_mode_serves_as_any_other():
    """Such a tensor counts no writes, by which what works in place on it is known."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).eval()
    randomise(model)
    with torch.inference_mode():
        example = picture(1, 3, 5, 7)
    folded = fold_batchnorm(model, example)
    assert norms(folded) == []
    assert_same(model, folded, picture(2, 3, 6, 4))


def test_what_works_in_place_on_an_example_of_inference_mode_is_seen_and_leaves_it_alone():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    randomise(model)
    with torch.inference_mode():
        example = picture(1, 3, 5, 7)
    before = example.clone()
    folded = fold_batchnorm(model, example)
    assert torch.equal(example, before)
    assert_same(model, folded, picture(2, 3, 6, 4))
