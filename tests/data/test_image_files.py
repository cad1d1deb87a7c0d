"""Images that are files of their own: what a source says of them once they are listed."""

import hashlib
import os
from pathlib import Path

import pytest

from vitrail.data.image_files import ImageFiles
from vitrail.data.index import NOWHERE


class Listed(ImageFiles):
    def __init__(self, folder, keys):
        self._above = folder
        self.root = folder.absolute()
        self.keys = keys

    def _present(self, split):
        return self.keys[split]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Of a folder named relatively, as a person does; one file's name is no UTF-8."""
    monkeypatch.chdir(tmp_path)
    keys = ["b.png", os.fsdecode(b"\xff.png")]
    for number, key in enumerate(keys, 1):
        (tmp_path / key).write_bytes(b"x" * number)
        os.utime(tmp_path / key, ns=(0, 1_000_000_000 + number))
    return Listed(Path(), {"train": keys, "val": keys[:1]})


def test_a_fingerprint_is_of_the_root_and_of_each_files_name_size_and_time(source):
    def expected(*lines):
        return hashlib.sha256(os.fsencode(source.root) + b"".join(lines)).hexdigest()

    b, other = b"b.png\x001\x001000000001\n", b"\xff.png\x002\x001000000002\n"
    assert source.fingerprint("train") == expected(b, other)
    assert source.fingerprint("val") == expected(b)
    os.utime("b.png", ns=(0, 7))
    assert source.fingerprint("val") == expected(b"b.png\x001\x007\n")


def test_a_link_to_nothing_has_no_size_and_no_time(source):
    os.unlink("b.png")
    os.symlink("gone.png", "b.png")
    lines = os.fsencode(source.root) + b"b.png\x000\x000\n"
    assert source.fingerprint("val") == hashlib.sha256(lines).hexdigest()
    os.unlink("b.png")
    Path("b.png").write_bytes(b"x")
    assert source.fingerprint("val") != hashlib.sha256(lines).hexdigest()


def test_images_are_scanned_in_their_order_and_one_that_is_gone_with_its_error(source, tmp_path):
    first, second = source.keys["train"]
    assert source.count("train") == 2
    assert source.count("val") == 1
    assert list(source.scan("train")) == [
        (first, "", NOWHERE, b"x"),
        (second, "", NOWHERE, b"xx"),
    ]
    (tmp_path / first).unlink()
    gone, there = source.scan("train")
    assert gone[:3] == (first, "", (0, 0, 0))
    assert isinstance(gone[3], FileNotFoundError)
    assert there == (second, "", (0, 0, 0), b"xx")


def test_images_are_read_below_the_root_wherever_the_process_goes(source, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert source.read("b.png", NOWHERE) == b"x"


def test_messages_call_an_image_as_the_folder_was_given_and_without_detours(source):
    assert source.where("b.png", NOWHERE) == "b.png"
    assert source.where("labels/../b.png", NOWHERE) == "b.png"
