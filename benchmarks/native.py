"""Images at their own size: a packed ViT beside padded batches and single images.

python benchmarks/native.py --data $DATA/native [--quick] [--model NAME] [--threads N] [--json FILE]

Images drawn at random keep their ratio, their long side at most 512 pixels. All forms get the same ones:
timm's NaFlexViT of the same shape with patches padded to the longest, our ViT with a key mask on such a
batch, and our ViT on one image at a time. vit-pytorch's NaViT is not compared: it is not among what
`make test` installs.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vitrail.bench.harness import arguments, compare, report, threads
from vitrail.models import create_model
from vitrail.packing import PackedImages, pack, patch_grid
from vitrail_runtime.preprocess import Preprocessing, normalise

LONG, PATCH, CLASSES = 512, 16, 1000
Step = Callable[[], object]
Parts = Callable[
    [], Iterable[Tensor]
]  # logits of the images, in order, in as many parts as forwards


def read(folder: Path, count: int) -> list[Tensor]:
    """So many images drawn at random, normalised, no longer than 512 pixels."""
    with (folder / "labels.csv").open() as file:
        names = [row["file"] for row in csv.DictReader(file)]
    images = []
    for i in np.random.default_rng(0).permutation(len(names))[:count]:
        image = Image.open(folder / names[i]).convert("RGB")
        image.thumbnail((LONG, LONG), Image.Resampling.BICUBIC)
        images.append(torch.from_numpy(normalise(np.asarray(image), Preprocessing())))
    return images


def padded_to_longest(packed: PackedImages) -> tuple[Tensor, Tensor, Tensor]:
    """Patches (N, L, 3 * p * p), their (row, column) (N, L, 2), and which are none's padding (N, L)."""
    longest = max(packed.lengths)
    patches = packed.patches.new_zeros(len(packed.lengths), longest, packed.patches.shape[1])
    places = torch.zeros(*patches.shape[:2], 2, dtype=torch.long)
    keep = torch.zeros(*patches.shape[:2], dtype=torch.bool)
    pieces = zip(packed.patches.split(packed.lengths), packed.grids, strict=True)
    for i, (piece, (h, w)) in enumerate(pieces):
        patches[i, : h * w], keep[i, : h * w] = piece, True
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        places[i, : h * w] = torch.stack([rows, columns], -1).flatten(0, 1)
    return patches, places, keep


def masked(model: Any, patches: Tensor, grids: tuple, keep: Tensor) -> Tensor:
    """Our ViT on a padded batch: keys that are padding are masked."""
    vit = model.backbone
    x = vit.patch_embed.project(patches)
    table = x.new_zeros(x.shape)
    for row, (h, w) in zip(table, grids, strict=True):
        row[: h * w] = vit.positions((h, w))[0]
    x = torch.cat([vit.prefix().expand(len(x), -1, -1), x + table], 1)
    mask = F.pad(keep, (vit.num_prefix_tokens, 0), value=True)[:, None, None]
    for block in vit.blocks:
        q, k, v = block.attn.heads(block.attn.qkv(block.norm1(x)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + block.ls1(block.attn.proj(out.transpose(1, 2).flatten(2)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.head.fc(vit.norm(x)[:, 0])


def forwards(
    flags: argparse.Namespace,
) -> tuple[dict[str, tuple[nn.Module, Parts]], dict[str, Any]]:
    """By name: a model, and what gives its logits on the images; and facts."""
    images = read(flags.data, flags.images)
    (packed,) = pack(images, PATCH, max_tokens=10**6)
    patches, places, keep = padded_to_longest(packed)
    # The patch's numbers as timm has them: row, column, channel.
    theirs = patches.unflatten(2, (3, PATCH, PATCH)).permute(0, 1, 3, 4, 2).flatten(2).contiguous()
    own = [images[i][None] for i in packed.image_ids]
    model = create_model(flags.model, num_classes=CLASSES)
    c = model.backbone.config
    shape = {"embed_dim": c.embed_dim, "depth": c.depth, "num_heads": c.num_heads}
    naflex = timm.create_model("naflexvit_base_patch16_gap", **shape, num_classes=CLASSES)
    given = {"patches": theirs, "patch_coord": places, "patch_valid": keep}
    facts = {
        "images": len(own),
        "tokens": sum(packed.lengths) + len(own),
        "padding of the batch": round(1 - keep.float().mean().item(), 3),
        "sizes": [patch_grid(size, PATCH) for size in packed.sizes],
    }
    return {
        "packed": (model, lambda: [model.forward_packed(packed)]),
        "timm NaFlexViT, padded": (naflex, lambda: [naflex(given)]),
        "our ViT, padded with a key mask": (
            model,
            lambda: [masked(model, patches, packed.grids, keep)],
        ),
        "our ViT, one image at a time": (model, lambda: (model(x) for x in own)),
    }, facts


def training(model: nn.Module, parts: Parts, count: int) -> Step:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    labels = torch.arange(count)

    def step() -> None:
        model.train()
        optimiser.zero_grad(set_to_none=True)
        start = 0
        for logits in parts():
            own = labels[start : start + len(logits)]
            (F.cross_entropy(logits, own, reduction="sum") / count).backward()
            start += len(logits)
        optimiser.step()

    return step


def inference(model: nn.Module, parts: Parts) -> Step:
    def step() -> None:
        model.eval()
        with torch.inference_mode():
            for _ in parts():
                pass

    return step


def peak(flags: argparse.Namespace, name: str, what: str) -> float:
    """Peak memory of a process that takes one such step, in GB."""
    command = [sys.executable, __file__, "--data", str(flags.data), "--model", flags.model]
    command += ["--images", str(flags.images)]
    done = subprocess.run(
        [*command, "--only", name, what], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = arguments(__doc__.split("\n")[0], threads=2)
    parser.add_argument("--data", type=Path, required=True, help="the folder of labels.csv")
    parser.add_argument("--model", default="vit_small_patch16")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    found, facts = forwards(flags)
    steps = {
        "training": {n: training(m, f, facts["images"]) for n, (m, f) in found.items()},
        "inference": {n: inference(m, f) for n, (m, f) in found.items()},
    }
    if flags.only:
        name, what = flags.only
        steps[what][name]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
        return
    rows = []
    memory = {}
    how = {"clock": flags.clock, "warmup": 1, "seconds": 5 if flags.quick else 120}
    how["min_rounds"] = 1 if flags.quick else 3
    with threads(flags.threads):
        for what, calls in steps.items():
            for name, call in calls.items():
                memory[f"{what}, {name}"] = None if flags.quick else peak(flags, name, what)
                if name != "packed":
                    row = compare(f"{what}: packed / {name}", calls["packed"], call, **how)
                    rate = 1000 * facts["images"] / row.ours
                    print(f"{row.name}: {row.ratio:.2f}x, {rate:.2f} images/s packed", flush=True)
                    rows.append(row)
        facts |= {"what": f"{flags.model}, fp32", "peak GB": memory}
        print(json.dumps(facts))
        report(rows, json_file=flags.json, clock=flags.clock, **facts)


if __name__ == "__main__":
    main()
