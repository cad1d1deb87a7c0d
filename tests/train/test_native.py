"""Training on packs of images of any shape: the run's other parts do not notice."""

import json
import math
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

import vitrail
from tests.parity import randomise
from tests.train.children import run, run_many
from tests.train.conftest import VIT, tiny_config
from vitrail.cli import main
from vitrail.data import open_data, pack_plan
from vitrail.data.augmentation import Augmentation
from vitrail.data.pack_plan import PackPlan
from vitrail.data.packing import Packing
from vitrail.train.config import TrainConfig
from vitrail.train.evaluate import evaluate
from vitrail.train.folder import RunFolder
from vitrail.train.introduction import introduce
from vitrail.train.loop import loop
from vitrail.train.ranks import check_world
from vitrail.train.replay import replay
from vitrail.train.schedule import learning_rate
from vitrail.train.setup import build, open_splits, set_up
from vitrail.train.state import Position
from vitrail.train.trainer import failures_told, train
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import num_patches

NATIVE = VIT | {
    "native": True,
    "packing": Packing(max_tokens=40, packs=4, drop=0.2, resolution="uniform", sides=(12, 40)),
    "image_size": None,
    "crop_pct": None,
    "augmentation": Augmentation(crop="whole", flip=0.0),
}


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """Images of many sizes whose class is whether they are bright at the top or at the bottom."""
    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for i in range(count):
            height, width = rng.integers(10, 60, 2)
            pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
            name = ("top", "bottom")[i % 2]
            half = slice(0, height // 2) if i % 2 == 0 else slice(height // 2, None)
            pixels[half] += 150
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def native_config(data: Path, out: Path, **changes) -> TrainConfig:
    return tiny_config(data, out, **(NATIVE | {"epochs": 2} | changes))


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("native") / "run"
    train(native_config(shapes, out, log_every=1))
    return out


def test_a_run_on_packs_counts_images_padding_and_steps(trained, shapes):
    config = native_config(shapes, trained)
    data, _ = open_splits(config, 1)
    _, plan = build(config, data, 1)
    rows = [row for row in RunFolder(trained).rows() if row["kind"] == "train"]
    assert len(rows) == plan.steps(0) + plan.steps(1)
    batches = [b for epoch in (0, 1) for b in plan.batches(epoch)]
    seen = 0
    for row, batch in zip(rows, batches, strict=True):
        images = [image for k in batch.packs for image in k]
        seen += len(images)
        assert row["images"] == seen
        tokens = sum(image.kept + 1 for image in images)
        assert row["padding"] == pytest.approx(1 - tokens / 160, abs=1e-4)
        assert math.isfinite(row["loss"])
    assert seen == 48


def test_the_model_sees_images_at_their_own_shape_ever_after(trained, shapes):
    model = vitrail.load(trained / "best")
    p = model.preprocessing
    assert (p.mode, p.patches) == ("native", (39, 8))
    data = open_data(shapes, "val", classes=model.classes)
    scores = evaluate(model, data)
    stored = json.loads((trained / "best" / "metrics.json").read_text())
    assert scores["loss"] == pytest.approx(stored["loss"])
    height, width = data.images.sizes[0].tolist()
    pixels = torch.from_numpy(data.images.read(0)).permute(2, 0, 1)[None].float() / 255
    normal = (pixels - torch.tensor(p.mean)[:, None, None]) / torch.tensor(p.std)[:, None, None]
    assert height * width <= 39 * 64
    with torch.no_grad():
        alone = model(normal).softmax(1)
    (said,) = vitrail.Predictor(model, top_k=2)([data.images.read(0)])
    order = [model.classes.index(name) for name in said.names]
    torch.testing.assert_close(torch.tensor(said.scores), alone[0, order], atol=1e-5, rtol=0)


def test_images_that_are_shown_smaller_are_told_where_they_are_asked_of(trained, shapes, capsys):
    sizes = open_data(shapes, "val").images.sizes
    for most in (12, 39):  # 39: what the run saw
        how = ["--tokens-per-image", str(most)] if most == 12 else []
        count = int((num_patches(sizes, 8) > most).sum())
        assert 0 < count < 8
        said = r"{} of 8 {} have more than {} patches of 8 pixels, such as .*: shown smaller"
        assert main(["eval", str(trained), "--data", str(shapes), *how]) == 0
        assert re.search(said.format(count, "images", most), capsys.readouterr().err)
        assert main(["predict", str(trained), str(shapes / "val"), *how]) == 0
        assert re.search(said.format(count, "pictures", most), capsys.readouterr().err)
    assert main(["eval", str(trained), "--data", str(shapes), "--tokens-per-image", "64"]) == 0
    assert "shown smaller" not in capsys.readouterr().err


def test_weights_of_squares_go_on_at_drawn_resolutions_of_images_own_shapes(shapes, tmp_path):
    """Variable-resolution fine-tuning: nothing of an open checkpoint is lost or bound to its one size."""
    start = vitrail.create_model(
        VIT["model"], classes=("bottom", "top"), image_size=32, **VIT["model_fields"]
    )
    randomise(start)
    vitrail.save(start, tmp_path / "squares")
    changes = {"weights": str(tmp_path / "squares"), "max_steps": 1, "lr": 0.0, "warmup_lr": 0.0}
    changes["model_fields"] = VIT["model_fields"] | {"image_size": 32}
    train(native_config(shapes, tmp_path / "run", min_lr=0.0, epochs=1, **changes))
    tuned = vitrail.load(tmp_path / "run" / "last")
    for name, value in start.state_dict().items():
        assert torch.equal(tuned.state_dict()[name], value), name
    pictures = sorted((shapes / "val").rglob("*.png"))
    wanted = vitrail.Predictor(start, top_k=2, tokens_per_image=39)(pictures)
    for ours, theirs in zip(vitrail.Predictor(tuned, top_k=2)(pictures), wanted, strict=True):
        assert ours.names == theirs.names
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-6)


