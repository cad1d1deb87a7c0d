"""Reading of whatever people call a checkpoint, and writing that leaves the old file or the new one."""

import argparse
import errno
import hashlib
import json
import os
import pickle
import random
import stat
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from vitrail.weights import files, read_state, write_state, write_text
from vitrail.weights.files import read_checkpoint, unwrap
from vitrail_runtime.errors import InputError

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.0, -2.0])}


def assert_same(got, want=STATE):
    assert got.keys() == want.keys()
    for key in want:
        assert torch.equal(got[key], want[key]), key


# --- formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt", "w.bin", "w.ckpt", "w.pth.tar"])
def test_every_format_gives_the_same_tensors(tmp_path, name):
    path = tmp_path / name
    save_file(STATE, path) if name.endswith("safetensors") else torch.save(STATE, path)
    assert_same(read_state(path))
    assert_same(read_state(str(path)))


def test_files_of_pytorch_before_its_zip_format_are_read(tmp_path):
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(read_state(tmp_path / "old.pth"))


def test_tensors_do_not_change_when_the_file_is_overwritten(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(STATE, path)
    got = read_state(path)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert_same(got)


def test_half_precision_and_zero_sized_tensors_come_back_as_they_are(tmp_path):
    state = {"h": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(7), "e": torch.empty(0, 4)}
    write_state(state, tmp_path / "w.safetensors")
    got = read_state(tmp_path / "w.safetensors")
    assert_same(got, state)
    assert got["h"].dtype == torch.bfloat16


# --- wrappers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "note"),
    [
        ({"model": STATE, "epoch": 3}, "'model'"),
        ({"state_dict": {f"module.{k}": v for k, v in STATE.items()}}, "'module.'"),
        ({"model_ema": STATE, "model": {"x": torch.ones(1)}}, "there is also 'model'"),
        ({"teacher": STATE, "student": {"x": torch.ones(1)}}, "'teacher'"),
        ({"checkpoint": 1, "model": {"state_dict": STATE}}, "'state_dict'"),
        ({f"_orig_mod.{k}": v for k, v in STATE.items()}, "_orig_mod."),
        ({f"module._orig_mod.{k}": v for k, v in STATE.items()}, "'module.'"),
        ({"n_averaged": torch.tensor(9), **{f"module.{k}": v for k, v in STATE.items()}}, "averag"),
        ({**STATE, "epoch": 4}, "epoch"),
        ({"model": STATE, "step": torch.tensor(3)}, "'model'"),
    ],
)
def test_wrappers_of_training_scripts_are_taken_off_and_said(data, note):
    checkpoint = unwrap(data, "here")
    assert_same(checkpoint.state)
    assert any(note in line for line in checkpoint.notes), checkpoint.notes


def test_of_entries_that_are_no_tensors_eight_are_named():
    (note,) = unwrap({**STATE, **{f"n{i}": i for i in range(9)}}, "here").notes
    assert note == (
        "passed over entries that are no tensors: n0, n1, n2, n3, n4, n5, n6, n7, ... (9 in all)"
    )


def test_of_several_states_the_averaged_ones_come_first_then_the_teachers():
    order = [
        "state_dict_ema", "model_ema", "ema_state_dict", "teacher", "state_dict",
        "model_state_dict", "model", "module", "net", "network", "student",
    ]  # fmt: skip
    data = {key: {"w": torch.tensor(float(i))} for i, key in enumerate(order)}
    for i, key in enumerate(order):
        shuffled = dict(sorted(data.items(), reverse=True))
        assert unwrap(shuffled, "here").state["w"].item() == i
        del data[key]


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "model_ema.", "ema_model.", "teacher.", "student.", "net."]
)
def test_a_prefix_is_taken_off_where_every_key_has_it_and_nowhere_else(prefix):
    state = {f"{prefix}module.{k}": v for k, v in STATE.items()}
    assert_same(unwrap(state, "here").state)
    kept = {**state, "head.bias": torch.ones(2)}
    assert_same(unwrap(kept, "here").state, kept)


@pytest.mark.parametrize(
    "infix", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"]
)
def test_what_compilers_and_wrappers_put_into_names_is_taken_out(infix):
    state = {f"a.{infix}.weight": STATE["a.weight"], "a.bias": STATE["a.bias"]}
    assert_same(unwrap(state, "here").state)


