"""Two towers, one for images and one for texts, which say the same of an image and its caption: CLIP
(Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
arXiv 2103.00020) and, with the sigmoid loss, SigLIP (Zhai et al., ICCV 2023, arXiv 2303.15343).

The image tower is any backbone with the tail of its paper, which projects to the shared space; the text
tower is CLIP's transformer for both losses. Asked with class names, they are a classifier that has seen no
label.

Unlike the official codes: the image tower is a plain backbone (CLIP's ViT has a norm before its blocks, its
ResNet an attention pool), and SigLIP's text tower attends in both directions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.backbones.text import TextConfig, TextTransformer
from vitrail.classifiers import Classifier
from vitrail.features import Features
from vitrail.modes import eval_mode
from vitrail.ops.contrastive import sigmoid_pairs, softmax_pairs
from vitrail.packing import as_packed
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing

LARGEST_SCALE = 100.0  # of CLIP, section 2.5: "to prevent training instability"
AT_ONCE = 256  # texts in one forward, where there are many


@dataclass(frozen=True, kw_only=True)
class TowersConfig(TextConfig):
    """loss: over all pairs of a batch. scale, bias: what similarities are multiplied by and, under the
    sigmoid loss, moved by, before any training. templates: what a class name is put into, at its {}."""

    loss: Literal["softmax", "sigmoid"] = "softmax"
    scale: float = 1 / 0.07
    bias: float = 0.0
    templates: tuple[str, ...] = ("a photo of a {}",)

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [template for template in self.templates if template.count("{}") != 1]
        if wrong or not self.templates:
            raise InputError(
                f"templates are texts with one {{}} for the name of a class, but got {wrong or 'none'}"
            )
        if self.scale <= 0:
            raise InputError(f"scale must be above 0, but is {self.scale}")


class Pairs(nn.Module):
    """The loss over all pairs, and the numbers that it learns: log(scale), and a bias for the sigmoid.

    In one axis, because weights without one cannot be sharded.
    """

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), math.log(config.scale)))
        self.bias = None
        if config.loss == "sigmoid":
            self.bias = nn.Parameter(torch.full((1,), config.bias))

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()

    def forward(self, images: Tensor, texts: Tensor, *, alone: bool = False) -> Tensor:
        """This process's share of the sum over the pairs of all; alone: of these (`ops/contrastive.py`)."""
        if self.training:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(LARGEST_SCALE))
        if self.bias is None:
            return softmax_pairs(images, texts, self.scale, alone=alone)
        return sigmoid_pairs(images, texts, self.scale, self.bias, alone=alone)


class TwoTowers(nn.Module):
    """images (B, 3, H, W) -> embeddings (B, dim) of unit length, which those of their captions resemble.

    classes: names that it may be asked for; there may be none, and `zero_shot` asks for any.
    """

    task = "contrast"
    # Attached by models.create_model and load:
    info: Any
    weights_report: Any
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    def __init__(self, backbone: Any, tail: nn.Module, config: TowersConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.head = tail
        for (
            module
        ) in tail.modules():  # ViTs' tails start at zero, where no embedding has a direction
            if isinstance(module, nn.Linear) and module.out_features == config.dim:
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        self.text = TextTransformer(config)
        self.pairs = Pairs(config)

    def forward(self, images: Any, record: dict[str, Tensor] | None = None) -> Tensor:
        return unit(self.head(self.backbone(images, record=record)))

    def forward_tensors(
        self, images: Tensor, packing: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """{"embeddings": (B, dim)}: what is exported as it is.

        packing: where `images` are the patches of several (`vitrail.packing.as_packed`).
        """
        if packing is not None:
            return {"embeddings": self.forward_packed(as_packed(images, packing))}
        return {"embeddings": self(images)}

    def forward_packed(self, packed: Any) -> Tensor:
        """PackedImages of N images -> embeddings (N, dim), in the order of `packed`."""
        tower: Any = Classifier(self.backbone, self.head)
        return unit(tower.forward_packed(packed))

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (N, dim) of texts, of unit length."""
        parts = [texts[i : i + AT_ONCE] for i in range(0, len(texts), AT_ONCE)]
        said = [self.text(self.text.encode(part)) for part in parts]
        return unit(torch.cat(said))

    def losses(
        self, images: Tensor, targets: Any, *, packing: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """{"contrast": over all pairs of all processes' images and captions, this process's share}; divide by
        `weight(targets)`, of all processes.

        targets: the UTF-8 bytes of each image's caption, (B, length) or B tensors (length,).
        """
        embeddings = self.forward_tensors(images, packing)["embeddings"]
        return {"contrast": self.pairs(embeddings, self.embed(texts_of(targets)))}

    def weight(self, targets: Any) -> Tensor:
        """What the sums of `losses` are divided by: the number of pairs."""
        return torch.tensor(float(len(targets)), device=targets[0].device)

    @property
    def merges(self) -> list[list[int]]:
        """The vocabulary of the text tower: pairs of tokens that are one, in order."""
        return [pair for pair in self.text.merges.tolist() if pair[0] >= 0]

    @merges.setter
    def merges(self, merges: Sequence[Sequence[int]]) -> None:
        """A vocabulary that came with weights stays, because they are its words'."""
        if not self.text.knows_words:
            self.text.take(merges)


class NamedHead(nn.Module):
    """A tail, and the embeddings of names: Features -> (B, K), as alike as they are, times the scale."""

    names: Tensor
    scale: Tensor

    def __init__(self, tail: nn.Module, names: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.tail = tail
        self.register_buffer("names", names)
        self.register_buffer("scale", scale)

    def forward(self, features: Features) -> Tensor:
        images = unit(self.tail(features))
        return self.scale * images @ self.names.T


def zero_shot(
    model: TwoTowers, classes: Sequence[str] | None = None, templates: Sequence[str] | None = None
) -> Classifier:
    """A classifier of any classes, by their names alone (Radford et al., section 3.1.4).

    classes: None takes the model's own. templates: texts with {} for a name, whose embeddings are averaged;
    None takes those of the model's config. It shares the image tower's weights and has the text tower's
    answers as they are now. Raises InputError where no class is named.
    """
    names = tuple(model.classes if classes is None else classes)
    if not names:
        raise InputError(
            f"{model.info.name} answers to any names, but none are given and its captions came with none; "
            "say what to look for: --classes, or zero_shot(model, ['cat', 'dog'])"
        )
    if len(set(names)) < len(names):
        raise InputError(f"names to look for must differ, but are {', '.join(names)}")
    forms = model.config.templates if templates is None else templates
    with eval_mode(model), torch.no_grad():
        texts = [form.replace("{}", name) for name in names for form in forms]
        each = model.embed(texts).unflatten(0, (len(names), len(forms)))
        head = NamedHead(model.head, unit(each.mean(1)), model.pairs.scale.detach())
    out = Classifier(model.backbone, head).train(model.training)
    out.info = replace(model.info, classes=names)
    out.classes, out.preprocessing = names, model.preprocessing
    return out


def unit(x: Tensor) -> Tensor:
    """Rows of length one, in float32 at least: 16 bits are too few to compare by."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def texts_of(targets: Any) -> list[str]:
    """Captions from their UTF-8 bytes."""
    return [bytes(caption.tolist()).decode() for caption in targets]
