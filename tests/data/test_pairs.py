"""Images with captions, from tables and shards."""

import io
import tarfile

import numpy as np
import pytest

from tests.data.conftest import picture
from vitrail.cli import main
from vitrail.data import open_data, sheet
from vitrail.data.checkup import check
from vitrail.data.digits import INKS, PLACES, WORDS, draw_captioned, make_digits
from vitrail.data.opening import open_source
from vitrail.data.pairs import PairShards, PairTable, packed, unpacked
from vitrail.data.shards import Shards
from vitrail.data.tables import Table
from vitrail_runtime.errors import InputError


def table(folder, text, name="pairs.csv", files="abcdef"):
    folder.mkdir(exist_ok=True)
    for number, letter in enumerate(files):
        picture(number, (20, 30)).save(folder / f"{letter}.png")
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def encoded(number):
    buffer = io.BytesIO()
    picture(number, (20, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path, members):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


SAID = """file,caption,label,split
a.png,"A red,  round
dot",dot,train
b.png,two cells,cell,train
c.png,nothing known,,train
d.png,a dot,dot,val
"""


def test_a_table_gives_captions_labels_and_splits(tmp_path):
    path = table(tmp_path / "set", SAID)
    train = open_data(path, "train")
    assert isinstance(train.images.source, PairTable)
    assert train.truth.kind == "captions"
    assert train.truth.captions == ["A red, round dot", "two cells", "nothing known"]
    assert train.classes == ("cell", "dot")
    assert train.truth.labels.tolist() == [1, 0, -1]
    val = open_data(path, "val", classes=train.classes)
    assert (val.truth.captions, val.truth.labels.tolist()) == (["a dot"], [1])
    assert val.truth.missing() == ["cell"]
    every = open_data(path, "all")
    assert every.truth.captions[-1] == "a dot"
    assert every.truth.labels.tolist() == [1, 0, -1, 1]
    assert open_data(path.parent, "val").truth.captions == ["a dot"]  # by its pairs.csv


def test_what_a_caption_teaches_are_its_bytes_and_evaluation_sees_the_text(tmp_path):
    truth = open_data(table(tmp_path / "set", "file,text\na.png,é b\nb.png,c\n"), "all").truth
    assert truth.classes == ()
    assert truth.missing() == []
    assert truth.target(0, object()).tolist() == list("é b".encode())
    assert truth.target(0, object()).dtype == np.uint8
    assert truth.target(1, None) == ("c", -1)
    some = truth.select(np.array([1]))
    assert (len(some), some.captions, some.labels.tolist()) == (1, ["c"], [-1])


def test_another_caption_or_label_is_another_data_set(tmp_path):
    head = "file,caption,label\n"
    texts = ["a.png,x,k\nb.png,y,m\n", "a.png,x2,k\nb.png,y,m\n", "a.png,x,m\nb.png,y,k\n"]
    hashes = set()
    for i, text in enumerate(texts):
        hashes.add(open_data(table(tmp_path / str(i), head + text), "all").content_hash)
    assert len(hashes) == 3


@pytest.mark.parametrize("column", ["caption", "text", "Caption"])
def test_a_column_of_captions_makes_a_table_one_of_pairs(tmp_path, column):
    path = table(tmp_path / "set", f"path,{column}\na.png,x\n", name="t.csv")
    assert isinstance(open_source(path), PairTable)
    tabs = table(tmp_path / "tabs", f"path\t{column}\na.png\tx, y\n", name="t.tsv")
    assert open_data(tabs, "all").truth.captions == ["x, y"]
    other = table(tmp_path / "other", "file,label\na.png,x\nb.png,y\n", name="t.csv")
    assert type(open_source(other)) is Table


def test_an_empty_caption_is_named_and_may_be_left_out(tmp_path):
    path = table(tmp_path / "set", 'file,caption\na.png,x\nb.png,""\nc.png,  \nd.png,y\n')
    with pytest.raises(InputError, match=r"2 of 4 pictures are broken") as met:
        open_data(path, "all")
    assert f"{path.parent / 'b.png'}: has an empty caption" in str(met.value)
    assert f"{path.parent / 'c.png'}: has an empty caption" in str(met.value)
    data = open_data(path, "all", skip_broken=True)
    assert data.truth.captions == ["x", "y"]
    assert data.keys == ["a.png", "d.png"]
    assert len(data.broken) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("caption,other\nx,y\n", "cannot tell which of the columns caption, other is the file"),
        ("file,caption\n,x\n", "line 2: no file"),
        ("file,caption\nz.png,x\n", "lists 1 of 1 files that do not exist"),
        ("file,caption\na.png,x\na.png,y\n", "line 3: a.png is also in line 2"),
        (
            "file,caption,split\na.png,x,dev\n",
            "line 2: split must be train, val or test, but is 'dev'",
        ),
        (
            "file,caption,split\na.png,x,\n",
            "line 2: split must be train, val or test, but is ''",
        ),
        ("file,caption\na.png\n", "line 2: 1 cells under a header of 2"),
    ],
)
def test_a_table_that_does_not_fit_says_where(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        open_source(table(tmp_path / "set", text))


def test_labels_that_a_model_does_not_know_are_named(tmp_path):
    path = table(tmp_path / "set", SAID)
    with pytest.raises(
        InputError, match=r"has labels that are not among those .* cell; known are dot"
    ):
        open_data(path, "train", classes=("dot",))
    unnamed = open_data(path, "train", classes=())  # of a model that knows no names
    assert unnamed.truth.labels.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_shards_of_images_and_texts_are_pairs(tmp_path, ending):
    folder = tmp_path / "shards"
    folder.mkdir()
    members = {
        "x/1.txt": b"  a\n red  dot ",
        "x/1.png": encoded(1),
        "x/2.png": encoded(2),
        "x/2.txt": "zwei Kühe".encode("utf-8-sig"),
    }
    shard(folder / f"train-0.{ending}", members)
    shard(folder / f"val-0.{ending}", {"3.png": encoded(3), "3.txt": b"three"})
    data = open_data(folder, "train")
    assert isinstance(data.images.source, PairShards)
    assert data.truth.captions == ["a red dot", "zwei Kühe"]
    assert data.classes == ()
    assert data.images.read(0).shape == (20, 30, 3)
    assert open_data(folder, "val").truth.captions == ["three"]
    assert open_data(folder / f"val-0.{ending}", "all").truth.captions == ["three"]


def test_shards_with_labels_stay_those_of_labels(tmp_path):
    members = {"1.png": encoded(1), "1.txt": b"a text", "1.cls": b"dot"}
    assert type(open_source(shard(tmp_path / "train.tar", members))) is Shards


def test_an_image_without_a_caption_is_named_with_those_of_an_empty_one(tmp_path):
    members = {"1.png": encoded(1), "2.png": encoded(2), "2.txt": b" \n", "3.png": encoded(3)}
    path = shard(tmp_path / "some.tar", members | {"3.txt": b"x"})
    with pytest.raises(InputError) as met:
        open_data(path, "all")
    assert "2 of 3 pictures are broken" in str(met.value)
    assert f"{path}: 1: has no caption: there is no .txt beside it" in str(met.value)
    assert f"{path}: 2: has an empty caption" in str(met.value)
    assert open_data(path, "all", skip_broken=True).truth.captions == ["x"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.txt": b"x"}, "1.txt has no image; expected 1.jpg"),
        ({"1.png": b"", "1.txt": b"\xff\xfe"}, "1.txt is no UTF-8 text"),
        ({"1.png": b"", "1.txt": b"x" * 100_001}, "1.txt has 100,001 bytes, which is no caption"),
        ({"1.v2.txt": b"x", "1.png": b""}, "1.v2.txt captions no picture"),
        ({"1.txt": b"x", "1.TXT": b"y", "1.png": b""}, "sample '1' has two captions"),
    ],
)
def test_a_shard_that_does_not_fit_says_where(tmp_path, members, message):
    with pytest.raises(InputError, match=message):
        open_data(shard(tmp_path / "some.tar", members), "all")