class StopAfter:
    """A person who stops a run after so many updates."""

    def __init__(self, updates: int) -> None:
        self.left = updates

    @property
    def asked(self) -> int:
        self.left -= 1  # each update asks
        return signal.SIGTERM if self.left <= 0 else 0


@pytest.fixture
def each_epoch_by_itself(monkeypatch) -> list[int]:
    """As where an epoch has a million images; the epochs that were planned."""
    monkeypatch.setattr(pack_plan, "AHEAD", 0)
    monkeypatch.setattr(pack_plan, "CYCLE", 8)
    monkeypatch.setattr(pack_plan, "LEAST_STEPS", 0)
    planned, draw = [], PackPlan._draw
    monkeypatch.setattr(PackPlan, "_draw", lambda p, epoch: planned.append(epoch) or draw(p, epoch))
    return planned


def start_of(config: TrainConfig):
    Path(config.out).mkdir(exist_ok=True)
    return set_up(config, Accelerator(cpu=True), RunFolder(config.out))


def test_epochs_are_planned_when_they_come_and_the_schedule_ends_with_the_run(
    shapes, tmp_path, each_epoch_by_itself, monkeypatch
):
    packing = replace(NATIVE["packing"], packs=1)
    changes = {"packing": packing, "epochs": 4, "log_every": 1, "min_lr": 1e-5, "eval_every": 4}
    config = native_config(shapes, tmp_path / "run", **changes)
    run, said = start_of(config), []
    assert set(each_epoch_by_itself) == {0}
    steps = [run.plan.steps(epoch) for epoch in range(4)]
    assert len(set(steps)) > 1, "epochs of several lengths"
    assert (run.total_steps, run.warmup_steps) == (4 * steps[0], steps[0])
    monkeypatch.setattr(run.progress, "say", said.append)
    introduce(run)
    assert f"; about {4 * steps[0]} updates; " in said[-1]
    with run.progress:
        assert loop(run, StopAfter(steps[0] + 2)) == signal.SIGTERM
    assert (run.at.epoch, run.at.batch) == (1, 2)
    each_epoch_by_itself.clear()
    again = start_of(config)  # knows nothing of what the first planned
    assert set(each_epoch_by_itself) == {0, 1}
    assert again.total_steps == run.total_steps == sum(steps[:2]) + 2 * steps[0]
    assert again.first_total == run.first_total == 4 * steps[0]
    with again.progress:
        assert loop(again, StopAfter(10**6)) == 0
    assert (again.at.finished, again.at.images) == ("all epochs", 4 * 24)
    whole = start_of(replace(config, out=str(tmp_path / "whole")))
    with whole.progress:
        loop(whole, StopAfter(10**6))
    ours, theirs = (
        load_file(Path(o) / "last" / "model.safetensors") for o in (config.out, whole.config.out)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    rates = [row["lr"] for row in RunFolder(config.out).rows() if row["kind"] == "train"]
    shares = [(e + b / steps[e]) / 4 for e in range(4) for b in range(steps[e])]
    how = {"warmup_steps": steps[0], "total_steps": 4 * steps[0]}
    wanted = [learning_rate(config, i, done=share, **how) for i, share in enumerate(shares)]
    assert rates == pytest.approx(wanted)
    assert len(rates) == again.progress.total == sum(steps)


def walked(run) -> list[tuple[int, float]]:
    """Of each update of a run, without making it: the total that is told, and the learning rate."""
    said, at = [], run.at
    while at.epoch < run.config.epochs:
        run.batches()
        while at.batch < run.plan.steps(at.epoch):
            if run.stop_reason:
                return said
            said.append((run.total_steps, run.set_rate()))
            at.step, at.batch = at.step + 1, at.batch + 1
        at.epoch, at.batch = at.epoch + 1, 0
    assert run.stop_reason == "all epochs"
    return said


VARIED = {  # epochs of few steps, which draw their size of patches
    "packing": Packing(max_tokens=100, packs=1),
    "patch_sizes": (4, 8, 16),
    "epochs": 12,
    "warmup_epochs": 2.0,
    "min_lr": 1e-5,
}


def test_the_rate_never_rises_after_warm_up_however_many_steps_an_epoch_has(
    shapes, tmp_path, each_epoch_by_itself
):
    config = native_config(shapes, tmp_path / "run", **VARIED)
    run = start_of(config)
    steps = [run.plan.steps(epoch) for epoch in range(12)]
    assert min(steps) < 0.7 * max(steps)
    said = walked(run)
    for epoch, batch in ((1, 0), (5, 2), (11, 1)):  # it knows nothing of what was planned before
        again = start_of(config)
        again.at = Position(step=sum(steps[:epoch]) + batch, epoch=epoch, batch=batch)
        assert walked(again) == said[sum(steps[:epoch]) + batch :]
    totals, rates = map(np.array, zip(*said, strict=True))
    assert run.plan.estimates
    assert len(rates) == totals[-1] == sum(steps)
    assert len(set(totals)) > 3
    warm = run.warmup_steps
    assert warm == 2 * steps[0]
    assert (np.diff(rates[: warm + 1]) > 0).all()
    assert (np.diff(rates[warm:]) <= 0).all()
    ends = np.cumsum(steps)
    assert rates[ends[6]] == pytest.approx(
        learning_rate(run.config, 99, done=7 / 12, warmup_steps=2, total_steps=12)
    ), "an epoch is a twelfth of the run"


def test_a_limit_of_updates_ends_the_schedule_of_estimated_epochs(
    shapes, tmp_path, each_epoch_by_itself
):
    config = native_config(shapes, tmp_path / "run", **VARIED, max_steps=20)
    run = start_of(config)
    said = walked(run)
    assert (len(said), run.at.step, run.stop_reason) == (20, 20, "all steps")
    how = {"warmup_steps": run.warmup_steps, "total_steps": 20}
    assert said == [
        (20, pytest.approx(learning_rate(config, i, done=i / 20, **how))) for i in range(20)
    ]


def test_a_small_run_on_packs_knows_its_updates_from_the_start(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_plan, "CYCLE", 8)  # each epoch by itself
    config = native_config(shapes, tmp_path / "run", **VARIED)
    run, lines = start_of(config), []
    total = sum(run.plan.steps(epoch) for epoch in range(12))
    assert run.warmup_steps == round(2 * total / 12)
    monkeypatch.setattr(run.progress, "say", lines.append)
    introduce(run)
    assert f"; {total} updates; " in lines[-1]
    how = {"warmup_steps": run.warmup_steps, "total_steps": total}
    assert walked(run) == [
        (total, pytest.approx(learning_rate(config, i, done=i / total, **how)))
        for i in range(total)
    ]


def test_accumulated_parts_give_the_same_update(shapes, tmp_path):
    changes = {"max_steps": 1, "model_fields": VIT["model_fields"], "epochs": 1}
    packing = replace(NATIVE["packing"], drop=0.0)
    for parts in (1, 4):
        out = tmp_path / str(parts)
        train(native_config(shapes, out, accumulate=parts, packing=packing, **changes))
    states = [load_file(tmp_path / n / "last" / "model.safetensors") for n in ("1", "4")]
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, atol=2e-5, rtol=0)


