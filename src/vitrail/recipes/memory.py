"""A task with learnable memory beside a ViT that stays as it is (Sandler et al., CVPR 2022, arXiv
2203.15243)."""

from vitrail.data.augmentation import Augmentation
from vitrail.train.config import TrainConfig


def memory_small() -> TrainConfig:
    """A task on some hundred to some thousand images, learnt beside a frozen ViT: a class token and five rows
    of memory in each block.

    Command: vitrail train --recipe memory_small --data YOUR/FOLDER --model memory/NAME --weights BASE, where
        BASE is a model folder or a run of the ViT called NAME, or a file of its weights. Of a folder the
        recipe takes over what the network is and how it sees images. Without them it starts from the
        released weights of ViT-Ti.
    Cost: 30 passes over the data, with the network forward alone: a ViT-Ti at 64 x 64 sees 380 images
        a second of one core's time (AMD EPYC).
    Expected: depends on data and network; the abstract says slightly below training everything. Compare with
        a linear classifier on the same network, --model NAME --train-only head. See docs/results.md.

    From the paper: SGD with momentum, a clipped gradient, five updates of linear warm-up (here a third of an
    epoch, of 500 images as many), memory drawn with a deviation of 0.02. Differs: 30 passes in batches of 32
    in place of 20,000 updates of 512 images; crops stay larger than Inception's, because few images must not
    lose their subject; rate, cosine and Nesterov's form of the momentum are ours.
    """
    return TrainConfig(
        model="memory/vit_tiny_patch16",
        weights="auto",
        train_only="capsule",
        epochs=30,
        batch_size=32,
        optimizer="sgd",
        lr=0.05,
        momentum=0.9,
        weight_decay=0.0,
        warmup_epochs=0.3,
        warmup_lr=0.0,
        min_lr=0.0,
        clip_grad=1.0,
        task={"label_smoothing": 0.0},
        augmentation=Augmentation(scale=(0.35, 1.0), flip=0.5),
        eval_every=3,
        log_every=5,
    )