def test_a_file_may_be_all_header(tmp_path):
    save_file({"e": torch.empty(0, 4)}, tmp_path / "w.safetensors")
    assert read_state(tmp_path / "w.safetensors")["e"].shape == (0, 4)
    (tmp_path / "none.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(InputError, match="holds no tensors"):
        read_state(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(struct.pack("<Q", 3) + b"{}")
    with pytest.raises(InputError, match=r"its header would take 3 bytes, the file has 10"):
        read_state(tmp_path / "cut.safetensors")


def test_a_plain_state_is_passed_through_without_notes():
    checkpoint = unwrap(STATE, "here")
    assert_same(checkpoint.state)
    assert checkpoint.notes == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.ones(1)], "holds a list"),
        ({}, "no tensors"),
        ({"epoch": 3, "lr": 0.1}, "its keys are 'epoch', 'lr'"),
        (torch.ones(3), "holds a Tensor"),
    ],
)
def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path, data, message):
    torch.save(data, tmp_path / "w.pth")
    with pytest.raises(InputError, match=message):
        read_state(tmp_path / "w.pth")


# --- code is never run -----------------------------------------------------------------------


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("style", ["zip", "legacy", "bare", "protocol 0"])
def test_a_pickle_with_code_is_refused_and_nothing_is_executed(tmp_path, style):
    path, mark = tmp_path / "w.pth", str(tmp_path / "executed")
    data = {"model": STATE, "extra": Bomb(mark)}
    if style in ("zip", "legacy"):
        torch.save(data, path, _use_new_zipfile_serialization=style == "zip")
    else:
        protocol = 0 if style == "protocol 0" else None
        path.write_bytes(pickle.dumps(Bomb(mark), protocol=protocol))
    with pytest.raises(InputError, match="nothing was executed") as caught:
        read_state(path)
    assert str(path) in str(caught.value)
    assert "safetensors" in str(caught.value), "what to do next"
    assert not os.path.exists(mark)


def test_a_whole_pickled_model_is_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"torch.nn.modules.linear.Linear"):
        read_state(tmp_path / "w.pt")


