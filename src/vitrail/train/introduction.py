"""What a person is told before she waits: what was decided for her, and where the run stands."""

from pathlib import Path

import torch

from vitrail import models
from vitrail.train.progress import counted
from vitrail.train.run import Run
from vitrail.weights.catalogue import weight_sources

SMALL = 10_000  # training images under which a start from random weights is worth a word
NOTICEABLE = 0.05  # share of the images, left out of an epoch, from which it is worth a word


def introduce(run: Run) -> None:
    """Tell what a person should know before she waits: what was decided for her, and where the run stands."""
    at, config, say = run.at, run.config, run.progress.say
    for note in dict.fromkeys(run.train_data.notes + run.val_data.notes):
        say(note)
    for note in run.task.notes(run.model, run.train_data.truth):
        say(note)
    for key, problem in dict.fromkeys(run.train_data.broken + run.val_data.broken):
        say(f"left out {key}: {problem}")
    report = getattr(run.model, "weights_report", None)
    for note in run.plan.notes:
        say(note)
    if run.plan.batch_size < config.batch_size and not config.native:
        say(
            f"batches of all {run.plan.batch_size} images there are, instead of {config.batch_size}"
        )
    left_out = run.plan.left_out(at.epoch)
    once = run.plan.weights is None and config.repeats == 1  # else no epoch has every image
    if once and left_out >= NOTICEABLE * run.plan.length:
        say(f"{left_out} of {run.plan.length} images fill no batch in an epoch, others each time")
    if config.weights is not None and not at.step:
        start = models.model_folder(config.weights)
        if start.name == "best" and start != Path(config.weights):
            say(f"{config.weights} is a run; starting from its best model, {start}")
    if report is not None:
        say(str(report))
    elif config.weights is None and not at.step and len(run.train_data) < SMALL:
        known = weight_sources(models.parse_name(config.model)[1].name)
        known = f": --weights pretrained takes {known[0]}" if known else ""
        say(
            f"starting from random weights; on {len(run.train_data)} images, weights trained on many "
            f"do far better{known}"
        )
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    trained = f"{trained / 1e6:.2f} M" if trained >= 1e5 else f"{trained:,}"
    height, width = run.model.preprocessing.size
    shown = f"{height} x {width}"
    if config.native:
        packs, tokens = counted(config.packing.packs, "pack"), config.packing.max_tokens
        shown = f"their own shape, {packs} of {tokens} tokens an update"
    processes = f"{counted(run.world, 'process', 'processes')}, " if run.world > 1 else ""
    threads, workers = counted(torch.get_num_threads(), "thread"), counted(run.workers, "worker")
    images = counted(len(run.train_data), "image")
    about = "about " if run.plan.estimates and run.total_steps != config.max_steps else ""
    say(
        f"{config.model}: {trained} parameters to train on {images} at {shown}, "
        f"{len(run.model.classes)} classes; {about}{counted(run.total_steps, 'update')}; "
        f"{processes}{run.accelerator.device}, {threads}, {workers}"
    )
    for note in run.notes:
        say(note)
    if at.step and not at.finished:
        say(f"going on at update {at.step}, epoch {at.epoch + 1}")
