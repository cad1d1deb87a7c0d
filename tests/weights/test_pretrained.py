"""Weights by the model's name alone: the catalogue's first source, fetched once, its file's sha256 kept."""

import hashlib
import json
import urllib.error

import pytest
import torch
from safetensors.torch import save_file

import vitrail
from tests.weights.conftest import COMMIT
from vitrail.models import create_backbone, create_model
from vitrail.weights import pretrained
from vitrail.weights.pretrained import read_pretrained
from vitrail_runtime.errors import InputError

NAME = "efficientvit_m0"
SMALL = {"dims": (16, 24, 32), "depths": (1, 1, 1), "key_dim": 8}
ADDRESS = "https://example.org/files/m0.pth"


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(1)
    return create_model(NAME, num_classes=3, **SMALL)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where files are kept; the catalogue knows two sources of one model."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    sources = ("hf:owner/name", "hf:owner/other")
    monkeypatch.setattr(pretrained, "RELEASED", {NAME: sources})
    return tmp_path / "torch" / "checkpoints"


@pytest.fixture
def released(online, cache, trained, place):
    """The fake hub's file holds the model's weights."""
    save_file(trained.state_dict(), cache / "model.safetensors")
    return cache / "model.safetensors"


@pytest.fixture
def at_address(place, tmp_path, trained, monkeypatch):
    """The first source is an address; what was downloaded, and the failure to raise instead, if any."""
    monkeypatch.setattr(pretrained, "RELEASED", {NAME: (ADDRESS, "hf:owner/name")})
    asked = []

    def download(url, target):
        asked.append(url)
        if len(asked) > 1:
            raise AssertionError("downloaded twice")
        torch.save(trained.state_dict(), target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return asked


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same(model, trained, parts=("backbone.", "head.")):
    own, theirs = model.state_dict(), trained.state_dict()
    return all(torch.equal(own[k], theirs[k]) for k in own if k.startswith(parts))


def test_a_model_takes_the_first_source_of_its_name_and_says_which_and_its_checksum(
    released, online, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(pretrained, "RELEASED", {NAME: ("hf:owner/new", "hf:owner/name")})
    model = create_model(NAME, num_classes=3, weights="pretrained", **SMALL)
    assert same(model, trained)
    assert online.asked == [("owner/new", None)]
    report = str(model.weights_report)
    assert f"hf:owner/new@{COMMIT}: layout 'vitrail'" in report
    assert f"sha256 {sha256(released)}" in report
    said = {"source": f"hf:owner/new@{COMMIT}", "sha256": sha256(released)}
    assert model.info.pretrained == said
    vitrail.save(model, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["pretrained"] == said
    assert vitrail.load(tmp_path / "m").info == model.info


def test_a_hub_that_answers_is_asked_for_nothing_that_the_cache_has(released, online, trained):
    assert same(create_model(NAME, num_classes=3, weights="pretrained", **SMALL), trained)
    assert online.asked == online.fetched == []


def test_weights_of_another_source_leave_no_checksum(trained, tmp_path):
    vitrail.save(trained, tmp_path / "m")
    assert "pretrained" not in json.loads((tmp_path / "m" / "config.json").read_text())
    model = create_model(NAME, num_classes=3, weights=tmp_path / "m", **SMALL)
    assert model.info.pretrained is None


def test_what_is_in_the_hubs_cache_needs_no_network(cache, trained, place):
    save_file(trained.state_dict(), cache / "model.safetensors")
    assert same(create_model(NAME, num_classes=3, weights="pretrained", **SMALL), trained)


def test_a_backbone_a_part_and_a_dense_model_take_the_backbone_of_it(released, trained):
    backbone = create_backbone(NAME, weights="pretrained", **SMALL)
    assert same(backbone, trained.backbone, ("",))
    assert f"sha256 {sha256(released)}" in backbone.weights_report.notes
    for name, weights in (
        (NAME, {"backbone": "pretrained"}),
        (f"linear/{NAME}", "pretrained"),
        (f"linear/{NAME}", {"backbone": "pretrained"}),
    ):
        model = create_model(name, num_classes=5, weights=weights, **SMALL)
        assert same(model.backbone, trained.backbone, ("",))
        assert model.info.pretrained is not None


def test_another_number_of_classes_drops_the_head_and_says_so(released, trained):
    model = create_model(NAME, num_classes=4, weights="pretrained", **SMALL)
    assert same(model, trained, ("backbone.",))
    assert "the file has 3 classes, the model 4" in str(model.weights_report)


def test_offline_the_file_to_fetch_and_its_place_are_named_and_there_it_is_found(
    cache, trained, place
):
    (cache / "model.safetensors").unlink()
    file = place / "owner--name.safetensors"
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set") as error:
        create_model(NAME, num_classes=3, weights="pretrained", **SMALL)
    assert "fetch https://huggingface.co/owner/name/resolve/main/model.safetensors " in str(
        error.value
    )
    assert str(error.value).endswith(f"put it at {file}")
    file.parent.mkdir(parents=True)
    save_file(trained.state_dict(), file)
    model = create_model(NAME, num_classes=3, weights="pretrained", **SMALL)
    assert same(model, trained)
    assert model.info.pretrained == {"source": str(file), "sha256": sha256(file)}


def test_a_file_behind_an_address_is_downloaded_once(at_address, place, trained):
    place.mkdir(parents=True)  # other files lie there already
    for _ in range(2):
        model = create_model(NAME, num_classes=3, weights="pretrained", **SMALL)
        assert same(model, trained)
        assert model.info.pretrained["sha256"] == sha256(place / "m0.pth")
    assert at_address == [ADDRESS]


def test_an_address_that_does_not_answer_is_named_with_the_place(at_address, place, monkeypatch):
    def fail(url, target):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(InputError) as error:
        read_pretrained(NAME)
    assert f"{ADDRESS} cannot be fetched (<urlopen error no route>)" in str(error.value)
    assert str(error.value).endswith(f"put it at {place / 'm0.pth'}")


def test_a_file_whose_name_promises_another_checksum_is_refused(place, trained, monkeypatch):
    file = place / "m0-0123abcd.pth"
    monkeypatch.setattr(pretrained, "RELEASED", {NAME: (f"https://example.org/{file.name}",)})
    place.mkdir(parents=True)
    torch.save(trained.state_dict(), file)
    with pytest.raises(
        InputError, match=r"m0-0123abcd.pth is damaged: .*, not 0123abcd; remove it"
    ):
        read_pretrained(NAME)
    right = place / f"m0-{sha256(file)[:8]}.pth"
    file.rename(right)
    monkeypatch.setattr(pretrained, "RELEASED", {NAME: (f"https://example.org/{right.name}",)})
    assert read_pretrained(NAME).sha256 == sha256(right)


def test_the_checksum_of_shards_is_that_of_all_their_bytes(cache, place):
    (cache / "model.safetensors").unlink()
    index = cache / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}')
    for shard, key in (("1", "b"), ("2", "a")):
        save_file({key: torch.ones(int(shard))}, cache / f"{shard}.safetensors")
    whole = b"".join((cache / f"{i}.safetensors").read_bytes() for i in (1, 2))
    found = read_pretrained(NAME)
    assert found.sha256 == hashlib.sha256(whole).hexdigest()
    assert found.state.keys() == {"a", "b"}


def test_without_a_known_file_it_says_what_to_do(place, monkeypatch):
    with pytest.raises(InputError, match="no released weights of cmt_ti are known; give a file"):
        create_model("cmt_ti", weights="pretrained")
    monkeypatch.setattr(pretrained, "RELEASED", {NAME: ("https://example.org/page",)})
    with pytest.raises(
        InputError, match=r"are linked from https://example.org/page: download them"
    ):
        create_model(NAME, weights="pretrained")


@pytest.mark.parametrize("name", [NAME, f"linear/{NAME}"])
def test_auto_takes_them_where_they_can_be_had_and_else_says_why_not(cache, trained, place, name):
    save_file(trained.state_dict(), cache / "model.safetensors")
    model = create_model(name, num_classes=3, weights="auto", **SMALL)
    assert same(model.backbone, trained.backbone, ("",))
    (cache / "model.safetensors").unlink()
    torch.manual_seed(5)
    model = create_model(name, num_classes=3, weights="auto", **SMALL)
    torch.manual_seed(5)
    assert same(model, create_model(name, num_classes=3, **SMALL))
    said = str(model.weights_report)
    assert said.startswith("starting from random weights: hf:owner/name is not in the cache")
    assert "resolve/main/model.safetensors" in said
    assert "layout" not in said
    assert model.info.pretrained is None
    with pytest.raises(InputError, match="not in the cache"):
        create_model(name, num_classes=3, weights={"backbone": "auto", "head": {}}, **SMALL)


def test_a_backbone_says_too_why_auto_got_nothing(cache, place):
    (cache / "model.safetensors").unlink()
    backbone = create_backbone(NAME, weights="auto", **SMALL)
    assert str(backbone.weights_report).startswith("starting from random weights: ")
