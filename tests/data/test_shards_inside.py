"""What stands in a shard, line by line: names, labels, offsets, and how many files are open."""

import gzip
import os
import pickle
import tarfile

import pytest

from tests.data.test_shards import encoded, member, samples, write_shard
from vitrail.data import open_data, shards
from vitrail.data.opening import open_source
from vitrail.data.shards import LONGEST_LABEL, is_shard, split_of
from vitrail_runtime.errors import InputError


def pair(key: str, label: str, number: int = 1) -> list:
    return [member(f"{key}.jpg", encoded(number)), member(f"{key}.cls", label.encode())]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000.tar", "train"),
        ("training_000.tar.gz", "train"),
        ("TRAIN.tar", "train"),
        ("val.0.tar", "val"),
        ("validation-part-3.tgz", "val"),
        ("valid_1.tar", "val"),
        ("test-0.tar", "test"),
        ("testing-0.tar", "test"),
        ("mytrain-0.tar", ""),
        ("0-train.tar", ""),
        ("trainer.tar", ""),
    ],
)
def test_a_shards_name_begins_with_its_split(name, split):
    assert split_of(name) == split


def test_shards_are_files_of_three_endings_that_are_not_hidden(tmp_path):
    names = ["a.tar", "b.tar.gz", "c.tgz", "D.TAR", ".e.tar", "f.tar.bz2", "g.zip", "tar"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "folder.tar").mkdir()
    found = sorted(path.name for path in tmp_path.iterdir() if is_shard(path))
    assert found == ["D.TAR", "a.tar", "b.tar.gz", "c.tgz"]


def test_a_place_says_shard_offset_and_size_and_messages_name_shard_and_key(tmp_path):
    for split, first in (("val", 0), ("train", 4), ("test", 8)):
        write_shard(tmp_path / f"{split}-1.tar", samples(first, 2))
        write_shard(tmp_path / f"{split}-0.tar", samples(first + 2, 2))
    source = open_source(tmp_path)
    assert source.splits() == ("train", "val", "test")
    assert source.count("train") == 0
    for split, first in (("val", 0), ("train", 4), ("test", 8)):
        data = open_data(source, split, classes=("0", "1", "2"))
        assert data.keys == [f"s{first + i:03d}" for i in (2, 3, 0, 1)]
        for i, key in enumerate(data.keys):
            shard = tmp_path / f"{split}-{int(i > 1)}.tar"
            assert data.where(i) == f"{shard}: {key}"
            with tarfile.open(shard) as tar:
                (info,) = (m for m in tar if m.name.startswith(key) and "cls" not in m.name)
            assert data.images.places[i, 1:].tolist() == [info.offset_data, info.size]
            assert data.images.read_bytes(i) == shard.read_bytes()[info.offset_data :][: info.size]


def test_a_single_shard_is_named_by_its_own_path(tmp_path):
    write_shard(tmp_path / "one.tar", samples(0, 3))
    data = open_data(tmp_path / "one.tar", "all")
    assert data.where(1) == f"{tmp_path / 'one.tar'}: s001"


def test_a_single_shard_does_not_miss_those_beside_it(tmp_path):
    write_shard(tmp_path / "one.tar", samples(0, 6))
    (tmp_path / "shards.json").write_text(
        '{"shards": [{"file": "one.tar", "split": "Train"}, {"file": "two.tar", "split": "val"}]}'
    )
    assert open_source(tmp_path / "one.tar").splits() == ("train",)
    with pytest.raises(InputError, match=r"lists two\.tar, but there is no such shard"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "{", '{"shards": 5}', '{"shards": [{"file": "one.tar"}]}',
     '{"shards": [{"file": "one.tar", "split": "some"}]}',
     '{"shards": [{"file": "one.tar", "split": 1}]}'],
)  # fmt: skip
def test_a_list_of_shards_that_cannot_be_read_is_refused(tmp_path, text):
    write_shard(tmp_path / "one.tar", samples(0, 3))
    (tmp_path / "shards.json").write_text(text)
    with pytest.raises(InputError, match=r"shards\.json must hold .*\((Key|Type|Attr|JSON).*Error"):
        open_source(tmp_path)


def test_one_key_may_stand_in_two_splits(tmp_path):
    for split in ("train", "test"):
        write_shard(tmp_path / f"{split}.tar", samples(0, 3))
    assert len(open_data(tmp_path, "all")) == 6


