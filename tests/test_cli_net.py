"""What verbs write and refuse, beside what an oracle gives: convert, replay, predict, models, demo, flags."""

import io
import json
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scripts import models_table

from vitrail.cli import main
from vitrail.cli.demo import side_by_side
from vitrail.cli.flags import flags_of, parse_flags
from vitrail.models import create_model, load, save
from vitrail.predictor import Predictor
from vitrail_runtime.errors import InputError

timm = pytest.importorskip("timm")
SMALL = {"dims": (16, 24, 32), "depths": (1, 1, 1), "key_dim": 8}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """(a file of a foreign ViT made for 64 x 64 pixels, its tensors)"""
    torch.manual_seed(0)
    peer = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3)
    for p in peer.parameters():
        torch.nn.init.normal_(p, std=0.1)
    path = tmp_path_factory.mktemp("vit") / "peer.pth"
    torch.save(peer.state_dict(), path)
    return path, peer.state_dict()


def test_converted_weights_are_those_that_came_in(vit, tmp_path):
    path, state = vit
    command = ["convert", str(path), "--model", "vit_tiny_patch16", "--layout", "timm"]
    target = tmp_path / "w.safetensors"
    assert main([*command, str(target), "--image-size", "64"]) == 0
    out = load_file(target)

    def content(tensors):
        return sorted((v.numel(), v.flatten().tolist()) for v in tensors.values())

    assert content(out) == content(state)


