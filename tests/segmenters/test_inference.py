"""Windows, scales and flips equal loops written out."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vitrail
from tests.parity import randomise
from vitrail.segmenters.inference import Inference, InferredSegmenter, starts
from vitrail_runtime.errors import InputError

SMALL = {"dims": (16, 24, 32), "depths": (1, 1, 1), "key_dim": 8}


class Places(nn.Module):
    """Logits that depend on where a pixel lies in what is given, and on what is beside it."""

    task = "segment"
    classes = ("a", "b", "c")
    preprocessing = info = None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1).double()
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, images):
        self.sizes.append(tuple(images.shape))
        slope = torch.linspace(0, 1, images.shape[3], dtype=torch.float64)
        slope = slope + torch.linspace(0, 2, images.shape[2], dtype=torch.float64)[:, None]
        return self.conv(images) + slope * torch.tensor([1.0, -1.0, 2.0])[:, None, None]


def image(height: int, width: int, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randn(count, 3, height, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("length", "window", "step", "expected"),
    [
        (10, 4, 3, [0, 3, 6]),
        (10, 4, 4, [0, 4, 6]),
        (11, 4, 3, [0, 3, 6, 7]),
        (4, 4, 1, [0]),
        (5, 4, 4, [0, 1]),
        (3, 4, 4, [0]),
        (1, 1, 1, [0]),
    ],
)
def test_windows_begin_every_stride_and_the_last_ends_with_the_image(
    length, window, step, expected
):
    assert starts(length, window, step) == expected
    seen = {i for s in expected for i in range(s, min(length, s + window))}
    assert seen == set(range(length))


@pytest.mark.parametrize("size", [(20, 33), (8, 30), (5, 6), (16, 16)], ids=str)
@pytest.mark.parametrize("stride", [5, 8, None])
def test_logits_of_windows_are_averaged_where_they_overlap(size, stride):
    model, images = Places(), image(*size)
    with torch.no_grad():
        got = InferredSegmenter(model, Inference(window=8, stride=stride))(images)
        step = 5 if stride is None else stride  # two thirds of 8
        total, times = torch.zeros(2, 3, *size, dtype=torch.float64), torch.zeros(size)
        y = 0
        while True:
            bottom = min(y + 8, size[0])
            top, x = max(0, bottom - 8), 0
            while True:
                right = min(x + 8, size[1])
                left = max(0, right - 8)
                total[:, :, top:bottom, left:right] += model(images[:, :, top:bottom, left:right])
                times[top:bottom, left:right] += 1
                if right == size[1]:
                    break
                x += step
            if bottom == size[0]:
                break
            y += step
        torch.testing.assert_close(got, total / times, rtol=1e-12, atol=1e-12)


def test_a_window_larger_than_the_image_is_the_image():
    model, images = Places(), image(7, 12)
    with torch.no_grad():
        whole = model(images)
        model.sizes.clear()
        assert torch.equal(InferredSegmenter(model, Inference(window=50))(images), whole)
        assert model.sizes == [(2, 3, 7, 12)]
        assert torch.equal(InferredSegmenter(model, Inference())(images), whole)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.3), (0.75,), (0.01,)])
def test_probabilities_of_scales_and_flips_are_averaged(scales, flip, window):
    model, images = Places(), image(13, 18)
    wrapped = InferredSegmenter(model, Inference(scales=scales, flip=flip, window=window))
    plain = InferredSegmenter(model, Inference(window=window))
    with torch.no_grad():
        got = wrapped.forward_tensors(images)["logits"]
        if scales == (1.0,) and not flip:
            assert torch.equal(got, plain(images))
            return
        found = []
        for scale in scales:
            size = [max(1, int(side * scale + 0.5)) for side in (13, 18)]
            x = F.interpolate(images, size, mode="bilinear", align_corners=False)
            answers = [plain(x)]
            if flip:
                answers.append(torch.flip(plain(torch.flip(x, (3,))), (3,)))
            for logits in answers:
                back = F.interpolate(logits, (13, 18), mode="bilinear", align_corners=False)
                found.append(back.exp() / back.exp().sum(1, keepdim=True))
        want = torch.stack(found).mean(0)
    torch.testing.assert_close(got.exp(), want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got.softmax(1), got.exp(), rtol=1e-10, atol=1e-12)


def test_a_class_of_no_probability_stays_finite():
    class Sure(Places):
        def forward(self, images):
            return torch.stack([images[:, 0] * 0 + 1e4, images[:, 0] * 0, images[:, 0] * 0], 1)

    model = InferredSegmenter(Sure(), Inference(flip=True))
    assert model(image(3, 4).float()).isfinite().all()
    half = model(image(3, 4).bfloat16())
    assert half.dtype == torch.float32, "half precision would round probabilities away"
    assert half.isfinite().all()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"stride": 4}, r"a stride \(4\) needs a window"),
        ({"window": 0}, "windows of 0 pixels"),
        ({"window": 8, "stride": 9}, "windows of 8 pixels with a stride of 9 do not cover"),
        ({"window": 8, "stride": 0}, "a stride of 0"),
        ({"scales": ()}, "scales must be numbers above 0"),
        ({"scales": (1.0, 0.0)}, "scales must be numbers above 0"),
    ],
)
def test_what_covers_no_image_is_refused(how, said):
    with pytest.raises(InputError, match=said):
        Inference(**how)
    Inference(window=8, stride=8)
    Inference(window=1)


def test_a_classifier_is_not_asked_in_windows():
    model = SimpleNamespace(task="classify", info=SimpleNamespace(name="resnet18"))
    with pytest.raises(InputError, match=r"for segmenters, but resnet18 does the task 'classify'"):
        InferredSegmenter(model, Inference())


def test_a_predictor_takes_it_in_the_place_of_the_model():
    torch.manual_seed(0)
    model = vitrail.create_model("linear/efficientvit_m0", classes=("a", "b", "c"), **SMALL)
    randomise(model)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    wrapped = InferredSegmenter(model, Inference(window=256, stride=200, flip=True))
    assert (wrapped.classes, wrapped.info) == (model.classes, model.info)
    assert wrapped.preprocessing == model.preprocessing
    found = next(vitrail.Predictor(wrapped)(pixels))
    plain = next(vitrail.Predictor(model)(pixels))
    assert found.segmentation.shape == plain.segmentation.shape == (40, 60)
    assert (found.segmentation != plain.segmentation).any()