def test_numbers_are_classes_in_numerical_order_and_names_by_code_point(tmp_path):
    write_shard(tmp_path / "one.tar", [m for i in range(8, 12) for m in pair(f"k{i}", f" {i}\n")])
    assert open_data(tmp_path / "one.tar", "all").classes == ("8", "9", "10", "11")
    names = ("9", "a", "B", "²")
    write_shard(tmp_path / "two.tar", [m for i in range(4) for m in pair(f"k{i}", names[i])])
    assert open_data(tmp_path / "two.tar", "all").classes == ("9", "B", "a", "²")


def test_a_label_is_an_index_into_classes_txt_or_one_of_its_names(tmp_path):
    (tmp_path / "classes.txt").write_text("\ufeffcat\n dog \nowl\n\n\n", encoding="utf-8")
    labels = ("0", "dog", " 2\n", "owl", "1")
    write_shard(tmp_path / "one.tar", [m for i in range(5) for m in pair(f"k{i}", labels[i], i)])
    data = open_data(tmp_path / "one.tar", "all")
    assert data.classes == ("cat", "dog", "owl")
    assert data.truth.labels.tolist() == [0, 1, 2, 2, 1]
    for wrong in ("\u0661", "Dog", "3", "-0"):  # the first is Arabic for 1
        write_shard(tmp_path / "one.tar", pair("k", wrong))
        with pytest.raises(
            InputError, match=f"k.cls says '{wrong}', but classes.txt has .* 0 to 2"
        ):
            open_data(tmp_path / "one.tar", "all")


@pytest.mark.parametrize("text", ["cat\ndog\ncat\n", "\ncat\ndog\n"])
def test_class_names_are_told_once_and_without_gaps(tmp_path, text):
    write_shard(tmp_path / "one.tar", samples(0, 3))
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(InputError, match="must hold one class name a line, each once"):
        open_source(tmp_path / "one.tar")


def test_a_label_may_have_200_letters_of_any_script(tmp_path):
    assert LONGEST_LABEL == 200
    long = "\U00020000" * 200  # four bytes each
    write_shard(tmp_path / "one.tar", [*pair("a", long), *pair("b", "b")])
    assert open_data(tmp_path / "one.tar", "all").classes == ("b", long)
    write_shard(tmp_path / "two.tar", [*pair("a", "x" * 201), *pair("b", "b")])
    with pytest.raises(InputError, match=r"a\.cls holds no label; .* at most 200 characters"):
        open_data(tmp_path / "two.tar", "all")


def test_folders_hidden_files_and_other_members_are_passed_over_and_endings_may_be_capitals(
    tmp_path,
):
    members = [
        member("inner", type=tarfile.DIRTYPE),
        member("inner/.hidden.jpg", b"x"),
        member(".cls", b"5"),
        member("inner/k.JPG", encoded(1)),
        member("inner/k.CLS", b"a"),
        member("inner/k.json", b"{}"),
        member("k.WebP", encoded(2, "WEBP")),
        member("k.cls", b"b"),
        member("./l.jpeg", encoded(3)),
        member("./l.cls", b"b"),
    ]
    write_shard(tmp_path / "one.tar", members)
    data = open_data(tmp_path / "one.tar", "all")
    assert data.keys == ["inner/k", "k", "./l"]
    assert data.truth.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*pair("k", "1"), member("k.cls", b"1")], r"one\.tar: sample 'k' has two labels$"),
        (
            [*pair("k", "1"), member("k.png", encoded(1, "PNG"))],
            r"sample 'k' is there twice \(k\.jpg and k\.png\)",
        ),
        ([member("k.jpg", encoded(1))], r"k\.jpg has no label; expected k\.cls$"),
    ],
)
def test_what_belongs_to_no_one_image_is_refused(tmp_path, members, message):
    write_shard(tmp_path / "one.tar", members)
    with pytest.raises(InputError, match=message):
        open_data(tmp_path / "one.tar", "all")


def test_a_shard_cut_between_or_within_members_says_so(tmp_path):
    path = tmp_path / "one.tar"
    write_shard(path, [member("k.cls", b"1"), member("k.jpg", bytes(1024))])
    whole = path.read_bytes()
    end = whole.index(b"k.jpg") + 512 + 1024
    for length, message in (
        (end - 1, "is truncated: it ends within k.jpg"),
        (end, "is truncated: it has no end mark"),
        (end + 511, "is truncated: it has no end mark"),
        (end + 512, "2 of 2|k.*pictures|is broken"),  # whole: the image itself is none
    ):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=message):
            open_data(path, "all", classes=("1", "2"))


