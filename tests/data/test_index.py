"""What an index says of images without decoding them, and when it is made anew."""

import hashlib
import io
import os
import sys
import zlib

import numpy as np
import pytest

from tests.data.conftest import picture
from vitrail.data import cache, index
from vitrail.data.index import examine, make_index, read_index
from vitrail.data.opening import open_source


def saved(kind: str, size: tuple[int, int] = (40, 60), **options) -> bytes:
    buffer = io.BytesIO()
    picture(1, size).save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_digest_is_blake2b_of_the_bytes():
    assert index.digest(b"abc") == hashlib.blake2b(b"abc", digest_size=16).hexdigest()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_finished_file_is_believed_without_decoding(kind, monkeypatch):
    payload = saved(kind)
    monkeypatch.setattr(index, "decode", None)
    assert examine(payload) == ((40, 60), "")


def test_any_other_format_is_decoded_to_find_out(monkeypatch):
    decoded = []
    real = index.decode
    monkeypatch.setattr(index, "decode", lambda payload: decoded.append(payload) or real(payload))
    for kind in ("BMP", "GIF", "TIFF"):
        assert examine(saved(kind)) == ((40, 60), "")
    assert len(decoded) == 3
    size, problem = examine(saved("BMP")[:-900])
    assert size == (0, 0)
    assert problem.startswith("is broken or truncated")


def decoded_for(payload: bytes, monkeypatch) -> bool:
    """Whether these bytes had to be decoded."""
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(index, "decode", asked.append)
        patch.setattr(index, "read_size", lambda _: (1, 1))
        examine(payload)
    return bool(asked)


@pytest.mark.parametrize("padding", [b"", b"\0" * 30, b"\n", b"\r\n", b"\0\r\n\0"])
def test_a_jpeg_ends_with_its_mark_perhaps_padded(padding, monkeypatch):
    payload = saved("JPEG")
    assert not decoded_for(payload + padding, monkeypatch)
    assert decoded_for(payload[:-1] + padding, monkeypatch)
    assert decoded_for(payload + padding + b"x", monkeypatch)


def test_a_jpeg_with_more_padding_is_decoded(monkeypatch):
    """Only so much of the end is looked at."""
    assert decoded_for(saved("JPEG") + b"\0" * 31, monkeypatch)


