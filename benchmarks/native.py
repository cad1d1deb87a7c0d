"""Images at their own size: a packed ViT beside padded batches, vit-pytorch's NaViT and single images.

python benchmarks/native.py --data $DATA/native --threads 2 --minutes 6 [--bf16] [--images 16] [--quick]
    [--model NAME] [--max-tokens N] [--kinds training] [--settle N] [--clock cpu] [--json FILE]

Images drawn at random from all keep their ratio, their long side at most 512 pixels. Every form gets the
same ones, in one process, in turn, in training steps (forward, backward, AdamW), in inference, and in
inference from the files on (decoding, resizing, cutting into patches):

packed: our ViT on packs of at most --max-tokens.
timm NaFlexViT: of the same shape, in one batch; patches padded to the longest sequence.
padded: our ViT on one batch of images padded to one height and width, keys that are padding masked.
vit-pytorch NaViT: of the same shape, grouped by itself in sequences of at most 2,048 tokens (its default).
Left out where that package is missing: `make test` does not install it.
single: our ViT, one image at a time.

That packed, padded and single give the same logits is checked first. Peaks of memory are above what the
process holds before a step (Linux). ViT-S/16, fp32 (--bf16: autocast for all). --minutes is the whole time,
about; 16 images are about 10,000 tokens, so a round of training may take longer than its share, and is done
once at least. With --settle N a form runs so often before each run that counts: what another form has given
back to the system it must fetch again, which costs those of large tensors most.
"""

import argparse
import csv
import ctypes
import gc
import statistics
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vitrail.bench.harness import Row, arguments, interleave, report, summary, threads
from vitrail.features import pad_to_multiple
from vitrail.models import create_model
from vitrail.packing import PackedImages, pack, patch_grid, to_patches
from vitrail_runtime.preprocess import Preprocessing, normalise

LONG, PATCH, CLASSES = 512, 16, 1000
KINDS = ("inference", "from files", "training")


@dataclass(frozen=True)
class Form:
    """prepare: images -> what forward takes. forward: -> logits, in as many parts as forwards, and the places
    of the images that they are of."""

    model: nn.Module
    prepare: Callable[[list[Tensor]], Any]
    forward: Callable[[Any], Iterable[tuple[Tensor, list[int]]]]


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


def to_longest(images: list[Tensor]) -> dict[str, Tensor]:
    """What timm takes: patches (N, L, p * p * 3), their (row, column), and which are none's padding."""
    grids = [patch_grid((x.shape[1], x.shape[2]), PATCH) for x in images]
    longest = max(h * w for h, w in grids)
    patches = torch.zeros(len(images), longest, 3 * PATCH**2)
    places = torch.zeros(len(images), longest, 2, dtype=torch.long)
    keep = torch.zeros(len(images), longest, dtype=torch.bool)
    for i, (image, (h, w)) in enumerate(zip(images, grids, strict=True)):
        # The patch's numbers as timm has them: row, column, channel.
        cut = to_patches(image, PATCH).unflatten(1, (3, PATCH, PATCH)).permute(0, 2, 3, 1)
        patches[i, : h * w], keep[i, : h * w] = cut.flatten(1), True
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        places[i, : h * w] = torch.stack([rows, columns], -1).flatten(0, 1)
    return {"patches": patches, "patch_coord": places, "patch_valid": keep}


def to_canvas(images: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Images in one tensor as large as the largest of each axis, and their grids."""
    grids = [patch_grid((x.shape[1], x.shape[2]), PATCH) for x in images]
    height, width = (PATCH * max(side) for side in zip(*grids, strict=True))
    canvas = torch.zeros(len(images), 3, height, width)
    for row, image in zip(canvas, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return canvas, grids


def masked(model: Any, canvas: Tensor, grids: list[tuple[int, int]]) -> Tensor:
    """Our ViT on a padded batch: keys that are padding are masked."""
    vit = model.backbone
    x = vit.patch_embed(canvas).permute(0, 2, 3, 1)  # (N, h, w, C)
    table = x.new_zeros(x.shape)
    keep = torch.zeros(x.shape[:3], dtype=torch.bool)
    for i, (h, w) in enumerate(grids):
        table[i, :h, :w] = vit.positions((h, w))[0].unflatten(0, (h, w))
        keep[i, :h, :w] = True
    x = (x + table).flatten(1, 2)
    x = torch.cat([vit.prefix().expand(len(x), -1, -1), x], 1)
    mask = F.pad(keep.flatten(1), (vit.num_prefix_tokens, 0), value=True)[:, None, None]
    for block in vit.blocks:
        q, k, v = block.attn.heads(block.attn.qkv(block.norm1(x)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + block.ls1(block.attn.proj(out.transpose(1, 2).flatten(2)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.head.fc(vit.norm(x)[:, 0])


def forms(flags: argparse.Namespace) -> dict[str, Form]:
    model = create_model(flags.model, num_classes=CLASSES)
    nn.init.normal_(model.head.fc.weight, std=0.02)  # zeros would tell nothing
    c = model.backbone.config
    shape = {"embed_dim": c.embed_dim, "depth": c.depth, "num_heads": c.num_heads}
    naflex = timm.create_model("naflexvit_base_patch16_gap", **shape, num_classes=CLASSES)
    every = [*range(flags.images)]

    def packs(images: list[Tensor]) -> list[PackedImages]:
        return pack(images, PATCH, flags.max_tokens, model.backbone.num_prefix_tokens)

    found = {
        "packed": Form(
            model,
            packs,
            lambda given: ((model.forward_packed(p), list(p.image_ids)) for p in given),
        ),
        "timm NaFlexViT": Form(naflex, to_longest, lambda given: [(naflex(given), every)]),
        "padded": Form(model, to_canvas, lambda given: [(masked(model, *given), every)]),
        "single": Form(
            model,
            lambda images: [image[None] for image in images],
            lambda given: ((model(x), [i]) for i, x in enumerate(given)),
        ),
    }
    if find_spec("vit_pytorch") is not None:
        from vit_pytorch.na_vit import NaViT

        theirs = NaViT(
            image_size=LONG,
            patch_size=PATCH,
            num_classes=CLASSES,
            dim=c.embed_dim,
            depth=c.depth,
            heads=c.num_heads,
            mlp_dim=4 * c.embed_dim,
        )
        found["vit-pytorch NaViT"] = Form(
            theirs,
            lambda images: [pad_to_multiple(image, PATCH) for image in images],
            lambda given: [(theirs(given, group_images=True), every)],
        )
    return found


def train_step(form: Form, given: Any, optimiser: torch.optim.Optimizer, bf16: bool) -> None:
    form.model.train()
    optimiser.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for logits, ids in form.forward(given):
            F.cross_entropy(logits.float(), torch.tensor(ids), reduction="sum").backward()
    optimiser.step()


def infer(form: Form, given: Any, bf16: bool) -> Tensor:
    """Logits of the images in their order."""
    form.model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        parts = list(form.forward(given))
    order = torch.tensor([i for _, ids in parts for i in ids]).argsort()
    return torch.cat([logits for logits, _ in parts])[order].float()


def peak(call: Callable[[], object]) -> float | None:
    """Largest memory during a call, above what the process held before, in MB; None where it is not told."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # or what was freed would count as held
    try:
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        call()
        return round(_status("VmHWM") - before)
    except OSError:
        call()
        return None


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name)) / 1e3