def test_a_caption_may_be_as_long_as_a_page(tmp_path):
    path = shard(tmp_path / "some.tar", {"1.png": encoded(1), "1.txt": b"x" * 100_000})
    assert len(open_data(path, "all").truth.captions[0]) == 100_000


def test_captions_pass_through_an_index():
    assert unpacked(packed("a\tb \0 c\n", " the label ")) == ("a b c", "the label")
    assert unpacked(packed("a")) == ("a", "")


def test_val_is_held_out_of_pairs_without_splits(tmp_path):
    lines = "".join(f"{letter}.png,text {letter}\n" for letter in "abcdef")
    path = table(tmp_path / "set", "file,caption\n" + lines)
    train, val = open_data(path, "train"), open_data(path, "val")
    assert len(val) == 1
    assert sorted(train.truth.captions + val.truth.captions) == [f"text {x}" for x in "abcdef"]


def test_a_digit_is_drawn_in_the_colour_and_the_place_of_its_caption():
    ink = np.zeros((8, 8))
    ink[1:7, 2:6] = 16
    seen = set()
    for seed in range(40):
        image, caption = draw_captioned(ink, "seven", np.random.default_rng(seed))
        pixels = np.asarray(image).astype(float)
        ways = [(c, p) for c in INKS for p in PLACES if caption == f"a {c} seven {p}"]
        assert len(ways) == 1, caption
        ((colour, place),) = ways
        seen |= {colour, place}
        dark = pixels.sum(2) < np.quantile(pixels.sum(2), 0.05)
        middle = np.nonzero(dark)[1].mean() / pixels.shape[1]
        assert abs(middle - {"on the left": 0.25, "on the right": 0.75}[place]) < 0.2
        apart = {c: np.abs(pixels[dark].mean(0) - INKS[c]).sum() for c in INKS}
        assert min(apart, key=apart.__getitem__) == colour
    assert seen == {*INKS, *PLACES}


