"""Matching answers with objects: ours beside the official form, written here from its description.

    python benchmarks/matcher.py --json matcher.json

32 images, 100 and 300 queries, 91 classes, and as many objects as COCO's images have (7 on average, of a few
images 30 and more). The official form weighs every query of the batch against every object of the batch in
one matrix, of which then each image's own block is cut out and solved. Both give the same pairs, which is
compared before anything is timed. "one layer" is one call of either, "six layers" what a loss asks for.
"""

from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vitrail.bench.harness import Row, arguments, compare, report, threads
from vitrail.boxes import cxcywh_to_xyxy, giou
from vitrail.detectors.hungarian import Objects, Weights, match

IMAGES, CLASSES = 32, 91


def inputs(layers: int, queries: int) -> tuple[Tensor, Tensor, Objects]:
    """Logits (L, B, Q, K + 1), boxes (L, B, Q, 4), and objects."""
    torch.manual_seed(0)
    counts = torch.empty(IMAGES).exponential_(1 / 7).round().int().tolist()
    labels = [torch.randint(CLASSES, (n,)) for n in counts]
    boxes = [boxes_of(n) for n in counts]
    logits = torch.randn(layers, IMAGES, queries, CLASSES + 1)
    return logits, boxes_of(layers, IMAGES, queries), Objects(labels, boxes)


def boxes_of(*shape: int) -> Tensor:
    return torch.cat((torch.rand(*shape, 2), 0.05 + 0.5 * torch.rand(*shape, 2)), -1)


def official(logits: Tensor, boxes: Tensor, objects: Objects) -> list[tuple[Tensor, Tensor]]:
    """Of each image queries and objects: one layer."""
    scores, mine = logits.flatten(0, 1).softmax(-1), boxes.flatten(0, 1)
    labels, wanted = torch.cat(list(objects.labels)), torch.cat(list(objects.boxes))
    cost = -scores[:, labels] + 5 * torch.cdist(mine, wanted, p=1)
    cost = cost - 2 * giou(cxcywh_to_xyxy(mine), cxcywh_to_xyxy(wanted))
    blocks = cost.view(*logits.shape[:2], -1).cpu().split(objects.counts, -1)
    found = [linear_sum_assignment(block[i]) for i, block in enumerate(blocks)]
    return [(torch.as_tensor(query), torch.as_tensor(own)) for query, own in found]


def theirs(logits: Tensor, boxes: Tensor, objects: Objects) -> list[list[tuple[Tensor, Tensor]]]:
    return [official(one, own, objects) for one, own in zip(logits, boxes, strict=True)]


def ours(logits: Tensor, boxes: Tensor, objects: Objects) -> list[tuple[Tensor, Tensor, Tensor]]:
    return list(match([-one.softmax(-1) for one in logits], list(boxes), objects, Weights()))


def check(given: tuple[Tensor, Tensor, Objects]) -> None:
    """Raise unless both say the same."""
    counts = given[2].counts
    starts = [sum(counts[:i]) for i in range(IMAGES)]
    for mine, other in zip(ours(*given), theirs(*given), strict=True):
        queries = torch.cat([query for query, _ in other])
        own = torch.cat([o + s for (_, o), s in zip(other, starts, strict=True)])
        if not (torch.equal(mine[1], queries) and torch.equal(mine[2], own)):
            raise SystemExit("ours and the official form give other pairs")


def main() -> None:
    given = arguments(__doc__.splitlines()[0]).parse_args()
    how = {"seconds": 3 if given.quick else 20, "clock": given.clock, "min_rounds": 3}
    rows: list[Row] = []
    with threads(given.threads), torch.no_grad():
        for queries in (100, 300):
            for layers, called in ((1, "one layer"), (6, "six layers")):
                data = inputs(layers, queries)
                check(data)
                forms: list[Callable[[], object]] = [
                    lambda f=f, d=data: f(*d) for f in (ours, theirs)
                ]
                rows.append(compare(f"{queries} queries, {called}", *forms, **how))
    objects = inputs(1, 100)[2].counts
    capability = torch.backends.cpu.get_cpu_capability()
    report(
        rows,
        json_file=given.json,
        instructions=capability,
        objects=sum(objects),
        most_objects=max(objects),
    )


if __name__ == "__main__":
    main()
