"""DeiT (Touvron et al., "Training data-efficient image transformers & distillation through attention",
ICML 2021, https://arxiv.org/abs/2012.12877).

A plain ViT learns from ImageNet alone when the training is right. With a teacher, a second learned token, the
distillation token, travels beside the class token: its own classifier answers the teacher's label, the class
token's the true one, and the two answers are averaged at test time.

Unlike the official code: the head averages in training too, and `both` gives the two answers for the loss.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from vitrail.backbones.vit import (
    BASE,
    SMALL,
    TINY,
    ViT,
    ViTConfig,
    ViTHead,
)
from vitrail.backbones.vit import LAYOUTS as VIT_LAYOUTS
from vitrail.backbones.vit_keys import (
    HUGGINGFACE_EMBEDDING,
    TIMM_MARKS,
    from_huggingface,
    from_timm,
    resample_to,
)
from vitrail.features import Features, FeatureSpec
from vitrail.registry import Layout, Published, register_backbone
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing

PLAIN = {"deit_tiny": TINY, "deit_small": SMALL, "deit_base": BASE}  # Table 1
VARIANTS = {f"{name}_patch16": size for name, size in PLAIN.items()} | {
    f"{name}_distilled_patch16": replace(size, distillation_token=True)
    for name, size in PLAIN.items()
}


class DeiT(ViT):
    """A ViT; its config says whether there is a distillation token."""


class DistilledHead(nn.Module):
    """One zero-initialised linear classifier per token. Features -> (B, num_classes), their mean."""

    def __init__(
        self, config: ViTConfig, specs: Mapping[str, FeatureSpec], num_classes: int
    ) -> None:
        super().__init__()
        if (config.pool, config.head) != ("token", "linear"):
            raise InputError(
                f"pool={config.pool!r}, head={config.head!r}: with a distillation token the head is one "
                "linear layer per token; leave both fields, or take the model without distillation"
            )
        self.fc = nn.Linear(config.embed_dim, num_classes)
        self.fc_dist = nn.Linear(config.embed_dim, num_classes)
        for layer in (self.fc, self.fc_dist):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Features) -> Tensor:
        from_class, from_teacher = self.both(features)
        return (from_class + from_teacher) / 2

    def both(self, features: Features) -> tuple[Tensor, Tensor]:
        """Logits of the class token, for the true label, and of the distillation token, for the teacher's."""
        assert features.prefix is not None
        return self.fc(features.prefix[:, 0]), self.fc_dist(features.prefix[:, 1])


def deit_tail(config: ViTConfig, specs: Mapping[str, FeatureSpec], num_classes: int) -> nn.Module:
    """Two classifiers where there is a distillation token, ViT's head otherwise."""
    head = DistilledHead if config.distillation_token else ViTHead
    return head(config, specs, num_classes)


LAYOUTS = {
    "timm": Layout(from_timm, TIMM_MARKS, source="DeiT's official files, timm"),
    "huggingface_plain": VIT_LAYOUTS["huggingface"],
    "huggingface": Layout(
        from_huggingface,
        (f"deit.{HUGGINGFACE_EMBEDDING}", "deit.embeddings.distillation_token"),
        may_leave=("deit.pooler.*",),
        source="Hugging Face DeiTForImageClassificationWithTeacher",
    ),
    "huggingface_base": replace(VIT_LAYOUTS["huggingface_base"], source="Hugging Face DeiTModel"),
}

README = "the official README"
NO_MACS = "no multiply-adds are given"
PUBLISHED = {
    "deit_tiny_patch16": Published(
        params=5,
        macs=1.3,
        top1=72.2,
        source=f"{README}; multiply-adds: table 3 of the MobileViT paper",
        params_note="digits are cut there and the classifier is left out: 5.52 M without it",
    ),
    "deit_small_patch16": Published(
        params=22,
        macs=4.6,
        top1=79.9,
        source=f"{README}; multiply-adds: the Swin paper's table 1",
        remark="the paper's table 5 has 79.8 %",
    ),
    "deit_base_patch16": Published(
        params=86,
        macs=17.5,
        top1=81.8,
        source=f"{README}; multiply-adds: the Swin paper's table 1",
        params_note="the classifier is left out there: 85.80 M without it",
    ),
    "deit_tiny_distilled_patch16": Published(
        params=6,
        top1=74.5,
        source=README,
        params_note="rounded to whole millions there",
        remark=NO_MACS,
    ),
    "deit_small_distilled_patch16": Published(params=22, top1=81.2, source=README, remark=NO_MACS),
    "deit_base_distilled_patch16": Published(params=87, top1=83.4, source=README, remark=NO_MACS),
}

register_backbone(
    DeiT,
    VARIANTS,
    tiny=ViTConfig(
        embed_dim=32,
        depth=2,
        num_heads=2,
        patch_size=8,
        image_size=32,
        mlp_ratio=2.0,
        drop_path_rate=0.1,
        distillation_token=True,
    ),
    layouts=LAYOUTS,
    tail=deit_tail,
    resample=resample_to,
    preprocessing=Preprocessing(crop_pct=0.9),
    published=PUBLISHED,
)
