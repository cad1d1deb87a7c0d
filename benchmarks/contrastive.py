"""The contrastive losses: the chunked form beside the plain one, in time and in memory.

    python benchmarks/contrastive.py --json contrastive.json
    python benchmarks/contrastive.py --device cuda

16,384 pairs of 512 numbers, in float32, forward and backward. Each measurement is a process of its own, so
that its peak of memory is its own: how much more it took than when the embeddings lay there. On a CPU that is
of resident memory, on a GPU of what torch had allocated.
"""

import json
import multiprocessing
import resource
import time
from multiprocessing.connection import Connection

import torch

from vitrail.bench.harness import arguments, machine
from vitrail.ops.contrastive import sigmoid_pairs, softmax_pairs

PAIRS, DIM = 16384, 512


def measure(pipe: Connection, form: str, how: str, device: str, pairs: int, threads: int) -> None:
    """Sends (seconds, peak of memory in bytes, loss) of one forward and backward."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    towers = torch.nn.functional.normalize(torch.randn(2, pairs, DIM), dim=-1).to(device)
    images, texts = (x.clone().requires_grad_() for x in towers)
    del towers
    scale, bias = (torch.tensor(v, device=device, requires_grad=True) for v in (10.0, -10.0))

    def update(count: int | None = None) -> torch.Tensor:
        # Warm-up on some rows: libraries are loaded and a GPU's kernels made.
        given = images[:count], texts[:count], scale
        form_of = {
            "softmax": softmax_pairs,
            "sigmoid": lambda *x, **k: sigmoid_pairs(*x, bias, **k),
        }
        loss = form_of[form](*given, implementation=how)
        (loss / len(given[0])).backward()
        return loss.detach()

    update(64)
    before = peak(device)
    start = time.perf_counter()
    loss = float(update() / pairs)  # which waits for a GPU
    seconds = time.perf_counter() - start
    pipe.send((seconds, peak(device) - before, loss))


def peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measured(*how: object) -> tuple[float, int, float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=measure, args=(theirs, *how))
    child.start()
    theirs.close()
    found = ours.recv()
    child.join()
    return found


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    given = parser.parse_args()
    pairs = PAIRS // 4 if given.quick else PAIRS
    rows = []
    for form in ("softmax", "sigmoid"):
        of = {}
        for how in ("chunked", "plain"):
            seconds, memory, loss = measured(form, how, given.device, pairs, given.threads)
            of[how] = {"seconds": seconds, "peak_bytes": memory, "loss": loss}
        share = of["chunked"]["peak_bytes"] / of["plain"]["peak_bytes"]
        rows.append({"name": form, "pairs": pairs, **of, "memory_share": share})
    print("| loss | form | seconds | peak MB | share | value |\n|---|---|---|---|---|---|")
    for row in rows:
        for how in ("chunked", "plain"):
            one = row[how]
            share = f"{row['memory_share']:.3f}" if how == "chunked" else ""
            print(
                f"| {row['name']} | {how} | {one['seconds']:.2f} | {one['peak_bytes'] / 1e6:.0f} "
                f"| {share} | {one['loss']:.6f} |"
            )
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
