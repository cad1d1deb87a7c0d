"""CLIP's text transformer (Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", ICML 2021, section 2.4, https://arxiv.org/abs/2103.00020).

Blocks as a ViT's, but each token sees only those before it; so the last one, which ends the text, is what the
text says. It is normed and projected to the space that images share.

Where official code and this file differ: the merges of the byte-pair encoding are a part of the weights,
and a batch is as long as its longest text, not the whole context, which with such attention changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.backbones.text_tokens import SMALLEST, encode, learn_merges
from vitrail.layers.mlp import Mlp
from vitrail.ops.linear import Linear
from vitrail.registry import Tensors, rename_keys
from vitrail_runtime.errors import InputError

AT_ONCE = 10_000  # texts that are counted at a time


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    dim: int = 512  # of the space that images and texts share
    text_dim: int = 512  # width of the transformer
    text_depth: int = 12
    text_heads: int = 8
    text_mlp_ratio: float = 4.0
    text_act: Literal["gelu", "quick_gelu"] = "gelu"  # OpenAI's own weights are of the quick one
    context: int = 77  # tokens at most, the beginning and the end counted
    vocab_size: int = 49408
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.text_dim % self.text_heads:
            raise InputError(
                f"text_dim {self.text_dim} is no multiple of text_heads {self.text_heads}; each head has an "
                "equal part of it"
            )
        if self.context < 3:
            raise InputError(
                f"context is {self.context}, but a text has a beginning, a word and an end: at least 3"
            )
        if self.vocab_size < SMALLEST:
            raise InputError(
                f"vocab_size is {self.vocab_size}, but the bytes alone need {SMALLEST}"
            )


class QuickGelu(nn.Module):
    """x sigmoid(1.702 x), which stood for GELU in OpenAI's code."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class CausalAttention(nn.Module):
    """Each token sees itself and those before it. (B, L, C) -> same."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )


class TextBlock(nn.Module):
    """Attention, then MLP; each is pre-normed and added back. (B, L, C) -> same."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        dim = config.text_dim
        self.norm1 = nn.LayerNorm(dim, config.norm_eps)
        self.attn = CausalAttention(dim, config.text_heads)
        self.norm2 = nn.LayerNorm(dim, config.norm_eps)
        act = QuickGelu if config.text_act == "quick_gelu" else nn.GELU
        self.mlp = Mlp(dim, round(dim * config.text_mlp_ratio), act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TextTransformer(nn.Module):
    """Ids (B, L) of texts, each ended by the last id of the vocabulary -> (B, dim).

    merges: (M, 2) int32, which of them the vocabulary has; rows that it has not are -1.
    """

    merges: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.text_dim)
        self.pos_embed = nn.Parameter(torch.zeros(config.context, config.text_dim))
        self.blocks = nn.ModuleList([TextBlock(config) for _ in range(config.text_depth)])
        self.norm = nn.LayerNorm(config.text_dim, config.norm_eps)
        self.proj = nn.Linear(config.text_dim, config.dim, bias=False)
        none = torch.full((config.vocab_size - SMALLEST, 2), -1, dtype=torch.int32)
        self.register_buffer("merges", none)
        self._init_weights()

    def _init_weights(self) -> None:
        """As OpenAI's code does: the deeper, the smaller what is added."""
        width, depth = self.config.text_dim, self.config.text_depth
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        stds = {
            "qkv": width**-0.5,
            "fc1": (2 * width) ** -0.5,
            "proj": width**-0.5 * (2 * depth) ** -0.5,
            "fc2": width**-0.5 * (2 * depth) ** -0.5,
        }
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=stds[name.rpartition(".")[2]])
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.proj.weight, std=width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embed(ids) + self.pos_embed[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        last = (ids == self.config.vocab_size - 1).int().argmax(1)  # the first end of each
        return self.proj(self.norm(x[torch.arange(len(x), device=x.device), last]))

    def learn(self, texts: Sequence[str]) -> None:
        """Learn the vocabulary from these texts. Raises InputError where there is one already."""
        if self.knows_words:
            raise InputError("this model has a vocabulary already, which its weights belong to")
        self.take(learn_merges(texts, len(self.merges)))

    def take(self, merges: Sequence[Sequence[int]]) -> None:
        """Take a vocabulary, or as much of it as there is room for."""
        some = merges[: len(self.merges)]
        with torch.no_grad():
            self.merges.fill_(-1)
            if some:
                self.merges[: len(some)] = torch.tensor(some, dtype=torch.int32)

    @property
    def knows_words(self) -> bool:
        """Whether there is a vocabulary; without, a text is read byte by byte."""
        return bool((self.merges >= 0).any())

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Ids (B, L), zeros behind the end; L as the longest needs it, and at most the context."""
        ids, _ = self._encode(texts)
        longest = max(map(len, ids))
        padded = [row + [0] * (longest - len(row)) for row in ids]
        return torch.tensor(padded, device=self.merges.device)

    def too_long(self, texts: Sequence[str]) -> int:
        """How many texts are longer than the context, and are cut."""
        parts = range(0, len(texts), AT_ONCE)
        return sum(self._encode(texts[start : start + AT_ONCE])[1] for start in parts)

    def _encode(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        known = tuple((left, right) for left, right in self.merges.tolist() if left >= 0)
        return encode(texts, known, self.config.vocab_size, self.config.context)


def from_transformers(state: Tensors) -> Tensors:
    """Keys of transformers' CLIPTextModelWithProjection, or of the text part of its CLIPModel, to ours."""
    state = {k: v for k, v in state.items() if not k.endswith("position_ids")}
    out = rename_keys(
        state,
        (
            (r"^text_model\.", ""),
            (r"^embeddings\.token_embedding\.", "token_embed."),
            (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
            (r"^encoder\.layers\.", "blocks."),
            (r"\.self_attn\.out_proj\.", ".attn.proj."),
            (r"\.self_attn\.", ".attn."),
            (r"\.layer_norm([12])\.", r".norm\1."),
            (r"^final_layer_norm\.", "norm."),
            (r"^text_projection\.", "proj."),
        ),
    )
    for key in [k for k in out if k.endswith((".q_proj.weight", ".q_proj.bias"))]:
        parts = [out.pop(key.replace(".q_proj.", f".{which}_proj.")) for which in "qkv"]
        out[key.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    return out
