"""From weights that have seen much to a few hundred or thousand pictures of your own."""

from vitrail.data.augmentation import Augmentation
from vitrail.train.config import TrainConfig


def finetune_small() -> TrainConfig:
    """Any model on some hundred to some thousand images, from weights trained on many. Needs no other
    setting.

    Command: vitrail train --recipe finetune_small --data YOUR/FOLDER --model NAME. It starts from the
        released weights of that name, downloaded once; where they cannot be had, it says so and starts from
        random ones, unless --weights pretrained makes that an error. --weights SOURCE takes others: a model
        folder (whose model is taken over), a file, or hf:owner/name@revision.
    Cost: 30 passes over the data: 15,000 pictures for 500 of your own, minutes on a CPU at 64 x 64 for
        EfficientViT-M0.
    Expected: depends on data and weights; compare with `vitrail eval --probe linear` of the same weights.

    Small steps, smaller for earlier layers, keep what the weights know; crops stay large, because a few
    pictures must not lose their subject; the averaged weights are the ones that are saved.
    """
    return TrainConfig(
        weights="auto",
        epochs=30,
        batch_size=32,
        lr=5e-4,
        layer_decay=0.75,
        weight_decay=0.05,
        warmup_epochs=3,
        min_lr=1e-6,
        clip_grad=1.0,
        ema=0.99,
        augmentation=Augmentation(
            scale=(0.35, 1.0), flip=0.5, color_jitter=0.2, random_erasing=0.1
        ),
        eval_every=2,
        log_every=5,
    )
