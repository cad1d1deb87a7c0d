"""Tar shards: the same pictures as folders, and every way in which a shard can be wrong."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest

from tests.data.conftest import picture
from vitrail.data import open_data
from vitrail_runtime.errors import InputError

CLASSES = ("cat", "dog", "owl")


def encoded(number: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    picture(number, (20 + number % 3, 30)).save(buffer, kind)
    return buffer.getvalue()


def member(name: str, payload: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(payload)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, payload


def samples(first: int, count: int, label=lambda i: str(i % 3)) -> list:
    """Members of `count` samples; every fourth is a PNG."""
    members = []
    for i in range(first, first + count):
        kind, ending = ("PNG", "png") if i % 4 == 3 else ("JPEG", "jpg")
        members.append(member(f"s{i:03d}.{ending}", encoded(i, kind)))
        members.append(member(f"s{i:03d}.cls", label(i).encode()))
    return members


def write_shard(path, members) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, payload in members:
            tar.addfile(info, io.BytesIO(payload))
    payload = buffer.getvalue()
    path.write_bytes(gzip.compress(payload) if path.suffix == ".gz" else payload)


@pytest.fixture
def shards(tmp_path):
    """Three unequal training shards, one of them gzip, and one of test."""
    root = tmp_path / "shards"
    root.mkdir()
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    write_shard(root / "train-000000.tar", samples(0, 12))
    write_shard(root / "train-000001.tar.gz", samples(12, 17))
    write_shard(root / "train-000002.tar", samples(29, 1))
    write_shard(root / "test-000000.tar.gz", samples(30, 6))
    return root


def test_pictures_and_labels_of_every_shard_are_read_at_random(shards):
    data = open_data(shards, "all")
    assert len(data) == 36
    assert data.classes == CLASSES
    for i in np.random.default_rng(0).permutation(36).tolist():
        number = int(data.keys[i].removeprefix("s"))
        assert data.truth.labels[i] == number % 3
        assert data.images.read_bytes(i) == encoded(number, "PNG" if number % 4 == 3 else "JPEG")
        assert data.images.read(i).shape == (*data.images.sizes[i], 3)


def test_an_ending_in_capitals_is_read_as_what_it_is(shards, own_cache):
    (shards / "train-000000.tar").rename(shards / "train-000000.TAR")
    (shards / "test-000000.tar.gz").rename(shards / "test-000000.TAR.GZ")
    assert len(open_data(shards, "all")) == 36
    assert len(list((own_cache / "shards").iterdir())) == 2, "only gzip is inflated"


def test_a_missing_val_is_cut_from_train_with_every_class(shards):
    train, val, test = (open_data(shards, s) for s in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (24, 6, 6)
    assert np.bincount(val.truth.labels).tolist() == [2, 2, 2]
    assert not set(train.keys) & set(val.keys)


def test_a_second_start_reads_no_shard(shards, monkeypatch):
    first = open_data(shards, "train")
    monkeypatch.setattr("vitrail.data.index.make_index", None)
    second = open_data(shards, "train")
    assert second.content_hash == first.content_hash
    assert second.images.read_bytes(20) == first.images.read_bytes(20)


def test_inflated_shards_may_vanish_from_the_cache(shards, own_cache):
    data = open_data(shards, "test")
    for path in (own_cache / "shards").iterdir():
        path.unlink()
    again = open_data(shards, "test")
    assert [again.images.read_bytes(i) for i in range(6)] == [
        data.images.read_bytes(i) for i in range(6)
    ]


def test_inflated_shards_stay_within_the_bound_of_the_cache(shards, own_cache, monkeypatch):
    open_data(shards, "test")
    monkeypatch.setenv("VITRAIL_CACHE_BYTES", "30000")
    with pytest.raises(InputError, match="inflate to more than the cache may hold"):
        open_data(shards, "train")
    # Another set's shards make room: the test shard went first.
    size = sum(p.stat().st_size for p in (own_cache / "shards").iterdir())
    assert size <= 30000


def test_a_cache_that_cannot_be_written_is_said(shards, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"cannot be inflated into .*set VITRAIL_CACHE"):
        open_data(shards, "test")


def test_without_classes_txt_indices_or_names_are_the_classes(shards):
    (shards / "classes.txt").unlink()
    assert open_data(shards, "test").classes == ("0", "1", "2")
    write_shard(shards / "train-000003.tar", samples(40, 9, label=lambda i: CLASSES[i % 3]))
    for name in ("train-000000.tar", "train-000001.tar.gz", "train-000002.tar"):
        (shards / name).unlink()
    assert open_data(shards, "train").classes == CLASSES


def test_shards_json_says_which_split_a_shard_belongs_to(shards):
    (shards / "train-000000.tar").rename(shards / "held.tar")
    listed = [("held.tar", "val"), ("train-000001.tar.gz", "train"), ("test-000000.tar.gz", "test")]
    text = json.dumps({"shards": [{"file": f, "split": s, "samples": 1} for f, s in listed]})
    (shards / "shards.json").write_text(text)
    assert len(open_data(shards, "val")) == 12
    assert open_data(shards, "train").notes == ()
    (shards / "shards.json").write_text(text.replace("held.tar", "lost.tar"))
    with pytest.raises(
        InputError, match=r"shards\.json lists lost\.tar, but there is no such shard"
    ):
        open_data(shards, "val")
    (shards / "shards.json").write_text("{}")
    with pytest.raises(InputError, match=r"shards\.json must hold"):
        open_data(shards, "val")


def test_one_shard_alone_is_a_set_without_splits(shards):
    data = open_data(shards / "train-000001.tar.gz", "all")
    assert len(data) == 17
    assert len(open_data(shards / "train-000000.tar", "val")) == 3


def test_keys_in_folders_of_a_shard_are_told_apart(shards):
    pairs = [(f"{side}/x.{e}", p) for side in "ab" for e, p in (("jpg", encoded(1)), ("cls", b"1"))]
    more = [*samples(50, 3), *(member(n, p) for n, p in pairs), member("notes.json", b"{}")]
    write_shard(shards / "train-000003.tar", more)
    keys = open_data(shards / "train-000003.tar", "all").keys
    assert keys == ["s050", "s051", "s052", "a/x", "b/x"]


def test_a_broken_picture_in_a_shard_is_named_with_its_shard(shards):
    write_shard(
        shards / "train-000002.tar",
        [
            member("bad.jpg", encoded(1)[:200]),
            member("bad.cls", b"0"),
            member("empty.png"),
            member("empty.cls", b"0"),
        ],
    )
    with pytest.raises(InputError) as caught:
        open_data(shards, "train")
    assert "2 of 31 pictures are broken" in str(caught.value)
    assert "train-000002.tar: bad: is broken or truncated" in str(caught.value)
    assert "train-000002.tar: empty: is empty" in str(caught.value)
    assert len(open_data(shards, "train", skip_broken=True).broken) == 2


WRONG = {
    "a sample without a label": ([member("x.jpg", encoded(1))], r"x\.jpg has no label; expected x\.cls"),
    "a class folder": ([member("cat/x.jpg", encoded(1))], "folders are the classes, unpack it"),
    "a label without a picture": ([member("x.cls", b"1")], r"x\.cls has no picture"),
    "an empty label": ([member("x.jpg", encoded(1)), member("x.cls")], r"x\.cls is empty"),
    "an unknown label": (
        [member("x.jpg", encoded(1)), member("x.cls", b"3")],
        "says '3', but classes.txt has classes 0 to 2",
    ),
    "a negative label": ([member("x.jpg", encoded(1)), member("x.cls", b"-1")], "says '-1'"),
    "a label of bytes": ([member("x.jpg", encoded(1)), member("x.cls", b"\xff\0")], "holds no label"),
    "a label of two lines": ([member("x.jpg", encoded(1)), member("x.cls", b"1\n2")], "holds no label"),
    "a label without end": ([member("x.jpg", encoded(1)), member("x.cls", b"9" * 5000)], "no label"),
    "a key with dots": (
        [member("x.v1.jpg", encoded(1)), member("x.v1.cls", b"1")],
        r"x\.v1\.cls labels no picture, because a key ends at its first dot",
    ),
    "a picture twice": ([*samples(50, 1), *samples(50, 1)], "'s050' is there twice"),
    "a key of another shard": (samples(3, 1), r"'s003' is also in train-000000\.tar"),
    "a path upwards": ([member("../x.jpg", encoded(1))], r"'\.\./x\.jpg' points outside the shard"),
    "a path upwards, inside": ([member("a/../../x.cls", b"1")], "points outside the shard"),
    "an absolute path": ([member("/etc/x.jpg", encoded(1))], "'/etc/x.jpg' points outside the shard"),
    "a symbolic link": (
        [member("x.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
        r"'x\.jpg' is a link or a device",
    ),
    "a hard link": ([member("x.jpg", type=tarfile.LNKTYPE, linkname="y")], "is a link or a device"),
    "a device": ([member("x.jpg", type=tarfile.CHRTYPE)], "is a link or a device"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_a_shard_with_something_wrong_is_refused_and_named(shards, what, ending):
    members, message = WRONG[what]
    write_shard(shards / f"train-000009.{ending}", members)
    with pytest.raises(InputError, match=message) as caught:
        open_data(shards, "train")
    assert f"train-000009.{ending}" in str(caught.value)


def cut(payload: bytes, share: float) -> bytes:
    return payload[: int(share * len(payload))]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-000000.tar", lambda p: cut(p, 0.5), "is truncated"),
        ("train-000000.tar", lambda p: p[: p.rindex(b"ustar") + 1024], "is truncated"),
        ("train-000000.tar", lambda p: b"", "is no whole tar file"),
        ("train-000000.tar", lambda p: b"hello" * 500, "is no whole tar file"),
        ("train-000000.tar", lambda p: p[:1536] + b"x" * 512 + p[2048:], "tar"),
        ("train-000001.tar.gz", lambda p: cut(p, 0.5), "broken or truncated gzip"),
        ("train-000001.tar.gz", lambda p: p[:-4], "broken or truncated gzip"),
        ("train-000001.tar.gz", lambda p: b"hello" * 500, "broken or truncated gzip"),
    ],
)
def test_a_damaged_shard_is_refused_and_named(shards, name, damage, message):
    path = shards / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        open_data(shards, "train")
    assert name in str(caught.value)


def test_a_damaged_header_in_the_middle_does_not_end_a_shard_quietly(shards):
    path = shards / "train-000000.tar"
    payload = bytearray(path.read_bytes())
    header = payload.index(b"s005.jpg")
    payload[header : header + 512] = b"x" * 512
    path.write_bytes(bytes(payload))
    with pytest.raises(InputError, match=r"train-000000\.tar is damaged: no member begins at byte"):
        open_data(shards, "train")


def test_shards_of_named_splits_and_others_are_not_mixed(shards):
    write_shard(shards / "more.tar", samples(50, 1))
    with pytest.raises(InputError, match=r"shards of named splits and others \(more\.tar\)"):
        open_data(shards, "train")


def test_class_names_must_be_one_a_line(shards):
    (shards / "classes.txt").write_text("cat\n\ndog\n")
    with pytest.raises(InputError, match="one class name a line"):
        open_data(shards, "train")


def test_an_archive_beside_the_folders_it_held_is_not_taken_for_shards(shards):
    (shards / "cat").mkdir()
    assert len(open_data(shards, "all")) == 36, "shards with a split's name are meant"
    for path in shards.glob("t*.tar*"):
        path.unlink()
    write_shard(shards / "flowers.tar", samples(0, 12))
    with pytest.raises(InputError, match=r"both tar files \(flowers\.tar\) and folders \(cat\)"):
        open_data(shards, "all")


def test_class_names_that_are_no_text_are_refused(shards):
    (shards / "classes.txt").write_bytes(b"k\xe4tz\ndog\nowl\n")
    with pytest.raises(InputError, match=r"classes\.txt cannot be read as UTF-8"):
        open_data(shards, "train")


def test_shards_without_a_labelled_picture_say_what_was_expected(tmp_path):
    write_shard(
        tmp_path / "train-0.tar", [member("x.seg.jpg", encoded(1)), member("x.json", b"{}")]
    )
    with pytest.raises(InputError, match=r"holds no train picture; expected members KEY\.jpg"):
        open_data(tmp_path, "train")


def test_shards_read_in_workers_give_the_same_pictures(shards):
    from vitrail.data.augment import Augmentation
    from vitrail.data.loader import train_batches
    from vitrail.data.plan import BatchPlan

    data = open_data(shards, "train")
    plan = BatchPlan(length=len(data), batch_size=8, size=(16, 16))
    own, other = (
        list(train_batches(data, plan, Augmentation(), epoch=0, workers=w)) for w in (0, 2)
    )
    assert [b.images.tolist() for b in own] == [b.images.tolist() for b in other]
