"""The stored predictions of a model: read as they were written, or refused."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.damage import flipped, outcomes, zeroed
from vitrail.analysis.report import read_predictions, write_report
from vitrail_runtime.errors import InputError

CLASSES = ("left", "right", "top")


class Data:
    """What is asked of a data set."""

    images = SimpleNamespace(source=SimpleNamespace(name="my/pictures"))

    def __init__(self, keys: list[str]) -> None:
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)


def report(path, keys: list[str]) -> None:
    """A page about what the file says, of images with these keys; by a model of three classes."""
    data = Data(keys)
    model = SimpleNamespace(task="classify", classes=CLASSES, info=SimpleNamespace(name="net"))
    write_report(path.with_suffix(".html"), model, data, read_predictions(path, data))


@pytest.fixture
def said() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet((1, 1, 1), 500).astype(np.float16)
    return {
        "labels": rng.integers(0, 3, 500),
        "predicted": probabilities.argmax(1),
        "probabilities": probabilities,
        "keys": np.array([f"val/{i}.png" for i in range(500)]),
    }


@pytest.fixture
def path(tmp_path, said):
    np.savez_compressed(tmp_path / "predictions.npz", **said)
    return tmp_path / "predictions.npz"


def test_predictions_come_back_and_no_damage_to_them_passes(path, said):
    data, whole = Data(said["keys"].tolist()), path.read_bytes()

    def read() -> bool:
        found = read_predictions(path, data)
        return all(
            np.array_equal(found[k], v) and found[k].dtype == v.dtype for k, v in said.items()
        )

    assert read()
    for damaged in (zeroed(whole), flipped(whole, 300)):
        found = outcomes(path, damaged, read)
        assert found["silent"] == found["traceback"] == 0
        assert found["refused"] > 0.6 * found.total()  # half of a zip file's own fields stand twice


@pytest.mark.parametrize("keys", [["val/0.png"], ["other"] * 500, []])
def test_predictions_of_other_pictures_are_refused(path, keys):
    with pytest.raises(InputError, match=r"npz is about other images; .*--data my/pictures"):
        read_predictions(path, Data(keys))


@pytest.mark.parametrize(
    "change",
    [
        {"probabilities": np.zeros((500, 2), np.float16)},
        {"labels": np.zeros(499, np.int64)},
        {"predicted": np.zeros((500, 1), np.int64)},
    ],
)
def test_predictions_of_another_shape_are_refused(path, said, change):
    np.savez_compressed(path, **(said | change))
    with pytest.raises(InputError, match="about other images"):
        report(path, said["keys"].tolist())


@pytest.mark.parametrize("key", ["probabilities", "labels", "predicted", "keys"])
def test_predictions_without_a_part_are_damaged(path, said, key):
    np.savez_compressed(path, **{k: v for k, v in said.items() if k != key})
    with pytest.raises(InputError, match=rf"predictions\.npz is damaged .*{key}"):
        report(path, said["keys"].tolist())


def test_predictions_that_are_gone_say_how_to_make_them_anew(path, said):
    path.unlink()
    with pytest.raises(
        InputError, match=rf"is gone; .*: vitrail eval {path.parent} --data my/pict"
    ):
        read_predictions(path, Data(said["keys"].tolist()))
