"""Hub repositories without a network: a fake hub, and a fake cache in offline mode."""

from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from tests.weights.conftest import COMMIT, STATE
from vitrail.weights import hub
from vitrail.weights.files import read_checkpoint
from vitrail_runtime.errors import InputError


def failed(kind):
    response = SimpleNamespace(headers={}, status_code=404, request=None, url="", text="")
    error = kind.__new__(kind)
    Exception.__init__(error, "no")
    error.response = response
    return error


def test_only_weights_of_the_resolved_commit_are_fetched_never_code(online):
    checkpoint = read_checkpoint("hf:owner/name@main")
    assert torch.equal(checkpoint.state["a"], STATE["a"])
    assert online.fetched == [
        ("owner/name", "model.safetensors", COMMIT),
        ("owner/name", "config.json", COMMIT),
    ]


def test_the_hub_is_asked_for_the_revision_that_is_named(online):
    for spec in ("hf:owner/name@v1", "hf:owner/name/model.safetensors@refs/pr/3", "hf:owner/name"):
        hub.fetch(spec)
    assert online.asked == [("owner/name", r) for r in ("v1", "refs/pr/3", None)]


@pytest.mark.parametrize("spec", ["hf:owner/name", "hf:owner/name@v1", "hf://owner/name"])
def test_the_report_names_the_commit_so_that_it_can_be_pinned(online, spec):
    checkpoint = read_checkpoint(spec)
    assert checkpoint.source == f"hf:owner/name@{COMMIT}"
    assert any(f"pin it: hf:owner/name@{COMMIT}" in note for note in checkpoint.notes)


def test_a_pinned_commit_in_the_cache_needs_no_network(online):
    online.failure = ConnectionError("no network")
    checkpoint = read_checkpoint(f"hf:owner/name@{COMMIT}")
    assert checkpoint.source == f"hf:owner/name@{COMMIT}"
    assert not any("pin" in note for note in checkpoint.notes)
    assert online.fetched == []


def test_one_file_of_a_repository_can_be_named(online, cache):
    save_file({"b": torch.ones(1)}, cache / "other.safetensors")
    online.files.append("other.safetensors")
    checkpoint = read_checkpoint("hf:owner/name/other.safetensors")
    assert list(checkpoint.state) == ["b"]
    assert [name for _, name, _ in online.fetched] == ["other.safetensors"]
    with pytest.raises(InputError, match=r"no gone.safetensors; it has .*name one: hf:owner/name/"):
        read_checkpoint("hf:owner/name/gone.safetensors")
    with pytest.raises(InputError) as error:
        read_checkpoint("hf:owner/name/gone.safetensors@v1")
    assert str(error.value).endswith("; name one: hf:owner/name/model.safetensors@v1")


def test_a_file_in_a_folder_of_the_repository_can_be_named_online_and_in_the_cache(online, cache):
    (cache / "sub").mkdir()
    save_file({"c": torch.ones(1)}, cache / "sub" / "x.safetensors")
    online.files.append("sub/x.safetensors")
    found = hub.fetch("hf:owner/name/sub/x.safetensors@main")
    assert found.path == cache / "sub" / "x.safetensors"
    assert found.name == f"hf:owner/name/sub/x.safetensors@{COMMIT}"
    again = hub.fetch(f"hf:owner/name/sub/x.safetensors@{COMMIT}")
    assert (again.path, again.name, again.notes) == (found.path, found.name, [])


def test_shards_are_fetched_with_what_describes_them_and_no_odd_names(online, cache):
    (cache / "model.safetensors").unlink()
    index = cache / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}')
    for shard, key in (("1", "b"), ("2", "a")):
        save_file({key: torch.ones(1)}, cache / f"{shard}.safetensors")
    online.files[:] = ["model.safetensors.index.json", "config.json", "preprocessor_config.json"]
    (cache / "preprocessor_config.json").write_text("{}")
    assert set(read_checkpoint("hf:owner/name").state) == {"a", "b"}
    names = [name for _, name, _ in online.fetched]
    assert names == [
        "model.safetensors.index.json",
        "1.safetensors",
        "2.safetensors",
        "config.json",
        "preprocessor_config.json",
    ]
    for odd in ("../1.safetensors", "code.py"):
        index.write_text('{"weight_map": {"a": "ODD"}}'.replace("ODD", odd))
        with pytest.raises(InputError, match="not a plain file name"):
            hub.fetch("hf:owner/name@main")


def test_an_address_is_taken_apart():
    assert hub.parse("hf:a/b") == ("a/b", None, None)
    assert hub.parse("hf:a/b.c-d@v1.0/x") == ("a/b.c-d", None, "v1.0/x")
    assert hub.parse("hf://a/b/c/d.safetensors@r") == ("a/b", "c/d.safetensors", "r")


def test_a_repository_without_weights_says_so(online):
    online.files[:] = ["README.md", "tf_model.h5"]
    with pytest.raises(InputError, match="it has no weight files"):
        read_checkpoint("hf:owner/name")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.RepositoryNotFoundError, "no repository owner/name"),
        (errors.GatedRepoError, "asks for its terms to be accepted"),
        (errors.RevisionNotFoundError, "has no revision 'v9'"),
        (ConnectionError, r"cannot be fetched \(ConnectionError: no\)"),
    ],
)
def test_what_the_hub_refuses_is_said(online, kind, message):
    online.failure = failed(kind)
    with pytest.raises(InputError, match=message):
        read_checkpoint("hf:owner/name@v9")


def test_without_a_network_the_cached_commit_is_pointed_out(online):
    online.failure = ConnectionError("no route")
    with pytest.raises(InputError, match=rf"pin its commit \(hf:owner/name@{COMMIT}\)"):
        read_checkpoint("hf:owner/name")


@pytest.mark.parametrize("spec", ["hf:owner/name", "hf:owner/name@main", f"hf:owner/name@{COMMIT}"])
def test_offline_the_cache_is_read(cache, spec):
    checkpoint = read_checkpoint(spec)
    assert torch.equal(checkpoint.state["a"], STATE["a"])
    assert checkpoint.source.endswith(COMMIT)


@pytest.mark.parametrize("spec", ["hf:owner/other", "hf:owner/name@v2", "hf:owner/name/x.pth"])
def test_offline_what_is_not_cached_is_a_clear_error(cache, spec):
    with pytest.raises(InputError, match=r"is not in the cache .* HF_HUB_OFFLINE is set"):
        read_checkpoint(spec)


def test_offline_a_half_cached_set_of_shards_counts_as_not_cached(cache):
    (cache / "model.safetensors").unlink()
    index = cache / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    save_file(STATE, cache / "1.safetensors")
    with pytest.raises(InputError, match="not in the cache"):
        read_checkpoint("hf:owner/name")
    save_file({"b": torch.ones(1)}, cache / "2.safetensors")
    assert set(read_checkpoint("hf:owner/name").state) == {"a", "b"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:name", "write hf:owner/name@revision"),
        ("hf:owner/name@", "write hf:owner/name@revision"),
        ("hf:owner/name/code.py", "only weights are fetched"),
        ("hf:owner/name/../../x.pth", "only weights are fetched"),
    ],
)
def test_an_address_that_is_none_is_refused(spec, message):
    with pytest.raises(InputError, match=message):
        hub.parse(spec)
