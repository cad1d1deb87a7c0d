"""Mistakes with tasks, masks and models, as a person meets them: one message, exit code 2, no traceback."""

import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.train.conftest import SEGMENTER, SHAPES, VIT, make_masks, tiny_config
from vitrail.cli import main
from vitrail.configuration import to_dict
from vitrail.models import create_model, save


def told(capsys, argv: list[str]) -> str:
    """The one message of a command that is refused."""
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.fixture
def train(tmp_path, capsys):
    """What `vitrail train` says to these settings and flags."""

    def run(data, settings: dict, *flags: str) -> str:
        out = tmp_path / "run"
        config = to_dict(tiny_config(data, out, **{"epochs": 1} | settings))
        (file := tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        said = told(capsys, ["train", "--config", str(file), *flags])
        assert not (out / "state").exists(), "nothing is trained"
        return said

    return run


def test_a_classifier_learns_nothing_from_masks_and_a_segmenter_nothing_from_folders(
    train, masks, pictures
):
    said = train(masks, VIT)
    assert "vit_tiny_patch16 does the task 'classify', which learns from labels, but" in said
    assert f"{masks} holds class maps, for the task 'segment'" in said
    said = train(pictures, SEGMENTER)
    assert f"{SEGMENTER['model']} does the task 'segment', which learns from class maps" in said
    assert f"{pictures} holds labels, for the task 'classify'" in said


def test_settings_of_another_task_are_refused_by_name(train, masks, pictures):
    said = train(masks, SEGMENTER, "--task.label-smoothing", "0.1")
    assert "--task.label-smoothing" in said
    said = train(masks, SEGMENTER | {"task": {"label_smoothing": 0.1}})
    assert "settings of the task 'segment', which semantic_fpn/vit_tiny_patch16 does," in said
    assert "label_smoothing" in said
    said = train(pictures, VIT | {"task": {"class_weights": "balanced"}})
    assert "settings of the task 'classify'" in said
    assert "class_weights" in said
    said = train(masks, SEGMENTER | {"task": {"class_weights": "equal"}})
    assert "class_weights" in said
    assert "balanced" in said


def broken_set(tmp_path):
    return make_masks(tmp_path / "set", train=4, val=2)


def test_masks_that_do_not_fit_their_images_are_named(train, tmp_path):
    root = broken_set(tmp_path)
    Image.fromarray(np.zeros((9, 11), np.uint8)).save(root / "masks/train/01.png")
    said = train(root, SEGMENTER)
    assert f"{root}/masks/train/01.png: is 9 x 11 (height x width), but its image" in said


def test_values_outside_the_classes_are_named_with_their_place_and_number(train, tmp_path):
    root = broken_set(tmp_path)
    ids = np.array(Image.open(root / "masks/val/01.png"))
    ids[3, 5:8] = 77
    Image.fromarray(ids).save(root / "masks/val/01.png")
    said = train(root, SEGMENTER)
    assert f"{root}/masks/val/01.png: has values outside the classes" in said
    assert "3 pixels of 77 (first in row 3, column 5)" in said


def test_images_without_masks_and_masks_without_images_are_named(train, tmp_path):
    root = broken_set(tmp_path)
    (root / "masks/train/02.png").rename(root / "aside.png")
    assert "1 of 4 images" in (said := train(root, SEGMENTER))
    assert "02.png" in said
    (root / "aside.png").rename(root / "masks/train/02.png")
    (root / "images/train/03.png").unlink()
    assert "1 of 4 masks" in (said := train(root, SEGMENTER))
    assert "03.png" in said


def test_validation_masks_without_any_class_are_told(train, tmp_path):
    root = broken_set(tmp_path)
    for path in (root / "masks/val").iterdir():
        size = Image.open(path).size
        Image.new("L", size, 255).save(path)
    said = train(root, SEGMENTER)
    assert "none of the 2 images has a pixel with a class" in said
    assert "vitrail data show" in said


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    how = {"image_size": 32, "head": SEGMENTER["head_fields"]}
    fields = SEGMENTER["model_fields"]
    save(create_model(SEGMENTER["model"], classes=SHAPES, **fields, **how), folder)
    return folder


def test_a_window_larger_than_the_image_is_the_image(segmenter, masks, tmp_path, capsys):
    image = str(masks / "images/val/00.png")
    for name, flags in (("whole", []), ("window", ["--window", "500"])):
        assert main(["predict", str(segmenter), image, "--out", str(tmp_path / name), *flags]) == 0
    one, other = (np.array(Image.open(tmp_path / n / "masks/00.png")) for n in ("whole", "window"))
    assert np.array_equal(one, other)


def test_a_model_is_measured_on_data_of_its_task_alone(segmenter, pictures, tmp_path, capsys):
    said = told(capsys, ["eval", str(segmenter), "--data", str(pictures)])
    assert "segment" in said or "does not know" in said
    shutil.copytree(pictures, tmp_path / "same")
    for split in ("train", "val"):  # the model's names, and still no class maps
        for name, other in zip(("left", "right", "top"), SHAPES, strict=True):
            (tmp_path / "same" / split / name).rename(tmp_path / "same" / split / other)
    said = told(capsys, ["eval", str(segmenter), "--data", str(tmp_path / "same")])
    assert "does the task 'segment', which learns from class maps" in said
