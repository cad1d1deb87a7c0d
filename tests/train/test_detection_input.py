"""Annotations that cannot be used end `vitrail train` before the first update: exit code 2, one message."""

import json
import re
import shutil

import pytest

from vitrail.cli import main

TRAIN = ["--model", "faster_rcnn/vit_tiny_patch16", "--image-size", "32", "--max-steps", "1"]


def edited(change):
    """Bytes of a COCO file -> the same after `change` of what it holds."""

    def edit(data: bytes) -> bytes:
        told = json.loads(data)
        return json.dumps(change(told) or told).encode()

    return edit


def first(**changes):
    return edited(lambda told: told["annotations"][0].update(changes))


BAD = {
    "cut off": (
        lambda data: data[: len(data) // 2],
        r"train\.json is no whole JSON: .*written to its end\?",
    ),
    "of another encoding": (
        lambda data: data.replace(b'"ruby"', b'"rub\xe9"'),
        r"is not UTF-8 text .*; save it as UTF-8",
    ),
    "nested": (lambda _: b"[" * 100_000 + b"]" * 100_000, r"is nested too deeply"),
    "a list": (lambda _: b"[1, 2]", r"expected an object with the lists .*, but it holds a list"),
    "empty": (
        edited(lambda told: told | {"annotations": []}),
        r"has no annotation at all; .* at least one object is needed",
    ),
    "not a number": (first(bbox=[float("nan"), 1, 2, 3]), r"is not finite .*\n.*--drop-bad"),
    "of no area": (first(bbox=[1, 1, 0, 3]), r"annotation 1 of .*\n.*--drop-bad"),
    "of no category": (first(category_id=9), r"category_id 9 is unknown; known are 2 \('ruby'\)"),
    "given twice": (
        edited(lambda told: told["annotations"].append(told["annotations"][0])),
        r"its id 1 stands twice",
    ),
    "of no file": (
        edited(lambda told: told["images"][1].update(file_name="no.png")),
        r"no\.png: the file is missing; .* gives it 1 object",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_message_says_what_is_wrong_and_where(case, scenes, tmp_path, capsys):
    edit, message = BAD[case]
    data = shutil.copytree(scenes, tmp_path / "data")
    file = data / "train.json"
    file.write_bytes(edit(file.read_bytes()))
    assert main(["train", "--data", str(data), *TRAIN, "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert re.search(message, told), told
    assert not (tmp_path / "run" / "best").exists()


def test_classes_that_a_model_does_not_know_are_told_with_both_lists(scenes, tmp_path, capsys):
    data, run = shutil.copytree(scenes, tmp_path / "data"), tmp_path / "run"
    small = ["--head-fields", "neck_dim=16", "box_dim=16", "strides=[8, 16]", "neck=simple_pyramid"]
    small += ["--model-fields", "depth=1", "embed_dim=32", "num_heads=2", "patch_size=8"]
    assert main(["train", "--data", str(data), *TRAIN, *small, "--out", str(run)]) == 0
    file = data / "val.json"
    file.write_bytes(file.read_bytes().replace(b'"grass"', b'"hay"'))
    capsys.readouterr()
    assert main(["eval", str(run), "--data", str(data)]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert "hay" in told
    assert "its 3: ruby, hay, sky" in told
    assert "grass" in told.split("its 3: ruby, hay, sky")[1]


def test_a_mark_before_the_text_and_names_beyond_ascii_are_read(scenes, tmp_path, capsys):
    data = shutil.copytree(scenes, tmp_path / "data")
    for split in ("train", "val"):
        file = data / f"{split}.json"
        text = file.read_text(encoding="utf-8").replace('"ruby"', '"rubí"')
        file.write_text(text, encoding="utf-8-sig")
    assert main(["data", "check", str(data)]) == 0
    assert "rubí" in capsys.readouterr().out
