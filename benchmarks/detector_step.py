"""A training step of Faster R-CNN (forward, losses, backward, SGD) against torchvision's same model.

python benchmarks/detector_step.py [--quick] [--models NAME ...] [--size H W] [--threads N] [--json FILE]

Weights, images and objects are the same on both sides. "from scratch": every layer learns, BatchNorm too;
"frozen norms": as torchvision fine-tunes, the backbone's norms and first stages are fixed.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn, fasterrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

from vitrail.bench.harness import arguments, compare, report, threads
from vitrail.models import create_model, load_dense

CLASSES = 20
MODELS = {
    "resnet50, from scratch": ("resnet50", False),
    "resnet50, frozen norms": ("resnet50", True),
    "mobilenetv3, from scratch": ("mobilenetv3_large", False),
}
# Five sizes at each level, the two maps of stride 32 that torchvision reads.
MOBILE = {"strides": (), "anchor_pixels": (32.0, 64.0, 128.0, 256.0, 512.0), "proposal_score": 0.05}
FIXED = ("conv1.", "layer1.")  # what torchvision does not train of a fine-tuned ResNet


def peer_of(name: str) -> nn.Module:
    backbone, frozen = MODELS[name]
    build = {
        "resnet50": fasterrcnn_resnet50_fpn,
        "mobilenetv3_large": fasterrcnn_mobilenet_v3_large_fpn,
    }[backbone]
    torch.manual_seed(0)
    model: nn.Module = build(weights=None, weights_backbone=None, num_classes=CLASSES + 1)
    if frozen:
        freeze(model)
    return model.train()


def freeze(peer: nn.Module) -> None:
    """torchvision's own layers, as `weights=` would choose them; the last norm of a block is damped, since
    untrained features would grow from block to block."""
    for module in list(peer.backbone.body.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, norm := FrozenBatchNorm2d(child.num_features))
                if name == "bn3":
                    norm.weight.fill_(0.2)
    for name, parameter in peer.backbone.body.named_parameters():
        parameter.requires_grad_(not name.startswith(FIXED))


def ours_of(name: str, peer: nn.Module) -> nn.Module:
    backbone, frozen = MODELS[name]
    head = {"frozen_norm": frozen} | (MOBILE if backbone != "resnet50" else {})
    fields = {} if backbone == "resnet50" else {"detection_maps": True}
    full = f"faster_rcnn/{backbone}"
    model = create_model(full, num_classes=CLASSES, head=head, **fields)
    load_dense(model, peer.state_dict(), full)
    if frozen:
        for key, parameter in model.backbone.named_parameters():
            parameter.requires_grad_(not key.startswith(FIXED))
    return model.train()


def batch_of(size: tuple[int, int], number: int = 2) -> tuple[Tensor, list[dict[str, Tensor]]]:
    torch.manual_seed(1)
    height, width = size
    images = torch.randn(number, 3, height, width)
    targets = []
    for _ in range(number):
        corner = torch.rand(12, 2) * torch.tensor([width, height]) * 0.7
        side = (0.05 + 0.25 * torch.rand(12, 2)) * torch.tensor([width, height])
        labels = torch.randint(0, CLASSES, (12,))
        targets.append({"boxes": torch.cat((corner, corner + side), 1), "labels": labels})
    return images, targets


def step_of(model: nn.Module, losses: Callable[[], dict[str, Tensor]]) -> Callable[[], None]:
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(learnt, lr=1e-6, momentum=0.9)

    def step() -> None:
        torch.manual_seed(2)
        optimiser.zero_grad(set_to_none=True)
        loss: Tensor = sum(losses().values(), torch.zeros(()))
        loss.backward()
        optimiser.step()

    return step


def steps_of(name: str, size: tuple[int, int]) -> dict[str, Callable[[], None]]:
    peer = peer_of(name)
    ours = ours_of(name, peer)
    images, targets = batch_of(size)
    # torchvision resizes and normalises within: asked for the size that the images have.
    peer.transform.min_size, peer.transform.max_size = (min(size),), max(size)
    theirs = [{**t, "labels": t["labels"] + 1} for t in targets]

    def peer_losses() -> dict[str, Tensor]:
        return peer(list(images), [dict(t) for t in theirs])

    def our_losses() -> dict[str, Tensor]:
        given = ours.losses(images, tuple(targets))
        return {k: v / len(images) for k, v in given.items()}

    return {"ours": step_of(ours, our_losses), "peer": step_of(peer, peer_losses)}


def resident(what: str) -> int:
    """MiB of this process, now (VmRSS) or at most (VmHWM); on Linux."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{what}:")[1].split()[0]) // 1024


def peak(name: str, side: str, size: tuple[int, int], count: int) -> int:
    """MiB that two steps add at most to a process that has both models."""
    asked = [sys.executable, __file__, "--peak-of", side, "--models", name]
    asked += ["--size", *map(str, size), "--threads", str(count)]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"))
    parser.add_argument("--peak-of", choices=("ours", "peer"), help="print only this side's memory")
    parser.add_argument("--profile", action="store_true", help="print where the time goes, ours")
    flags = parser.parse_args()
    size = tuple(flags.size or ((192, 256) if flags.quick else (448, 640)))
    rows, memory = [], {}
    with threads(flags.threads):
        for name in flags.models:
            if flags.peak_of:
                step = steps_of(name, size)[flags.peak_of]
                before = resident("VmRSS")
                Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
                step()
                step()
                print(resident("VmHWM") - before)
                continue
            steps = steps_of(name, size)
            if flags.profile:
                for side, step in steps.items():
                    step()
                    with torch.profiler.profile() as seen:
                        step()
                    table = seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=22)
                    print(f"{name}, {side}\n{table}")
                continue
            seconds = (20 if flags.quick else 240) / len(flags.models)
            how = {"seconds": seconds, "clock": flags.clock, "min_rounds": 3, "warmup": 1}
            row = compare(f"{name}, 2 x {size[0]} x {size[1]}", steps["ours"], steps["peer"], **how)
            print(f"{row.name}: {row.ratio:.3f}x", flush=True)
            rows.append(row)
            if not flags.quick:
                memory[name] = {side: peak(name, side, size, flags.threads) for side in steps}
                print(f"MiB of a step: {memory[name]}", flush=True)
    if rows:
        facts = {"what": "training step of Faster R-CNN, SGD, fp32", "clock": flags.clock}
        report(rows, json_file=flags.json, peer="torchvision", memory_mib=memory, **facts)


if __name__ == "__main__":
    main()
