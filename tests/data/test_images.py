"""Labels, splits and what is said of them, whatever holds the images; against torchvision and formulas."""

import io
import tarfile

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from tests.data.conftest import picture
from vitrail.data import images, open_data
from vitrail.data.images import _parts, broken_message, contradictory, hold_out
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
    assert np.bincount(data.labels).tolist() == [COUNTS[c] for c in data.classes]
    for i in range(len(data)):
        assert data.classes[data.labels[i]] == of[data.read_bytes(i)]
        assert tuple(data.sizes[i]) == (8, 9)


def test_folders_have_the_labels_and_the_order_of_torchvisions_image_folder(named):
    roots, _ = named
    data = open_data(roots["folders"], "all")
    theirs = ImageFolder(str(roots["folders"]))
    assert list(data.classes) == theirs.classes
    label_of = {str(path): label for path, label in theirs.samples}
    assert [label_of[data.where(i)] for i in range(len(data))] == data.labels.tolist()


def test_names_given_decide_the_labels(named):
    roots, of = named
    names = ("öl und gas", "apple", "9", "Zebra", "10")
    for root in roots.values():
        data = open_data(root, "all", classes=names)
        assert data.classes == names
        for i in range(len(data)):
            assert names[data.labels[i]] == of[data.read_bytes(i)]


def test_all_is_every_split_with_its_own_images(class_folders):
    root = class_folders({"train": {"b": 2, "a": 3}, "val": {"a": 1, "b": 2}, "test": {"b": 1}})
    parts = [open_data(root, s, classes=("a", "b")) for s in ("train", "val", "test")]
    whole = open_data(root, "all", classes=("a", "b"))
    assert whole.keys == [k for p in parts for k in p.keys]
    assert whole.labels.tolist() == [0, 0, 0, 1, 1, 0, 1, 1, 1]
    assert whole.sizes.tolist() == [s for p in parts for s in p.sizes.tolist()]
    for i, key in enumerate(whole.keys):
        assert whole.read_bytes(i) == (root / key).read_bytes()
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
    assert np.bincount(val.labels).tolist() == [3, 2]
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


def test_the_content_hash_follows_names_labels_keys_content_and_order():
    names, keys, labels, digests = ("a", "b"), ["x", "y"], np.array([0, 1]), ["1", "2"]
    made = {
        images._content_hash(names, keys, labels, digests),
        images._content_hash(("a", "c"), keys, labels, digests),
        images._content_hash(names, ["x", "z"], labels, digests),
        images._content_hash(names, keys, np.array([1, 1]), digests),
        images._content_hash(names, keys, labels, ["1", "3"]),
        images._content_hash(names, keys[::-1], labels[::-1], digests[::-1]),
    }
    assert len(made) == 6
    assert images._content_hash(list(names), list(keys), labels.copy(), list(digests)) in made


def test_a_subset_keeps_the_order_asked_for_and_has_a_hash_of_its_own(class_folders):
    data = open_data(class_folders({"": {"a": 3, "b": 2}}), "all")
    part = data.subset(np.array([4, 0, 2]))
    assert part.keys == [data.keys[i] for i in (4, 0, 2)]
    assert part.labels.tolist() == [1, 0, 0]
    assert part.sizes.tolist() == data.sizes[[4, 0, 2]].tolist()
    assert [part.read_bytes(i) for i in range(3)] == [data.read_bytes(i) for i in (4, 0, 2)]
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
    assert data.labels.tolist() == [0, 0, 1, 1, 1]
    assert [data.read(i).shape[:2] for i in range(5)] == [tuple(s) for s in data.sizes.tolist()]


def test_of_many_broken_images_ten_are_named():
    found = [(f"{i}.jpg", "is empty") for i in range(13)]
    lines = broken_message(found, 40).splitlines()
    assert lines[0] == "13 of 40 pictures are broken:"
    assert lines[1:11] == [f"  {i}.jpg: is empty" for i in range(10)]
    assert lines[11] == "  ... and 3 more"
    assert lines[12] == "repair or remove them, or skip them with --skip-broken"
    assert "more" not in broken_message(found[:10], 40)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2, 1.5])
def test_a_share_to_hold_out_lies_between_nothing_and_all(fraction, tmp_path):
    with pytest.raises(InputError, match=f"between 0 and 1, but is {fraction}"):
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