def measure(flags: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """A row for each form beside packed, and what is known of all."""
    images, found = read(flags.data, flags.images), forms(flags)
    given = {name: form.prepare(images) for name, form in found.items()}
    logits = {n: infer(found[n], given[n], False) for n in ("packed", "padded", "single")}
    for other in ("padded", "single"):
        torch.testing.assert_close(logits["packed"], logits[other], atol=1e-4, rtol=1e-4)
    rates = {n: torch.optim.AdamW(form.model.parameters(), lr=1e-5) for n, form in found.items()}
    kinds: dict[str, tuple[float, Callable[[str], Callable[[], object]]]] = {
        "inference": (0.2, lambda n: partial(infer, found[n], given[n], flags.bf16)),
        "from files": (
            0.15,
            lambda n: (
                lambda: infer(
                    found[n], found[n].prepare(read(flags.data, flags.images)), flags.bf16
                )
            ),
        ),
        "training": (0.4, lambda n: partial(train_step, found[n], given[n], rates[n], flags.bf16)),
    }
    rows, cells = [], []
    for what in flags.kinds:
        share, call = kinds[what]
        calls = {name: call(name) for name in found}
        memory = {name: peak(one) for name, one in calls.items()}  # and warms up
        seconds = 0 if flags.quick else 60 * flags.minutes * share
        how = {"seconds": seconds, "min_rounds": 1, "warmup": 0, "settle": flags.settle}
        times = dict(
            zip(calls, interleave([*calls.values()], clock=flags.clock, **how), strict=True)
        )
        for name, taken in times.items():
            cells.append(
                {
                    "what": what,
                    "form": name,
                    "images_per_second": round(flags.images / statistics.median(taken), 3),
                    "peak_mb": memory[name],
                }
            )
            print(cells[-1], flush=True)
            if name != "packed":
                rows.append(beside(f"{what}: packed / {name}", times["packed"], taken))
    tokens = [h * w for h, w in given["padded"][1]]
    canvas = given["padded"][0][0, 0].numel() // PATCH**2
    facts = {
        "what": f"{flags.model}, {'bf16' if flags.bf16 else 'fp32'}, {flags.images} images",
        "patches": sum(tokens),
        "packs": len(given["packed"]),
        "padding, longest sequence": round(1 - statistics.fmean(tokens) / max(tokens), 3),
        "padding, largest sides": round(1 - statistics.fmean(tokens) / canvas, 3),
        "forms": cells,
    }
    return rows, facts


def beside(name: str, ours: list[float], peer: list[float]) -> Row:
    """How many times as fast ours is: of the least times, which other programs disturb least."""
    (own, own_spread), (other, other_spread) = summary(ours), summary(peer)
    return Row(
        name=name,
        ours=own,
        ours_spread=own_spread,
        peer=other,
        peer_spread=other_spread,
        ratio=round(min(peer) / min(ours), 3),
        rounds=len(ours),
    )


def main() -> None:
    parser = arguments((__doc__ or "").split("\n")[0], threads=2)
    parser.add_argument("--data", type=Path, required=True, help="the folder of labels.csv")
    parser.add_argument("--model", default="vit_small_patch16")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=4096, help="of a pack")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--settle", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    flags = parser.parse_args()
    if flags.quick:
        flags.images = min(flags.images, 4)
    with threads(flags.threads):
        rows, facts = measure(flags)
        print({name: fact for name, fact in facts.items() if name != "forms"})
        report(rows, json_file=flags.json, clock=flags.clock, **facts)


if __name__ == "__main__":
    main()
