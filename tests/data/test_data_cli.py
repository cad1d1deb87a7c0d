"""vitrail data check and show."""

import json
import shutil

import pytest
from PIL import Image

from tests.data.conftest import picture
from vitrail.cli import main
from vitrail.data import open_data, sheet
from vitrail.data.checkup import check
from vitrail_runtime.errors import InputError


@pytest.fixture
def root(class_folders):
    return class_folders({"train": {"cat": 5, "dog": 4}, "val": {"cat": 2, "dog": 2}})


def test_a_clean_set_is_ready_to_train(root, capsys):
    assert main(["data", "check", str(root)]) == 0
    out = capsys.readouterr().out
    assert "2 classes" in out
    assert "train: 9 pictures, 4 to 5 a class" in out
    assert "ready to train" in out


def test_broken_pictures_are_found_by_decoding(root):
    path = root / "train" / "cat" / "000.jpg"
    payload = path.read_bytes()
    # The last bytes are those of a whole JPEG, so only decoding can tell.
    path.write_bytes(payload[:300] + b"\xff\xd9")
    (root / "train" / "dog" / "000.jpg").write_bytes(b"")
    found = check(root)
    lines = found.errors["broken pictures"]
    assert len(lines) == 2
    assert "cat/000.jpg: " in lines[0]
    assert "truncated" in lines[0]
    assert "dog/000.jpg: is empty" in lines[1]


def test_doubles_leaks_and_contradictions_are_told_apart(root):
    train, val = root / "train", root / "val"
    shutil.copy(train / "cat" / "001.jpg", train / "cat" / "copy.jpg")
    shutil.copy(train / "cat" / "002.jpg", val / "cat" / "leak.jpg")
    shutil.copy(train / "cat" / "003.jpg", train / "dog" / "wrong.jpg")
    found = check(root)
    assert len(found.warnings["duplicates: the same bytes more than once in a split"]) == 1
    (leak,) = found.errors["leaks: the same bytes in different splits"]
    assert "train/cat/002.jpg" in leak
    assert "val/cat/leak.jpg" in leak
    (wrong,) = found.errors["the same bytes under different labels"]
    assert wrong.endswith("(cat, dog)")


def test_a_copy_saved_anew_at_another_size_is_a_leak(root):
    image = Image.open(root / "train" / "cat" / "002.jpg")
    image.resize((80, 60), Image.Resampling.BICUBIC).save(root / "val" / "cat" / "again.png")
    (leak,) = check(root).warnings["leaks: pictures that look the same in different splits"]
    assert "train/cat/002.jpg" in leak
    assert "val/cat/again.png" in leak


def test_flat_pictures_are_not_taken_for_copies_of_each_other(root):
    for i in range(3):
        Image.new("RGB", (40, 40), (9, 9, 9 + i)).save(root / "train" / "cat" / f"flat{i}.png")
    assert not any("look the same" in what for what in check(root).warnings)


def test_imbalance_missing_classes_and_small_pictures_are_reported(class_folders, capsys):
    root = class_folders({"train": {"cat": 30, "dog": 2}, "val": {"cat": 2, "owl": 1}})
    assert main(["data", "check", str(root)]) == 1
    out = capsys.readouterr().out
    assert "train: cat has 15 times as many pictures as dog (30 and 2)" in out
    assert "ERROR: classes without a picture: 1\n    val: dog" in out
    assert "ERROR: classes that train does not have: 1\n    val: owl (1)" in out
    assert "warning: pictures with a side under 32 pixels: 35" in out
    assert "... and 25 more" in out
    assert "ready" not in out


def test_what_a_training_would_refuse_is_an_error_of_the_check(class_folders, tmp_path):
    few = class_folders({"": {"cat": 5, "dog": 1, "owl": 2}}, tmp_path / "few")
    (found,) = check(few).errors.values()
    assert found == ["dog (1); add some, or give a val split"]
    with pytest.raises(
        InputError, match=r"1 of 3 classes have too few pictures to hold out .*: dog;"
    ):
        open_data(few, "val")
    measured = class_folders({"val": {"cat": 5, "dog": 1}}, tmp_path / "measured")
    assert check(measured).errors == {"no train split; a model is trained on one": ["there is val"]}


