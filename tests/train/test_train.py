"""What a run does: learns, freezes, accumulates, stops early, says what went wrong."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vitrail
from tests.train.conftest import CLASSES, TINY, VIT, Tiny, make_pictures, tiny_config
from vitrail.cli import main
from vitrail.data import open_data
from vitrail.data.augmentation import Augmentation
from vitrail.detectors.rcnn import RCNN
from vitrail.tasks.probe import extract_features
from vitrail.tasks.task import label_map
from vitrail.train import loop
from vitrail.train.config import TrainConfig
from vitrail.train.evaluate import evaluate
from vitrail.train.folder import RunFolder
from vitrail.train.replay import replay, verdict
from vitrail.train.setup import build_plan
from vitrail.train.trainer import train
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing

WHOLE = Augmentation(crop="whole", flip=0.0)


def logged(out: Path, kind: str, key: str) -> list:
    return [row[key] for row in RunFolder(out).rows() if row["kind"] == kind]


@pytest.fixture(scope="module")
def learned(pictures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("learned") / "run"
    settings = VIT | {"lr": 5e-3, "task": {"label_smoothing": 0.0}, "augmentation": WHOLE}
    train(tiny_config(pictures, out, **settings, epochs=30, eval_every=5, keep_every=15))
    return out


def test_a_tiny_model_learns_where_the_square_is(learned):
    losses = logged(learned, "train", "loss")
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert max(logged(learned, "eval", "top1")) > 0.4, "one in three is chance"


def test_the_run_folder_holds_models_scores_and_predictions(learned, pictures):
    model = vitrail.load(learned / "best")
    assert model.classes == CLASSES
    assert model.preprocessing.size == (32, 32)
    scores = json.loads((learned / "best" / "metrics.json").read_text())
    again = evaluate(model, open_data(pictures, "val", classes=model.classes))
    assert again["top1"] == scores["top1"] == max(logged(learned, "eval", "top1"))
    assert again["loss"] == pytest.approx(scores["loss"])
    assert list(again["per_class"]) == list(CLASSES)
    said = np.load(learned / "best" / "predictions.npz")
    assert (said["labels"] == said["predicted"]).mean() == pytest.approx(scores["top1"])
    np.testing.assert_allclose(said["probabilities"].sum(1), 1, atol=2e-3)
    assert len(set(said["keys"])) == 12
    assert sorted(p.name for p in learned.glob("epoch-*")) == ["epoch-0015", "epoch-0030"]
    assert logged(learned, "eval", "epoch") == [5, 10, 15, 20, 25, 30]


def test_measuring_leaves_every_module_in_the_mode_it_was_in(tmp_path):
    data = make_pictures(tmp_path / "data", val=2)
    model = vitrail.create_model(
        "efficientvit_m0", classes=CLASSES, dims=(16, 24, 32), depths=(1, 1, 1), key_dim=8
    )
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # frozen, as a detector does
    before = [module.training for module in model.modules()]
    val, p = open_data(data, "val"), Preprocessing(size=(32, 32))
    evaluate(model, val, p)
    extract_features(model.backbone, val, p)
    assert [module.training for module in model.modules()] == before
    (data / "val" / "left" / "0.png").write_bytes(b"gone")
    for measure in (evaluate, lambda *given: extract_features(model.backbone, *given[1:])):
        with pytest.raises(InputError, match="has changed"):
            measure(model, val, p)
    assert [module.training for module in model.modules()] == before


def test_head_only_moves_no_weight_and_no_statistic_of_the_backbone(pictures, tmp_path):
    config = tiny_config(pictures, tmp_path / "full", epochs=1)
    train(config)
    start = load_file(tmp_path / "full" / "last" / "model.safetensors")
    head = replace(
        config, out=str(tmp_path / "head"), weights=f"{config.out}/last", train_only="head"
    )
    train(head)
    end = load_file(tmp_path / "head" / "last" / "model.safetensors")
    moved = {key for key in start if not torch.equal(start[key], end[key])}
    assert moved
    assert all(key.startswith("head.") for key in moved)


def losses_of(tiny: Tiny, data: Path, out: Path, **changes) -> list[float]:
    settings = tiny.settings | {"log_every": 1, "epochs": 2} | changes
    train(tiny_config(data, out, **settings))
    return logged(out, "train", "loss")


@pytest.mark.parametrize("changes", [{"grad_checkpointing": True}, {"workers": 2}], ids=str)
def test_a_batch_recomputed_or_read_by_workers_trains_the_same(tiny, examples, tmp_path, changes):
    plain = losses_of(tiny, examples, tmp_path / "plain")
    assert len(plain) == 8
    assert losses_of(tiny, examples, tmp_path / "other", **changes) == pytest.approx(
        plain, abs=1e-5
    )


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_a_batch_in_parts_trains_the_same(task, pictures, masks, tmp_path):
    """Though each part has another number of labelled pixels, and some have none."""
    tiny, data = TINY[task], {"classify": pictures, "segment": masks}[task]
    plain = losses_of(tiny, data, tmp_path / "plain")
    for count in (2, 3, 6):
        parts = losses_of(tiny, data, tmp_path / str(count), accumulate=count)
        assert parts == pytest.approx(plain, abs=1e-5), count


@pytest.mark.parametrize("count", [2, 3, 6])
def test_a_detector_learns_from_each_part_by_its_number_of_images(
    scenes, tmp_path, count, monkeypatch
):
    """Its losses are means over the boxes that a part draws, times the part's images; so the update's are the
    mean over images, not those of the batch as a whole."""
    seen, plain = [], RCNN.losses

    def noted(self, images, *args, **kwargs):
        losses = plain(self, images, *args, **kwargs)
        seen.append((len(images), float(sum(losses.values()).detach())))
        return losses

    monkeypatch.setattr(RCNN, "losses", noted)
    found = losses_of(TINY["detect"], scenes, tmp_path / "run", accumulate=count)
    assert [images for images, _ in seen] == [6 // count] * count * 8
    of_updates = np.array([loss for _, loss in seen]).reshape(8, count)
    assert found == pytest.approx((of_updates.sum(1) / 6).tolist(), rel=1e-6)


def test_a_batch_is_weighed_as_it_is_learnt_with_its_mosaics(scenes, tmp_path, monkeypatch):
    weighed, learnt = [], []
    plain, losses = RCNN.weight, RCNN.losses

    def count(targets):
        return [len(target["labels"]) for target in targets]

    def weight(self, targets):
        weighed.append(count(targets))
        return plain(self, targets)

    def noted(self, images, targets, **options):
        learnt.append(count(targets))
        return losses(self, images, targets, **options)

    monkeypatch.setattr(RCNN, "weight", weight)
    monkeypatch.setattr(RCNN, "losses", noted)
    losses_of(TINY["detect"], scenes, tmp_path / "run", task={"mosaic": 1.0})
    assert len(learnt) == 8
    assert weighed == learnt
    assert max(map(max, learnt)) > 3, "no scene alone has so many"


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"optimizer": "sgd", "lr": 0.05},
        {"layer_decay": 0.7},
        {"task": {"sampling": "balanced"}, "repeats": 2},
        {"sizes": (24, 32, 40)},
        {
            "augmentation": Augmentation(randaugment_ops=2, random_erasing=0.2),
            "task": {"mixup": 0.2, "cutmix": 1.0},
        },
        {"schedule": "constant", "clip_grad": None, "ema": 0.9},
    ],
    ids=lambda c: next(iter(c)),
)
def test_every_way_to_train_gives_finite_losses_and_a_model(pictures, tmp_path, changes):
    result = train(tiny_config(pictures, tmp_path / "run", **(VIT | changes)))
    assert result.reason == "all epochs"
    assert all(math.isfinite(x) for x in logged(tmp_path / "run", "train", "loss"))
    assert vitrail.load(tmp_path / "run" / "best").classes == CLASSES


def test_batchnorm_of_one_picture_is_refused_before_training(pictures, tmp_path):
    config = tiny_config(pictures, tmp_path / "run", epochs=1)
    for changes in ({"batch_size": 1}, {"batch_size": 6, "accumulate": 6}):
        with pytest.raises(InputError, match=r"BatchNorm, .* one image of 32 x 32.*--batch-size"):
            train(replace(config, **changes))
    alone = tiny_config(pictures, tmp_path / "vit", **VIT, batch_size=1, max_steps=2)
    assert train(alone).steps == 2, "LayerNorm needs no company"


def test_early_stopping_ends_after_evaluations_without_a_better_score(tiny, examples, tmp_path):
    still = {"lr": 0.0, "warmup_lr": 0.0, "min_lr": 0.0}
    config = tiny_config(examples, tmp_path / "run", **tiny.settings, epochs=20, **still)
    result = train(replace(config, early_stopping=3))
    assert result.reason == "no better score in 3 evaluations"
    assert len(logged(tmp_path / "run", "eval", tiny.headline)) == 4


def test_a_run_ends_after_max_steps_in_the_middle_of_an_epoch(pictures, tmp_path):
    result = train(tiny_config(pictures, tmp_path / "run", **VIT, epochs=9, max_steps=6))
    assert (result.reason, result.steps) == ("all steps", 6)
    assert len(logged(tmp_path / "run", "eval", "top1")) == 2


def test_a_time_limit_ends_the_run_with_its_evaluation(pictures, tmp_path):
    result = train(tiny_config(pictures, tmp_path / "run", **VIT, max_minutes=0.001, epochs=500))
    assert result.reason == "time limit"
    assert 1 <= result.steps < 2000
    assert result.best is not None


def test_a_loss_that_is_not_finite_stops_with_a_batch_that_can_be_run_again(
    pictures, tmp_path, capsys
):
    config = tiny_config(
        pictures,
        tmp_path / "run",
        **VIT,
        lr=1e30,
        warmup_epochs=0.0,
        clip_grad=None,
        save_every=0.0,
    )
    with pytest.raises(InputError, match=r"(?s)not finite at step \d.*--replay.*--lr"):
        train(config)
    found = replay(tmp_path / "run")
    assert not math.isfinite(found["loss"] + found["gradient_norm"])
    assert found["weights"] == [], "what was kept is from before the weights broke"
    assert 0 < found["step"] <= 8
    assert main(["train", "--replay", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "weights that are not finite: none" in said
    assert f"of {found['num_images']}\n" in said
    kept = tmp_path / "run" / "nonfinite.safetensors"
    whole = kept.read_bytes()
    for damaged in (
        whole[:-1] + bytes([whole[-1] ^ 1]),
        b"",
        whole.replace(b"vitrail", b"vitrai1"),
    ):
        kept.write_bytes(damaged)
        with pytest.raises(InputError, match=r"nonfinite\.safetensors is not whole"):
            replay(tmp_path / "run")
    kept.write_bytes(kept.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"nonfinite\.safetensors is not whole"):
        replay(tmp_path / "run")


@pytest.mark.parametrize("settings", [{}, VIT])  # the batch, the table of positions
def test_a_picture_size_that_does_not_fit_into_memory_is_one_message(pictures, tmp_path, settings):
    config = tiny_config(pictures, tmp_path / "run", **settings | {"image_size": 10**7})
    with pytest.raises(InputError, match=r"^not enough memory for .* 10000000 x 10000000"):
        train(config)


def test_memory_that_runs_out_in_an_update_says_what_needs_less(pictures, tmp_path, monkeypatch):
    real, asked = loop.backward, []

    def backward(*args):
        asked.append(1)
        if len(asked) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore words")
        return real(*args)

    monkeypatch.setattr(loop, "backward", backward)
    config = tiny_config(pictures, tmp_path / "run", **VIT, accumulate=2, save_every=0.0)
    said = (
        r"^not enough memory for an update on 6 images of 32 x 32 \(3 at a time\) \(CUDA out of memory\. "
        r"Tried to allocate 9 GiB\.\); give a smaller --batch-size, a larger --accumulate, .*--grad-check"
        r".*\n.*step-00000002\.safetensors is complete: .* the same command goes on from it$"
    )
    with pytest.raises(InputError, match=said):
        train(config)
    assert train(config).steps == 8


def test_an_error_that_is_not_of_memory_keeps_its_traceback(pictures, tmp_path, monkeypatch):
    def backward(*args):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(loop, "backward", backward)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(tiny_config(pictures, tmp_path / "run", **VIT))


def test_a_replay_says_whose_fault_it_is():
    found = {
        "weights": [],
        "images": [],
        "num_images": 8,
        "loss": math.nan,
        "loss_fp32": math.nan,
    }
    assert "the images are not to blame" in verdict(found | {"weights": ["head.weight"]})
    assert "--precision fp32" in verdict(found | {"loss_fp32": 2.0})
    assert "look at these images" in verdict(found | {"images": ["a.jpg"]})
    assert "too large for this batch" in verdict(found)


def test_a_model_whose_answers_are_no_numbers_is_not_saved(pictures, tmp_path, monkeypatch):
    config = tiny_config(pictures, tmp_path / "run", **VIT, epochs=3)

    def evaluate_worse(model, *args, **kwargs):
        if (tmp_path / "run" / "best").exists():
            next(model.head.parameters()).data.fill_(math.nan)
        return evaluate(model, *args, **kwargs)

    monkeypatch.setattr("vitrail.train.loop.evaluate", evaluate_worse)
    said = r"(?s)after step 8 \(epoch 2\.0\) .* not finite; weights that are not: 1 \(head\..*\)\nbest and "
    with pytest.raises(InputError, match=said):
        train(config)
    for name in ("best", "last"):
        model = vitrail.load(tmp_path / "run" / name)
        assert all(p.isfinite().all() for p in model.parameters())


def test_only_a_run_that_kept_a_batch_can_be_replayed(learned):
    with pytest.raises(InputError, match="keeps no batch"):
        replay(learned)


def test_other_classes_start_from_the_backbone_alone(learned, tmp_path):
    data = make_pictures(tmp_path / "data")
    for split in ("train", "val"):
        (data / split / "top").rename(data / split / "up")
    out = tmp_path / "run"
    train(
        tiny_config(
            data,
            out,
            **VIT,
            weights=str(learned / "best"),
            epochs=1,
            lr=0.0,
            warmup_lr=0.0,
            min_lr=0.0,
        )
    )
    ours, theirs = (load_file(p / "best" / "model.safetensors") for p in (out, learned))
    same = {k for k in ours if torch.equal(ours[k], theirs[k])}
    assert same == {k for k in ours if k.startswith("backbone.")}


def test_classes_are_matched_by_name_and_strange_ones_shown_with_both_lists(learned, pictures):
    assert label_map(("top", "left"), CLASSES) == [2, 0]
    with pytest.raises(
        InputError,
        match=r"(?s)does not know: cat.*model's 3: left, right, top.*data's 2: cat, left",
    ):
        label_map(("cat", "left"), CLASSES)


def test_a_broken_picture_is_named_and_can_be_left_out(tmp_path, capsys):
    data = make_pictures(tmp_path / "data")
    (data / "train" / "left" / "0.png").write_bytes(b"no picture")
    config = tiny_config(data, tmp_path / "run", **VIT, epochs=1)
    with pytest.raises(InputError, match=r"0\.png"):
        train(config)
    assert train(replace(config, skip_broken=True, batch_size=4)).best is not None
    shutil.rmtree(data / "val")  # train and val are then cut from the same pictures
    capsys.readouterr()
    train(replace(config, out=str(tmp_path / "cut"), skip_broken=True, batch_size=4))
    assert capsys.readouterr().err.count("left out") == 1 + 1, "with the note that counts them"


def test_balanced_batches_draw_every_class_its_share_exactly(pictures):
    data = open_data(pictures, "train").subset([*range(8), 8, 9, 16, 17, 18])
    plan = build_plan(TrainConfig(task={"sampling": "balanced"}, batch_size=4), data, (8, 8), 1)
    for epoch in range(5):
        drawn = np.bincount(data.truth.labels[plan.order(epoch)], minlength=3)
        assert set(drawn.tolist()) <= {4, 5}


@pytest.mark.parametrize(("batch_size", "said"), [(10, True), (8, False)])
def test_pictures_that_fill_no_batch_are_told(pictures, tmp_path, capsys, batch_size, said):
    train(tiny_config(pictures, tmp_path / "run", **VIT, max_steps=1, batch_size=batch_size))
    line = "4 of 24 images fill no batch in an epoch, others each time\n"
    assert (line in capsys.readouterr().err) == said


def test_fewer_pictures_than_a_batch_are_one_batch(pictures, tmp_path, capsys):
    config = tiny_config(pictures, tmp_path / "run", **VIT, epochs=2, batch_size=128)
    assert train(config).steps == 2
    assert "batches of all 24 images there are, instead of 128" in capsys.readouterr().err