def test_the_flags_that_training_scripts_save_do_no_harm(tmp_path):
    torch.save({"model": STATE, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "w.pth")
    assert_same(read_state(tmp_path / "w.pth"))


def test_a_compressed_zip_is_refused_before_it_unfolds(tmp_path):
    torch.save(STATE, tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as old,
        zipfile.ZipFile(tmp_path / "z.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for member in old.infolist():
            new.writestr(member.filename, old.read(member) + b"\0" * 10_000)
    with pytest.raises(InputError, match="compressed zip"):
        read_state(tmp_path / "z.pth")


# --- files that are something else -----------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "web page"),
        (
            b"just some words that somebody wrote down",
            "download",
        ),
        (b"\x00" * 64, "download"),
    ],
)
def test_files_that_are_no_weights_say_what_they_are(tmp_path, suffix, content, message):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_state(path)
    assert str(path) in str(caught.value)


def test_a_truncated_pickle_is_named(tmp_path):
    torch.save(STATE, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    for end in (3, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pth").write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"cut\.pth"):
            read_state(tmp_path / "cut.pth")


def test_a_format_under_the_wrong_suffix_is_recognised(tmp_path):
    save_file(STATE, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").rename(tmp_path / "w.pth")
    with pytest.raises(InputError, match="is a safetensors file; rename"):
        read_state(tmp_path / "w.pth")
    torch.save(STATE, tmp_path / "v.pth")
    (tmp_path / "v.pth").rename(tmp_path / "v.safetensors")
    with pytest.raises(InputError, match="is a PyTorch zip file; rename"):
        read_state(tmp_path / "v.safetensors")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("model_best.pt", "did you mean .*model_best.pth"),
        ("nowhere/w.pth", "nor a folder"),
        ("w.npz", "ends in .npz"),
        ("https://example.org/w.pth", "download the file"),
    ],
)
def test_a_source_that_is_not_there_says_what_is(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_best.pth").touch()
    (tmp_path / "w.npz").touch()
    with pytest.raises(InputError, match=message):
        read_state(source)


# --- safetensors that lie --------------------------------------------------------------------


def craft(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


ONCE = json.dumps(entry([2], 0, 8)).encode()
TWICE = b'{"a": ' + ONCE + b', "a": ' + ONCE + b"}"
LIES = {
    "header larger than the file": ({}, b"", 2**60),
    "header of four gigabytes": ({}, b"", 2**32),
    "overlapping offsets": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12, None),
    "a key twice": (TWICE, b"\0" * 8, None),
    "data cut off": ({"a": entry([2], 0, 8)}, b"\0" * 4, None),
    "data too long": ({"a": entry([2], 0, 8)}, b"\0" * 99, None),
    "a hole": ({"a": entry([2], 8, 16)}, b"\0" * 16, None),
    "shape against offsets": ({"a": entry([2**40], 0, 8)}, b"\0" * 8, None),
    "an overflowing shape": ({"a": entry([2**62, 4], 0, 8)}, b"\0" * 8, None),
    "a negative shape": ({"a": entry([-2], 0, 8)}, b"\0" * 8, None),
    "an unknown dtype": ({"a": entry([2], 0, 8, "F99")}, b"\0" * 8, None),
    "not JSON": (b"{" * 40, b"", None),
    "deep JSON": (b"[" * 200_000, b"", None),
    "a list": ([], b"", None),
    "not UTF-8": (b'{"\xff\xfe": 1}', b"", None),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_safetensors_file_that_lies_is_refused(tmp_path, lie):
    header, data, length = LIES[lie]
    craft(tmp_path / "w.safetensors", header, data, length)
    with pytest.raises(InputError, match=r"w\.safetensors"):
        read_state(tmp_path / "w.safetensors")


def test_a_header_beyond_the_limit_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_HEADER", 1000)
    save_file({str(i): torch.ones(1) for i in range(100)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="more than the 1000 that are read"):
        read_state(tmp_path / "w.safetensors")


@given(st.integers(0, 2**32 - 1))
def test_damaged_safetensors_give_tensors_or_a_clear_error(tmp_path_factory, seed):
    rng = random.Random(seed)
    raw = bytearray(save({**STATE, "c": torch.ones(3, 2)}))
    for _ in range(rng.randrange(1, 5)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    raw = raw[: rng.randrange(len(raw)) if rng.random() < 0.3 else None]
    path = tmp_path_factory.mktemp("damaged") / "w.safetensors"
    path.write_bytes(raw)
    try:
        state = read_state(path)
    except InputError:  # anything else that is raised fails the test
        return
    assert sum(t.nbytes for t in state.values()) <= len(raw)


# --- folders ---------------------------------------------------------------------------------


def shards(folder, places=None):
    for key, value in STATE.items():
        save_file({key: value}, folder / f"{key}.safetensors")
    places = places or {key: f"{key}.safetensors" for key in STATE}
    text = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(text)


def test_a_folder_gives_its_safetensors_before_its_pickle(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    checkpoint = read_checkpoint(tmp_path)
    assert_same(checkpoint.state)
    assert checkpoint.config == {"model_type": "vit"}
    assert checkpoint.notes == ["read model.safetensors in the folder"]


def test_a_folder_of_shards_is_read_as_one(tmp_path):
    shards(tmp_path)
    assert_same(read_state(tmp_path))


def test_a_folder_of_pickle_shards_is_read_as_one(tmp_path):
    for i, (key, value) in enumerate(STATE.items()):
        torch.save({key: value}, tmp_path / f"pytorch_model-{i}.bin")
    places = {key: f"pytorch_model-{i}.bin" for i, key in enumerate(STATE)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert_same(read_state(tmp_path))


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a.weight": "../a.weight.safetensors"}, "not a plain file name"),
        ({"a.weight": "/etc/passwd"}, "not a plain file name"),
        ({"a.weight": "a.py"}, "that ends in .safetensors"),
        ({"a.weight": "gone.safetensors"}, "are not there: gone.safetensors"),
        ({"b": "a.bias.safetensors"}, "lack 1 of its keys: b"),
        ({"a.weight": 3}, "no weight_map"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused(tmp_path, places, message):
    shards(tmp_path, places)
    with pytest.raises(InputError, match=message):
        read_state(tmp_path)


def test_a_key_in_two_shards_is_an_error(tmp_path):
    shards(tmp_path)
    save_file(STATE, tmp_path / "a.bias.safetensors")
    with pytest.raises(InputError, match="repeats"):
        read_state(tmp_path)


def test_a_run_folder_points_to_its_best_model(tmp_path):
    (tmp_path / "best").mkdir()
    save_file(STATE, tmp_path / "best" / "model.safetensors")
    with pytest.raises(InputError, match=r"did you mean .*best"):
        read_state(tmp_path)


def test_a_folder_with_other_names_lists_them(tmp_path):
    torch.save(STATE, tmp_path / "efficientvit_m0.pth")
    with pytest.raises(InputError, match=r"it holds efficientvit_m0\.pth: name one"):
        read_state(tmp_path)


# --- writing ---------------------------------------------------------------------------------


def test_written_weights_come_back_bit_for_bit_and_readable_by_others(tmp_path):
    path = tmp_path / "new" / "w.safetensors"
    write_state(STATE, path)
    assert_same(load_file(path))
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask, "a shared folder stays shared"
    assert os.listdir(path.parent) == ["w.safetensors"], "no temporary file stays"


def test_tied_and_sliced_tensors_are_written_on_their_own(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {"whole": base, "tied": base, "row": base[1], "turned": base.T}
    write_state(state, tmp_path / "w.safetensors")
    assert_same(read_state(tmp_path / "w.safetensors"), state)


def test_tensors_of_no_values_come_back(tmp_path):
    """NumPy's have strides of 0, of which torch makes no view as bytes."""
    taken = torch.from_numpy(np.arange(5)[[]])
    assert taken.stride() == (0,)
    state = {"labels": taken, "boxes": torch.zeros(0, 4), "a": torch.ones(2)}
    write_state(state, tmp_path / "w.safetensors")
    assert_same(read_state(tmp_path / "w.safetensors"), state)


@pytest.mark.parametrize("fails", ["save_file", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, fails):
    path = tmp_path / "w.safetensors"
    write_state(STATE, path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((files, fails, full) if fails == "save_file" else (os, fails, full)))
    with pytest.raises(InputError, match=r"No space left.*unchanged"):
        write_state({"a": torch.zeros(1)}, path)
    monkeypatch.undo()
    assert_same(read_state(path))
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_text_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_text(path, "old")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(errno.EIO, "bad")))
    with pytest.raises(InputError, match="unchanged"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    write_text(path, "naïve ✓")
    assert path.read_text(encoding="utf-8") == "naïve ✓"


def test_the_file_is_on_the_disk_before_it_is_renamed_and_its_folder_after(tmp_path, monkeypatch):
    steps, sync, replace = [], os.fsync, os.replace

    def fsync(descriptor):
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def renamed(source, target):
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    write_state(STATE, tmp_path / "w.safetensors")
    assert steps == ["file", "rename", "folder"]


def test_nothing_stays_open_after_writing(tmp_path):
    def next_descriptor():
        found = os.dup(0)
        os.close(found)
        return found

    write_text(tmp_path / "first.txt", "text")
    before = next_descriptor()
    write_text(tmp_path / "a.txt", "text")
    write_state(STATE, tmp_path / "w.safetensors")
    assert next_descriptor() == before


def test_only_safetensors_is_written(tmp_path):
    with pytest.raises(InputError, match="only safetensors"):
        write_state(STATE, tmp_path / "w.pth")


def test_a_folder_where_the_file_should_go_is_named(tmp_path):
    (tmp_path / "w.safetensors").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_state(STATE, tmp_path / "w.safetensors")
    assert os.listdir(tmp_path) == ["w.safetensors"]


# --- digests -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda s, t: s["a.bias"].neg_(),
        lambda s, t: s.update({"a.bias": s["a.bias"].to(torch.float64)}),
        lambda s, t: s.update({"a.weight": s["a.weight"].reshape(3, 2)}),
        lambda s, t: s.update({"b.bias": s.pop("a.bias")}),
        lambda s, t: s.pop("a.bias"),
        lambda s, t: s.update({"new": torch.ones(1)}),
        lambda s, t: t.update(said="other"),
        lambda s, t: t.update(new="text"),
        lambda s, t: t.pop("said"),
    ],
)
def test_what_is_not_as_it_was_written_is_refused(tmp_path, change):
    path = tmp_path / "w.safetensors"
    write_state(STATE, path, metadata={"said": "this"})
    state, texts = load_file(path), files.read_metadata(path)
    assert texts.keys() == {"format", "said", files.DIGEST}
    save_file(state, path, metadata=texts)
    assert_same(read_state(path))
    change(state, texts)
    save_file(state, path, metadata=texts)
    with pytest.raises(InputError, match=rf"^{path} is damaged: its digest is not .*copy it again"):
        read_state(path)


def test_a_file_without_a_digest_is_read_as_it_is(tmp_path):
    save_file(STATE, tmp_path / "w.safetensors", metadata={"format": "pt"})
    assert_same(read_state(tmp_path / "w.safetensors"))


def test_the_digest_is_what_files_of_today_carry():
    """Another formula would call every file that was written before damaged."""
    state = {"b": torch.tensor([[1.5], [2.5]]), "a": torch.tensor(7, dtype=torch.int16)}
    parts = [b'{"format": "pt", "said": "this"}']
    parts += [
        hashlib.blake2b(about + data, digest_size=16).digest()
        for about, data in (
            (b'["a", "torch.int16", []]', struct.pack("<h", 7)),
            (b'["b", "torch.float32", [2, 1]]', struct.pack("<2f", 1.5, 2.5)),
        )
    ]
    want = hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()
    assert files.digest_of(state, {"said": "this", "format": "pt"}) == want
    assert files.digest_of(state, {"format": "pt", "said": "this"}) == want


def test_a_digest_does_not_depend_on_layout_order_or_threads():
    state = {"b": torch.arange(60_000.0).reshape(300, 200).t(), "a": torch.ones(1)}
    digest = files.digest_of(state)
    assert files.digest_of({k: v.contiguous() for k, v in reversed(state.items())}) == digest
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert files.digest_of(state) == digest
    finally:
        torch.set_num_threads(threads)