def test_the_finding_comes_as_json_too(root, capsys):
    assert main(["data", "check", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["classes"] == ["cat", "dog"]
    assert found["splits"][0]["per_class"] == {"cat": 5, "dog": 4}


def test_flags_may_stand_before_the_source(root, tmp_path, capsys):
    assert main(["data", "check", "--json", str(root)]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == str(root)
    assert main(["data", "show", "--out", str(tmp_path / "sheet.png"), str(root)]) == 0


def test_the_sheet_counts_what_a_training_holds_out(class_folders, tmp_path, capsys):
    root = class_folders({"train": {"cat": 10, "dog": 10}, "test": {"cat": 2, "dog": 2}})
    assert main(["data", "show", str(root), "--out", str(tmp_path / "sheet.png")]) == 0
    said = capsys.readouterr().out
    assert "no val split: 20% of the training pictures" in said
    assert "train: 16 pictures" in said
    assert "val: 4 pictures" in said
    assert "test: 4 pictures" in said


def test_a_contact_sheet_is_drawn_for_few_classes_and_for_many(
    root, class_folders, tmp_path, capsys
):
    (root / "train" / "cat" / "bad.jpg").write_bytes(b"no")
    out = tmp_path / "new" / "sheet.png"
    assert main(["data", "show", str(root), "--out", str(out)]) == 0
    assert Image.open(out).size[0] == 1600
    said = capsys.readouterr().out
    assert "train: 9 pictures of 2 classes" in said
    assert "broken:" in said
    assert "bad.jpg" in said
    many = class_folders(
        {"": {f"klasse_äöü_{i:03d}_with_a_long_name": 1 for i in range(90)}}, tmp_path / "many"
    )
    assert main(["data", "show", str(many), "--out", str(out)]) == 0


def test_letters_that_dejavu_lacks_come_from_an_installed_font_or_as_escapes(
    class_folders, tmp_path, capsys, monkeypatch
):
    root = class_folders({"": {"cat": 2, "\u732b": 2}})  # a cat in Chinese
    show = ["data", "show", str(root), "--out", str(tmp_path / "sheet.png")]
    monkeypatch.setattr(sheet, "_installed", lambda: ())
    assert sheet._escaped("a\u732b") == "a\\u732b"
    assert main(show) == 0
    said = capsys.readouterr().out
    assert (
        "no font here has the letters of \u732b: the sheet shows escapes such as \\u4e2d; inst"
        in said
    )
    real = sheet._letters
    extra = {"other.ttf": real(sheet._dejavu(False)) | {0x732B}, "broken.ttf": frozenset()}
    monkeypatch.setattr(sheet, "_installed", lambda: tuple(sorted(extra)))
    monkeypatch.setattr(sheet, "_letters", lambda path: extra.get(path) or real(path))
    assert sheet._font_with("\u732b", False) == "other.ttf"
    assert sheet._font_with("cat", True) == sheet._dejavu(True)


def test_a_broken_font_has_no_letters(tmp_path):
    (tmp_path / "a.ttf").write_bytes(b"no font")
    assert sheet._letters(str(tmp_path / "a.ttf")) == frozenset()


def test_one_set_draws_one_sheet(root, tmp_path):
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    for path in (a, b):
        assert main(["data", "show", str(root), "--out", str(path), "--seed", "3"]) == 0
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["check"], "takes one SOURCE, but got none"),
        (["check", "nowhere"], "nowhere: no such file or folder"),
        (["show", "a", "b"], "takes one SOURCE, but got a, b"),
        (["make", "cats", "x"], "vitrail data make digits DIR"),
    ],
)
def test_wrong_arguments_are_one_message_and_code_2(argv, message, capsys):
    assert main(["data", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_sheet_of_an_unknown_kind_is_one_message(root, tmp_path, capsys):
    assert main(["data", "show", str(root), "--out", str(tmp_path / "sheet.xyz")]) == 2
    assert "sheet.xyz cannot be written" in capsys.readouterr().err


def test_picture_helper_makes_different_pictures():
    assert picture(1).tobytes() != picture(2).tobytes()


def test_a_set_of_broken_pictures_alone_is_a_finding(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.jpg").write_text("no picture")
    assert len(check(tmp_path).errors["broken pictures"]) == 2
