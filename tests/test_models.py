"""Names to models, and models to folders and back."""

import hashlib
import json
import os
import shutil
from itertools import islice

import pytest
import torch

import vitrail
from tests.damage import flipped, outcomes, zeroed
from tests.parity import randomise
from vitrail import models, weights
from vitrail.models import build_classifier
from vitrail.registry import backbone_entry, list_backbones
from vitrail_runtime.errors import InputError, NewerVersion

NAME = "efficientvit_m0"
CLASSES = ("ant", "Biene", "câprier", "蝶")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = vitrail.create_model(NAME, classes=CLASSES, image_size=64)
    randomise(model)
    return model.eval()


@pytest.fixture
def folder(model, tmp_path):
    return vitrail.save(model, tmp_path / "model", metrics={"top1": 0.5})


def test_a_saved_model_comes_back_bit_for_bit(model, folder):
    again = vitrail.load(folder)
    assert again.info == model.info
    assert again.classes == CLASSES
    assert again.preprocessing.size == (64, 64)
    assert not again.training
    state = again.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
        assert value.dtype == state[key].dtype, key
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        assert torch.equal(model(x), again(x))


def test_the_folder_holds_what_the_design_says_and_no_temporary_file(folder):
    expected = ["README.md", "config.json", "metrics.json", "model.safetensors"]
    assert sorted(os.listdir(folder)) == expected
    assert json.loads((folder / "metrics.json").read_text()) == {"top1": 0.5}
    assert "| top1 | 0.5 |" in (folder / "README.md").read_text(encoding="utf-8")


def test_a_saved_folder_serves_as_weights_and_the_report_is_kept(model, folder):
    again = vitrail.create_model(NAME, classes=CLASSES, image_size=64, weights=folder)
    assert "read model.safetensors in the folder" in str(again.weights_report)
    assert torch.equal(again.head.linear.weight, model.head.linear.weight)
    body = vitrail.create_model(NAME, num_classes=2, image_size=64, weights={"backbone": folder})
    assert torch.equal(
        body.state_dict()["backbone.patch_embed.conv1.conv.weight"],
        model.state_dict()["backbone.patch_embed.conv1.conv.weight"],
    )
    assert body.weights_report.layout == "vitrail"
    backbone = vitrail.create_backbone(NAME, weights=folder, image_size=64)
    assert "head.linear.weight" in backbone.weights_report.left


def change_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    config = {k: v for k, v in config.items() if v is not None}
    path.write_text(json.dumps(config | {"config_sha256": models.config_hash(config)}))


@pytest.mark.parametrize("read", [models.load, models.read_config])
def test_a_config_that_is_not_as_it_was_written_is_refused_unless_the_hash_is_taken_out(
    folder, read
):
    path = folder / "config.json"
    text = path.read_text().replace('"ant"', '"ape"')
    path.write_text(text)
    with pytest.raises(InputError, match=r"config\.json is not as it was written.*take its line"):
        read(folder)
    path.write_text("\n".join(x for x in text.splitlines() if "config_sha256" not in x)[:-3] + "}")
    assert vitrail.load(folder).classes == ("ape", *CLASSES[1:])


def test_ids_of_categories_travel_with_a_model_whose_data_had_them(folder):
    model = vitrail.load(folder)
    assert model.category_ids is model.info.category_ids is None
    assert "category_ids" not in models.read_config(folder)
    model.category_ids = ids = list(range(90, 90 - 3 * len(CLASSES), -3))
    again = vitrail.load(vitrail.save(model, folder))
    assert again.category_ids == again.info.category_ids == tuple(ids)
    assert vitrail.load(vitrail.save(again, folder)).category_ids == tuple(ids)
    for wrong in (ids[:-1], [*ids[:-1], ids[0]], [*ids[:-1], "1"], "12", [*ids[:-1], True]):
        change_config(folder, category_ids=wrong)
        with pytest.raises(InputError, match="category_ids are different whole numbers, one of"):
            vitrail.load(folder)


def test_the_hash_of_a_config_is_sha256_over_all_else_in_it(folder):
    config = json.loads((folder / "config.json").read_text())
    said = config.pop("config_sha256")
    text = json.dumps(config, sort_keys=True)
    assert said == hashlib.sha256(text.encode()).hexdigest()


def test_a_vit_saved_with_the_fields_that_are_a_studys_now_comes_back(tmp_path):
    shape = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "image_size": 32}
    made = vitrail.create_model("vit_tiny_patch16", num_classes=3, **shape)
    randomise(made)
    path = vitrail.save(made, tmp_path / "vit") / "config.json"
    config = json.loads(path.read_text())
    config["parts"]["backbone"] |= {"attn_every": 1, "qk_dim": None, "stem": "patch"}
    config["config_sha256"] = models.config_hash(config)
    path.write_text(json.dumps(config))
    x = torch.randn(1, 3, 20, 30)
    with torch.no_grad():
        torch.testing.assert_close(vitrail.load(path.parent)(x), made.eval()(x), rtol=0, atol=0)


