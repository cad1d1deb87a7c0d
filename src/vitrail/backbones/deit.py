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

from vitrail.backbones.vit import BASE, SMALL, TINY, ViT, ViTConfig, ViTHead, smallest
from vitrail.backbones.vit import LAYOUTS as VIT_LAYOUTS
from vitrail.backbones.vit_keys import (
    HUGGINGFACE_EMBEDDING,
    TIMM_MARKS,
    from_huggingface,
    from_timm,
    resample_to,
)
from vitrail.features import Features, FeatureSpec
from vitrail.registry import Layout, register_backbone
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


register_backbone(
    DeiT,
    VARIANTS,
    tiny=smallest(ViTConfig, distillation_token=True),
    layouts=LAYOUTS,
    tail=deit_tail,
    resample=resample_to,
    preprocessing=Preprocessing(crop_pct=0.9),
)