def test_digits_with_captions_are_made_and_read(tmp_path, monkeypatch):
    from vitrail.data import digits

    few = np.arange(10).repeat(10)
    monkeypatch.setattr(digits, "_source", lambda: (np.full((100, 8, 8), 9), few, "x"))
    folder = make_digits(tmp_path / "d", task="pairs")
    train, val = open_data(folder, "train"), open_data(folder, "val")
    assert (len(train), len(val), len(open_data(folder, "test"))) == (160, 20, 20)
    assert set(train.classes) == set(WORDS)
    for data in (train, val):
        for i, caption in enumerate(data.truth.captions):
            number = int(data.keys[i][-8:-4])
            assert data.classes[data.truth.labels[i]] == WORDS[few[number // 2]]
            words = caption.split()
            assert words.count(WORDS[few[number // 2]]) == 1
            whole = len(words) == 6 and words[1] in INKS and " ".join(words[3:]) in PLACES
            assert whole or (data is train and number % 2)
    forms = {len(caption.split()) for caption in train.truth.captions}
    assert forms == {2, 3, 5, 6}  # with and without a colour, a place


def test_check_counts_captions_and_names_images_without(tmp_path, capsys):
    text = SAID.replace("a dot,dot,val", ",dot,val")
    path = table(tmp_path / "set", text)
    found = check(path)
    train, val = found.splits
    assert train.texts == (3, (2, 2, 4))
    assert train.per_class == {"cell": 1, "dot": 1}
    assert val.texts == (0, (0, 0, 0))
    where = f"{path.parent / 'd.png'}: has an empty caption"
    assert found.errors == {"images without a caption": [where]}
    assert main(["data", "check", str(path)]) == 1
    said = capsys.readouterr().out
    assert "train: 3 images, 3 different captions of 2 to 4 words (median 2)" in said
    assert where in said


def test_check_finds_nothing_in_pairs_as_they_should_be(tmp_path):
    text = "file,caption,split\n" + "".join(
        f"{letter}.png,the same,{split}\n"
        for letter, split in zip("abcd", ("train", "train", "val", "val"), strict=True)
    )
    found = check(table(tmp_path / "set", text))
    assert not found.errors
    assert [s.texts for s in found.splits] == [(1, (2, 2, 2))] * 2


def test_a_sheet_shows_images_above_their_captions(tmp_path, monkeypatch):
    data = open_data(table(tmp_path / "set", SAID), "train")
    written = []
    monkeypatch.setattr(sheet, "_write", lambda draw, at, text, *_, **__: written.append(text))
    image = sheet.contact_sheet([data], "set")
    assert image.width == sheet.WIDTH
    assert sorted(written[:-1]) == sorted(data.truth.captions)
    cell = sheet._with_caption(data, 0, 60)
    assert cell.size == (60, 40 + sheet.CAPTION)  # of an image of 20 x 30
    shown = np.asarray(cell.crop((0, 0, 60, 40)).resize((30, 20))).astype(int)
    assert np.abs(shown - data.images.read(0)).mean() < 40


def test_a_text_beside_a_label_is_a_remark_and_a_caption_is_not(tmp_path):
    kinds = {}
    for head in ("file,text", "file,text,label", "file,caption,label", "file,label"):
        folder = tmp_path / head.replace(",", "-")
        row = ",".join({"file": "{}.png"}.get(name, "{} word") for name in head.split(","))
        lines = [head, *(row.replace("{}", name) for name in "ab")]
        kinds[head] = open_data(table(folder, "\n".join(lines), files="ab"), "all").truth.kind
    assert kinds["file,text"] == kinds["file,caption,label"] != kinds["file,label"]
    assert kinds["file,text,label"] == kinds["file,label"]
