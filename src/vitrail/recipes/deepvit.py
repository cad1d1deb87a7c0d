"""DeepViT (Zhou et al., "DeepViT: Towards Deeper Vision Transformer", 2021, https://arxiv.org/abs/2103.11886):
ImageNet-1k from nothing."""

from dataclasses import replace

from vitrail.recipes.deit import imagenet_deit
from vitrail.train.config import TrainConfig


def imagenet_deepvit(model: str) -> TrainConfig:
    """DeiT's augmentation, average and rate of the end, with stochastic depth of 0.2, without repeated copies
    of an image.

    Neither the paper nor the official repository could be read. These are the settings of a public fork of
    it (github.com/chilung/dvit_repo, scripts/DeepViT_24B_pure_transformer.yaml and DeepViT_L_CNN_patch.yaml,
    which agree): 32 images a process at a rate of 5e-4, which nothing scales, and train.sh starts four
    processes for the 24 blocks. How many the authors used for the other sizes is not said there.

    There training is in float32, the interpolation is bilinear or bicubic at random, and ten more epochs at
    the lowest rate follow; here it is bfloat16, bicubic, and ends with the cosine.
    """
    return replace(
        imagenet_deit(model),
        model_fields={"drop_path_rate": 0.2},
        batch_size=128,  # 4 * 32
        lr=5e-4,
        repeats=1,
    )


def deepvit_s() -> TrainConfig:
    """DeepViT-S (16 blocks, convolutional stem) on ImageNet-1k.

    Command: torchrun --nproc-per-node 4 -m vitrail train --recipe deepvit_s --data IMAGENET --out
        runs/deepvit_s.
    Cost: 300 epochs of a 27 M model; we know of no published time.
    Expected: top-1 82.3 (official README), by "optimized" settings; we have not measured what these give.
    """
    return imagenet_deepvit("deepvit_s")


def deepvit_l() -> TrainConfig:
    """DeepViT-L (32 blocks, convolutional stem): as deepvit_s, at twice the cost. Expected: top-1 83.1
    (official README, by "optimized" settings; not measured here).
    """
    return imagenet_deepvit("deepvit_l")


def deepvit_16b() -> TrainConfig:
    """DeepViT of 16 blocks: as deepvit_s. Expected: top-1 79.10 (README; the ViT of this depth: 78.88)."""
    return imagenet_deepvit("deepvit_16b")


def deepvit_24b() -> TrainConfig:
    """DeepViT of 24 blocks: as deepvit_s, 1.5 times the cost. Expected: top-1 79.99 (README; ViT: 79.35)."""
    return imagenet_deepvit("deepvit_24b")


def deepvit_32b() -> TrainConfig:
    """DeepViT of 32 blocks: as deepvit_s, at twice the cost. Expected: top-1 80.90 (README; a ViT: 79.27)."""
    return imagenet_deepvit("deepvit_32b")
