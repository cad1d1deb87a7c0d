"""Every setting of every recipe beside the paper or the official script that it comes from: values read
there, not in the recipe. "Ours" marks what no paper says; a source ends with what differs, where
something does.
"""

import math
from dataclasses import fields

import pytest

from vitrail.data.packing import Packing
from vitrail.data.plan import BatchPlan
from vitrail.recipes import RECIPES, recipe_config
from vitrail.registry import backbone_entry
from vitrail.tasks.classify import Settings
from vitrail.train.config import TrainConfig

IMAGENET = 1_281_167  # training images
Table = dict[str, tuple[object, str]]

OUTWARD = "ours: how a run is carried out, not what it learns"
RUN: Table = {
    "data": ("", OUTWARD),
    "out": ("", OUTWARD),
    "device": ("auto", OUTWARD),
    "workers": (None, OUTWARD),
    "threads": (None, OUTWARD),
    "log_every": (20, OUTWARD),
    "save_every": (5.0, OUTWARD),
    "keep": (2, OUTWARD),
    "keep_every": (None, OUTWARD),
    "head_fields": ({}, "ours: no head of its own"),
    "tensorboard": (False, OUTWARD),
    "eval_every": (1, OUTWARD),
    "accumulate": (1, OUTWARD),
    "grad_checkpointing": (False, OUTWARD),
    "parallel": ("data", OUTWARD),
    "skip_broken": (False, OUTWARD),
    "drop_bad": (False, OUTWARD),
    "seed": (0, OUTWARD),
    "val_fraction": (0.2, "ours: where the data has no val split; ImageNet has one"),
    "weights": (None, "ours: from nothing, unless --weights is given"),
    "train_only": ("full", "ours"),
    "early_stopping": (None, "none of the scripts stops early"),
    "max_steps": (None, "the scripts count epochs"),
    "max_minutes": (None, "the scripts count epochs"),
    "task.sampling": ("uniform", "the scripts shuffle"),
    "task.loss": ("softmax", "cross-entropy in all of them"),
    "native": (False, "squares of one size"),
    "patch_sizes": ((), "the model's own"),
    "packing": (Packing(), "not used by squares"),
    "backbone_lr": (1.0, "none of the scripts"),
    "layer_decay": (1.0, "none of the scripts"),
    "clip_mode": ("norm", "--clip-mode: timm's default"),
    "crop_pct": (None, "evaluation: the model's own preprocessing"),
    "resize": (None, "evaluation: the model's own preprocessing"),
    "precision": ("bf16", "ours; the scripts use fp16 or fp32, which the docstrings say"),
}

ADAMW: Table = {
    "optimizer": ("adamw", "--opt adamw"),
    "betas": ((0.9, 0.999), "--opt-betas: the optimiser's default"),
    "eps": (1e-8, "--opt-eps 1e-8"),
    "momentum": (0.9, "SGD's; not used"),
    "schedule": ("cosine", "--sched cosine"),
}

TIMM = "timm's create_transform, which the scripts call"
PLAIN: Table = {
    "augmentation.crop": ("random_resized", TIMM),
    "augmentation.scale": ((0.08, 1.0), TIMM),
    "augmentation.ratio": ((3 / 4, 4 / 3), TIMM),
    "augmentation.padding": (4, "not used by this crop"),
    "augmentation.scale_jitter": ((1.0, 1.0), "of detectors"),
    "augmentation.interpolation": ("bicubic", "--train-interpolation bicubic"),
    "augmentation.flip": (0.5, TIMM),
    "augmentation.color_jitter": (0.0, "timm leaves --color-jitter out where --aa is given"),
    "augmentation.three_augment": (False, "not asked for"),
    "augmentation.randaugment_ops": (0, "not asked for"),
    "augmentation.randaugment_magnitude": (9.0, "not used"),
    "augmentation.randaugment_std": (0.5, "not used"),
    "augmentation.random_erasing": (0.0, "not asked for"),
    "task.mixup": (0.0, "not asked for"),
    "task.cutmix": (0.0, "not asked for"),
    "task.mix_prob": (1.0, "--mixup-prob 1.0"),
    "augmentation.mean": ((0.485, 0.456, 0.406), "ImageNet's"),
    "augmentation.std": ((0.229, 0.224, 0.225), "ImageNet's"),
}

