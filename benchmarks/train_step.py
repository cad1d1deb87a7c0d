"""A training step (forward, cross entropy, backward, AdamW) against timm's same model, batch 8, 224 x 224.

python benchmarks/train_step.py [--quick] [--models NAME ...] [--threads N] [--json FILE]
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peers import FEW, PAIRS, SIZES, add_models, pair
from torch import Tensor, nn

from vitrail.bench.harness import arguments, compare, report, threads


def step_of(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()
        if images.is_cuda:
            torch.cuda.synchronize()

    return step


def main() -> None:
    parser = arguments(__doc__)
    add_models(parser, FEW)
    flags = parser.parse_args()
    seconds = (20 if flags.quick else 160) / len(flags.models)
    batch = 8
    rows = []
    with threads(flags.threads):
        for name in flags.models:
            images = torch.randn(batch, 3, SIZES[name], SIZES[name], device=flags.device)
            labels = torch.arange(batch, device=flags.device)
            steps = [step_of(model, images, labels) for model in pair(name, flags.device)]
            how = {"seconds": seconds, "clock": flags.clock, "min_rounds": 3, "warmup": 1}
            row = compare(f"{name}, batch {batch}", *steps, **how)
            print(f"{row.name}: {row.ratio:.3f}x", flush=True)
            rows.append(row)
        facts = {"what": "training step, AdamW, 224 x 224, fp32", "clock": flags.clock}
        facts["peers"] = {name: f"timm {PAIRS[name]}" for name in flags.models}
        report(rows, json_file=flags.json, **facts)


if __name__ == "__main__":
    main()
