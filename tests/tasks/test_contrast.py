"""The task of pairs: its settings, what it measures, its report."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.test_towers import HEAD, VIT
from vitrail.data.pairs import Captions
from vitrail.models import create_model
from vitrail.tasks import contrast, contrast_report
from vitrail.tasks.section import Bullets, Found, Images, Rows, Tiles
from vitrail.tasks.task import TASKS, task_of, task_of_model
from vitrail.train.config import TrainConfig
from vitrail_runtime.errors import InputError, NotFinite

TEXTS = ["a dot", "two cells", "a dot", "nothing", "three"]


def model_of(classes=("dot", "cell")):
    torch.manual_seed(0)
    return create_model("clip/vit_tiny_patch16", classes=classes, head=HEAD, **VIT)


class Towers(torch.nn.Module):
    """Says what it is told: embeddings by caption."""

    def __init__(self, said):
        super().__init__()
        model = model_of()
        self.pairs, self.config, self.info = model.pairs, model.config, model.info
        self.head, self.backbone = model.head, model.backbone
        self.preprocessing, self.classes = model.preprocessing, model.classes
        self.said = said

    def embed(self, texts):
        return torch.stack([self.said[text] for text in texts])


def data_of(captions, labels=None, classes=()):
    labels = np.full(len(captions), -1) if labels is None else np.array(labels)
    return SimpleNamespace(
        truth=Captions(classes, list(captions), labels),
        classes=classes,
        __len__=lambda: len(captions),
    )


class Data(SimpleNamespace):
    def __len__(self):
        return len(self.truth)


def evaluated(images, said, captions, labels=None, classes=(), batches=((0, 2), (2, None))):
    data = Data(**vars(data_of(captions, labels, classes)))
    evaluator = contrast.TASK.evaluator(Towers(said), data)
    for start, stop in batches:
        some = list(range(len(captions)))[start:stop]
        batch = SimpleNamespace(
            targets=tuple(data.truth.target(i, None) for i in some), indices=torch.tensor(some)
        )
        evaluator.update({"embeddings": images[some]}, batch)
    return evaluator.compute(), evaluator.said()


def some_embeddings():
    generator = torch.Generator().manual_seed(3)
    texts = F.normalize(torch.randn(4, 6, generator=generator), dim=1)
    return F.normalize(torch.randn(5, 6, generator=generator), dim=1), dict(
        zip(("a dot", "two cells", "nothing", "three"), texts, strict=True)
    )


def test_recall_is_counted_over_different_captions_and_all_images():
    images, said = some_embeddings()
    scores, rows = evaluated(images, said, TEXTS)
    texts = list(said)
    to_text = [
        sum(images[i] @ said[t] > images[i] @ said[own] for t in texts).item()
        for i, own in enumerate(TEXTS)
    ]
    assert rows["rank"].tolist() == to_text
    to_image = {}
    for text in texts:
        alike = (images @ said[text]).tolist()
        best = max(a for a, own in zip(alike, TEXTS, strict=True) if own == text)
        to_image[text] = sum(a > best for a, own in zip(alike, TEXTS, strict=True) if own != text)
    assert rows["caption_rank"].tolist() == [to_image[text] for text in TEXTS]
    one = np.mean([r < 1 for r in to_text]), np.mean([r < 1 for r in to_image.values()])
    five = np.mean([r < 5 for r in to_text]), np.mean([r < 5 for r in to_image.values()])
    assert scores["image_to_text@1"], scores["text_to_image@1"] == pytest.approx(one)
    assert (scores["image_to_text@5"], scores["text_to_image@5"]) == pytest.approx(five)
    assert (scores["image_to_text@1"], scores["text_to_image@1"]) == pytest.approx(one)
    assert scores.best == scores["recall"] == pytest.approx(sum(one) / 2)
    assert one[0] not in (0, 1)
    assert scores["num_captions"] == 4
    assert scores["num_images"] == 5
    assert "zero_shot" not in scores.values
    for i, best in enumerate(rows["best"].tolist()):
        assert said[TEXTS[best]] @ images[i] == max(said[t] @ images[i] for t in texts)


def test_the_loss_is_that_of_all_pairs_at_once():
    images, said = some_embeddings()
    scores, _ = evaluated(images, said, TEXTS)
    logits = images @ torch.stack([said[t] for t in TEXTS]).T / 0.07
    own = torch.arange(5)
    want = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert scores["loss"] == pytest.approx(float(want), rel=1e-5)


def test_labelled_images_are_classified_by_names_alone():
    images, said = some_embeddings()
    names = {f"a {n}": v for n, v in zip(("dot", "cell"), said.values(), strict=False)}
    names |= {f"the {n} here": names[f"a {n}"] for n in ("dot", "cell")}
    labels = [0, 1, 0, -1, 1]
    scores, rows = evaluated(images, said | names, TEXTS, labels, ("dot", "cell"))
    guess = [int(images[i] @ names["a cell"] > images[i] @ names["a dot"]) for i in range(5)]
    assert rows["predicted"].tolist() == guess
    assert rows["labels"].tolist() == labels
    right = [guess[i] == labels[i] for i in (0, 1, 2, 4)]
    assert 0 < sum(right) < 4
    assert scores["zero_shot"] == pytest.approx(np.mean(right))
    assert scores["per_class"] == {
        "dot": {"images": 2, "accuracy": (right[0] + right[2]) / 2},
        "cell": {"images": 2, "accuracy": (right[1] + right[3]) / 2},
    }
    assert "zero-shot top-1" in scores.line()
    assert "recall@1" in scores.line()
    assert scores.tables[0].rows == (
        ("dot", 2, scores["per_class"]["dot"]["accuracy"]),
        ("cell", 2, scores["per_class"]["cell"]["accuracy"]),
    )


def test_a_class_without_an_image_has_no_accuracy():
    share, each = contrast.by_class(np.array([0, 1]), np.array([0, -1]), ("a", "b"))
    assert share == 1
    assert each["b"] == {"images": 0, "accuracy": None}


def test_embeddings_that_are_no_numbers_are_refused():
    images, said = some_embeddings()
    images[3, 1] = torch.nan
    with pytest.raises(NotFinite, match="the model's embeddings are not finite"):
        evaluated(images, said, TEXTS)
    images, said = some_embeddings()
    said["three"][2] = torch.inf
    with pytest.raises(NotFinite, match="embeddings are not finite"):
        evaluated(images, said, TEXTS)


def test_the_task_has_its_place():
    task = task_of("contrast")
    assert task_of_model("siglip/resnet50") is task
    assert TASKS["contrast"] == "vitrail.tasks.contrast"
    assert (task.truth, task.headline, task.shown) == ("captions", "recall", "recall@1")
    assert task.any_names
    assert not any(task_of(name).any_names for name in TASKS if name != "contrast")


def test_a_vocabulary_is_learnt_from_the_training_captions():
    truth = Captions((), ["the seven", "the dot"] * 5, np.full(10, -1))
    settings = contrast.Settings(merges=2)
    options = contrast.TASK.model_options(settings, truth)
    assert len(options["merges"]) == 2
    model = model_of()
    for name, value in options.items():
        setattr(model, name, value)
    assert model.text.encode(["the"]).shape == (1, 3)
    assert contrast.Settings().merges + 514 == 49408
    with pytest.raises(InputError, match="merges"):
        contrast.Settings(merges=-1)


def test_captions_that_are_cut_are_counted():
    model = model_of()
    long = Captions((), ["12345678", "123456789", "1", "1234567890"], np.full(4, -1))
    (note,) = contrast.TASK.notes(model, long)
    assert note == (
        "2 of 4 captions are longer than the 10 tokens that the model reads, and are cut; "
        "--head-fields context=N reads more"
    )
    assert contrast.TASK.notes(model, long.select(np.array([0, 2]))) == []


def test_what_would_be_another_loss_is_refused():
    fine = TrainConfig(model="clip/resnet50")
    contrast.TASK.check(fine)
    with pytest.raises(InputError, match=r"--accumulate 2 would hold each part's images"):
        contrast.TASK.check(TrainConfig(model="clip/resnet50", accumulate=2))
    with pytest.raises(InputError, match="take --parallel data"):
        contrast.TASK.check(TrainConfig(model="clip/resnet50", parallel="fsdp"))


def test_a_model_answers_to_names_to_labelled_data_and_to_captions():
    model, answering = model_of(), contrast.TASK.answering
    assert answering(model, ["x", "y", "z"]).classes == ("x", "y", "z")
    assert answering(model, None).classes == ("dot", "cell")
    labelled = SimpleNamespace(truth=SimpleNamespace(kind="labels"), classes=("k", "m"))
    assert answering(model, None, labelled).classes == ("k", "m")
    assert answering(model, None, data_of(TEXTS)) is model
    other = SimpleNamespace(info=SimpleNamespace(name="resnet50"), classes=("a", "b"))
    assert task_of("classify").answering(other, None) is other
    with pytest.raises(InputError, match="resnet50 knows its own 2 classes; --classes is for"):
        task_of("classify").answering(other, ["x"])


def found_of(rank, best, per_class):
    captions = [f"text {i}" for i in range(len(rank))]
    data = Data(
        truth=Captions((), captions, np.full(len(rank), -1)),
        images=SimpleNamespace(
            read=lambda i: np.full((4, 5, 3), i, np.uint8), sizes=np.ones((len(rank), 2), int)
        ),
        broken=(),
        content_hash="0" * 32,
    )
    ways = {
        f"{way}@{k}": 0.25 * k / 5 for way in ("image_to_text", "text_to_image") for k in (1, 5)
    }
    scores = {"recall": 0.125, "num_captions": 40, "per_class": per_class} | ways
    said = {"rank": np.array(rank), "best": np.array(best)}
    if per_class:
        scores["zero_shot"] = 0.5
    return Found(model_of(), data, said, "val", lambda *_: ("", None), scores)


def blocks(found, kind):
    return [b for s in contrast_report.sections(found) for b in s.blocks if isinstance(b, kind)]


def test_the_report_shows_what_was_taken_for_what_the_worst_first():
    found = found_of([0, 2, 7, 0, 9], [0, 4, 1, 3, 0], {})
    (grid,) = blocks(found, Images)
    assert [text for _, text in grid.pairs] == [
        "text 4\ntaken for: text 0\n9 before its own",
        "text 2\ntaken for: text 1\n7 before its own",
        "text 1\ntaken for: text 4\n2 before its own",
    ]
    assert np.asarray(grid.pairs[0][0])[0, 0, 0] == 4
    (bullets,) = blocks(found, Bullets)
    assert bullets.items[0].startswith("2 of 5 images find their caption among 40 different ones")
    assert bullets.items[1] == "2 images have 5 or more other captions before their own."
    assert len(bullets.items) == 2
    (tiles,) = blocks(found, Tiles)
    assert [value for value, _ in tiles.items[:3]] == ["0.125", "0.050", "0.050"]
    table = blocks(found, Rows)[0]
    assert table.header == ("what is searched", "first 1", "first 5")
    assert list(table.rows[0]) == ["an image's caption", "0.050", "0.250"]


def test_the_report_of_labelled_images_has_a_table_of_classes():
    per_class = {
        "a": {"images": 4, "accuracy": 0.75},
        "b": {"images": 0, "accuracy": None},
        "c": {"images": 2, "accuracy": 0.5},
    }
    found = found_of([0, 0], [0, 1], per_class)
    assert not blocks(found, Images)
    table = next(b for b in blocks(found, Rows) if b.header[0] == "class")
    assert [row[0] for row in table.rows] == ["c", "a", "b"]
    (bullets,) = blocks(found, Bullets)
    assert "Weakest class by its name: 'c', 50.0% of 2 images." in bullets.items
    assert "Not measured: no image of 'b' in this split." in bullets.items
    (tiles,) = blocks(found, Tiles)
    assert ("50.0%", "right class, by its name alone") in tiles.items


def test_a_report_without_scores_says_how_to_have_them():
    found = found_of([0], [0], {})
    bare = Found(found.model, found.data, found.said, "val", found.explain)
    with pytest.raises(InputError, match="measure it anew: vitrail eval RUN"):
        contrast_report.sections(bare)