# github.com/facebookresearch/deit: main.py's defaults, the commands of README_deit.md; the paper's table 9.
DEIT: Table = (
    RUN
    | ADAMW
    | PLAIN
    | {
        "image_size": (224, "--input-size 224"),
        "model_fields": ({"drop_path_rate": 0.1}, "--drop-path 0.1, --drop 0"),
        "sizes": ((), "one size"),
        "epochs": (300, "--epochs 300"),
        "batch_size": (4 * 256, "--nproc_per_node=4 ... --batch-size 256"),
        "lr": (5e-4 * 1024 / 512, "--lr 5e-4, times batch / 512"),
        "weight_decay": (0.05, "--weight-decay 0.05"),
        "warmup_epochs": (5, "--warmup-epochs 5"),
        "warmup_lr": (1e-6, "--warmup-lr 1e-6, not scaled"),
        "min_lr": (1e-5, "--min-lr 1e-5, not scaled"),
        "clip_grad": (None, "--clip-grad: none"),
        "task.label_smoothing": (0.1, "--smoothing 0.1"),
        "ema": (0.99996, "--model-ema-decay 0.99996"),
        "repeats": (3, "--repeated-aug: RASampler's three copies"),
        "augmentation.randaugment_ops": (2, "--aa rand-m9-mstd0.5-inc1: timm's two operations"),
        "augmentation.randaugment_magnitude": (9.0, "--aa rand-m9-mstd0.5-inc1"),
        "augmentation.randaugment_std": (0.5, "--aa rand-m9-mstd0.5-inc1"),
        "augmentation.random_erasing": (0.25, "--reprob 0.25"),
        "task.mixup": (0.8, "--mixup 0.8"),
        "task.cutmix": (1.0, "--cutmix 1.0"),
    }
)

# github.com/ggjy/CMT.pytorch: the commands of the README; train.py's defaults are DeiT's.
CMT = DEIT | {"warmup_epochs": (20, "--warmup-epochs 20")}
CMT_TI: Table = CMT | {
    "model": ("cmt_ti", "--model cmt_ti"),
    "image_size": (160, "--input-size 160"),
    "epochs": (800, "--epochs 800"),
    "batch_size": (8 * 256, "--nproc_per_node=8 ... --batch-size 256"),
    "lr": (8e-4 * 2048 / 512, "--lr 8e-4, times batch / 512"),
    "warmup_lr": (1e-7, "--warmup-lr 1e-7"),
    "ema": (0.0, "--no-model-ema"),
}
CMT_XS: Table = CMT | {
    "model": ("cmt_xs", "--model cmt_xs"),
    "model_fields": ({"drop_path_rate": 0.08}, "--drop-path 0.08"),
    "image_size": (192, "--input-size 192"),
    "epochs": (400, "--epochs 400"),
    "batch_size": (8 * 256, "--nproc_per_node=8 ... --batch-size 256"),
    "lr": (7e-4 * 2048 / 512, "--lr 7e-4, times batch / 512"),
    "weight_decay": (0.04, "--weight-decay 0.04"),
    "warmup_lr": (1e-6, "--warmup-lr 1e-6"),
    "min_lr": (2e-5, "--min-lr 2e-5"),
    "ema": (0.9998, "--model-ema-decay 0.9998"),
}
CMT_S: Table = CMT | {
    "model": ("cmt_s", "--model cmt_s"),
    "batch_size": (8 * 128, "--nproc_per_node=8 ... --batch-size 128"),
    "lr": (5e-4 * 1024 / 512, "train.py: --lr 5e-4, times batch / 512"),
    "warmup_lr": (1e-7, "--warmup-lr 1e-7"),
}
CMT_B: Table = CMT | {
    "model": ("cmt_b", "--model cmt_b"),
    "model_fields": ({"drop_path_rate": 0.25}, "--drop-path 0.25"),
    "image_size": (256, "--input-size 256"),
    "batch_size": (8 * 64, "--nproc_per_node=8 ... --batch-size 64"),
    "lr": (5e-4 * 512 / 512, "train.py: --lr 5e-4, times batch / 512"),
    "min_lr": (2e-5, "--min-lr 2e-5"),
}