def test_converting_for_a_size_makes_tables_and_preprocessing_of_that_size(vit, tmp_path):
    path, state = vit
    command = ["convert", str(path), "--model", "vit_tiny_patch16"]
    assert main([*command, str(tmp_path / "a"), "--image-size", "64"]) == 0
    assert main([*command, str(tmp_path / "b")]) == 0
    there, native = load(tmp_path / "a"), load(tmp_path / "b")
    assert there.preprocessing.size == (64, 64)
    assert native.preprocessing.size == (224, 224)
    x = torch.randn(1, 3, 64, 64)
    peer = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3)
    peer.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(there.eval()(x), peer.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "vit_tiny_patch16", "--layout", "nonsense"], "nonsense"),
        (["--model", "vit_tiny_patch17"], "did you mean"),
        ([], "models: deit_tiny_patch16, vit_tiny_patch16; say which with --model"),
        (["--model", "vit_tiny_patch16", "--classes", "NO"], "--classes NO cannot be read"),
    ],
)
def test_a_wrong_flag_of_convert_writes_nothing(vit, tmp_path, capsys, flags, words):
    assert main(["convert", str(vit[0]), str(tmp_path / "m"), *flags]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


FOUND = {
    "step": 12,
    "loss": float("inf"),
    "gradient_norm": 3.5,
    "loss_fp32": 0.25,
    "weights": [],
    "images": [f"{i}.png" for i in range(21)],
    "num_images": 32,
}


def test_replay_looks_at_the_run_that_is_named_and_trains_nothing(monkeypatch, capsys):
    given = []
    monkeypatch.setattr("vitrail.train.replay.replay", lambda run: given.append(run) or FOUND)
    monkeypatch.setattr("vitrail.train.trainer.train", None)
    assert main(["train", "--replay", "runs/broken"]) == 0
    assert given == ["runs/broken"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "update 12: loss inf, gradient norm 3.5",
        "in full precision: loss 0.25",
        "weights that are not finite: none",
    ]
    assert "19.png" in lines[3]
    assert "20.png" not in lines[3]
    assert lines[3].endswith("of 32")
    assert lines[4] == "full precision helps: --precision fp32"


def test_what_predict_writes_is_what_the_predictor_says_and_draws(tmp_path):
    torch.manual_seed(1)
    save(create_model("efficientvit_m0", classes=["a", "b", "c"], **SMALL), tmp_path / "run")
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    files = [tmp_path / "in" / name for name in ("x.png", "y.png")]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(file)
    out = tmp_path / "out"
    command = ["predict", str(tmp_path / "run"), str(tmp_path / "in"), "--out", str(out)]
    assert main([*command, "--top-k", "2", "--device", "cpu"]) == 0
    expected = list(Predictor(load(tmp_path / "run"), device="cpu", top_k=2)(files))
    lines = (out / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [p.to_dict() for p in expected]
    for file, prediction in zip(files, expected, strict=True):
        drawn = io.BytesIO()
        prediction.draw().save(drawn, "JPEG", quality=92, subsampling=0)
        assert (out / f"{file.stem}.jpg").read_bytes() == drawn.getvalue()


def fake_row(name, **more):
    return {
        "name": name,
        "family": "fam",
        "params_m": 2.3,
        "macs_g": 0.0791,
        "image_size": 224,
        "strides": [16, 32],
        "paper_params_m": None,
        "paper_macs_g": None,
        "paper_top1": None,
        "source": "none",
        "remark": "no figures",
        "differences": [],
        "weights": [],
        "downloads": [],
    } | more


def test_the_page_of_models_has_each_figure_in_its_column():
    one = fake_row(
        "vit_tiny_patch16",
        paper_params_m=2.25,
        paper_macs_g=0.5,
        paper_top1=63.0,
        source="the table",
        remark="",
        differences=["parameters: rounded there"],
        weights=["hf:one"],
        downloads=["https://two"],
    )
    lines = models_table.markdown([one, fake_row("vit_small_patch16")]).splitlines()
    assert (
        "| `vit_tiny_patch16` | 2.30 | 2.25 | 0.0791 | 0.5 | 224 | 16, 32 | 63 | hf:one; https://two |"
        in lines
    )
    assert "| `vit_small_patch16` | 2.30 |  | 0.0791 |  | 224 | 16, 32 |  |  |" in lines
    assert "- `vit_tiny_patch16`: parameters: rounded there" in lines
    assert "- `vit_tiny_patch16`: The table." in lines
    assert "- `vit_small_patch16`: No figures." in lines
    plain = models_table.markdown([fake_row("vit_small_patch16")])
    assert "Where a count differs" not in plain


def test_the_page_is_written_with_its_counts_and_stale_where_either_differs(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "docs").mkdir()
    (tmp_path / "src" / "vitrail" / "cli").mkdir(parents=True)
    page, stored = tmp_path / "docs" / "models.md", tmp_path / "src/vitrail/cli/counts.json"
    ours = [2_160_000, 79_000_000]
    monkeypatch.setattr(models_table, "ROOT", tmp_path)
    monkeypatch.setattr(models_table, "list_models", lambda: ["efficientvit_m0"])
    monkeypatch.setattr(models_table, "count", lambda name: ours)
    monkeypatch.setattr(models_table, "efficientdets", lambda: ["(their scales)"])
    assert models_table.main(["--check"]) == 1
    assert not page.exists()
    assert models_table.main([]) == 0
    assert json.loads(stored.read_text()) == {"efficientvit_m0": ours}
    text = page.read_text()
    assert "| `efficientvit_m0` | 2.16 | 2.3 | 0.079 | 0.079 | 224 | 16, 32, 64 | 63.2 |" in text
    assert "### EfficientViT (Liu et al." in text
    assert "Unlike the official classification code" in text
    assert "(their scales)" in text
    assert "| EfficientDet | [1911.09070](https://arxiv.org/abs/1911.09070) |" in text
    assert models_table.main(["--check"]) == 0
    monkeypatch.setattr(models_table, "count", lambda name: [2_160_000, 79_000_001])
    assert models_table.main(["--check"]) == 1, "the text is the same, the counts are not"
    monkeypatch.setattr(models_table, "count", lambda name: ours)
    page.write_text(text + "\n")
    capsys.readouterr()
    assert models_table.main(["--check"]) == 1
    assert capsys.readouterr().out == f"{page} is stale; run: python scripts/models_table.py\n"
    assert page.read_text() == text + "\n"


def test_one_model_is_told_with_its_weights(capsys):
    assert main(["models", "mobilenetv1_125"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.split() == [
        "model",
        "params",
        "M",
        "MACs",
        "G",
        "at",
        "px",
        "strides",
        "paper",
        "top-1",
    ]
    assert rest[0].split()[0] == "mobilenetv1_125"
    assert rest[1] == "1 models; task classify; vitrail train --model NAME trains one"
    assert all(line.startswith("mobilenetv1_125: ") for line in rest[2:])
    assert len(rest) > 2


def test_the_demos_sheet_puts_pictures_of_one_height_side_by_side():
    red, blue = Image.new("RGB", (80, 40), "red"), Image.new("RGB", (10, 20), "blue")
    sheet = side_by_side([red, blue], height=20, gap=4)
    assert sheet.size == (4 + 40 + 4 + 10 + 4, 4 + 20 + 4)
    colours = [sheet.getpixel((x, 14)) for x in (3, 4, 43, 44, 47, 48, 57, 58)]
    white, r, b = (255, 255, 255), (255, 0, 0), (0, 0, 255)
    assert colours == [white, r, r, white, white, b, b, white]
    assert [sheet.getpixel((20, y)) for y in (3, 4, 23, 24)] == [white, r, r, white]


@dataclass(frozen=True, kw_only=True)
class Inner:
    flip: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Flags:
    data: str
    batch_size: int = 4
    limit: float | None = None
    kind: Literal["knn", "linear"] | None = None
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")


def test_flags_are_named_as_they_are_typed():
    assert flags_of(Flags) == ["--data", "--batch-size", "--limit", "--kind", "--inner.flip"]
    given = [
        "--data",
        "D",
        "--batch-size",
        "8",
        "--limit",
        "1.5",
        "--kind",
        "knn",
        "--inner.flip",
        "0",
    ]
    expected = Flags(data="D", batch_size=8, limit=1.5, kind="knn", inner=Inner(flip=0.0))
    assert parse_flags(Flags, given, prog="p") == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "p needs --data STR; p --help tells what there is"),
        (
            ["--data", "D", "--bach-size", "3"],
            "unknown flag '--bach-size'; did you mean '--batch-size'",
        ),
        (["--data", "D", "--flip=1"], "'--flip'"),
        (["--data", "D", "-1"], "unexpected '-1'; p --help tells what there is"),
        (["--data", "D", "extra"], "unexpected 'extra'"),
        (["--data"], "--data STR: a value is missing; p --help tells what there is"),
        (["--data", "D", "--kind", "k"], "--kind must be one of None, knn, linear, but is 'k'"),
        (["--data", "D", "--batch-size", "x"], "--batch-size INT: "),
        (["--data", "D", "--limit", "x"], "--limit {None}|FLOAT: "),
        (["--data", "D", "--batch-size", "0"], "batch_size must be at least 1, not 0"),
    ],
)
def test_a_wrong_flag_is_one_message(given, words):
    with pytest.raises(InputError) as told:
        parse_flags(Flags, given, prog="p")
    assert words in str(told.value)
    assert "<class" not in str(told.value)
