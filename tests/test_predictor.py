"""Pictures in any form, any size and any number -> Predictions in their order, each as if alone."""

import itertools
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vitrail
from tests.parity import randomise
from vitrail.classifiers import Classifier, PooledHead
from vitrail.models import ModelInfo, build_backbone, describe
from vitrail.predictor import Predictor
from vitrail.registry import tiny_entries
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing, decode, prepare

CLASSES = ("red", "green", "blue", "grey")


class Statistics(nn.Module):
    """A stand-in backbone that sees everything of a picture but its size: mean and spread per channel."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.batches = []

    def forward(self, images, record=None):
        self.batches.append(tuple(images.shape))
        x = self.norm(self.conv(images))
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


def classifier(**preprocessing):
    torch.manual_seed(0)
    model = Classifier(Statistics(), nn.Linear(16, len(CLASSES)))
    describe(model, ModelInfo("statistics", {}, CLASSES, Preprocessing(**preprocessing)))
    return model.eval()


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        height, width = rng.integers(5, 60, 2)
        yield rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_every_kind_of_source_gives_the_same_result(tmp_path):
    image = next(pictures(1))
    path = tmp_path / "Bild ä.png"
    Image.fromarray(image).save(path)
    chw = torch.from_numpy(image).permute(2, 0, 1)
    predict = Predictor(classifier(size=(16, 16)))
    files = [path, str(path), tmp_path, f"{tmp_path}/*.png", path.read_bytes(), Image.open(path)]
    kinds = [*files, image, chw, chw / 255]
    scores = [next(predict(kind)).scores for kind in kinds]
    for other in scores[1:]:
        np.testing.assert_array_equal(other, scores[0])
    assert len(list(predict(kinds))) == len(kinds)
    assert len(list(predict(chw[None].expand(3, -1, -1, -1)))) == 3


@pytest.mark.parametrize("mode", ["crop", "fit", "native"])
def test_results_come_in_order_and_each_equals_the_picture_alone(mode):
    model = classifier(size=(24, 24), mode=mode)
    images = list(pictures(23)) + [np.zeros((8, 8, 3), np.uint8)] * 9
    random.Random(0).shuffle(images)
    together = list(Predictor(model, batch_size=4)(images))
    assert [p.size for p in together] == [image.shape[:2] for image in images]
    for image, p in zip(images, together, strict=True):
        (alone,) = Predictor(model)(image)
        np.testing.assert_allclose(p.scores, alone.scores, atol=1e-6)
        assert p.names == alone.names


def test_pictures_of_equal_size_share_a_batch_and_others_never_do():
    model = classifier(mode="native")
    images = [np.zeros((6, 7 + i % 2, 3), np.uint8) for i in range(10)]
    list(Predictor(model, batch_size=4)(images))
    assert sorted(model.backbone.batches) == [
        (1, 3, 6, 7),
        (1, 3, 6, 8),
        (4, 3, 6, 7),
        (4, 3, 6, 8),
    ]


def test_results_come_before_the_last_picture_is_read():
    images = itertools.chain(pictures(200), iter(lambda: pytest.fail("read too far"), None))
    predictions = Predictor(classifier(size=(8, 8)), batch_size=4)(images)
    assert len(list(itertools.islice(predictions, 20))) == 20


def test_many_sizes_do_not_wait_for_the_end():
    sizes = itertools.count(5)
    images = (np.zeros((4, next(sizes), 3), np.uint8) for _ in itertools.count())
    assert next(Predictor(classifier(mode="native"), batch_size=2)(images)).size == (4, 5)
    assert next(sizes) < 30


def test_the_model_comes_back_as_it_was():
    model = classifier(size=(8, 8)).train()
    model.backbone.norm.eval()  # a frozen norm stays frozen
    before = {k: v.clone() for k, v in model.state_dict().items()}
    (p,) = Predictor(model)(next(pictures(1)))
    assert (model.training, model.backbone.conv.training, model.backbone.norm.training) == (
        True,
        True,
        False,
    )
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert p.labels.dtype == np.int64


def test_a_model_in_training_answers_as_in_evaluation_and_learns_nothing_from_it():
    model = classifier(size=(8, 8))
    model.head = nn.Sequential(nn.Dropout(0.5), model.head)
    images = list(pictures(6))
    want = [p.scores for p in Predictor(model.eval())(images)]
    before = model.backbone.norm.running_mean.clone()
    got = [p.scores for p in Predictor(model.train())(images)]
    np.testing.assert_array_equal(got, want)
    assert torch.equal(model.backbone.norm.running_mean, before)
    assert model.training


def test_top_k_is_set_for_all_calls_or_for_one():
    predict = Predictor(classifier(size=(8, 8)), top_k=2)
    image = next(pictures(1))
    assert [len(next(predict(image)).names), len(next(predict(image, top_k=9)).names)] == [2, 4]
    assert next(predict(image, top_k=4)).scores.sum() == pytest.approx(1)


def test_half_precision_models_are_fed_what_they_hold():
    (p,) = Predictor(classifier(size=(8, 8)).bfloat16())(next(pictures(1)))
    assert np.isfinite(p.scores).all()


@pytest.fixture
def folder(tmp_path):
    for i, image in enumerate(pictures(7)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"not a picture")
    (tmp_path / "3.png").write_bytes(b"")
    data = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").write_bytes(data[: len(data) // 2])
    return tmp_path


def test_broken_pictures_are_listed_after_all_results(folder):
    predictions, seen = Predictor(classifier(size=(8, 8)), batch_size=2)(folder), []
    with pytest.raises(InputError, match=r"3 of 7 pictures could not be read") as error:
        seen.extend(p.source for p in predictions)
    assert seen == [str(folder / f"{i}.png") for i in (0, 1, 4, 6)]
    for i, why in [(2, "not a picture"), (3, "empty"), (5, "broken or truncated")]:
        assert f"{folder / f'{i}.png'} is {why}" in str(error.value)


def test_broken_pictures_are_left_out_when_asked(folder):
    predict = Predictor(classifier(size=(8, 8)), skip_broken=True)
    assert len(list(predict(folder))) == 4
    assert [name for name, _ in predict.skipped] == [str(folder / f"{i}.png") for i in (2, 3, 5)]
    assert predict.skipped[1][1] == "is empty (0 bytes)"
    list(predict(folder / "0.png"))
    assert predict.skipped == []


def test_a_broken_array_is_named_by_its_place():
    images = [next(pictures(1)), np.zeros((3, 4))]
    with pytest.raises(
        InputError, match=r"1 of 2 .*\n  picture 1 \(ndarray\) must be a uint8 array"
    ):
        list(Predictor(classifier(size=(8, 8)))(images))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(5, 6, 3), r"shape \(3, H, W\)"),
        (torch.full((3, 4, 4), 2.0), "must lie in"),
        (torch.full((3, 4, 4), float("nan")), "must lie in"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), "uint8 or float"),
    ],
)
def test_tensors_that_are_no_pictures_are_refused(tensor, message):
    with pytest.raises(InputError, match=message):
        list(Predictor(classifier(size=(8, 8)))([tensor]))


def test_what_is_missing_is_said_at_once(tmp_path):
    predict = Predictor(classifier())
    with pytest.raises(InputError, match="no such file"):
        predict([tmp_path / "no.jpg"])
    with pytest.raises(InputError, match="no pictures in"):
        predict(tmp_path)
    with pytest.raises(InputError, match="got int"):
        predict(3)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match="does not know its classes"):
        Predictor(nn.Linear(2, 2))
    for settings in ({"batch_size": 0}, {"top_k": 0}):
        with pytest.raises(InputError, match="at least 1"):
            Predictor(classifier(), **settings)
    with pytest.raises(InputError, match=r"cannot use device 'cuda:77'.*here are: cpu"):
        Predictor(classifier(), device="cuda:77")
    with pytest.raises(InputError, match="cannot use device 'gpu'"):
        Predictor(classifier(), device="gpu")


@pytest.mark.parametrize("family", sorted(tiny_entries()))
def test_every_family_gives_each_picture_the_result_it_has_alone(family):
    entry = tiny_entries()[family]
    torch.manual_seed(0)
    backbone = build_backbone(entry, {})
    head = (entry.tail or PooledHead)(backbone.config, backbone.feature_specs, len(CLASSES))
    model = Classifier(backbone, head)
    randomise(model)
    preprocessing = Preprocessing(size=(48, 48), mode="fit")
    describe(model, ModelInfo(entry.name, {"backbone": backbone.config}, CLASSES, preprocessing))
    images = [*pictures(5), *pictures(5)]
    for image, p in zip(images, Predictor(model, batch_size=3)(images), strict=True):
        (alone,) = Predictor(model)(image)
        order = np.argsort(p.labels), np.argsort(alone.labels)
        np.testing.assert_allclose(p.scores[order[0]], alone.scores[order[1]], atol=1e-5)


def test_a_picture_of_1_by_5000_is_one_like_any_other():
    for mode in ("crop", "squash", "fit", "native"):
        (p,) = Predictor(classifier(size=(32, 32), mode=mode))(np.zeros((1, 5000, 3), np.uint8))
        assert p.size == (1, 5000)


def test_an_array_that_is_no_picture_is_refused_by_its_shape():
    with pytest.raises(InputError, match=r"must be a uint8 array.*\(5,\)"):
        list(Predictor(classifier())([np.zeros(5, np.uint8)]))


def test_a_large_jpeg_is_decoded_at_a_fraction_and_prepared_as_if_it_were_whole(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (700, 1001, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.jpg", quality=95)
    with Image.open(tmp_path / "large.jpg") as image:
        image.draft("RGB", (250, 175))  # a quarter: an eighth is less than 1.5 times 73 x 54
        quarter = np.asarray(image)
    assert quarter.shape == (175, 251, 3)
    model = classifier(size=(64, 48))
    pixels, _ = prepare(quarter, model.preprocessing, original=(700, 1001))
    with torch.no_grad():
        want = model(torch.from_numpy(pixels)[None]).softmax(1)[0].sort(descending=True)
    (p,) = Predictor(model)(tmp_path / "large.jpg")
    assert p.labels.tolist() == want.indices.tolist()
    np.testing.assert_allclose(p.scores, want.values, atol=1e-7)
    (whole,) = Predictor(model)(decode(tmp_path / "large.jpg"))
    assert np.abs(whole.scores - p.scores).max() > 1e-5  # it could be told apart


def test_sixteen_share_a_forward_and_five_answers_are_given_without_a_word():
    model = classifier(size=(8, 12))
    predict = Predictor(model)
    assert len(list(predict([np.zeros((5, 6, 3), np.uint8)] * 20))) == 20
    assert model.backbone.batches == [(16, 3, 8, 12), (4, 3, 8, 12)]
    assert predict.top_k == 5


def test_images_of_as_many_pixels_in_another_shape_have_a_forward_of_their_own():
    model = classifier(mode="native")
    sizes = [(6, 8), (8, 6), (6, 8), (4, 12), (8, 6)]
    predictions = list(Predictor(model)([np.zeros((*size, 3), np.uint8) for size in sizes]))
    assert [p.size for p in predictions] == sizes
    assert sorted(b[0] for b in model.backbone.batches) == [1, 2, 2]


def test_images_of_any_size_share_a_forward_once_they_are_cut_to_one():
    model = classifier(size=(8, 12))
    list(Predictor(model, batch_size=3)(list(pictures(5))))
    assert model.backbone.batches == [(3, 3, 8, 12), (2, 3, 8, 12)]


def test_of_those_that_wait_the_oldest_runs_first():
    model = classifier(mode="native")
    widths = [5, 5, 6, 5, *range(7, 17)]
    predictions = Predictor(model, batch_size=2)(np.zeros((4, w, 3), np.uint8) for w in widths)
    assert [p.size for p in predictions] == [(4, w) for w in widths]
    assert [(b[0], b[3]) for b in model.backbone.batches[:4]] == [(2, 5), (1, 6), (1, 5), (1, 7)]


def test_grey_and_transparent_tensors_are_images_too():
    predict = Predictor(classifier(size=(16, 16)))
    grey = torch.from_numpy(next(pictures(1))).permute(2, 0, 1)[:1]
    opaque = torch.cat([grey.expand(3, -1, -1), torch.full_like(grey, 255)])
    (want,) = predict(grey.expand(3, -1, -1))
    for tensor in (grey, opaque, grey / 255, (opaque / 255).double().requires_grad_()):
        (got,) = predict(tensor)
        np.testing.assert_array_equal(got.scores, want.scores)
    with pytest.raises(InputError, match=r"\n  picture 0 \(Tensor\) must be of shape \(3, H, W\)"):
        list(predict(grey.expand(2, -1, -1)))


def test_floats_are_rounded_to_the_nearest_of_256_steps():
    predict = Predictor(classifier(mode="native"))
    values = torch.rand(3, 6, 7, generator=torch.Generator().manual_seed(0))
    nearest = np.floor(values.permute(1, 2, 0).numpy().astype(float) * 255 + 0.5).astype(np.uint8)
    (got,), (want,) = predict(values), predict(nearest)
    np.testing.assert_array_equal(got.scores, want.scores)


def test_a_prediction_names_its_file_also_when_it_came_opened(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(next(pictures(1))).save(path)
    predict = Predictor(classifier(size=(8, 8)))
    with Image.open(path) as image:
        sources = [p.source for p in predict([image, path, str(path), path.read_bytes()])]
    assert sources == [str(path)] * 3 + [None]


def test_of_many_broken_images_twenty_are_listed_and_the_rest_counted(tmp_path):
    for i in range(23):
        (tmp_path / f"{i:02}.png").touch()
    with pytest.raises(InputError) as error:
        list(Predictor(classifier(size=(8, 8)))(tmp_path))
    first, *listed, more, hint = str(error.value).splitlines()
    assert first == "23 of 23 pictures could not be read:"
    assert [line.split()[0] for line in listed] == [
        str(tmp_path / f"{i:02}.png") for i in range(20)
    ]
    assert more == "  ... and 3 more"
    assert "--skip-broken" in hint


def test_the_model_is_moved_to_the_device_and_nowhere_without_one(monkeypatch):
    model = classifier(size=(8, 8)).double()
    monkeypatch.setattr("vitrail.predictor.choose_device", lambda name: torch.device(name))
    assert next(Predictor(model, device=None).model.parameters()).device.type == "cpu"
    monkeypatch.setattr(
        "vitrail.predictor.choose_device", lambda name: {"auto": torch.device("meta")}[name]
    )
    assert next(Predictor(classifier(size=(8, 8))).model.parameters()).device.type == "meta"
    monkeypatch.setattr("vitrail.predictor.choose_device", lambda name: torch.device(name))
    assert next(Predictor(model, device="meta").model.parameters()).device.type == "meta"


def packing_model() -> Any:
    torch.manual_seed(0)
    shape = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}
    model = vitrail.create_model("vit_tiny_patch16", classes=["a", "b", "c"], **shape)
    randomise(model)
    return model


def arrays_of(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]


def test_packed_pictures_come_in_order_and_are_each_what_it_is_alone():
    model = packing_model()
    images = arrays_of((8, 40), (30, 21), (64, 64), (8, 8), (17, 80), (40, 8))
    for options in (
        {"max_tokens": 70},
        {"tokens_per_image": 6},
        {"max_tokens": 8, "tokens_per_image": 5},
    ):
        predict = vitrail.Predictor(model, top_k=3, **options)
        got = list(predict(images))
        alone = [next(iter(predict([image]))) for image in images]
        assert [p.labels.tolist() for p in got] == [p.labels.tolist() for p in alone]
        for a, b in zip(got, alone, strict=True):
            np.testing.assert_allclose(a.scores, b.scores, atol=1e-6)
    # Against the model itself: 64 x 64 as 4 patches of 8 is 16 x 16.
    small = vitrail.Predictor(model, top_k=3, tokens_per_image=4)
    (found,) = small([images[2]])
    pixels, _ = prepare(images[2], replace(model.preprocessing, mode="squash", size=(16, 16)))
    with torch.no_grad():
        want = model.eval()(torch.from_numpy(pixels)[None]).softmax(1)[0]
    np.testing.assert_allclose(found.scores, want[torch.as_tensor(found.labels)], atol=1e-6)
    assert model.preprocessing.mode == "crop", "left as it was"


def test_pictures_that_are_shown_smaller_are_listed(tmp_path):
    first, *others = arrays_of((17, 24), (16, 24), (8, 50), (24, 16))  # 9, 6, 7 and 6 patches of 8
    Image.fromarray(first).save(tmp_path / "first.png")
    pictures = [tmp_path / "first.png", *others]
    predict = vitrail.Predictor(packing_model(), max_tokens=7)
    for _ in range(2):  # of each call
        assert len(list(predict(pictures))) == 4
        assert predict.smaller == [str(tmp_path / "first.png"), "picture 2 (ndarray)"]
    whole = vitrail.Predictor(packing_model())  # at the model's own size: nothing is said
    assert len(list(whole(pictures))) == 4
    assert whole.smaller == []


def test_packs_share_forwards(monkeypatch):
    model, seen = packing_model(), []
    real = model.forward_tensors

    def counted(patches, packing):
        seen.append(len(packing["sizes"]))
        return real(patches, packing=packing)

    monkeypatch.setattr(model, "forward_tensors", counted)
    images = arrays_of(*[(8, 8 * n) for n in (1, 2, 3, 4, 5, 6)])  # 2 to 7 tokens with the prefix
    assert len(list(vitrail.Predictor(model, max_tokens=9)(images))) == 6
    assert seen == [2, 2, 2]


def test_what_cannot_be_packed_is_said_by_the_predictor():
    other = vitrail.create_model("efficientvit_m0", num_classes=2)
    with pytest.raises(InputError, match="efficientvit_m0 cannot take packed images"):
        vitrail.Predictor(other, tokens_per_image=9)
    for budget in (0, 1):
        said = f"max_tokens is {budget}, but the model adds 1 tokens .* needs at least one more"
        with pytest.raises(InputError, match=said):
            vitrail.Predictor(packing_model(), max_tokens=budget)
    with pytest.raises(InputError, match="at most 0"):
        vitrail.Predictor(packing_model(), tokens_per_image=0)
