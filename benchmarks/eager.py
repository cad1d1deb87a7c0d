"""Eager inference against timm's same model with the same weights, batch 1 and 8, at 224 (MobileViTs 256) px.

python benchmarks/eager.py [--quick] [--models NAME ...] [--threads N] [--json FILE]
"""

from functools import partial

import torch
from peers import PAIRS, SIZES, add_models, pair

from vitrail.bench.harness import arguments, compare, report, threads


def main() -> None:
    parser = arguments(__doc__)
    add_models(parser)
    flags = parser.parse_args()
    seconds = (24 if flags.quick else 160) / (2 * len(flags.models))
    rows = []
    with threads(flags.threads), torch.inference_mode():
        for name in flags.models:
            ours, peer = pair(name, flags.device)
            for batch in (1, 8):
                images = torch.randn(batch, 3, SIZES[name], SIZES[name], device=flags.device)

                def run(model, images=images):
                    model(images)
                    if images.is_cuda:
                        torch.cuda.synchronize()

                row = compare(
                    f"{name}, batch {batch}",
                    partial(run, ours),
                    partial(run, peer),
                    seconds=seconds,
                    clock=flags.clock,
                )
                print(f"{row.name}: {row.ratio:.3f}x", flush=True)
                rows.append(row)
        facts = {
            "what": "eager inference, 224 x 224 (MobileViTs: 256 x 256), fp32",
            "clock": flags.clock,
        }
        facts["peers"] = {name: f"timm {PAIRS[name]}" for name in flags.models}
        report(rows, json_file=flags.json, **facts)


if __name__ == "__main__":
    main()
