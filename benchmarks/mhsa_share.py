"""Speed of Swin-T and DeiT-T as fewer of their blocks attend: eager inference, 224 x 224.

python benchmarks/mhsa_share.py [--quick] [--batch N] [--json FILE]

EfficientViT (Liu et al., CVPR 2023, section 2.1) counts attention and feed-forward layers: a common
transformer has as many of one as of the other, a share of 50 %, and 20 to 40 % was better at equal speed in
models made 1.25 and 1.5 times faster. With `attn_every=k` every k-th block attends, the others keep their
feed-forward layer. The peer of each row is the model whose blocks all attend: `ratio` is how many times
faster than it.
"""

import torch

from vitrail.bench.harness import arguments, compare, report, threads
from vitrail.models import create_backbone

MODELS = ("swin_tiny_patch4_window7", "deit_tiny_patch16")
EVERY = (2, 3, 4)  # of 12 blocks 6, 4 and 3 attend


def shares(backbone: torch.nn.Module) -> tuple[float, float]:
    """(share of blocks that attend, share of attention among attention and feed-forward layers), per cent."""
    attends = [m.attn is not None for m in backbone.modules() if hasattr(m, "attn")]
    count, blocks = sum(attends), len(attends)
    return 100 * count / blocks, 100 * count / (count + blocks)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--batch", type=int, default=4, help="pictures at a time")
    flags = parser.parse_args()
    seconds = 6.0 if flags.quick else 25.0
    images = torch.randn(flags.batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    rows, facts = [], {}
    with threads(flags.threads), torch.inference_mode():
        for name in MODELS:
            full = create_backbone(name).eval()
            for every in EVERY:
                sparse = create_backbone(name, attn_every=every).eval()
                blocks, layers = shares(sparse)
                label = f"{name}, {blocks:.0f} % of blocks ({layers:.0f} % of layers) attend"
                row = compare(
                    label,
                    lambda m=sparse: m(images),
                    lambda m=full: m(images),
                    seconds=seconds,
                    min_rounds=5,
                    max_rounds=60,
                    warmup=1,
                    clock=flags.clock,
                )
                rows.append(row)
                facts[label] = {"attn_every": every, "blocks": blocks, "layers": layers}
                print(f"{label}: {row.ratio:.2f}x", flush=True)
    what = f"eager inference, 224 x 224, batch {flags.batch}, fp32; peer: every block attends"
    report(rows, json_file=flags.json, what=what, clock=flags.clock, shares=facts)


if __name__ == "__main__":
    main()