def test_no_flipped_bit_of_a_model_folder_passes_for_what_was_written(folder):
    """The slow test below flips more of them."""
    flip_bits(folder, 12)


@pytest.mark.slow
def test_no_flipped_bit_nor_zeroed_block_of_a_model_folder_passes_for_what_was_written(folder):
    flip_bits(folder, 1000)


def flip_bits(folder, count: int) -> None:
    written = vitrail.load(folder)
    state = written.state_dict()

    def read() -> bool:
        again = vitrail.load(folder)
        theirs = again.state_dict()
        return again.info == written.info and all(torch.equal(state[k], theirs[k]) for k in state)

    for name in ("model.safetensors", "config.json"):
        path = folder / name
        whole = path.read_bytes()
        draws = {
            "bits flipped": flipped(whole, count),
            "blocks of 4 KiB zeroed": islice(zeroed(whole), count),
        }
        for what, damaged in draws.items():
            found = outcomes(path, damaged, read, named=str(folder))
            print(f"{name}, {len(whole)} bytes, {found.total()} {what}: {dict(found)}")
            assert found["silent"] == found["traceback"] == 0
            assert found["refused"] > 0.9 * found.total()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 3}, "schema version 3, but this vitrail reads 2; .* newer .* update"),
        ({"schema_version": "x"}, "schema version 'x'"),
        ({"schema_version": None}, "not the config.json of a vitrail model"),
        ({"classes": None}, "lacks 'classes'"),
        ({"classes": "abc"}, r"lacks 'classes' \(expected list"),
        ({"classes": ["a", "a"]}, "'a'.* more than once"),
        ({"name": "efficientvit_m9"}, "unknown model 'efficientvit_m9'; did you mean"),
        ({"parts": {"backbone": {"dimz": []}}}, "config.json 'dimz'; did you mean 'dims'"),
        ({"parts": {"head": {}}}, "has the parts backbone, but head are given"),
        ({"classes": ["a", "b"]}, "keys differ, such as head.linear.bias"),
        ({"weights_sha256": "0" * 64}, None),  # the text in the weights' own header is right
    ],
)
def test_a_config_that_does_not_belong_is_named(folder, changes, message):
    change_config(folder, **changes)
    if message is None:
        assert vitrail.load(folder).classes == CLASSES
        return
    with pytest.raises(InputError, match=message):
        vitrail.load(folder)


def test_a_newer_schema_is_an_error_of_its_own(folder):
    change_config(folder, schema_version=3)
    with pytest.raises(NewerVersion):
        vitrail.load(folder)
    change_config(folder, schema_version="x")
    with pytest.raises(InputError) as error:
        vitrail.load(folder)
    assert not isinstance(error.value, NewerVersion)


def test_weights_other_than_those_described_are_refused(model, folder):
    state = dict(model.state_dict())
    state["head.linear.bias"] = state["head.linear.bias"] + 1
    weights.write_state(state, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"sha256 differs.*copy the whole folder again"):
        vitrail.load(folder)


