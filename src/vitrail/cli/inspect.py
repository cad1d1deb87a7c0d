"""`vitrail inspect`: what the attention of a model does, and which of its channels matter."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from vitrail.cli.flags import act, parse_flags
from vitrail_runtime.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

HELP = """usage: vitrail inspect ACTION [options]

  vitrail inspect collapse MODEL... --images DIR    do attention maps repeat from block to block?
  vitrail inspect heads MODEL... --images DIR       are heads of a layer alike, and how far do they reach?
  vitrail inspect queries RUN --images DIR          where does a DETR look for what it finds?
  vitrail inspect importance RUN --data DIR         which channels matter? --slim 0.5 makes a slimmer model

A MODEL is a run folder, a model folder or a name of `vitrail models` (with --weights, or random weights).
vitrail inspect ACTION --help tells an action's options."""


@dataclass(frozen=True, kw_only=True)
class StudyFlags:
    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL...")]
    """Run folders, model folders or names."""
    images: Path
    """An image, or a folder of them."""
    count: int = 8
    """How many images are taken, evenly from all."""
    weights: str | None = None
    """Weights for a model given by name: pretrained, a file, a folder or hf:owner/name@revision."""
    device: str = "auto"
    """Where the model runs, such as cpu or cuda; auto: a GPU where there is one."""
    json: bool = False
    """The numbers as JSON on stdout."""


@dataclass(frozen=True, kw_only=True)
class CollapseFlags(StudyFlags):
    """Compare the attention maps of a model's blocks, on images, and write a page.

    A block whose maps are those of the block before adds little: as depth grows, plain ViTs have more and
    more of them (DeepViT, 2021). Several models are drawn side by side.
    """

    out: Path = Path("collapse.html")
    """The page."""
    threshold: float = 0.9
    """From which similarity on a block counts as similar."""
    within: int = 1
    """How many blocks before it a block is compared with for the count."""


@dataclass(frozen=True, kw_only=True)
class HeadsFlags(StudyFlags):
    """Compare the heads of each attention layer, measure how far they reach, and write a page."""

    out: Path = Path("heads.html")
    """The page."""


@dataclass(frozen=True, kw_only=True)
class QueriesFlags:
    """Draw what the query of each answer of a DETR looks at, and the encoder around it, and write a page."""

    model: Annotated[Positional[Path], arg(metavar="RUN")]
    """A run folder (its best model) or a model folder."""
    images: Path
    """An image, or a folder of them."""
    count: int = 4
    """How many images are taken, evenly from all."""
    answers: int = 4
    """How many answers of an image are drawn, best first."""
    score: float = 0.3
    """Those of at least this score; of an image without any the best one."""
    out: Path = Path("queries.html")
    """The page."""
    device: str = "auto"
    """Where the model runs, such as cpu or cuda; auto: a GPU where there is one."""


@dataclass(frozen=True, kw_only=True)
class ImportanceFlags:
    """Weigh the channels of a trained model by stage and by Q, K, V and FFN, and write a page.

    With --slim a model with fewer of them is written as well, ready to be fine-tuned: vitrail train
    --weights OUT. Queries, keys and FFNs shrink; values keep their width (EfficientViT, 2023).
    """

    model: Annotated[Positional[Path], arg(metavar="RUN")]
    """A run folder (its best model) or a model folder."""
    data: str
    """Labelled pictures: class folders, tar shards or a CSV file."""
    split: Literal["train", "val", "test", "all"] = "train"
    """Which of them."""
    count: int = 256
    """How many pictures are taken, evenly from all."""
    batch_size: int = 16
    """Pictures at a time."""
    slim: float | None = None
    """Share of the query, key and FFN channels that the slimmer model keeps, such as 0.5."""
    out: Path = Path("importance")
    """The folder for importance.html and, with --slim, the slimmer model."""
    device: str = "auto"
    """Where the model runs, such as cpu or cuda; auto: a GPU where there is one."""
    skip_broken: bool = False
    """Leave out pictures that cannot be read, instead of stopping."""


def run(argv: list[str]) -> int | None:
    actions = {"collapse": collapse, "heads": heads, "queries": queries, "importance": importance}
    return act("inspect", actions, HELP, argv)


