"""`vitrail predict` from the command line: what is printed where, what is written, what is refused."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.parity import randomise
from vitrail.cli import main
from vitrail.cli.predict import print_table
from vitrail.models import create_model, load, save
from vitrail.predictor import Predictor
from vitrail.segmenters.inference import Inference, InferredSegmenter
from vitrail_runtime.drawing import colour_of
from vitrail_runtime.prediction import Prediction
from vitrail_runtime.preprocess import Preprocessing
from vitrail_runtime.rle import decode_mask

CLASSES = ["ant", "[bold]bee", "cat ä"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    save(create_model("efficientvit_m0", classes=CLASSES), folder / "best")
    return str(folder)


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.png", "a.jpg", "sub/Bild ä.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return tmp_path / "in"


def test_a_table_names_every_picture_with_its_label_and_score(trained, pictures, capsys):
    assert main(["predict", trained, str(pictures)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["picture", "label", "score", "or"]
    assert [line.split("  ")[0] for line in lines[1:]] == [
        str(pictures / name) for name in ("a.jpg", "a.png", "sub/Bild ä.png")
    ]
    assert any(name in lines[1] for name in CLASSES)
    assert "3 pictures in" in err
    assert "images/s" in err


def test_json_lines_are_all_that_stands_on_stdout(trained, pictures, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # with a bar on stderr
    assert main(["predict", trained, f"{pictures}/**/*.png", "--json", "--top-k", "2"]) == 0
    out, _ = capsys.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert first["path"] == str(pictures / "a.png")
    assert second["path"] == str(pictures / "sub/Bild ä.png")
    assert first["size"] == [30, 40]
    assert first["label"] in CLASSES
    assert [first["label"], first["score"]] == [first["top"][0]["label"], first["top"][0]["score"]]
    assert len(first["top"]) == 2
    assert 0 < first["top"][1]["score"] <= first["score"] < 1


def test_out_gets_annotated_pictures_and_the_predictions(trained, pictures, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert main(["predict", f"{trained}/best", str(pictures), "--out", str(out), "--json"]) == 0
    written = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert written == ["a.jpg", "a.png.jpg", "predictions.jsonl", "sub/Bild ä.jpg"]
    assert (out / "predictions.jsonl").read_text() == capsys.readouterr().out
    with Image.open(out / "a.jpg") as drawn:
        assert drawn.width == 320
        assert drawn.height > 240


def test_a_picture_given_twice_is_told_once(trained, pictures, capsys):
    assert main(["predict", trained, str(pictures), str(pictures / "a.png"), "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.fixture
def broken(pictures):
    (pictures / "b.png").write_bytes(b"text")
    return pictures


def test_broken_pictures_end_with_an_error_after_all_results(trained, broken, capsys):
    assert main(["predict", trained, str(broken)]) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4
    assert "vitrail: 1 of 4 pictures could not be read:" in err
    assert f"{broken / 'b.png'} is not a picture" in err


def test_broken_pictures_are_left_out_and_listed_when_asked(trained, broken, capsys):
    assert main(["predict", trained, str(broken), "--json", "--skip-broken"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert "left out 1 of 4 pictures:" in err
    assert main(["predict", trained, str(broken / "b.png"), "--skip-broken"]) == 2
    assert "none of the pictures could be read" in capsys.readouterr().err


def test_no_copy_ever_overwrites_a_picture(trained, pictures, capsys):
    before = (pictures / "a.jpg").read_bytes()
    assert main(["predict", trained, str(pictures), "--out", str(pictures)]) == 2
    assert "would overwrite the picture" in capsys.readouterr().err
    assert (pictures / "a.jpg").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN"], "say which pictures"),
        (["RUN", "PICTURES/no.jpg"], "no.jpg: no such file or folder"),
        (["RUN", "PICTURES/*.gif"], r"no pictures match"),
        (["RUN", "EMPTY"], "no pictures in"),
        (["EMPTY", "PICTURES"], "is not a saved model (has no config.json)"),
        (["EMPTY/no", "PICTURES"], "is not a saved model (no such folder)"),
        (["RUN", "PICTURES", "--out", "PICTURES/a.png"], "is a file, but a folder is expected"),
        (["RUN", "PICTURES", "--out", "/proc/no"], "cannot write to /proc/no"),
        (["RUN", "PICTURES", "--top-k", "0"], "top_k must be at least 1"),
        (["RUN", "PICTURES", "--batch-size", "0"], "batch_size must be at least 1"),
        (["RUN", "PICTURES", "--device", "gpu"], "cannot use device 'gpu'"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    trained, pictures, tmp_path, capsys, arguments, message
):
    (tmp_path / "empty").mkdir()
    places = {"RUN": trained, "PICTURES": str(pictures), "EMPTY": str(tmp_path / "empty")}
    for name, place in places.items():
        arguments = [a.replace(name, place) if a.startswith(name) else a for a in arguments]
    assert main(["predict", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vitrail: ")
    assert message in err


def test_an_image_on_which_nothing_was_found_has_its_row_in_the_table(capsys):
    labels, scores = np.array([2, 0]), np.array([0.75, 0.2], np.float32)
    found = Prediction(labels, scores, ["cat ä", "ant"], source="cat.png")
    nothing = Prediction(labels[:0], scores[:0], [], boxes=np.zeros((0, 4)), source="empty.png")
    print_table([nothing, found], sys.stdout)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [
        ["empty.png", "nothing", "found"],
        ["cat.png", "cat", "ä", "75.0%", "ant", "20.0%"],
    ]


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    torch.manual_seed(0)
    small = {"dims": (16, 24, 32), "depths": (1, 1, 1), "key_dim": 8}
    model = create_model("linear/efficientvit_m0", classes=CLASSES, **small)
    randomise(model)
    return str(save(model, tmp_path_factory.mktemp("segmenter") / "model"))


def masks_of(folder, pictures, inference=None):
    model = load(folder)
    if inference is not None:
        model = InferredSegmenter(model, inference)
    return [p.segmentation for p in Predictor(model)(pictures)]


def test_a_segmenter_writes_masks_with_a_palette_overlays_and_shares(segmenter, pictures, tmp_path):
    out = tmp_path / "out"
    assert main(["predict", segmenter, str(pictures), "--out", str(out)]) == 0
    written = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    masks = ["masks/a.png", "masks/a.png.png", "masks/sub/Bild ä.png"]
    drawn = ["a.jpg", "a.png.jpg", "sub/Bild ä.jpg"]
    assert written == sorted([*drawn, *masks, "predictions.jsonl"])
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["mask"] for line in lines] == masks
    for line, seen in zip(lines, masks_of(segmenter, pictures), strict=True):
        with Image.open(out / line["mask"]) as mask:
            assert (mask.mode, mask.size) == ("P", (40, 30))
            assert np.array_equal(np.array(mask), seen)
            colours = np.array(mask.convert("RGB"))
        for label in np.unique(seen):
            assert (colours[seen == label] == colour_of(label)).all()
        counts = np.bincount(seen.ravel(), minlength=3)
        shares = {CLASSES[k]: pytest.approx(n / 1200, abs=1e-6) for k, n in enumerate(counts) if n}
        assert {entry["label"]: entry["score"] for entry in line["top"]} == shares
        assert line["label"] == CLASSES[counts.argmax()]
    with Image.open(out / "a.jpg") as image:
        assert image.width == 320


@pytest.mark.parametrize(
    ("flags", "inference"),
    [
        (["--window", "256", "--stride", "200"], Inference(window=256, stride=200)),
        (["--scales", "0.5", "1", "--flip"], Inference(scales=(0.5, 1.0), flip=True)),
    ],
)
def test_flags_say_how_a_segmenter_is_asked(segmenter, pictures, tmp_path, flags, inference):
    out, image = tmp_path / "out", pictures / "a.png"
    assert main(["predict", segmenter, str(image), "--out", str(out), *flags]) == 0
    (seen,), (plain,) = masks_of(segmenter, image, inference), masks_of(segmenter, image)
    with Image.open(out / "masks" / "a.png") as mask:
        assert np.array_equal(np.array(mask), seen)
    assert (seen != plain).any()


def test_ways_to_ask_that_do_not_fit_are_refused_before_anything_is_written(
    segmenter, trained, pictures, tmp_path, capsys
):
    out = tmp_path / "out"
    for model, flags, said in (
        (trained, ["--flip"], "but efficientvit_m0 does the task 'classify'; leave them out"),
        (segmenter, ["--stride", "4"], "a stride (4) needs a window"),
        (segmenter, ["--scales", "0"], "scales must be numbers above 0"),
    ):
        assert main(["predict", model, str(pictures), "--out", str(out), *flags]) == 2
        assert said in capsys.readouterr().err
        assert not out.exists()


def test_no_mask_ever_overwrites_an_image(trained, pictures, tmp_path, capsys):
    image = tmp_path / "out" / "masks" / "a.png"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(image)
    before = image.read_bytes()
    assert main(["predict", trained, str(image), "--out", str(tmp_path / "out")]) == 2
    assert "masks/a.png with a mask (of " in capsys.readouterr().err
    assert image.read_bytes() == before


class Finder(torch.nn.Module):
    """A detector with the same three boxes in every image, of which one is doubtful."""

    task = "detect"
    classes = ("ant", "bee", "cat")
    preprocessing = Preprocessing(size=(20, 26), mode="squash")
    info = SimpleNamespace(name="finder", category_ids=None)

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward_tensors(self, images):
        boxes = torch.tensor([[1.0, 2, 11, 12], [4, 4, 8, 8], [0, 0, 26, 20]])
        each = {
            "boxes": boxes,
            "scores": torch.tensor([0.9, 0.6, 0.2]),
            "labels": torch.tensor([1, 1, 0]),
            "count": torch.tensor(3),
            "mask_crops": torch.full((3, 2, 2), 0.9),
        }
        return {name: torch.stack([value] * len(images)) for name, value in each.items()}


@pytest.fixture
def finder(trained, monkeypatch):
    monkeypatch.setattr("vitrail.models.load", lambda folder: Finder())
    return trained


def test_a_detectors_boxes_are_drawn_and_kept_as_coco_results(finder, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["predict", finder, str(pictures), "--out", str(out)]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[-3:] for row in rows] == [["2", "bee", "90.0%"]] * 3
    results = json.loads((out / "coco_results.json").read_text())
    assert len(results) == 9
    assert [r["image_id"] for r in results] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [r["category_id"] for r in results[:3]] == [2, 2, 1]
    # 30 x 40 pixels were seen as 20 x 26
    want = [40 / 26, 3, 10 * 40 / 26, 15]
    assert results[0]["bbox"] == pytest.approx(want, abs=1e-3)
    assert decode_mask(results[1]["segmentation"]).shape == (30, 40)
    about = json.loads((out / "coco_images.json").read_text())
    assert [c["name"] for c in about["categories"]] == ["ant", "bee", "cat"]
    assert [c["id"] for c in about["categories"]] == [1, 2, 3]
    assert [i["id"] for i in about["images"]] == [1, 2, 3]
    assert about["images"][0]["file_name"] == str(pictures / "a.jpg")
    assert (about["images"][0]["height"], about["images"][0]["width"]) == (30, 40)
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [len(line["top"]) for line in lines] == [2, 2, 2]
    drawn = next(iter(Predictor(Finder())(pictures / "a.png"))).above(0.5).draw()
    with Image.open(out / "a.png.jpg") as kept:
        assert kept.size == drawn.size
        assert np.abs(np.array(kept).astype(int) - np.array(drawn)).mean() < 4


def test_categories_are_called_as_in_the_data_that_the_model_learnt_from(
    finder, pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(Finder.info, "category_ids", (12, 7, 30))
    out = tmp_path / "out"
    assert main(["predict", finder, str(pictures / "a.png"), "--out", str(out)]) == 0
    results = json.loads((out / "coco_results.json").read_text())
    assert [r["category_id"] for r in results] == [7, 7, 12]
    about = json.loads((out / "coco_images.json").read_text())
    assert [c["id"] for c in about["categories"]] == [12, 7, 30]


def test_the_threshold_decides_what_is_told_and_drawn(finder, pictures, capsys):
    one = str(pictures / "a.png")
    for threshold, left in (("0", 3), ("0.2", 3), ("0.65", 1), ("1", 0)):
        assert main(["predict", finder, one, "--json", "--threshold", threshold]) == 0
        assert len(json.loads(capsys.readouterr().out)["top"]) == left
    assert main(["predict", finder, one, "--threshold", "1"]) == 0
    assert "nothing found" in capsys.readouterr().out
    assert main(["predict", finder, one, "--threshold", "50"]) == 2
    assert "--threshold is a score from 0 to 1, but is 50" in capsys.readouterr().err


def test_ids_are_those_of_a_coco_file_where_one_is_given(finder, pictures, tmp_path, capsys):
    names = ["a.png", "a.jpg", "Bild ä.png", "sub/Bild ä.png"]
    file = tmp_path / "known.json"
    known = {
        "images": [{"id": 70 + i, "file_name": name} for i, name in enumerate(names)],
        "categories": [{"id": i, "name": n} for i, n in ((9, "cat"), (4, "ant"), (7, "bee"))],
    }
    file.write_text(json.dumps(known), encoding="utf-8-sig")  # with a byte order mark
    out = tmp_path / "out"
    how = ["predict", finder, str(pictures), "--out", str(out), "--coco", str(file)]
    assert main(how) == 0
    results = json.loads((out / "coco_results.json").read_text())
    assert [r["image_id"] for r in results[::3]] == [71, 70, 73]
    assert [r["category_id"] for r in results[:3]] == [7, 7, 4]
    about = json.loads((out / "coco_images.json").read_text())
    assert [c["id"] for c in about["categories"]] == [4, 7, 9]
    capsys.readouterr()
    for change, said in (
        ({"images": known["images"][1:]}, "1 of 3 images are not in the annotations"),
        ({"categories": known["categories"][1:]}, "no category for classes of the model: cat"),
        ({"images": [{"id": 1}]}, "`images` with id and file_name"),
        ({"images": None}, "`images` with id and file_name"),
    ):
        file.write_text(json.dumps(known | change))
        assert main(how) == 2
        assert said in capsys.readouterr().err
    for text, said in (("{", "is no JSON"), ("[" * 9999, "is no JSON")):
        file.write_text(text)
        assert main(how) == 2
        assert said in capsys.readouterr().err
    file.write_text("[]")
    assert main(how) == 2
    assert "`images` with id" in capsys.readouterr().err
    assert main([*how[:-1], str(tmp_path / "none.json")]) == 2
    assert "cannot be read: No such file" in capsys.readouterr().err
    assert main(["predict", finder, str(pictures), "--coco", str(file)]) == 2
    assert "--out asks for" in capsys.readouterr().err


def test_a_classifier_is_not_cut_at_the_threshold(trained, pictures, tmp_path, capsys):
    one = str(pictures / "a.png")
    how = ["predict", trained, one, "--json", "--threshold", "1", "--out", str(tmp_path / "out")]
    assert main(how) == 0
    assert len(json.loads(capsys.readouterr().out)["top"]) == 3
    assert not list((tmp_path / "out").glob("coco*"))
