"""The `vitrail` command: one small file per verb; what is heavy is imported inside the verb."""

import importlib
import io
import os
import sys

from vitrail_runtime.errors import InputError

VERBS = {  # verb -> (module, what it does), in the order a newcomer needs them
    "demo": ("demo", "the whole path on the embedded data set, on a CPU, in about three minutes"),
    "models": ("models", "a table of models: parameters, MACs, strides, papers' scores, weights"),
    "data": ("data", "check|make|show: look at a data set, make the embedded one"),
    "train": ("train", "train or fine-tune on your data; resumes"),
    "eval": ("eval", "measure a trained model on a data set"),
    "predict": ("predict", "labels for pictures, as pictures or JSON lines"),
    "adapt": ("adapt", "train|list|eval|predict: many tasks on one frozen backbone, in one pass"),
    "inspect": ("inspect", "what the attention of a model does, and which channels matter"),
    "convert": ("convert", "a foreign checkpoint to safetensors"),
}

HELP = """usage: vitrail VERB [options]

vision transformers and their convolutional relatives, from an open checkpoint to a deployed model

{verbs}

vitrail VERB --help tells a verb's options."""


def main(argv: list[str] | None = None) -> int:
    """Run one verb. 0: done; 2: something the caller can put right, said in one message."""
    argv = sys.argv[1:] if argv is None else argv
    # Threads that spin for long at a barrier starve whoever they wait for once cores are shared with another
    # program; threads that never spin lose half of an idle machine. docs/benchmarks.md has the numbers.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # A file's name may hold bytes that are no text, or letters that the terminal lacks: escapes stand for
    # them, as they do on stderr.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP.format(verbs="\n".join(f"  {v:<8} {text}" for v, (_, text) in VERBS.items())))
        return 0
    if argv[0] in ("-V", "--version"):
        from vitrail import __version__

        print(f"vitrail {__version__}")
        return 0
    try:
        if argv[0] not in VERBS:
            from vitrail.registry import unknown

            raise unknown("verb", argv[0], VERBS)
        verb = importlib.import_module(f"vitrail.cli.{VERBS[argv[0]][0]}")
        return verb.run(argv[1:]) or 0
    except InputError as error:
        # Of the processes that a launcher started on this machine, the first one tells.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"vitrail: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output went away (| head)
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("vitrail: interrupted", file=sys.stderr)
        return 130