# A fork of the official repository (github.com/chilung/dvit_repo): scripts/DeepViT_24B_pure_transformer.yaml
# and DeepViT_L_CNN_patch.yaml, which agree in all of this, and train.sh.
DEEPVIT: Table = DEIT | {
    "model_fields": ({"drop_path_rate": 0.2}, "drop_path: 0.2"),
    "batch_size": (4 * 32, "train.sh: distributed_train.sh 4; batch_size: 32"),
    "lr": (5e-4, "lr: 0.0005, not scaled by timm's train.py of that time"),
    "repeats": (1, "use_repeated_aug: false"),
    "augmentation.interpolation": ("bicubic", "train_interpolation: random, of the two; ours"),
}

# github.com/microsoft/Cream: EfficientViT/classification, main.py's defaults and the README's commands.
EFFICIENTVIT: Table = DEIT | {
    "model_fields": ({}, "no --drop-path in main.py"),
    "batch_size": (8 * 256, "--nproc_per_node=8; --batch-size 256"),
    "lr": (1e-3 * 2048 / 512, "--lr 1e-3, times batch / 512"),
    "weight_decay": (0.025, "--weight-decay 0.025"),
    "clip_grad": (0.02, "--clip-grad 0.02"),
    "clip_mode": ("agc", "--clip-mode agc; theirs clips the classifier too, ours does not"),
}

# github.com/microsoft/Swin-Transformer: config.py, configs/swin_*_patch4_window7_224.yaml; main.py scales all
# three rates by batch / 512. The paper's appendix A2.1.
SWIN: Table = DEIT | {
    "batch_size": (8 * 128, "get_started.md: --nproc_per_node 8 ... --batch-size 128"),
    "lr": (5e-4 * 1024 / 512, "TRAIN.BASE_LR = 5e-4"),
    "warmup_lr": (5e-7 * 1024 / 512, "TRAIN.WARMUP_LR = 5e-7"),
    "min_lr": (5e-6 * 1024 / 512, "TRAIN.MIN_LR = 5e-6"),
    "warmup_epochs": (20, "TRAIN.WARMUP_EPOCHS = 20"),
    "clip_grad": (5.0, "TRAIN.CLIP_GRAD = 5.0"),
    "ema": (0.0, "none in config.py"),
    "repeats": (1, "none in config.py"),
}


