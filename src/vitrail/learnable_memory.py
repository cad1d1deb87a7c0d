"""A ViT with learnable memory (Sandler et al., "Fine-tuning Image Transformers using Learnable Memory", CVPR
2022, https://arxiv.org/abs/2203.15243).

A new task is learnt beside a ViT that stays as it is: every block gets a few rows, its memory, which tokens
attend to but which do not attend and are not handed on; a class token of the task reads the image, and a
linear layer reads the token. What a task owns is a hundredth of the network, and the network serves many.

Two forms. "full" is the paper's plain method: all tokens of the network attend to the memory, and its class
token is learnt, so that another task changes every answer. "masked" (section 3.3) lets the task's own class
token alone see memory and image, and nobody sees it: the network runs as if there were no task, hands out
keys and values, and a second stream of one token reads them. Then its answers stay the same to the last bit.

Unlike vit-pytorch's module, which is a field's choice each: memory passes the block's norm like a token, as
in the paper; the token starts from the network's own class token; the classifier reads it behind the
network's final norm. There is no official code; what is said of the paper here, sections included, is from
memory and from a reproduction (github.com/necrashter/transformers-learnable-memory, README).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrail.backbones.vit import Block, KeysValues, ViT, ViTConfig
from vitrail.classifiers import Classifier
from vitrail.configuration import check_choices
from vitrail_runtime.errors import InputError, listed

STD = 0.02  # of new memory, section 4
# Names of the backbones that can: the plain ViTs.
PLAIN = ("vit_*", "deit_*", "flexivit_*", "deepvit_*", "navit_*", "naflexvit_*")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """rows: of memory in each block; 0: a class token alone.
    form: "masked", the network does not see the task; "full", all of it attends to the memory.
    start: what the learnt token is added to: the network's class token, or nothing.
    norm_memory: whether memory passes the block's norm, as tokens do.
    norm: before the classifier: the network's final one, or the task's own.
    """

    rows: int = 5
    form: Literal["masked", "full"] = "masked"
    start: Literal["class", "zero"] = "class"
    norm_memory: bool = True
    norm: Literal["backbone", "own"] = "backbone"

    def __post_init__(self) -> None:
        check_choices(self, where="memory")
        for name, kind in (("rows", int), ("norm_memory", bool)):
            if type(value := getattr(self, name)) is not kind:
                raise InputError(f"{name} of memory must be {kind.__name__}, but is {value!r}")
        if self.rows < 0:
            raise InputError(f"rows of memory must be 0 or more, but are {self.rows}")
        if not self.rows and not self.norm_memory:
            raise InputError("norm_memory is about memory, but rows is 0; leave it away")
        if self.form == "full" and (self.start, self.norm_memory, self.norm) != (
            "class",
            True,
            "backbone",
        ):
            raise InputError(
                "form='full' learns the network's own class token, behind its own norms: start, norm_memory "
                "and norm are for form='masked'; leave them away"
            )


class MemoryHead(nn.Module):
    """All that a task owns: its class token (C,), memory (depth, rows, C), a norm where it has its own, and
    the classifier.

    base: of the network that it reads. The answers start at zero; in the masked form with start "class" the
    token starts as the network's, in the full form the class token starts unchanged.
    """

    def __init__(self, config: MemoryConfig, base: ViTConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        dim = base.embed_dim
        self.token = nn.Parameter(torch.zeros(dim))
        if config.start == "zero":
            nn.init.normal_(self.token, std=STD)
        self.memory = None
        if config.rows:
            self.memory = nn.Parameter(torch.zeros(base.depth, config.rows, dim))
            nn.init.normal_(self.memory, std=STD)
        self.norm = nn.LayerNorm(dim, base.norm_eps) if config.norm == "own" else None
        self.fc = nn.Linear(dim, num_classes)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(
        self,
        backbone: ViT,
        keys_values: Sequence[KeysValues | None],
        *,
        others: Sequence[Sequence[KeysValues]] | None = None,
        handed: list[KeysValues] | None = None,
    ) -> Tensor:
        """The masked form: what each block of the network handed out for B images -> logits (B, num_classes).

        others: for each block what earlier tasks offer, where this one reads them ("extension", section 3.3).
        handed: a list to which, block by block, what this task offers is appended: its token and its memory.
        """
        tokens = self.begin(backbone)
        for i, kv in enumerate(keys_values):
            earlier = () if others is None else others[i]
            tokens = self.read(backbone, i, tokens, kv, *earlier, handed=handed)
        return self.answer(backbone, tokens)

    def begin(self, backbone: ViT) -> Tensor:
        """The task's class token before the first block, the same for every image: (1, 1, C)."""
        if self.config.form == "full":
            raise InputError("memory of form='full' is no stream of its own; take form='masked'")
        token = self.token.expand(1, 1, -1)
        if self.config.start == "class":
            prefix = backbone.prefix()
            assert prefix is not None
            token = token + prefix[:, :1]
        return token

    def read(
        self,
        backbone: ViT,
        index: int,
        tokens: Tensor,
        kv: KeysValues | None,
        *others: KeysValues,
        handed: list[KeysValues] | None = None,
    ) -> Tensor:
        """One block, which hands out kv for B images: (1 or B, 1, C) -> (B, 1, C)."""
        assert kv is not None
        block: Any = backbone.blocks[index]
        memory, own = self.offered(block, index), []
        tokens = tokens.expand(kv.keys.shape[0], -1, -1)
        tokens = block.cross(tokens, kv, memory, *others, keys_values=own)
        if handed is not None:
            handed.append(own[0] if memory is None else _joined(own[0], memory))
        return tokens

    def answer(self, backbone: ViT, tokens: Tensor) -> Tensor:
        """The task's class token behind the last block (B, 1, C) -> logits (B, num_classes)."""
        norm = backbone.norm if self.norm is None else self.norm
        return self.fc(norm(tokens[:, 0]))

    def offered(self, block: Block, index: int) -> KeysValues | None:
        """Keys and values of a block's memory, the same for every image."""
        if self.memory is None:
            return None
        rows = self.memory[index]
        return block.keys_values(rows) if self.config.norm_memory else block.attn.keys_values(rows)