def collapse(argv: list[str]) -> None:
    flags = parse_flags(FlagCreatePairsOff[CollapseFlags], argv, prog="vitrail inspect collapse")
    if not -1 <= flags.threshold <= 1:
        raise InputError(
            f"--threshold is a cosine similarity, from -1 to 1, but is {flags.threshold}"
        )
    if flags.within < 1:
        raise InputError(f"--within must be at least 1 block, but is {flags.within}")
    from vitrail.analysis.attention_page import collapse_page, collapse_words

    studies, shown, fresh = _study(flags)
    how = {"threshold": flags.threshold, "within": flags.within}
    page = collapse_page(flags.out, studies, shown, random=fresh, **how)
    words = [collapse_words(study, flags.threshold, flags.within) for study in studies]
    _tell(flags.json, studies, words, fresh, page)


def heads(argv: list[str]) -> None:
    flags = parse_flags(FlagCreatePairsOff[HeadsFlags], argv, prog="vitrail inspect heads")
    from vitrail.analysis.attention_page import heads_page, heads_words

    studies, shown, fresh = _study(flags)
    page = heads_page(flags.out, studies, shown, random=fresh)
    _tell(flags.json, studies, [heads_words(study) for study in studies], fresh, page)


def queries(argv: list[str]) -> None:
    flags = parse_flags(FlagCreatePairsOff[QueriesFlags], argv, prog="vitrail inspect queries")
    if flags.answers < 1:
        raise InputError(f"--answers must be at least 1, but is {flags.answers}")
    chosen = _chosen(flags.images, flags.count)

    from vitrail.analysis.queries_page import queries_page
    from vitrail.device import choose_device
    from vitrail.models import load, model_folder

    device = choose_device(flags.device)
    model = load(model_folder(flags.model)).to(device)
    images = (image.to(device) for image in prepared(chosen, model.preprocessing))
    named = zip((path.name for path in chosen), images, strict=True)
    how = {"count": flags.answers, "score": flags.score}
    print(f"page: {queries_page(flags.out, model, named, **how)}")


def importance(argv: list[str]) -> None:
    prog = "vitrail inspect importance"
    flags = parse_flags(FlagCreatePairsOff[ImportanceFlags], argv, prog=prog)
    if flags.slim is not None and not 0 < flags.slim <= 1:
        raise InputError(f"--slim is the share to keep, above 0 and up to 1, but is {flags.slim}")
    if flags.count < 1:
        raise InputError(f"--count must be at least 1 picture, but is {flags.count}")

    from vitrail.analysis.importance_page import importance_page, importance_words
    from vitrail.device import choose_device
    from vitrail.models import load, model_folder

    model = load(model_folder(flags.model)).to(choose_device(flags.device))
    if flags.slim is not None and flags.out.resolve() in (
        flags.model.resolve(),
        model_folder(flags.model).resolve(),
    ):
        raise InputError(f"--out {flags.out} holds the model itself; name another folder")
    found = _weighed(model, flags)
    name, page = str(flags.model), flags.out / "importance.html"
    print(importance_words(name, found))
    about = {} if flags.slim is None else _slimmed(model, found, flags.slim, flags.out)
    importance_page(page, name, found, **about)
    print(f"page: {page}")
    if flags.slim is not None:
        out = flags.out
        print(f"fine-tune it: vitrail train --weights {out} --data {flags.data} --out {out}-tuned")


def _weighed(model: Any, flags: ImportanceFlags) -> Any:
    """The importance of each channel, by the chosen images."""
    import numpy as np
    import torch

    from vitrail.analysis.importance import importance as weigh
    from vitrail.data import open_data
    from vitrail.data.loader import eval_batches

    device = next(model.parameters()).device
    data = open_data(flags.data, flags.split, classes=model.classes, skip_broken=flags.skip_broken)
    for note in data.notes:
        print(f"vitrail: {note}", file=sys.stderr)
    taken = np.linspace(0, len(data) - 1, min(flags.count, len(data))).round().astype(int)
    batches = (
        (batch.images.to(device), torch.tensor(batch.targets, device=device))
        for batch in eval_batches(data.subset(taken), model.preprocessing, flags.batch_size)
    )
    return weigh(model, batches)