def test_the_fingerprint_follows_shards_sizes_times_and_class_names(tmp_path):
    write_shard(tmp_path / "train-0.tar", samples(0, 3))
    write_shard(tmp_path / "val-0.tar", samples(3, 3))
    shard, seen = tmp_path / "train-0.tar", set()

    def look() -> int:
        seen.update(open_source(tmp_path).fingerprint("train") for _ in range(2))
        return len(seen)

    os.utime(shard, ns=(10**18, 10**18))
    assert look() == 1
    os.utime(shard, ns=(10**18, 2 * 10**18))
    assert look() == 2
    shard.write_bytes(shard.read_bytes() + bytes(512))
    os.utime(shard, ns=(10**18, 2 * 10**18))
    assert look() == 3
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert look() == 4
    (tmp_path / "classes.txt").write_text("a\nc\nb\n")
    assert look() == 5
    (tmp_path / "val-0.tar").rename(tmp_path / "test-0.tar")  # places count over all shards
    assert look() == 6
    shard.rename(tmp_path / "train-1.tar")
    assert look() == 7


def test_only_so_many_shards_are_open_and_the_longest_unused_is_closed_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    for i in range(3):
        write_shard(tmp_path / f"train-{i}.tar", pair(f"k{i}", str(i), i))
    data = open_data(tmp_path, "all")
    source = data.images.source
    for i in (0, 1, 0, 2):
        assert data.images.read_bytes(i) == encoded(i)
    assert list(source._open_files) == [0, 2]
    kept = source._open_files[0]
    assert source._file(0) is kept
    assert data.images.read_bytes(1) == encoded(1)
    assert list(source._open_files) == [0, 1]
    first = source._open_files[0]
    data.images.read_bytes(2)
    assert first.closed


def test_a_copy_for_a_worker_has_no_open_file_and_reads_the_same(tmp_path):
    write_shard(tmp_path / "train-0.tar", samples(0, 3))
    data = open_data(tmp_path, "all")
    data.images.read_bytes(0)
    assert data.images.source._open_files
    copy = pickle.loads(pickle.dumps(data.images.source))
    assert not copy._open_files
    assert copy.read(data.keys[2], data.images._place(2)) == data.images.read_bytes(2)


def test_a_gzip_shard_is_inflated_once_whole_and_marked_as_used(tmp_path, own_cache, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK", 1000)  # in many parts
    own_cache /= "not/yet/there"
    monkeypatch.setenv("VITRAIL_CACHE", str(own_cache))
    write_shard(tmp_path / "one.tar", samples(0, 3))
    (tmp_path / "two.tgz").write_bytes(gzip.compress((tmp_path / "one.tar").read_bytes()))
    data = open_data(tmp_path / "two.tgz", "all")
    (inflated,) = (own_cache / "shards").iterdir()
    assert inflated.read_bytes() == (tmp_path / "one.tar").read_bytes()
    assert inflated.suffix == ".tar"
    used, inflate = [], shards._inflate
    monkeypatch.setattr(shards, "mark_used", used.append)
    monkeypatch.setattr(shards, "_inflate", None)
    again = open_source(tmp_path / "two.tgz")
    assert again.read(data.keys[0], data.images._place(0)) == encoded(0)
    assert used == [inflated]
    monkeypatch.setattr(shards, "_inflate", inflate)
    # Another content under the same name is inflated anew.
    write_shard(tmp_path / "one.tar", samples(3, 3))
    (tmp_path / "two.tgz").write_bytes(gzip.compress((tmp_path / "one.tar").read_bytes()))
    assert open_data(tmp_path / "two.tgz", "all").keys == ["s003", "s004", "s005"]
    assert len(list((own_cache / "shards").iterdir())) == 2


def test_the_gzip_shards_of_a_set_do_not_make_room_for_each_other(tmp_path, own_cache, monkeypatch):
    for i in range(2):
        write_shard(tmp_path / f"train-{i}.tar.gz", samples(3 * i, 3))
    size = len(gzip.decompress((tmp_path / "train-0.tar.gz").read_bytes()))
    monkeypatch.setenv("VITRAIL_CACHE_BYTES", str(int(1.5 * size)))
    with pytest.raises(
        InputError, match=r"inflate to more than the cache may hold \(0\.0 GB\); set VITRAIL_CACHE_"
    ):
        open_data(tmp_path, "all")
    assert len(list((own_cache / "shards").iterdir())) == 1, "no partial file is left"
    monkeypatch.setenv("VITRAIL_CACHE_BYTES", str(3 * size))
    assert len(open_data(tmp_path, "all")) == 6