def cvnets_sizes(least: int, most: int) -> tuple[int, ...]:
    """max_n_scales: 5 between the two, each brought to check_scale: 32 (ml-cvnets' batch sampler)."""
    step = (most - least) / 4
    return tuple(int(least + step * i + 16) // 32 * 32 for i in range(5))


# github.com/apple/ml-cvnets: config/classification/imagenet/mobilevit.yaml; the paper's section 4.1.
MOBILEVIT: Table = (
    RUN
    | ADAMW
    | PLAIN
    | {
        "image_size": (256, "center_crop size: 256"),
        "model_fields": ({}, "the model's own: classifier_dropout: 0.1, dropout: 0.1"),
        "sizes": (cvnets_sizes(160, 320), "vbs: min_crop_size 160, max_crop_size 320"),
        "epochs": (300, "max_epochs: 300"),
        "batch_size": (1024, "128 images/GPU * 8 GPUs"),
        "lr": (2e-3, "max_lr: 0.002"),
        "weight_decay": (0.01, "weight_decay: 0.01"),
        "warmup_epochs": (3.25, "the paper: 3,000 updates; 20,000 in the file, a longer warm-up"),
        "warmup_lr": (2e-4, "warmup_init_lr: 0.0002"),
        "min_lr": (2e-4, "min_lr: 0.0002"),
        "clip_grad": (None, "no grad_clip in the file"),
        "task.label_smoothing": (0.1, "label_smoothing: 0.1"),
        "ema": (1 - 0.0005, "ema momentum: 0.0005"),
        "repeats": (1, "none in the file"),
        "augmentation.interpolation": ("bilinear", "interpolation: bilinear"),
    }
)

# config/classification/imagenet/mobilevit_v2.yaml, and the commands of README-mobilevit-v2.md.
MOBILEVITV2: Table = MOBILEVIT | {
    "sizes": ((), 'sampler name: "batch_sampler", one size'),
    "warmup_epochs": (16, "warmup_iterations: 20000, of 1251 an epoch"),
    "warmup_lr": (1e-6, "warmup_init_lr: 1.e-6"),
    "clip_grad": (10.0, "grad_clip: 10.0"),
    "augmentation.interpolation": ("bicubic", "interpolation: bicubic"),
    "augmentation.randaugment_ops": (2, "rand_augment: torchvision's, num-ops 2; ours does half"),
    "augmentation.randaugment_magnitude": (10 * 9 / 30, "magnitude 9, the tenth of 31 from 0"),
    "augmentation.randaugment_std": (0.0, "torchvision's magnitude does not vary"),
    "augmentation.random_erasing": (0.25, "random_erase p: 0.25"),
    "task.mixup": (0.2, "mixup alpha: 0.2"),
    "task.cutmix": (1.0, "cutmix alpha: 1.0"),
}


def mobilevitv2(width: str, most: float, least: float, decay: float) -> Table:
    return MOBILEVITV2 | {
        "model": (f"mobilevitv2_{width}", "width_multiplier"),
        "lr": (most, "scheduler.cosine.max_lr"),
        "min_lr": (least, "scheduler.cosine.min_lr"),
        "weight_decay": (decay, "optim.weight_decay"),
    }


# config/classification/imagenet/mobilenet_v3.yaml of ml-cvnets, not the paper's RMSProp.
MOBILENETV3: Table = MOBILEVIT | {
    "model": ("mobilenetv3_large", 'mode: "large"'),
    "image_size": (224, "center_crop size: 224"),
    "sizes": (cvnets_sizes(128, 320), "vbs: min_crop_size 128, max_crop_size 320"),
    "batch_size": (2048, "512 * 4 GPUs"),
    "optimizer": ("sgd", "name: sgd, nesterov: true"),
    "momentum": (0.9, "momentum: 0.9"),
    "betas": ((0.9, 0.999), "AdamW's; not used"),
    "eps": (1e-8, "AdamW's; not used"),
    "lr": (0.8, "max_lr: 0.8"),
    "weight_decay": (4e-5, "weight_decay: 4.e-5"),
    "warmup_epochs": (6.25, "warmup_iterations: 3000"),
    "warmup_lr": (0.1, "warmup_init_lr: 0.1"),
    "min_lr": (4e-4, "min_lr: 4.e-4"),
}

# Stand-ins for what we do not have, beside what github.com/tensorflow/tpu
# (models/official/efficientnet/main.py) and the paper's section 5.2 say.
EFFICIENTNET: Table = MOBILENETV3 | {
    "model": ("efficientnet_b0", "--model_name efficientnet-b0"),
    "model_fields": ({}, "the model's own: dropout 0.2, survival_prob 0.8"),
    "sizes": ((), "one size"),
    "epochs": (350, "train_steps: 218949, 350 epochs at batch size 2048"),
    "batch_size": (2048, "--train_batch_size 2048"),
    "optimizer": ("sgd", "ours, for RMSProp"),
    "lr": (0.8, "ours, with SGD: mobilenetv3_large's; 0.016 * 2048 / 256 for RMSProp there"),
    "weight_decay": (4e-5, "ours, with SGD: mobilenetv3_large's; 1e-5 there"),
    "warmup_epochs": (5, "--lr_warmup_epochs 5"),
    "warmup_lr": (0.1, "ours, mobilenetv3_large's; 0 there"),
    "min_lr": (4e-4, "ours, with a cosine: mobilenetv3_large's; 0.97 every 2.4 epochs there"),
    "task.label_smoothing": (0.1, "--label_smoothing 0.1"),
    "ema": (0.9999, "--moving_average_decay 0.9999"),
    "augmentation.interpolation": ("bicubic", "preprocessing.py: tf.image.resize_bicubic"),
    "augmentation.randaugment_ops": (2, "ours, for AutoAugment"),
    "augmentation.randaugment_magnitude": (9.0, "ours, for AutoAugment"),
    "augmentation.randaugment_std": (0.5, "ours, for AutoAugment"),
}

OURS = "ours: docs/results.md says what it gives"
FINETUNE: Table = (
    RUN
    | ADAMW
    | PLAIN
    | {
        "model": ("", "the weights' model"),
        "weights": ("auto", "from weights that have seen many, where they can be had"),
        "model_fields": ({}, OURS),
        "image_size": (None, "the weights' own"),
        "sizes": ((), OURS),
        "epochs": (30, OURS),
        "batch_size": (32, OURS),
        "lr": (5e-4, OURS),
        "layer_decay": (0.75, OURS),
        "weight_decay": (0.05, OURS),
        "warmup_epochs": (3, OURS),
        "warmup_lr": (1e-6, OURS),
        "min_lr": (1e-6, OURS),
        "clip_grad": (1.0, OURS),
        "task.label_smoothing": (0.1, OURS),
        "ema": (0.99, OURS),
        "repeats": (1, OURS),
        "precision": ("fp32", OURS),
        "eval_every": (2, OURS),
        "log_every": (5, OURS),
        "augmentation.scale": ((0.35, 1.0), OURS),
        "augmentation.color_jitter": (0.2, OURS),
        "augmentation.random_erasing": (0.1, OURS),
    }
)
DIGITS: Table = FINETUNE | {
    "weights": (None, OURS),
    "model": ("efficientvit_m0", OURS),
    "image_size": (64, OURS),
    "resize": ("squash", OURS),
    "epochs": (24, OURS),
    "batch_size": (64, OURS),
    "lr": (5e-3, OURS),
    "layer_decay": (1.0, OURS),
    "warmup_epochs": (2, OURS),
    "min_lr": (1e-5, OURS),
    "ema": (0.98, OURS),
    "eval_every": (6, OURS),
    "log_every": (20, OURS),
    "augmentation.scale": ((0.6, 1.0), OURS),
    "augmentation.flip": (0.0, "a mirrored digit is no digit"),
    "augmentation.color_jitter": (0.0, OURS),
    "augmentation.random_erasing": (0.0, OURS),
}
DIGITS_SEGMENT: Table = DIGITS | {
    "model": ("semantic_fpn/mobilenetv3_small", OURS),
    "head_fields": ({"fpn_dim": 32, "dim": 32}, "a narrow head, for minutes on a CPU"),
    "image_size": (128, OURS),
    "epochs": (20, OURS),
    "batch_size": (16, OURS),
    "lr": (3e-3, OURS),
    "eval_every": (5, OURS),
    "augmentation.scale": ((0.5, 1.0), OURS),
    "augmentation.interpolation": ("bilinear", OURS),
}
DIGITS_DETECT: Table = DIGITS_SEGMENT | {
    "model": ("faster_rcnn/mobilenetv3_small", OURS),
    "head_fields": (
        {
            "neck_dim": 64,
            "strides": (8, 16, 32),
            "anchor_sizes": (3.0,),
            "anchor_ratios": (1.0, 2.0),
            "box_dim": 256,
            "class_agnostic": True,
            "proposals_before_nms": (400, 200),
            "proposals": (200, 60),
            "proposal_samples": 64,
            "samples": 64,
        },
        "small images with few objects, for minutes on a CPU",
    ),
    "image_size": (160, OURS),
    "epochs": (7, OURS),
    "batch_size": (8, OURS),
    "lr": (2e-3, OURS),
    "warmup_epochs": (1, OURS),
    "eval_every": (7, OURS),
}
DIGITS_PAIRS: Table = DIGITS | {
    "model": ("clip/efficientvit_m0", OURS),
    "head_fields": (
        {
            "dim": 64,
            "text_dim": 64,
            "text_depth": 2,
            "text_heads": 2,
            "context": 12,
            "vocab_size": 600,
            "templates": ("a {}",),
        },
        "short captions of few words, for minutes on a CPU",
    ),
    "image_size": ((56, 80), "as wide as the images, which show a place"),
    "epochs": (10, OURS),
    "batch_size": (64, OURS),
    "lr": (4e-3, OURS),
    "warmup_epochs": (2, OURS),
    "eval_every": (5, OURS),
    "augmentation.scale": ((0.8, 1.0), OURS),
    "augmentation.ratio": ((1.1, 1.9), OURS),
}
CIFAR_M0: Table = DIGITS | {
    "val_fraction": (0.02, OURS),
    "epochs": (20, OURS),
    "max_minutes": (7.0, OURS),
    "batch_size": (128, OURS),
    "lr": (2e-3, OURS),
    "warmup_epochs": (0.5, OURS),
    "ema": (0.995, OURS),
    "eval_every": (2, OURS),
    "augmentation.crop": ("simple", OURS),
    "augmentation.padding": (8, OURS),
    "augmentation.interpolation": ("bilinear", OURS),
    "augmentation.scale": ((0.08, 1.0), "not used by this crop"),
    "augmentation.flip": (0.5, OURS),
}
CIFAR_VIT: Table = CIFAR_M0 | {
    "model": ("vit_tiny_patch16", OURS),
    "model_fields": ({"drop_path_rate": 0.05}, OURS),
    "epochs": (60, OURS),
    "max_minutes": (45.0, OURS),
    "lr": (1e-3, OURS),
    "warmup_epochs": (2, OURS),
    "ema": (0.998, OURS),
    "precision": ("bf16", OURS),
}


def named(base: Table, model: str) -> Table:
    return base | {"model": (model, "the script's model")}


def swin(size: str, drop_path: float) -> Table:
    told = {"model_fields": ({"drop_path_rate": drop_path}, "DROP_PATH_RATE of the size's yaml")}
    return named(SWIN, f"swin_{size}_patch4_window7") | told


SEGMENT: Table = FINETUNE | {
    "batch_size": (16, OURS),
    "lr": (1e-3, OURS),
    "layer_decay": (1.0, OURS),
    "warmup_epochs": (1, OURS),
    "eval_every": (5, OURS),
    "log_every": (10, OURS),
    "augmentation.scale": ((0.3, 1.0), OURS),
    "augmentation.ratio": ((0.9, 1.8), OURS),
    "augmentation.interpolation": ("bilinear", OURS),
    "augmentation.random_erasing": (0.0, "noise would stand over pixels with a class"),
}


DETECT: Table = SEGMENT | {
    "batch_size": (8, OURS),
    "clip_grad": (10.0, OURS),
    "resize": ("edges", "as detectors are fed"),
    "augmentation.crop": ("whole", "scale jitter takes parts by itself"),
    "augmentation.scale": ((0.08, 1.0), "not of crop whole"),
    "augmentation.ratio": ((3 / 4, 4 / 3), "not of crop whole"),
    "augmentation.scale_jitter": ((0.8, 1.25), OURS),
}


EFFICIENTDET: Table = DETECT | {
    "model": ("efficientdet/mobilenetv3_small", OURS),
    "lr": (2e-3, OURS),
    "head_fields": ({"norm_momentum": 0.1}, "official 0.01, for runs of many updates"),
}


DETR_SMALL: Table = DETECT | {
    "model": ("deformable_detr/resnet18", OURS),
    "head_fields": (
        {"refine": True, "two_stage": True, "num_queries": 100},
        "the paper's last row; as many queries as few objects need: ours",
    ),
    "epochs": (50, "table 1"),
    "lr": (2e-4, "section 5"),
    "weight_decay": (1e-4, "--weight_decay of the official script"),
    "clip_grad": (0.1, "--clip_max_norm of the official script"),
}


PANOPTIC_SMALL: Table = DETECT | {
    "model": ("detr_panoptic/resnet18", OURS),
    "epochs": (300, "--epochs of the official script"),
    "batch_size": (16, "section 4: 16 GPUs of 4 images; one of 16: ours"),
    "lr": (1e-4, "section 4, of the transformer"),
    "weight_decay": (1e-4, "section 4"),
    "clip_grad": (0.1, "--clip_max_norm of the official script"),
    "eval_every": (20, OURS),
}


# Sandler et al., section 4, as a reproduction repeats it (necrashter/transformers-learnable-memory, README).
MEMORY_SMALL: Table = FINETUNE | {
    "model": (
        "memory/vit_tiny_patch16",
        "the paper's are ViT-B/32, B/16 and L/32; a small one: ours",
    ),
    "train_only": (
        "capsule",
        "the network stays as it is; token, memory and classifier are trained",
    ),
    "head_fields": ({}, "five rows: between the paper's 1 and 20"),
    "optimizer": ("sgd", "SGD with momentum"),
    "momentum": (0.9, "SGD with momentum; its value: ours"),
    "lr": (0.05, OURS),
    "layer_decay": (1.0, "not in the paper"),
    "weight_decay": (0.0, "not in the paper"),
    "warmup_epochs": (0.3, "five updates: a third of an epoch of 500 images"),
    "warmup_lr": (0.0, "linear warm-up"),
    "min_lr": (0.0, OURS),
    "clip_grad": (1.0, "clipped gradient; its norm: ours"),
    "task.label_smoothing": (0.0, "not in the paper"),
    "ema": (0.0, "not in the paper"),
    "eval_every": (3, OURS),
    "augmentation.color_jitter": (0.0, "crops and flips alone"),
    "augmentation.random_erasing": (0.0, "crops and flips alone"),
}


TABLES: dict[str, Table] = {
    "deit_tiny": named(DEIT, "deit_tiny_patch16"),
    "deit_small": named(DEIT, "deit_small_patch16"),
    "cmt_ti": CMT_TI,
    "cmt_xs": CMT_XS,
    "cmt_s": CMT_S,
    "cmt_b": CMT_B,
    **{f"deepvit_{size}": named(DEEPVIT, f"deepvit_{size}") for size in ("s", "l")},
    **{f"deepvit_{depth}b": named(DEEPVIT, f"deepvit_{depth}b") for depth in (16, 24, 32)},
    **{f"efficientvit_m{i}": named(EFFICIENTVIT, f"efficientvit_m{i}") for i in range(6)},
    "swin_tiny": swin("tiny", 0.2),
    "swin_small": swin("small", 0.3),
    "swin_base": swin("base", 0.5),
    **{f"mobilevit_{size}": named(MOBILEVIT, f"mobilevit_{size}") for size in ("xxs", "xs", "s")},
    "mobilevitv2_050": mobilevitv2("050", 0.0090, 0.00090, 0.004),
    "mobilevitv2_075": mobilevitv2("075", 0.0090, 0.00090, 0.008),
    "mobilevitv2_100": mobilevitv2("100", 0.0075, 0.00075, 0.013),
    "mobilevitv2_125": mobilevitv2("125", 0.0049, 0.00049, 0.020),
    "mobilevitv2_150": mobilevitv2("150", 0.0035, 0.00035, 0.029),
    "mobilevitv2_175": mobilevitv2("175", 0.0026, 0.00026, 0.039),
    "mobilevitv2_200": mobilevitv2("200", 0.0020, 0.0002, 0.050),
    "mobilenetv3_large": MOBILENETV3,
    "efficientnet_b0": EFFICIENTNET,
    "finetune_small": FINETUNE,
    "segment_small": SEGMENT,
    "detect_small": DETECT,
    "efficientdet_small": EFFICIENTDET,
    "detr_small": DETR_SMALL,
    "panoptic_small": PANOPTIC_SMALL,
    "memory_small": MEMORY_SMALL,
    "digits": DIGITS,
    "digits_segment": DIGITS_SEGMENT,
    "digits_detect": DIGITS_DETECT,
    "digits_pairs": DIGITS_PAIRS,
    "cifar10_efficientvit_m0": CIFAR_M0,
    "cifar10_vit_tiny": CIFAR_VIT,
}


def settings(config: TrainConfig) -> dict[str, object]:
    """Every setting, those of the augmentation as "augmentation.NAME", of the task as "task.NAME"."""
    flat = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
    inner = {"augmentation": flat.pop("augmentation"), "task": Settings(**flat.pop("task"))}
    for group, of in inner.items():
        flat |= {f"{group}.{f.name}": getattr(of, f.name) for f in fields(of)}
    return flat


def test_the_tables_are_those_of_the_recipes_and_name_every_setting():
    assert TABLES.keys() == RECIPES.keys()
    for name, table in TABLES.items():
        assert table.keys() == settings(TrainConfig()).keys(), f"{name}: a setting without a source"
        assert all(source for _, source in table.values())


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_of_a_recipe_is_the_one_of_its_source(name):
    found, table = settings(recipe_config(name)), TABLES[name]
    wrong = [
        f"{setting} is {found[setting]!r}; {source}: {value!r}"
        for setting, (value, source) in table.items()
        if found[setting] != (pytest.approx(value) if isinstance(value, float) else value)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "updates"),
    [("mobilevit_s", 3000), ("mobilenetv3_large", 3000), ("mobilevitv2_100", 20_000)],
)
def test_a_warm_up_that_the_script_counts_in_updates_takes_as_many(name, updates):
    config = recipe_config(name)
    assert config.image_size is not None
    side = config.image_size
    scales = tuple((s, s) for s in config.sizes)
    plan = BatchPlan(
        length=IMAGENET, batch_size=config.batch_size, size=(side, side), scales=scales
    )
    epochs = math.ceil(config.warmup_epochs)
    made = sum(plan.steps(epoch) for epoch in range(epochs)) / epochs * config.warmup_epochs
    assert made == pytest.approx(updates, rel=0.02)


def test_what_a_recipe_leaves_to_the_model_is_what_the_script_says():
    def config(name):
        return backbone_entry(name).config

    # mobilevit.yaml: classifier_dropout 0.1, mit.dropout 0.1
    assert config("mobilevit_xxs").drop_rate == 0.1
    assert config("mobilevit_xxs").head_drop_rate == 0.1
    assert config("mobilenetv3_large").head_drop_rate == 0.2  # the paper's section 6.1
    # The paper: dropout 0.2; efficientnet_builder.py: survival_prob 0.8
    assert config("efficientnet_b0").head_drop_rate == 0.2
    assert config("efficientnet_b0").drop_path_rate == 0.2