class Readers(list[KeysValues | None]):
    """What a pass of the network appends to (`keys_values`): tasks read what each block hands out at
    once, and nothing is kept. Of a ViT-Ti and 8 images of 224 x 224 it would be 43 MB until the pass is over.
    """

    def __init__(self, backbone: ViT, heads: Iterable[MemoryHead]) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, tuple(heads)
        self.tokens = [head.begin(backbone) for head in self.heads]
        self.block = 0  # the next one's number

    def append(self, kv: KeysValues | None) -> None:
        self.tokens = [
            head.read(self.backbone, self.block, tokens, kv)
            for head, tokens in zip(self.heads, self.tokens, strict=True)
        ]
        self.block += 1

    def answers(self) -> list[Tensor]:
        """Logits (B, num_classes) of each task, once the pass is over."""
        pairs = zip(self.heads, self.tokens, strict=True)
        return [head.answer(self.backbone, tokens) for head, tokens in pairs]


def _joined(of_images: KeysValues, of_all: KeysValues) -> KeysValues:
    batch = of_images.keys.shape[0]
    pairs = zip(of_images, of_all, strict=True)
    return KeysValues(*(torch.cat([a, b.expand(batch, -1, -1, -1)], dim=2) for a, b in pairs))


class MemoryClassifier(Classifier):
    """images (B, 3, H, W) -> logits (B, num_classes): a plain ViT, and a task with its memory beside it.

    In the masked form no gradient reaches what is frozen of the backbone, nor is a graph built for it.
    """

    capsule = ("head",)  # what `freeze` leaves to be trained
    takes_packs = False
    reads = "keys and values, which packs do not hand out"
    backbone: ViT
    head: MemoryHead

    def forward(
        self,
        images: Tensor,
        record: dict[str, Tensor] | None = None,
        *,
        patch_size: int | None = None,
    ) -> Tensor:
        head = self.head
        if head.config.form == "full":
            features = self.backbone(
                images,
                record,
                memory=None if head.memory is None else list(head.memory),
                class_offset=head.token,
                patch_size=patch_size,
            )
            assert features.prefix is not None
            return head.fc(features.prefix[:, 0])
        readers = Readers(self.backbone, [head])
        self.backbone(images, record, keys_values=readers, patch_size=patch_size)
        return readers.answers()[0]

    def forward_packed(self, packed: Any) -> Tensor:
        raise InputError(
            "a task with memory cannot take packed images, which hand out no keys and values; group images "
            "by size, as vitrail.Predictor does"
        )


def build(backbone: nn.Module, config: MemoryConfig, num_classes: int) -> MemoryClassifier:
    """Raises InputError for a backbone that is no plain ViT, or lacks what the config asks for."""
    base = check_base(backbone, config)
    return MemoryClassifier(base, MemoryHead(config, base.config, num_classes))


def check_base(backbone: nn.Module, config: MemoryConfig) -> ViT:
    """The backbone, where memory can stand beside it. Raises InputError otherwise."""
    if not isinstance(backbone, ViT):
        raise InputError(
            "memory is read by the class token of a plain ViT, which this backbone is not; those that are: "
            f"{', '.join(PLAIN)}, such as vit_tiny_patch16"
        )
    name = type(backbone).__name__
    if config.start == "class" and backbone.cls_token is None:
        raise InputError(
            f"this {name} has no class token for the task's to start from; give start='zero' "
            "(--head-fields start=zero), or a backbone that has one"
        )
    if config.norm == "backbone" and isinstance(backbone.norm, nn.Identity):
        raise InputError(f"this {name} has no final norm; give norm='own' (--head-fields norm=own)")
    blocks: Any = backbone.blocks
    silent = [str(i) for i, block in enumerate(blocks) if block.attn is None]
    if silent:
        raise InputError(
            f"blocks {listed(silent)} of this {name} do not attend, and would not read their memory; take "
            "one whose blocks all attend"
        )
    return backbone
