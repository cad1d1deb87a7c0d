"""The cache keeps to its bound, the longest unused file goes first, and nothing is half written."""

import os
import time

import numpy as np
import pytest

from tests.damage import flipped, outcomes
from vitrail.data.cache import (
    ABANDONED_AFTER,
    cache_bound,
    cache_folder,
    cached,
    load_columns,
    make_room,
    mark_used,
    write_atomically,
)
from vitrail_runtime.errors import InputError


def put(folder, name: str, size: int, age: float = 0):
    """A cached file of `size` bytes that was last used `age` seconds ago."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - age,) * 2)
    return path


def left(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.glob("*/*")}


def test_the_folder_is_the_one_given_else_the_systems_else_that_of_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("VITRAIL_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "vitrail"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "vitrail"


def test_the_bound_is_16_gib_or_a_number_given(monkeypatch):
    monkeypatch.delenv("VITRAIL_CACHE_BYTES", raising=False)
    assert cache_bound() == 16 * 2**30 == 17179869184
    monkeypatch.setenv("VITRAIL_CACHE_BYTES", "20e9")
    assert cache_bound() == 20_000_000_000
    monkeypatch.setenv("VITRAIL_CACHE_BYTES", "much")
    with pytest.raises(InputError, match="must be a number of bytes, such as 20e9, but is 'much'"):
        cache_bound()


def test_the_longest_unused_go_until_what_is_wanted_fits(own_cache, monkeypatch):
    monkeypatch.setenv("VITRAIL_CACHE_BYTES", "100")
    put(own_cache, "shards/new", 30, age=10)
    put(own_cache, "index/old", 30, age=300)
    put(own_cache, "index/middle", 30, age=200)
    assert make_room(10)
    assert len(left(own_cache)) == 3, "90 and 10 fit into 100"
    assert make_room(11)
    assert left(own_cache) == {"shards/new", "index/middle"}
    assert make_room(71)
    assert left(own_cache) == set()
    assert make_room(100)
    assert not make_room(101)


def test_a_file_in_use_stays_and_nothing_goes_where_it_would_not_help(own_cache, monkeypatch):
    monkeypatch.setenv("VITRAIL_CACHE_BYTES", "100")
    mine = put(own_cache, "shards/mine", 60, age=300)
    put(own_cache, "shards/other", 30, age=100)
    assert not make_room(41, keep={mine})
    assert left(own_cache) == {"shards/mine", "shards/other"}
    assert make_room(40, keep={mine})
    assert left(own_cache) == {"shards/mine"}


def test_what_another_process_is_writing_stays_for_an_hour(own_cache, monkeypatch):
    monkeypatch.setenv("VITRAIL_CACHE_BYTES", "100")
    assert ABANDONED_AFTER == 3600
    put(own_cache, "shards/.a.tar-x", 50, age=3500)
    put(own_cache, "shards/.b.tar-x", 40, age=3700)
    put(own_cache, "shards/c.tar", 5, age=3500)
    assert not make_room(51)
    assert len(left(own_cache)) == 3
    assert make_room(50)
    assert left(own_cache) == {"shards/.a.tar-x"}


def test_a_file_that_vanishes_meanwhile_does_not_matter(own_cache, monkeypatch):
    monkeypatch.setenv("VITRAIL_CACHE_BYTES", "100")
    (own_cache / "index").mkdir()
    (own_cache / "index" / "gone").symlink_to("nowhere")
    put(own_cache, "index/there", 90)
    assert make_room(50)
    assert left(own_cache) == {"index/gone"} or not (own_cache / "index" / "there").exists()


def test_a_file_marked_as_used_goes_last(own_cache, monkeypatch):
    monkeypatch.setenv("VITRAIL_CACHE_BYTES", "100")
    first = put(own_cache, "index/first", 40, age=300)
    put(own_cache, "index/second", 40, age=200)
    mark_used(first)
    assert make_room(60)
    assert left(own_cache) == {"index/first"}
    mark_used(own_cache / "index" / "not there")  # nor does a cache that may only be read matter


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"

    def fail(*_):
        assert [p.name.startswith(".file-") for p in path.parent.iterdir() if p != path] == [True]
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write_atomically(path, b"three")
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == b"two"


def columns():
    texts = ["", "ä\0", "\udcff", "no"]
    return {"sizes": np.arange(6, dtype=np.int32).reshape(3, 2), "names": texts, "none": []}


def same(found) -> bool:
    want = columns()
    array = want.pop("sizes")
    arrays = found["sizes"].dtype == array.dtype and np.array_equal(found["sizes"], array)
    return arrays and want == {k: v for k, v in found.items() if k != "sizes"}


def test_columns_are_made_once_and_again_for_another_identity(own_cache):
    made = []

    def make():
        made.append(True)
        return columns()

    assert all(same(cached("one", make)) for _ in range(3))
    assert len(made) == 1
    (path,) = (own_cache / "index").iterdir()
    os.utime(path, (1, 1))
    assert same(cached("one", make))
    assert path.stat().st_mtime > time.time() - 1000, "what serves is marked as used"
    assert same(cached("one \udcff", make))
    assert len(made) == 2
    assert len(left(own_cache)) == 2


def test_damaged_columns_are_made_again_whatever_bit_is_flipped(own_cache):
    cached("one", columns)
    (path,) = (own_cache / "index").iterdir()
    whole, made = path.read_bytes(), []

    def read() -> bool:
        return same(cached("one", lambda: made.append(True) or columns()))

    cut = (whole[:n] for n in (0, 10, 16, 40, len(whole) - 1))
    for damaged, count in ((flipped(whole, 40), 40), (cut, 5)):
        made.clear()
        found = outcomes(path, damaged, read)
        assert found["equal"] == found.total() == len(made) == count
    other = path.with_name("0" * 32 + ".npz")
    other.write_bytes(whole)
    assert load_columns(path) is not None
    assert load_columns(other) is None, "of another identity"


def test_a_cache_that_cannot_be_written_costs_time_alone(own_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("VITRAIL_CACHE_BYTES", "10")
    assert same(cached("one", columns))
    assert left(own_cache) == set()
    monkeypatch.delenv("VITRAIL_CACHE_BYTES")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "file" / "below"))
    assert same(cached("one", columns))


def test_what_cannot_be_made_is_not_kept(own_cache):
    def fail():
        raise InputError("no")

    for _ in range(2):
        with pytest.raises(InputError, match="no"):
            cached("one", fail)
    assert left(own_cache) == set()
