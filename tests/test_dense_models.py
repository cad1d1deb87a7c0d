"""HEAD/BACKBONE: segmenters by name, with weights by part or from foreign files, saved, loaded and asked."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vitrail
from tests.parity import assert_close_to_peer, randomise
from tests.segmenters.swin_peer import upernet_on_swin
from vitrail import models
from vitrail.models import HEADS, list_models, read_config
from vitrail.registry import list_backbones
from vitrail_runtime.errors import InputError

NAMES = ("sky", "road", "tree")
SMALL = {"dims": (16, 24, 32), "depths": (1, 1, 1), "key_dim": 8}
HEAD_FIELDS = {
    "linear": {"dropout": 0.1},
    "semantic_fpn": {"fpn_dim": 16, "dim": 16, "groups": 4},
    "upernet": {"dim": 16, "auxiliary_dim": 8},
}


def make(kind, **given):
    torch.manual_seed(0)
    settings = {"classes": NAMES, "head": HEAD_FIELDS[kind], **SMALL, **given}
    return vitrail.create_model(f"{kind}/efficientvit_m0", **settings)


@pytest.fixture(scope="module")
def upernet():
    model = make("upernet")
    randomise(model)
    return model.eval()


def test_every_head_goes_with_every_backbone_by_name():
    assert list_models() == list_backbones()
    assert list_models(task="classify") == list_backbones()
    every = [f"{h}/{b}" for h in ("linear", "semantic_fpn", "upernet") for b in list_backbones()]
    assert list_models(task="segment") == every
    assert list_models("upernet/*_m[01]") == ["upernet/efficientvit_m0", "upernet/efficientvit_m1"]
    assert list_models("*m0", task="segment") == [f"{h}/efficientvit_m0" for h in HEAD_FIELDS]
    assert list_models("*/x*") == []
    for given, said in (
        ({"task": "segmnt"}, r"unknown task 'segmnt'; did you mean 'segment'"),
        ({"name": "uppernet/resnet18"}, r"unknown head 'uppernet'; did you mean 'upernet'"),
        ({"name": "upernet/resnet19"}, r"unknown model 'resnet19'; did you mean 'resnet18'"),
    ):
        with pytest.raises(InputError, match=said):
            list_models(**given) if "task" in given else vitrail.create_model(**given)


@pytest.mark.parametrize("head", HEAD_FIELDS)
def test_a_saved_segmenter_comes_back_bit_for_bit(head, tmp_path):
    model = make(head)
    randomise(model)
    folder = vitrail.save(model.eval(), tmp_path / "model")
    again = vitrail.load(folder)
    assert again.info == model.info
    assert (again.task, again.classes) == ("segment", NAMES)
    assert again.preprocessing.mode == "fit"
    assert again.preprocessing.size == (512, 512)
    x = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        assert torch.equal(model(x), again(x))
    said = json.loads((folder / "config.json").read_text())
    assert said["schema_version"] == 2
    assert list(said["parts"]) == ["backbone", "head"]
    for field, value in HEAD_FIELDS[head].items():
        assert said["parts"]["head"][field] == value
        assert getattr(again.info.parts["head"], field) == value
    assert said["parts"]["backbone"]["dims"] == [16, 24, 32]


def test_a_classifiers_folder_of_schema_1_is_read_as_before(tmp_path):
    model = vitrail.create_model("efficientvit_m0", classes=NAMES, **SMALL)
    randomise(model)
    folder = vitrail.save(model, tmp_path / "model")
    now = read_config(folder)
    path = folder / "config.json"
    old = {k: v for k, v in json.loads(path.read_text()).items() if k != "config_sha256"}
    old |= {"schema_version": 1, "config": old.pop("parts")["backbone"]}
    path.write_text(json.dumps(old | {"config_sha256": models.config_hash(old)}))
    with pytest.warns(
        UserWarning, match=rf"is of schema 1 .* vitrail convert {folder} writes it in"
    ):
        again = vitrail.load(folder)
    assert again.info == model.info
    x = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), again(x))
    with pytest.warns(UserWarning, match="is of schema 1"):
        assert read_config(folder) == {k: v for k, v in now.items() if k != "config_sha256"}
    path.write_text(json.dumps(old | {"config_sha256": "0" * 64}))
    with pytest.raises(InputError, match="not as it was written"):
        vitrail.load(folder)


def test_parts_that_are_not_the_models_are_refused(upernet, tmp_path):
    folder = vitrail.save(upernet, tmp_path / "model")
    path = folder / "config.json"
    said = json.loads(path.read_text())
    said["parts"]["neck"] = said["parts"].pop("head")
    said["config_sha256"] = models.config_hash(said)
    path.write_text(json.dumps(said))
    with pytest.raises(InputError, match=r"has the parts backbone, head, but backbone, neck are"):
        vitrail.load(folder)


def test_fields_go_to_the_part_that_they_are_named_for():
    model = make("upernet", head={"dim": 8, "pool_scales": (1, 2)}, window_size=5)
    assert model.info.parts["head"].pool_scales == (1, 2)
    assert len(model.head.pools) == 2
    assert model.head.fc.in_channels == 8
    assert model.backbone.config.window_size == 5
    with pytest.raises(InputError, match=r"unknown config field of the head of upernet/.*'dims'"):
        make("upernet", head={"dims": 8})
    with pytest.raises(InputError, match="classifier, whose head has no fields"):
        vitrail.create_model("efficientvit_m0", head={"dim": 8})
    assert make("upernet", head={"auxiliary_weight": 0.0}).auxiliary is None
    with pytest.raises(InputError, match="1 to 255 classes"):
        vitrail.create_model("linear/efficientvit_m0", num_classes=256)


def test_swin_norms_its_maps_under_a_dense_head_and_only_there():
    assert {n for n, head in HEADS.items() if head.task == "segment"} == HEAD_FIELDS.keys()
    with torch.device("meta"):
        dense = vitrail.create_model("linear/swin_tiny_patch4_window7", num_classes=2)
        plain = vitrail.create_model("swin_tiny_patch4_window7", num_classes=2)
    assert list(dense.backbone.norms) == ["c2", "c3", "c4", "c5"]
    assert not plain.backbone.norms


def test_weights_by_part_fill_that_part_alone(upernet, tmp_path):
    classifier = vitrail.create_model("efficientvit_m0", num_classes=7, **SMALL)
    randomise(classifier)
    vitrail.save(classifier, tmp_path / "classifier")
    vitrail.save(upernet, tmp_path / "upernet")
    parts = {"backbone": str(tmp_path / "classifier"), "head": str(tmp_path / "upernet")}
    model = make("upernet", weights=parts)
    fresh = make("upernet").state_dict()
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        source = {"backbone": classifier, "head": upernet}.get(key.split(".")[0])
        assert torch.equal(value, (fresh if source is None else source.state_dict())[key]), key
    report = model.weights_report
    assert {k.split(".")[0] for k in report.used} == {"backbone", "head"}
    alone = make("upernet", weights={"backbone": tmp_path / "classifier"})
    assert torch.equal(alone.head.fc.weight, fresh["head.fc.weight"])
    bare = {k.removeprefix("head."): v for k, v in upernet.head.state_dict().items()}
    save_file(bare, tmp_path / "head.safetensors")
    again = make("upernet", weights={"head": tmp_path / "head.safetensors"})
    assert torch.equal(again.head.fc.weight, upernet.head.fc.weight)
    for weights, said in (
        ({"neck": "x.pth"}, r"take the keys 'backbone', 'head', 'auxiliary', but got \['neck'\]"),
        ({"head": str(tmp_path / "classifier")}, r"does not fit the head of the model.*missing"),
        (str(tmp_path / "classifier"), r"does not fit the head"),
        (dict(classifier.backbone.state_dict()), r"holds no whole upernet/.*'backbone': \.\.\."),
    ):
        with pytest.raises(InputError, match=rf"(?s){said}"):
            make("upernet", weights=weights)


def test_a_head_of_other_classes_is_dropped_and_said(upernet, tmp_path):
    vitrail.save(upernet, tmp_path / "upernet")
    model = make("upernet", classes=(*NAMES, "car"), weights=tmp_path / "upernet")
    report = model.weights_report
    assert report.classes == (3, 4)
    assert sorted(report.dropped_head) == [
        "auxiliary.fc.bias",
        "auxiliary.fc.weight",
        "head.fc.bias",
        "head.fc.weight",
    ]
    assert "head dropped: the file has 3 classes, the model 4" in str(report)
    assert torch.equal(model.head.fuse.conv.weight, upernet.head.fuse.conv.weight)
    with pytest.raises(
        InputError, match=r"trained for the 3 classes sky, road, tree.*the model has"
    ):
        make("upernet", classes=("tree", "road", "sky"), weights=tmp_path / "upernet")


@pytest.mark.parametrize("form", ["transformers", "mmsegmentation"])
def test_a_foreign_upernet_answers_the_same(form, tmp_path):
    peer = upernet_on_swin(3)
    state = dict(peer.state_dict())
    fields = {
        "embed_dim": 12,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 3, 4),
        "window_size": 4,
        "head": {"dim": 12, "auxiliary_dim": 10},
        "classes": NAMES,
    }
    name = "upernet/swin_tiny_patch4_window7"
    if form == "mmsegmentation":
        # Our own backbone in the official names: what merging needs, test_swin_maps.py tests.
        ours = vitrail.create_model(name, weights=dict(state), **fields).state_dict()
        for key in [k for k in state if k.startswith("backbone.")]:
            del state[key]
        for key, value in ours.items():
            if key.startswith("backbone."):
                key = key.replace("backbone.norms.c", "backbone.norm")
                if "backbone.norm" in key:
                    key = key.replace(f"norm{key[13]}", f"norm{int(key[13]) - 2}", 1)
                if ".downsample." in key:
                    stage = int(key.split(".")[2])
                    key = key.replace(f"layers.{stage}", f"layers.{stage - 1}")
                state[key] = value
        for old, new in ((".batch_norm.", ".bn."), ("_head.classifier.", "_head.conv_seg.")):
            heads = ("decode_head.", "auxiliary_head.")
            state = {k.replace(old, new) if k.startswith(heads) else k: v for k, v in state.items()}
    save_file(
        {k: v.contiguous().clone() for k, v in state.items()}, tmp_path / "foreign.safetensors"
    )
    model = vitrail.create_model(name, weights=tmp_path / "foreign.safetensors", **fields)
    assert not [k for k in model.weights_report.new if not k.endswith("num_batches_tracked")]
    x = torch.randn(1, 3, 128, 160, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        want = peer.double()(x).logits
        assert_close_to_peer(model.double().eval()(x), want)


def test_predictions_have_a_class_for_every_pixel_of_the_original(upernet, tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((40, 60), (90, 31))]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    predict = vitrail.Predictor(upernet)
    found = list(predict(sorted(tmp_path.glob("*.png"))))
    for image, p in zip(images, found, strict=True):
        assert p.segmentation.shape == image.shape[:2] == p.size
        counts = np.bincount(p.segmentation.ravel(), minlength=3)
        assert p.names == [NAMES[k] for k in np.argsort(-counts, kind="stable") if counts[k]]
        np.testing.assert_allclose(
            p.scores, np.sort(counts[counts > 0])[::-1] / p.segmentation.size
        )
        assert p.draw().size
        assert p.to_dict()["top"][0]["label"] == p.names[0]
        again = next(vitrail.Predictor(upernet)(image))
        assert np.array_equal(again.segmentation, p.segmentation)


def test_labels_of_whole_images_teach_and_measure_no_segmenter(upernet, tmp_path, capsys):
    from vitrail.cli import main

    vitrail.save(upernet, tmp_path / "model")
    data = tmp_path / "data"
    for name in NAMES:
        for split in ("train", "val"):
            (data / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 20)).save(data / split / name / "a.png")
    out = ["--out", str(tmp_path / "run")]
    for argv in (
        ["train", "--data", str(data), "--model", "linear/resnet18", *out],
        ["eval", str(tmp_path / "model"), "--data", str(data)],
    ):
        assert main(argv) == 2
        said = "does the task 'segment', which learns from class maps, but"
        assert said in capsys.readouterr().err


def test_models_lists_a_segmenter_with_its_size_and_its_task(capsys):
    from vitrail.cli import main

    assert main(["models", "upernet/efficientvit_m0", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    with torch.device("meta"):
        model = vitrail.create_model("upernet/efficientvit_m0", num_classes=150)
    params = sum(p.numel() for p in model.parameters())
    assert row["params_m"] == round(params / 1e6, 2)
    assert (row["task"], row["image_size"], row["paper_top1"]) == ("segment", 512, None)
    assert main(["models", "upernet/efficientvit_m[01]"]) == 0
    told = "2 models; task segment; counts with a dense head are for 150 classes; vitrail train"
    assert told in capsys.readouterr().out