def test_a_pack_whose_loss_is_not_finite_is_kept_and_runs_again(shapes, tmp_path):
    config = native_config(shapes, tmp_path / "run", lr=1e30, clip_grad=None, warmup_epochs=0.0)
    with pytest.raises(InputError, match="not finite"):
        train(config)
    found = replay(tmp_path / "run")
    assert not math.isfinite(found["loss"]) or not math.isfinite(found["gradient_norm"])
    assert found["num_images"] > 4


def test_what_is_decided_for_a_person_is_said(shapes, tmp_path, capfd):
    packing = Packing(max_tokens=30, packs=2)
    config = native_config(shapes, tmp_path / "run", packing=packing, max_steps=1)
    train(replace(config, augmentation=Augmentation(flip=0.0)))
    said = capfd.readouterr().err
    assert "images at their own shape, 2 packs of 30 tokens an update" in said
    assert "of 24 images have more than 29 patches of 8 pixels" in said
    assert "; 1 update; " in said
    assert "batches of all" not in said
    written = (tmp_path / "run" / "config.yaml").read_text()
    assert "crop: whole" in written


def test_strips_and_single_pixels_are_images_like_any_other(tmp_path, capfd):
    rng = np.random.default_rng(0)
    sizes = ((1, 5000), (5000, 1), (1, 1), (3, 3), (60, 40), (700, 90))
    for split in ("train", "val"):
        for i, size in enumerate(sizes):
            folder = tmp_path / "data" / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    packing = Packing(max_tokens=50)
    config = native_config(tmp_path / "data", tmp_path / "run", packing=packing, log_every=1)
    train(config)
    said = capfd.readouterr().err
    assert "3 of 6 images have more than 49 patches of 8 pixels" in said
    assert "4 of 6 images have a side of less than a patch of 8 pixels" in said
    rows = [row for row in RunFolder(config.out).rows() if row["kind"] == "train"]
    assert rows[-1]["images"] == 12
    assert all(math.isfinite(row["loss"]) for row in rows)
    pictures = sorted((tmp_path / "data" / "val").rglob("*.png"))
    model = vitrail.load(tmp_path / "run" / "last")
    packed = list(vitrail.Predictor(model, max_tokens=50)(pictures))
    for picture, found in zip(pictures, packed, strict=True):
        (alone,) = vitrail.Predictor(model)([picture])
        assert found.source == alone.source == str(picture)
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resize": "crop"}, "native and resize do not go together.*leave --resize away"),
        ({"sizes": (32, 64)}, "native and sizes do not go together"),
        ({"repeats": 2}, "native and repeats do not"),
        ({"augmentation": Augmentation(crop="simple")}, "shows images whole"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        native_config(tmp_path, tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"native": False, "image_size": 32},
            "--packing is for images at their own shape; give --native",
        ),
        ({"task": {"mixup": 0.2}}, "cannot be mixed with each other.*--task.mixup 0"),
        (
            {"model": "efficientvit_m0", "model_fields": {}},
            "efficientvit_m0 cannot take packed images: its tokens are no plain patches; models that can are "
            "those of the families vit, deit, dinov2",
        ),
        (
            {"model": "vit_tiny_r_s16_p8", "model_fields": {}},
            "vit_tiny_r_s16_p8 cannot take packed images: its tokens are no plain patches",
        ),
    ],
)
def test_what_cannot_be_packed_is_said_before_any_update(changes, message, shapes, tmp_path):
    with pytest.raises(InputError, match=message):
        train(native_config(shapes, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").glob("config.yaml"))


def test_a_plan_is_checked_before_any_update(shapes, tmp_path, monkeypatch):
    def refused(plan: PackPlan) -> None:
        raise InputError(f"of {plan.epochs} epochs one cannot be")

    monkeypatch.setattr(PackPlan, "check", refused)
    with pytest.raises(InputError, match="of 2 epochs one cannot be"):
        train(native_config(shapes, tmp_path / "run"))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_processes_share_whole_packs(tmp_path):
    config = native_config(tmp_path, tmp_path, batch_size=7)
    check_world(config, 4)
    with pytest.raises(InputError, match=r"3 processes cannot share 4 packs .*--packing.packs 3"):
        check_world(config, 3)


def test_memory_that_runs_out_is_told_of_packs(tmp_path):
    config = native_config(tmp_path, tmp_path)
    with (
        pytest.raises(
            InputError,
            match=r"for an update on 4 packs of 40 tokens .*smaller --packing.max-tokens",
        ),
        failures_told(config, RunFolder(tmp_path), 1),
    ):
        raise MemoryError


@pytest.mark.slow
def test_a_run_on_packs_that_is_killed_ends_the_same(shapes, tmp_path):
    changes = {"save_every": 0.0, "ema": 0.9}
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run(native_config(shapes, whole, **changes)) == 0
    died = 0
    for renames in (1, 2, 3, 5, 0):
        config = native_config(shapes, out, **changes)
        died += run(config, dies_at=f"rename:{renames}") == -signal.SIGKILL
    assert died == 5
    assert run(native_config(shapes, out, **changes)) == 0
    mine, theirs = (load_file(f / "last" / "model.safetensors") for f in (out, whole))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    rows = [
        [(r["step"], r["images"], r.get("loss")) for r in RunFolder(f).rows()] for f in (out, whole)
    ]
    assert rows[0] == rows[1]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_processes_train_on_packs_as_one_does(shapes, tmp_path, world):
    changes = {"log_every": 1, "epochs": 3, "workers": 1}
    alone, many = tmp_path / "alone", tmp_path / "many"
    train(native_config(shapes, alone, **changes))
    assert run_many(native_config(shapes, many, **changes), world) == [0] * world
    ours, theirs = (
        [r["loss"] for r in RunFolder(f).rows() if r["kind"] == "train"] for f in (many, alone)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