def _slimmed(model: Any, found: Any, share: float, out: Path) -> dict[str, Any]:
    """Write the slimmer model; what the page tells of it."""
    from vitrail.analysis.importance_page import changes
    from vitrail.analysis.prune import propose, prune
    from vitrail.models import save

    plan = propose(model, found, share)
    slim = prune(model, plan)
    costs = [(what, _cost(model, what), _cost(slim, what)) for what in ("parameters", "MACs")]
    for field, before, after in changes(model.info.config, plan.config):
        print(f"{field}: {before} -> {after}")
    for what, before, after in costs:
        print(f"{what}: {before} -> {after}")
    save(slim, out)
    return {"plan": plan, "costs": costs, "config": model.info.config}


def _cost(model: Any, what: str) -> str:
    from vitrail.bench.macs import count_macs, count_params

    if what == "parameters":
        return f"{count_params(model) / 1e6:.3f} M"
    height, width = model.preprocessing.size
    return f"{count_macs(model, height, width) / 1e9:.3f} G at {height} x {width}"


def _study(flags: StudyFlags) -> tuple[list[Any], dict[str, str], list[str]]:
    """(studies, HTML of attention maps by model, names of models with random weights)."""
    if not flags.models:
        raise InputError("say which model: vitrail inspect ACTION MODEL --images DIR")
    chosen = _chosen(flags.images, flags.count)

    from vitrail.analysis.attention import study_attention
    from vitrail.analysis.attention_page import attention_pictures
    from vitrail.device import choose_device

    device = choose_device(flags.device)
    studies, shown, fresh = [], {}, []
    for given in flags.models:
        name, model, random = open_model(given, flags.weights)
        if name in shown:
            raise InputError(f"{name} stands twice among the models; give each once")
        backbone, pre = model.backbone.to(device), model.preprocessing
        if random:
            fresh.append(name)
        pictures = (image.to(device) for image in prepared(chosen, pre))
        studies.append(study_attention(backbone, pictures, name=name))
        first = next(prepared(chosen[:1], pre))
        shown[name] = attention_pictures(backbone, first, pre, name=name)
    return studies, shown, fresh


def _chosen(images: Path, count: int) -> list[Path]:
    """So many of the images, evenly from all."""
    if count < 1:
        raise InputError(f"--count must be at least 1 picture, but is {count}")
    from vitrail_runtime.pictures import find_pictures

    paths = find_pictures(images)
    step = len(paths) / min(count, len(paths))
    return [paths[int(i * step)] for i in range(min(count, len(paths)))]


def open_model(given: str, weights: str | None) -> tuple[str, Any, bool]:
    """(its name for a reader, the model in eval mode, whether its weights are random)."""
    import torch

    from vitrail.models import create_model, load, model_folder

    folder = Path(given)
    if folder.is_dir():
        if weights is not None:
            raise InputError(f"{given} is a folder with weights of its own; drop --weights")
        return given, load(model_folder(folder)), False
    if "/" in given:
        raise InputError(f"{given} is neither a run folder nor a model's name")
    torch.manual_seed(0)  # random weights, but the same at every call
    return given, create_model(given, weights=weights).eval(), weights is None


def prepared(paths: list[Path], preprocessing: Any) -> Iterator["Tensor"]:
    """The pictures as a model takes them, one after another."""
    import torch

    from vitrail_runtime.preprocess import decode, decode_size, prepare

    for path in paths:
        pixels, _ = prepare(decode(path, at_least=decode_size(preprocessing)), preprocessing)
        yield torch.from_numpy(pixels)


def _tell(
    as_json: bool, studies: list[Any], words: list[str], fresh: list[str], page: Path
) -> None:
    if as_json:
        print(json.dumps([study.to_dict() for study in studies]))
    out = sys.stderr if as_json else sys.stdout
    print("\n".join(words), file=out)
    if fresh:
        print(f"random weights: {', '.join(fresh)}", file=out)
    print(f"page: {page}", file=out)
