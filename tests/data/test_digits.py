"""The embedded digits: whole, reproducible, and with no digit on two sides."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.cli import main
from vitrail.data import digits, open_data
from vitrail_runtime.errors import InputError


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "set"
    assert main(["data", "make", "digits", str(folder)]) == 0
    return folder


def test_every_source_digit_is_in_exactly_one_split(made):
    names = Counter(p.stem for p in made.rglob("*.jpg"))
    assert len(names) == 1797
    assert set(names.values()) == {1}
    counts = {s: len(list((made / s).rglob("*.jpg"))) for s in ("train", "val", "test")}
    assert counts == {"train": 1438, "val": 179, "test": 180}


def test_the_set_opens_without_a_broken_picture_and_in_many_sizes(made):
    data = open_data(made, "train")
    assert data.classes == tuple("0123456789")
    assert np.bincount(data.labels).min() >= 120
    assert len(np.unique(data.sizes, axis=0)) > 500


def test_the_same_seed_draws_the_same_bytes_and_another_does_not(made):
    images, labels, _ = digits._source()
    splits = digits.split_digits(labels, 0)
    for index in (0, 1000, 1796):
        path = made / splits[index] / str(labels[index]) / f"{index:04d}.jpg"
        again = path.with_suffix(".again.jpg")
        digits.draw_digit(images[index], np.random.default_rng([0, index])).save(again, quality=92)
        same = path.read_bytes() == again.read_bytes()
        again.unlink()
        assert same
    assert digits.split_digits(labels, 1) != splits


def test_the_source_is_small_and_names_its_licence():
    path = Path(digits.__file__).with_name("digits.npz")
    assert path.stat().st_size < 100_000
    assert "CC BY 4.0" in digits._source()[2]


def test_making_it_again_leaves_it_alone_and_other_folders_are_safe(made, tmp_path):
    def state() -> str:
        return hashlib.sha256(
            b"".join(p.read_bytes() for p in sorted(made.rglob("*.jpg"))[:50])
        ).hexdigest()

    before = state()
    assert digits.make_digits(made) == made
    assert state() == before
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="is not empty and does not hold these digits"):
        digits.make_digits(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        digits.make_digits(tmp_path / "mine.txt")
    around = tmp_path / "missing" / ".." / "mine"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").touch()
    with pytest.raises(InputError, match="is not empty and does not hold these digits"):
        digits.make_digits(around)
    assert not (tmp_path / "missing").exists()
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_the_attribution_lies_beside_the_pictures(made):
    assert "UCI Machine Learning Repository" in (made / "ABOUT.txt").read_text()


def test_an_unknown_action_is_one_message(capsys):
    assert main(["data", "mak"]) == 2
    assert "unknown action 'mak'" in capsys.readouterr().err


def test_every_class_is_split_in_the_same_proportions():
    _, labels, _ = digits._source()
    splits = np.array(digits.split_digits(labels, 0))
    for label, count in enumerate(np.bincount(labels).tolist()):
        train, val = round(0.8 * count), round(0.1 * count)
        of_class = Counter(splits[labels == label].tolist())
        assert of_class == {"train": train, "val": val, "test": count - train - val}


def test_a_drawn_digit_is_its_source_in_dark_ink_on_light_paper():
    images, _, _ = digits._source()
    sizes, alike = [], 0
    for i in range(40):
        drawn = digits.draw_digit(images[i], np.random.default_rng([0, i]))
        sizes.append(drawn.size[::-1])
        grey = np.asarray(drawn.convert("L"), float)
        dark = grey < (grey.min() + np.median(grey)) / 2
        rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
        part = dark[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        ink = images[i] / 16
        ink = ink[ink.any(1)][:, ink.any(0)]
        shown = np.asarray(
            Image.fromarray(part.astype(np.float32)).resize(ink.shape[::-1], Image.Resampling.BOX)
        )
        alike += np.corrcoef(shown.ravel(), ink.ravel())[0, 1] > 0.6
    assert alike >= 36
    heights, widths = zip(*sizes, strict=True)
    assert 56 <= min(heights) < 65 < 120 < max(heights) <= 128
    assert 56 <= min(widths) < 65 < 120 < max(widths) <= 144


def test_others_may_read_the_folder(made):
    assert made.stat().st_mode & 0o777 == 0o755
