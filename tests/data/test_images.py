"""Labels, splits and what is said of them, whatever holds the images; against torchvision and formulas."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from tests.data.conftest import picture
from vitrail.data import open_data
from vitrail.data.examples import Examples, Images, Labels
from vitrail.data.opening import _parts, broken_message, contradictory, hold_out, open_source
from vitrail_runtime.errors import InputError

# In the order of code points; 10 comes before 9, capitals first, and one has more below it.
COUNTS = {"10": 3, "9": 1, "Zebra": 2, "apple": 5, "öl und gas": 2}


def image_of(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number, (8, 9)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def named(tmp_path):
    """The same images by class as folders, table and shard, stored in another order than that of the names.

    Returns the roots, and for each image its class.
    """
    of, rows, number = {}, [], 0
    folders, table, shard = tmp_path / "folders", tmp_path / "list.csv", tmp_path / "one.tar"
    with tarfile.open(shard, "w") as tar:
        for name, count in reversed(COUNTS.items()):
            for i in range(count):
                number += 1
                payload = image_of(number)
                of[payload] = name
                below = folders / name / ("deeper/still" if i % 2 else ".")
                below.mkdir(parents=True, exist_ok=True)
                (below / f"{20 - number}.png").write_bytes(payload)
                rows.append(f"{(below / f'{20 - number}.png').relative_to(tmp_path)},{name}")
                for ending, content in (("png", payload), ("cls", name.encode())):
                    info = tarfile.TarInfo(f"{99 - number}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    table.write_text("file,label\n" + "\n".join(rows[::2] + rows[1::2]), encoding="utf-8")
    return {"folders": folders, "table": table, "shard": shard}, of


@pytest.mark.parametrize("kind", ["folders", "table", "shard"])
def test_every_image_has_the_label_of_its_class_by_name(named, kind):
    roots, of = named
    data = open_data(roots[kind], "all")
    assert data.classes == tuple(sorted(COUNTS))
    assert np.bincount(data.truth.labels).tolist() == [COUNTS[c] for c in data.classes]
    for i in range(len(data)):
        assert data.classes[data.truth.labels[i]] == of[data.images.read_bytes(i)]
        assert tuple(data.images.sizes[i]) == (8, 9)


def test_folders_have_the_labels_and_the_order_of_torchvisions_image_folder(named):
    roots, _ = named
    data = open_data(roots["folders"], "all")
    theirs = ImageFolder(str(roots["folders"]))
    assert list(data.classes) == theirs.classes
    label_of = {str(path): label for path, label in theirs.samples}
    assert [label_of[data.where(i)] for i in range(len(data))] == data.truth.labels.tolist()


def test_names_given_decide_the_labels(named):
    roots, of = named
    names = ("öl und gas", "apple", "9", "Zebra", "10")
    for root in roots.values():
        data = open_data(root, "all", classes=names)
        assert data.classes == names
        for i in range(len(data)):
            assert names[data.truth.labels[i]] == of[data.images.read_bytes(i)]


def test_all_is_every_split_with_its_own_images(class_folders):
    root = class_folders({"train": {"b": 2, "a": 3}, "val": {"a": 1, "b": 2}, "test": {"b": 1}})
    parts = [open_data(root, s, classes=("a", "b")) for s in ("train", "val", "test")]
    whole = open_data(root, "all", classes=("a", "b"))
    assert whole.keys == [k for p in parts for k in p.keys]
    assert whole.truth.labels.tolist() == [0, 0, 0, 1, 1, 0, 1, 1, 1]
    assert whole.images.sizes.tolist() == [s for p in parts for s in p.images.sizes.tolist()]
    for i, key in enumerate(whole.keys):
        assert whole.images.read_bytes(i) == (root / key).read_bytes()
    assert whole.split == "all"
    assert [p.split for p in parts] == ["train", "val", "test"]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_the_share_held_out_is_that_of_each_class(fraction):
    counts = [1, 2, 3, 10, 41, 200]
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(6), counts))
    digests = [f"{i:04d}" for i in range(len(labels))]
    held_out = hold_out(labels, digests, fraction, seed=5)
    expected = [min(max(1, round(fraction * n)), n - 1) for n in counts]
    assert np.bincount(labels[held_out], minlength=6).tolist() == expected
    order = np.random.default_rng(1).permutation(len(labels))  # of the files does not matter
    again = hold_out(labels[order], [digests[i] for i in order], fraction, seed=5)
    assert np.array_equal(again, held_out[order])


def test_every_image_is_as_likely_to_be_held_out():
    labels = np.repeat([0, 1], 20)
    digests = [f"{i}" for i in range(40)]
    times = sum(hold_out(labels, digests, 0.25, seed).astype(int) for seed in range(400))
    assert times.sum() == 400 * 10
    assert 70 <= times.min() < times.max() <= 130  # 100 and a standard deviation of 8.7


def test_train_and_val_cut_by_one_seed_are_the_whole(class_folders):
    root = class_folders({"": {"a": 12, "b": 8}})
    given = {"val_fraction": 0.25, "seed": 3}
    train, val = (open_data(root, s, **given) for s in ("train", "val"))
    assert np.bincount(val.truth.labels).tolist() == [3, 2]
    assert sorted(train.keys + val.keys) == sorted(open_data(root, "all").keys)
    said = (
        f"{root} has no val split: 25% of the pictures of each class are held out as val (seed 3)",
    )
    assert train.notes == val.notes == said
    assert open_data(root, "all").notes == ()


class Stored:
    """As much of a source as choosing its splits needs."""

    name = "set"

    def __init__(self, *have: str) -> None:
        self.have = have

    def splits(self) -> tuple[str, ...]:
        return self.have


@pytest.mark.parametrize(
    ("have", "split", "expected"),
    [
        (("train", "val", "test"), "train", (["train"], False)),
        (("train", "val", "test"), "val", (["val"], False)),
        (("train", "val", "test"), "test", (["test"], False)),
        (("train", "val", "test"), "all", (["train", "val", "test"], False)),
        (("train", "test"), "train", (["train"], True)),
        (("train", "test"), "val", (["train"], True)),
        (("train", "test"), "test", (["test"], False)),
        (("",), "train", ([""], True)),
        (("",), "val", ([""], True)),
        (("",), "all", ([""], False)),
        (("val", "test"), "val", (["val"], False)),
    ],
)
def test_what_holds_a_split_and_whether_val_is_cut_from_it(have, split, expected):
    assert _parts(Stored(*have), split) == expected


@pytest.mark.parametrize(
    ("have", "split", "message"),
    [
        (("",), "test", "set has no test split; ask for val, or put"),
        (("train", "val"), "test", "set has no test split; it has train, val"),
        (("val", "test"), "train", "set has no train split; it has val, test"),
        (("test",), "val", "set has no val split; it has test"),
    ],
)
def test_a_split_that_is_not_there_is_refused(have, split, message):
    with pytest.raises(InputError, match=message):
        _parts(Stored(*have), split)


def test_a_content_under_two_labels_is_contradictory_and_a_copy_is_not():
    labels = np.array([0, 0, 1, 1, 2, 0])
    assert contradictory(labels, ["a", "b", "c", "b", "d", "a"]).tolist() == [
        False, True, False, True, False, False,
    ]  # fmt: skip


def content_hash(names, keys, labels, digests):
    sizes, places = np.zeros((len(keys), 2), np.int32), np.zeros((len(keys), 3), np.int64)
    images = Images(keys, sizes, digests, places, None)
    return Examples(images, Labels(tuple(names), labels)).content_hash


def test_the_content_hash_follows_names_labels_keys_content_and_order():
    names, keys, labels, digests = ("a", "b"), ["x", "y"], np.array([0, 1]), ["1", "2"]
    made = {
        content_hash(names, keys, labels, digests),
        content_hash(("a", "c"), keys, labels, digests),
        content_hash(names, ["x", "z"], labels, digests),
        content_hash(names, keys, np.array([1, 1]), digests),
        content_hash(names, keys, labels, ["1", "3"]),
        content_hash(names, keys[::-1], labels[::-1], digests[::-1]),
    }
    assert len(made) == 6
    assert content_hash(list(names), list(keys), labels.copy(), list(digests)) in made


def test_a_subset_keeps_the_order_asked_for_and_has_a_hash_of_its_own(class_folders):
    data = open_data(class_folders({"": {"a": 3, "b": 2}}), "all")
    part = data.subset(np.array([4, 0, 2]))
    assert part.keys == [data.keys[i] for i in (4, 0, 2)]
    assert part.truth.labels.tolist() == [1, 0, 0]
    assert part.images.sizes.tolist() == data.images.sizes[[4, 0, 2]].tolist()
    assert [part.images.read_bytes(i) for i in range(3)] == [
        data.images.read_bytes(i) for i in (4, 0, 2)
    ]
    assert part.content_hash != data.content_hash
    assert data.subset(range(5)).content_hash == data.content_hash
    assert part.subset([1]).keys == [data.keys[0]]


def test_one_broken_image_is_told_of_in_the_singular_and_labels_stay_with_their_images(
    class_folders,
):
    root = class_folders({"": {"a": 3, "b": 3}})
    (root / "a" / "001.jpg").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"^1 of 6 pictures is broken:\n.*001\.jpg: is empty .*\nrepair"
    ):
        open_data(root, "all")
    data = open_data(root, "all", skip_broken=True)
    assert data.notes == ("1 of 6 pictures is broken and left out",)
    assert data.keys == ["a/000.jpg", "a/002.jpg", "b/000.jpg", "b/001.jpg", "b/002.jpg"]
    assert data.truth.labels.tolist() == [0, 0, 1, 1, 1]
    assert [data.images.read(i).shape[:2] for i in range(5)] == [
        tuple(s) for s in data.images.sizes.tolist()
    ]


def test_of_many_broken_images_ten_are_named():
    found = [(f"{i}.jpg", "is empty") for i in range(13)]
    lines = broken_message(found, 40).splitlines()
    assert lines[0] == "13 of 40 pictures are broken:"
    assert lines[1:11] == [f"  {i}.jpg: is empty" for i in range(10)]
    assert lines[11] == "  ... and 3 more"
    assert lines[12] == "repair or remove them, or skip them with --skip-broken"
    assert "more" not in broken_message(found[:10], 40)


@pytest.mark.parametrize("fraction", [1.0, -0.2, 1.5])
def test_a_share_to_hold_out_lies_between_nothing_and_all(fraction, tmp_path):
    with pytest.raises(InputError, match=f"from 0 to below 1, but is {fraction}"):
        open_data(tmp_path, "val", val_fraction=fraction)


def test_class_names_are_unique_and_a_near_name_is_suggested(class_folders):
    root = class_folders({"": {"cat": 2, "dgo": 2}})
    with pytest.raises(InputError, match=r"must be unique, but are cat, cat"):
        open_data(root, "all", classes=("cat", "cat"))
    with pytest.raises(
        InputError, match=r"be learnt: dgo; known are cat, dog .closest to 'dgo': 'dog'"
    ):
        open_data(root, "all", classes=("cat", "dog"))
    with pytest.raises(InputError, match=rf"did you mean {root}\?"):
        open_data(root.with_name("sett"), "all")


def test_a_source_that_is_none_is_told_what_it_should_be(tmp_path):
    with pytest.raises(
        InputError, match="no data set is named: give a folder, a table, a shard or hf"
    ):
        open_source("")
    (tmp_path / "pets").mkdir()
    with pytest.raises(InputError, match=rf"{tmp_path}/pest: .* did you mean {tmp_path}/pets\?$"):
        open_source(tmp_path / "pest")
    with pytest.raises(InputError, match=rf"^{tmp_path}/quite-else: no such file or folder$"):
        open_source(tmp_path / "quite-else")
    with pytest.raises(InputError, match=r"no such file or folder$"):
        open_source(tmp_path / "nowhere" / "pets")


def test_what_stands_in_a_folder_tells_its_kind(class_folders, named):
    roots, _ = named
    kinds = {kind: type(open_source(root)).__name__ for kind, root in roots.items()}
    assert kinds == {"folders": "ClassFolders", "table": "Table", "shard": "Shards"}
    root = class_folders({"": {"a": 1, "b": 1}})
    (root / ".hidden.tar").write_bytes(roots["shard"].read_bytes())
    assert type(open_source(str(root))).__name__ == "ClassFolders"
    (root / "one.tar").write_bytes(roots["shard"].read_bytes())
    with pytest.raises(InputError, match=r"both tar files \(one\.tar\) and folders \(a, b\); move"):
        open_source(root)
    (root / "train-one.tar").write_bytes(roots["shard"].read_bytes())
    with pytest.raises(InputError, match=r"named splits and others \(one\.tar\)"):
        open_source(root)
    (root / "one.tar").unlink()
    assert open_source(root).splits() == ("train",)


def test_every_class_has_images_except_where_a_part_is_measured(class_folders):
    root = class_folders({"train": {"a": 2, "b": 2}, "val": {"a": 1}, "test": {"b": 1}})
    message = r"test of .*set has no picture of 1 of 2 classes: a; add some, or remove"
    with pytest.raises(InputError, match=message):
        open_data(root, "test")
    assert open_data(root, "test", classes=("a", "b")).truth.labels.tolist() == [1]
    with pytest.raises(InputError, match=r"val of .* no picture of 1 of 2 classes: b"):
        open_data(root, "val", classes=("a", "b"))
    with pytest.raises(InputError, match=r"train of .* no picture of 1 of 3 classes: c"):
        open_data(root, "train", classes=("a", "b", "c"))
    assert len(open_data(root, "all", classes=("a", "b", "c"))) == 6
    (root / "train" / "a" / "000.jpg").write_bytes(b"")
    (root / "train" / "a" / "001.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"train of .* no picture of 1 of 2 classes: a"):
        open_data(root, "train", skip_broken=True)


def test_a_split_of_broken_images_alone_is_none(class_folders):
    root = class_folders({"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 2}})
    for path in (root / "test").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"^.*set has no readable picture in test$"):
        open_data(root, "test", classes=("a", "b"), skip_broken=True)


def test_the_share_held_out_may_take_a_class_of_two_apart_and_never_a_class_of_one(class_folders):
    root = class_folders({"train": {"a": 2, "b": 3}, "test": {"a": 1, "b": 1}})
    assert np.bincount(open_data(root, "val").truth.labels).tolist() == [1, 1]
    note = "20% of the training pictures of each class are held out as val (seed 0)"
    assert open_data(root, "val").notes == (f"{root} has no val split: {note}",)
    lone = class_folders({"": {f"c{i:02d}": 1 for i in range(11)} | {"d": 2}}, root / "x" / "lone")
    names = ", ".join(f"c{i:02d}" for i in range(10))
    said = (
        rf"and 11 of 12 classes have too few pictures .*: {names}, \.\.\. \(11 in all\); add some, give a "
        "val split, or hold out none: --val-fraction 0"
    )
    with pytest.raises(InputError, match=said):
        open_data(lone, "val")
    assert len(open_data(lone, "train")) == 12


def test_what_is_held_out_goes_by_a_hash_of_seed_and_content():
    labels, digests = np.zeros(12, np.int64), [f"{i:02d}" for i in range(12)]
    ranks = [hashlib.blake2b(f"7:{d}".encode(), digest_size=16).hexdigest() for d in digests]
    expected = np.zeros(12, bool)
    expected[np.argsort(ranks)[:3]] = True
    assert np.array_equal(hold_out(labels, digests, 0.25, seed=7), expected)


def test_copies_at_the_edge_of_what_is_held_out_go_with_it_unless_that_is_all():
    for copies, held in ((5, 5), (6, 6), (9, 9)):
        digests = ["x"] * copies + [f"{i}" for i in range(10 - copies)]
        found = {int(hold_out(np.zeros(10, np.int64), digests, 0.4, s).sum()) for s in range(60)}
        # Either the copies rank first, or others do and the copies come after them, or not at all.
        assert held in found
        assert max(found) < 10
    assert not hold_out(np.zeros(4, np.int64), ["x"] * 4, 0.5, 0).any(), (
        "one content is never parted"
    )


def test_an_image_that_cannot_be_read_later_is_named_with_why(class_folders, monkeypatch):
    data = open_data(class_folders({"": {"a": 1, "b": 1}}), "all")

    def fail(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(data.images.source, "read", fail)
    with pytest.raises(InputError, match=r"a/000\.jpg cannot be read: the disk is gone$"):
        data.images.read_bytes(0)


def test_a_jpeg_comes_reduced_only_as_far_as_asked(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        picture(1, (80, 120)).save(tmp_path / name / "0.jpg")
    data = open_data(tmp_path, "all")
    assert data.images.read(0).shape == (80, 120, 3)
    assert data.images.read(0, (40, 60)).shape == (40, 60, 3)
    assert data.images.read(0, (41, 60)).shape == (80, 120, 3)