def test_a_save_stopped_between_its_files_loses_nothing(model, folder, monkeypatch):
    other = vitrail.create_model(NAME, classes=("x", "y"), image_size=96)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "write_text", stop)
    with pytest.raises(KeyboardInterrupt):
        vitrail.save(other, folder)
    monkeypatch.undo()
    again = vitrail.load(folder)
    assert again.classes == ("x", "y")
    assert again.preprocessing.size == (96, 96)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[1]"), "not the config.json of a vitrail"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "there is no weights file"),
        (lambda f: os.truncate(f / "model.safetensors", 4000), "not a whole safetensors file"),
        (lambda f: os.truncate(f / "model.safetensors", 0), "is empty"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_damaged_folder_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        vitrail.load(folder)
    assert str(folder) in str(caught.value)


def test_a_run_folder_points_to_its_best_model(model, tmp_path):
    vitrail.save(model, tmp_path / "best")
    with pytest.raises(InputError, match=r"did you mean .*best\?"):
        vitrail.load(tmp_path)


def test_a_head_of_another_number_of_classes_is_dropped_and_said(folder):
    model = vitrail.create_model(NAME, num_classes=7, image_size=64, weights=folder)
    assert model.weights_report.classes == (4, 7)
    assert model.weights_report.dropped_head == ("head.linear.weight", "head.linear.bias")


def test_other_names_of_equal_number_are_an_error(folder):
    with pytest.raises(InputError, match=r"ant, Biene, câprier, 蝶, but .* 1, 2, 3, 4"):
        vitrail.create_model(NAME, classes=list("1234"), image_size=64, weights=folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": "abc"}, "list of names"),
        ({"classes": ["a", "a"]}, "more than once"),
        ({"classes": []}, "list of names"),
        ({"classes": ["a", "b"], "num_classes": 3}, "drop num_classes"),
        ({"num_classes": 0}, "at least one class"),
        ({"image_sise": 3}, "did you mean 'image_size'"),
        ({"name": "vit_tiny_patch16", "pool": "mean"}, "must be one of"),
        ({"name": "vit_tiny_patch16", "drop_path_rate": 1.0}, "below 1"),
        ({"weights": {"backbon": "x.pth"}}, "take the keys 'backbone', 'head'"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        vitrail.create_model(**{"name": NAME, **options})


def test_an_unknown_name_lists_the_closest():
    with pytest.raises(InputError, match=r"did you mean .*'efficientvit_m0'"):
        vitrail.create_model("efficient_vit_m0")
    with pytest.raises(InputError, match=r"unknown task 'detec'.*'detect'"):
        vitrail.list_models(task="detec")
    assert NAME in vitrail.list_models("efficientvit*")


@pytest.mark.parametrize("name", list_backbones())
def test_every_variant_builds_on_meta_and_loads_by_assignment(name):
    entry = backbone_entry(name)
    with torch.device("meta"):
        model = build_classifier(entry, entry.config, 3)
    # One number each, read again and again: the largest variants would fill the memory.
    state = {
        k: torch.zeros((), dtype=v.dtype, device="cpu").expand(v.shape)
        for k, v in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    assert not any(v.is_meta for v in [*model.parameters(), *model.buffers()])
    assert models.to_dict(entry.config) == models.to_dict(
        models.from_dict(type(entry.config), json.loads(json.dumps(models.to_dict(entry.config))))
    )


def test_a_run_that_has_saved_no_model_says_so(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(InputError, match="has saved no model yet; go on with it: vitrail train"):
        models.load(models.model_folder(tmp_path))


def test_a_run_whose_best_model_is_gone_says_what_is_there(tmp_path):
    for name in ("config.yaml", "report.html"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"models are gone; train again: .* --out ANOTHER"):
        models.load(models.model_folder(tmp_path))
    for name in ("epoch-0001", "last"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    with pytest.raises(
        InputError, match=r"without its best/; what is there: epoch-0001, last; give .*last instead"
    ):
        models.load(models.model_folder(tmp_path))


def test_the_folder_of_a_run_stands_for_its_best_model(tmp_path):
    best = tmp_path / "best"
    best.mkdir()
    (best / "config.json").touch()
    (tmp_path / "config.json").touch()  # a run's own
    assert models.model_folder(tmp_path) == models.model_folder(best) == best
    assert models.model_folder(tmp_path / "other") == tmp_path / "other"
    (tmp_path / "model.safetensors").touch()
    assert models.model_folder(str(tmp_path)) == tmp_path


def test_a_training_checkpoint_in_memory_is_unwrapped_and_a_part_is_taken():
    source = vitrail.create_model("efficientvit_m0", num_classes=3)
    model = vitrail.create_model(
        "efficientvit_m0", num_classes=3, weights={"model": source.state_dict(), "epoch": 3}
    )
    assert torch.equal(model.head.linear.weight, source.head.linear.weight)
    state = source.backbone.state_dict()
    backbone = vitrail.create_backbone("efficientvit_m0", weights={"backbone": state})
    key = "patch_embed.conv1.conv.weight"
    assert torch.equal(backbone.state_dict()[key], state[key])


def test_a_square_table_is_resampled_to_another_grid_of_as_many_patches():
    timm = pytest.importorskip("timm")
    peer = timm.create_model("vit_tiny_patch16_224", depth=1)
    config = {"depth": 1, "image_size": (112, 448)}  # 7 x 28 patches instead of 14 x 14
    model = vitrail.create_model("vit_tiny_patch16", weights=peer.state_dict(), **config)
    (said,) = model.weights_report.resampled
    assert said == "backbone.pos_embed (1, 197, 192), to another grid of as many places"
    table = model.backbone.pos_embed.detach()
    assert not torch.equal(table, peer.pos_embed)
    peer.set_input_size((112, 448))
    torch.testing.assert_close(table, peer.pos_embed.detach(), atol=2e-6, rtol=0)


def test_a_backbone_without_patches_as_tokens_cannot_be_packed():
    model = vitrail.create_model("efficientvit_m0", num_classes=2)
    with pytest.raises(InputError, match="no forward_packed"):
        model.forward_packed(None)