def test_a_png_is_whole_where_every_chunk_has_its_checksum(monkeypatch):
    payload = saved("PNG")
    assert not decoded_for(payload, monkeypatch)
    # Chunks as the format says: length, name, content, checksum.
    at, chunks = 8, []
    while at < len(payload):
        length = int.from_bytes(payload[at : at + 4], "big")
        assert zlib.crc32(payload[at + 4 : at + 8 + length]) == int.from_bytes(
            payload[at + 8 + length : at + 12 + length], "big"
        )
        chunks.append(payload[at : at + 12 + length])
        at += 12 + length
    for i, chunk in enumerate(chunks[:-1]):
        for place in {4, len(chunk) // 2, len(chunk) - 1}:  # name, content, checksum
            changed = bytearray(chunk)
            changed[place] ^= 1
            damaged = payload[:8] + b"".join([*chunks[:i], bytes(changed), *chunks[i + 1 :]])
            assert decoded_for(damaged, monkeypatch), (i, place)
    assert decoded_for(payload[:-3], monkeypatch)
    assert decoded_for(payload[:20] + payload[-12:], monkeypatch)
    # A file cut within a chunk, behind which the end mark happens to stand.
    assert decoded_for(payload[: len(payload) // 2] + chunks[-1], monkeypatch)
    swapped = payload[:-12] + b"\0\0\0\0IENX" + zlib.crc32(b"IENX").to_bytes(4, "big")
    assert decoded_for(swapped, monkeypatch)


def test_a_webp_is_as_long_as_it_says(monkeypatch):
    payload = saved("WEBP")
    assert int.from_bytes(payload[4:8], "little") + 8 == len(payload)
    assert not decoded_for(payload, monkeypatch)
    assert not decoded_for(payload + b"\0", monkeypatch)
    assert decoded_for(payload[:-1], monkeypatch)
    assert decoded_for(payload[:8] + b"WAVE" + payload[12:], monkeypatch)
    assert decoded_for(b"RIFX" + payload[4:], monkeypatch)


def test_a_message_of_bytes_does_not_name_them():
    assert examine(b"") == ((0, 0), "is empty (0 bytes)")
    assert examine(b"text")[1].startswith("is not a picture in a format")


class Listed:
    """A source of what it is given: (key, class, bytes or an error)."""

    name = "made up"

    def __init__(self, *samples) -> None:
        self.samples = samples

    def scan(self, split):
        for i, (key, name, payload) in enumerate(self.samples):
            yield key, name, (i, 2 * i, 3 * i), payload

    def count(self, split) -> int:
        return len(self.samples)

    def fingerprint(self, split) -> str:
        return "always the same"


def listed() -> Listed:
    return Listed(
        ("x", "cat", saved("PNG", (5, 7))),
        ("y", "dog", b"nothing"),
        ("z", "cat", OSError(2, "No such file")),
        ("ä", "owl", OSError("odd")),
        ("w", "dog", saved("JPEG", (9, 8))),
    )


def test_an_index_has_a_row_for_every_sample_in_their_order(own_cache):
    source = listed()
    made, stored, read = make_index(source, ""), *(read_index(source, "") for _ in range(2))
    for found in (made, stored, read):
        assert len(found) == 5
        assert found.keys == ["x", "y", "z", "ä", "w"]
        assert found.names == ["cat", "dog", "cat", "owl", "dog"]
        assert found.sizes.tolist() == [[5, 7], [0, 0], [0, 0], [0, 0], [9, 8]]
        assert found.sizes.dtype == np.int32
        assert found.places.tolist() == [[i, 2 * i, 3 * i] for i in range(5)]
        assert found.places.dtype == np.int64
        payloads = [saved("PNG", (5, 7)), b"nothing", b"", b"", saved("JPEG", (9, 8))]
        assert found.digests == [index.digest(p) for p in payloads]
        assert list(found.problems) == [1, 2, 3]
        assert found.problems[1].startswith("is not a picture")
        assert found.problems[2] == "No such file"
        assert found.problems[3] == "odd"
    (path,) = (own_cache / "index").iterdir()
    assert path.suffix == ".npz"


def test_an_index_of_nothing_is_stored_too(own_cache):
    for _ in range(2):
        found = read_index(Listed(), "")
        assert (len(found), found.sizes.shape, found.places.shape) == (0, (0, 2), (0, 3))
        assert (found.names, found.problems) == ([], {})


def test_another_name_split_kind_content_or_version_has_an_index_of_its_own(own_cache, monkeypatch):
    def stored() -> int:
        return len(list((own_cache / "index").iterdir()))

    source = listed()
    read_index(source, "")
    read_index(source, "train")
    assert stored() == 2
    source.name = "other"
    read_index(source, "")
    assert stored() == 3
    monkeypatch.setattr(Listed, "fingerprint", lambda *_: "changed")
    read_index(source, "")
    assert stored() == 4
    read_index(type("Relisted", (Listed,), {})(*source.samples), "")
    assert stored() == 5, "of another kind, though its name is the same"
    monkeypatch.setattr(index, "VERSION", index.VERSION + 1)
    read_index(source, "")
    assert stored() == 6
    read_index(source, "")
    assert stored() == 6


def test_an_index_that_is_read_is_marked_as_used(own_cache, monkeypatch):
    read_index(listed(), "")
    (path,) = (own_cache / "index").iterdir()
    used = []
    monkeypatch.setattr(cache, "mark_used", used.append)
    read_index(listed(), "")
    assert used == [path]


def test_an_index_keeps_to_the_bound_of_the_cache_and_needs_none(own_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("VITRAIL_CACHE_BYTES", "10")
    assert len(read_index(listed(), "")) == 5
    assert not (own_cache / "index").exists()
    monkeypatch.delenv("VITRAIL_CACHE_BYTES")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "file" / "below"))
    assert len(read_index(listed(), "")) == 5


@pytest.mark.parametrize(("count", "terminal"), [(4999, True), (5000, True), (5000, False)])
def test_progress_is_shown_on_a_terminal_from_5000_images_on(count, terminal, monkeypatch):
    titles = []

    def track(samples, total, title):
        titles.append((total, title))
        return samples

    monkeypatch.setattr(index, "_with_progress", track)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    source = Listed()
    source.count = lambda _: count
    make_index(source, "train")
    shown = terminal and count == 5000
    assert titles == ([(5000, "indexing made up train")] if shown else [])
    make_index(source, "")
    assert titles[1:] == ([(5000, "indexing made up")] if shown else [])


def test_progress_passes_every_sample_on_and_writes_to_standard_error(capsys):
    assert list(index._with_progress(iter(range(7)), 7, "indexing")) == list(range(7))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ["folders", "table"])
def test_a_fingerprint_follows_names_sizes_times_and_labels(kind, class_folders):
    root = class_folders({"": {"a": 2, "b": 2}})
    file, table = root / "a" / "000.jpg", root / "list.csv"
    rows = [f"{p.relative_to(root)},{p.parent.name}" for p in sorted(root.rglob("*.jpg"))]
    table.write_text("\n".join(["file,label", *rows]))
    content, seen = file.read_bytes(), set()

    def look() -> None:
        for _ in range(2):  # what has not changed is the same
            seen.add(open_source(table if kind == "table" else root).fingerprint(""))

    os.utime(file, ns=(10**18, 10**18))
    look()
    assert len(seen) == 1
    os.utime(file, ns=(10**18, 10**18 + 10**9))
    look()
    assert len(seen) == 2
    file.write_bytes(content + b"\0")
    os.utime(file, ns=(10**18, 10**18))
    look()
    assert len(seen) == 3
    file.rename(root / "a" / "0.jpg")
    table.write_text(table.read_text().replace("a/000.jpg", "a/0.jpg"))
    look()
    assert len(seen) == 4
    (root / "b").rename(root / "c")
    table.write_text(table.read_text().replace("b/", "c/"))
    look()
    assert len(seen) == 5
    table.write_text(table.read_text().replace(",b", ",c"))
    look()
    assert len(seen) == 5 + (kind == "table")


def test_the_line_of_progress_vanishes_when_all_is_read(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert list(index._with_progress(iter(range(7)), 7, "indexing")) == list(range(7))
    assert "indexing" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K"), "the line is erased"
