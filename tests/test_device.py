"""Where a model runs: one choice, the same for every verb."""

import pytest
import torch
from PIL import Image

from vitrail.cli import main
from vitrail.device import choose_device
from vitrail.models import create_model, save
from vitrail.predictor import Predictor
from vitrail_runtime.errors import InputError

SMALL = {"dims": (16, 24, 32), "depths": (1, 1, 1), "key_dim": 8}


@pytest.mark.parametrize(("there", "chosen"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_a_gpu_where_there_is_one(monkeypatch, there, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert choose_device() == choose_device("auto") == torch.device(chosen)
    assert choose_device("cpu") == torch.device("cpu")
    if there:
        assert choose_device("cuda") == torch.device("cuda")


def test_a_gpu_that_is_not_there_is_refused_with_what_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    message = r"cannot use device 'cuda' \(torch sees no GPU\); here are: cpu; auto chooses"
    with pytest.raises(InputError, match=message):
        choose_device("cuda")
    for wrong in ("gpu", "cuda:77", ""):
        with pytest.raises(InputError, match=f"cannot use device '{wrong}' .* here are: cpu;"):
            choose_device(wrong)


def test_a_predictor_moves_its_model_there_and_leaves_it_without_a_device():
    model = create_model("efficientvit_m0", num_classes=2, **SMALL)
    assert next(Predictor(model).model.parameters()).device.type == "cpu"
    assert next(Predictor(model, device="meta").model.parameters()).device.type == "meta"
    assert next(Predictor(model, device=None).model.parameters()).device.type == "meta"


class Asked(Exception):
    """Which device a verb asked for."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    for split in ("train", "val"):
        for i, name in enumerate(("cat", "dog")):
            (folder / "data" / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 36), (9, 90 * i, 80)).save(
                folder / "data" / split / name / "a.png"
            )
    save(create_model("efficientvit_m0", classes=("cat", "dog"), **SMALL), folder / "run")
    return folder


@pytest.mark.parametrize(
    "verb",
    [
        "predict RUN DATA",
        "eval RUN --data DATA",
        "eval RUN --data DATA --probe knn",
        "inspect collapse RUN --images DATA",
        "inspect heads RUN --images DATA",
        "inspect importance RUN --data DATA",
        "train --data DATA --out OUT",
    ],
)
def test_every_verb_asks_for_auto_unless_told_otherwise(trained, monkeypatch, verb):
    def ask(name):
        raise Asked(name)

    for place in ("device", "predictor", "train.ranks"):
        monkeypatch.setattr(f"vitrail.{place}.choose_device", ask)
    places = {"RUN": trained / "run", "DATA": trained / "data", "OUT": trained / "out"}
    argv = [str(places.get(word, word)) for word in verb.split()]
    for flags, expected in (([], "auto"), (["--device", "cpu"], "cpu")):
        with pytest.raises(Asked) as asked:
            main([*argv, *flags])
        assert asked.value.args == (expected,)
