"""Images of a stream into packs of a budget, by the tokens that each needs. Pure functions."""

import bisect
from collections.abc import Sequence

import numpy as np

from vitrail_runtime.errors import InputError


def best_fit(needs: Sequence[int] | np.ndarray, budget: int, window: int) -> list[list[int]]:
    """Packs of at most `budget` tokens from a stream of images that need so many each: lists of its indices.

    Of the next `window` images that are in no pack yet, the one that waited longest begins a pack; then the
    largest that fits comes in, the earlier of equal ones, until none fits. None waits for ever, and the order
    stays as random as it was.
    """
    needs = needs.tolist() if isinstance(needs, np.ndarray) else needs
    packs: list[list[int]] = []
    waiting: list[tuple[int, int]] = []  # (tokens, minus the place in the stream), sorted
    placed = bytearray(len(needs))
    oldest = coming = 0
    while oldest < len(needs):
        pack, room = [], budget
        while True:
            while coming < len(needs) and len(waiting) < window:
                bisect.insort(waiting, (needs[coming], -coming))
                coming += 1
            if not pack:
                at = bisect.bisect_left(waiting, (needs[oldest], -oldest))
            else:
                at = bisect.bisect_left(waiting, (room + 1, -len(needs))) - 1
            if at < 0:
                break
            tokens, minus = waiting.pop(at)
            pack.append(-minus)
            placed[-minus] = True
            room -= tokens
        packs.append(pack)
        while oldest < len(needs) and placed[oldest]:
            oldest += 1
    return packs


def best_fit_of_kinds(
    needs: np.ndarray, kinds: Sequence[int], budget: int, window: int
) -> list[list[int]]:
    """As `best_fit`, where an image needs other tokens in packs of another kind: needs (K, N), and of each
    pack to come its kind."""
    table: list[list[int]] = needs.tolist()
    packs: list[list[int]] = []
    waiting: list[list[tuple[int, int]]] = [[] for _ in table]
    total = len(table[0])
    placed = bytearray(total)
    oldest = coming = 0
    while oldest < total:
        pack, room, kind = [], budget, kinds[len(packs)]
        while True:
            while coming < total and len(waiting[0]) < window:
                for own, row in zip(waiting, table, strict=True):
                    bisect.insort(own, (row[coming], -coming))
                coming += 1
            if not pack:
                chosen = oldest
            else:
                at = bisect.bisect_left(waiting[kind], (room + 1, -total)) - 1
                if at < 0:
                    break
                chosen = -waiting[kind][at][1]
            for own, row in zip(waiting, table, strict=True):
                own.pop(bisect.bisect_left(own, (row[chosen], -chosen)))
            pack.append(chosen)
            placed[chosen] = True
            room -= table[kind][chosen]
        packs.append(pack)
        while oldest < total and placed[oldest]:
            oldest += 1
    return packs


def filled_steps(packs: list[list[int]], multiple: int) -> list[list[int]]:
    """As `whole_steps`, with the kinds of packs as they were: what the last step lacks are packs of one image
    each, which fit whatever their kind."""
    packs = whole_steps(packs, 1)
    images, wanted = sum(map(len, packs)), -(-len(packs) // multiple) * multiple
    if images < wanted:
        whole_steps(packs, multiple)  # which says so
    while len(packs) < wanted:
        largest = max(range(len(packs)), key=lambda i: (len(packs[i]), i))
        packs.append([packs[largest].pop()])
    return packs


def whole_steps(packs: list[list[int]], multiple: int) -> list[list[int]]:
    """The packs, and some of the last ones in two, so that they are a multiple of `multiple`."""
    images = sum(map(len, packs))
    wanted = -(-len(packs) // multiple) * multiple
    if images < wanted:
        raise InputError(
            f"{images} images cannot fill {wanted} packs, {multiple} an update; give smaller "
            "--packing.packs, or smaller --packing.max-tokens"
        )
    packs = list(packs)
    while len(packs) < wanted:
        # The last of those with the most images: what comes early is left as it is.
        largest = max(range(len(packs)), key=lambda i: (len(packs[i]), i))
        pack = packs[largest]
        packs[largest : largest + 1] = [pack[::2], pack[1::2]]
    return packs
