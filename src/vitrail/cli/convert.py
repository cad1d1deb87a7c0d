"""`vitrail convert`: a checkpoint of timm, torchvision, Hugging Face or a paper's authors, as ours."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from vitrail.cli.flags import parse_flags
from vitrail_runtime.errors import InputError, listed


@dataclass(frozen=True, kw_only=True)
class ConvertFlags:
    """Read a foreign checkpoint, report every key, and write a model folder or a bare .safetensors file."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A file (.safetensors, .pth, .pt, .bin, .ckpt), a folder, or hf:owner/name@revision."""
    target: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[TARGET]")] = None
    """A new model folder, or a file ending in .safetensors for the weights alone; none: a model folder of
    vitrail's of an older schema is written anew in its place."""
    model: str | None = None
    """The model's name; recognised from the keys and shapes where only one fits."""
    layout: str | None = None
    """The layout of the keys, where recognising it goes wrong; an unknown one lists those there are."""
    image_size: int | None = None
    """Pixels of a side that the position tables are made for; without it what the source says."""
    classes: Path | None = None
    """A text file of class names, one per line, in the order of the labels."""
    overwrite: bool = False
    """Write over a target that is there."""


def run(argv: list[str]) -> None:
    flags = parse_flags(ConvertFlags, argv, prog="vitrail convert")
    unguided = (flags.model, flags.layout, flags.image_size, flags.classes) == (None,) * 4
    ours = unguided and is_model_folder(Path(flags.source))
    if flags.target is None and not ours:
        raise InputError(
            "vitrail convert needs a TARGET too: a new folder, or a file ending in .safetensors (only a "
            "model folder of vitrail's, without other flags, is written anew in its place)"
        )
    target = flags.target or Path(flags.source)
    bare = target.suffix == ".safetensors"
    if flags.target is not None and target.exists() and not flags.overwrite:
        raise InputError(f"{target} is there already; name another, or pass --overwrite")
    if target.exists() and bare == target.is_dir():
        raise InputError(f"{target} is a {'folder' if bare else 'file'}; name another target")

    from vitrail import models
    from vitrail.weights import files

    metrics = Path(flags.source) / "metrics.json"
    if ours:
        model = models.load(flags.source)
        name, count = model.info.name, len(model.classes)
    else:
        name, model, count = converted(flags, bare)
    if bare:
        state = model.state_dict()
        if count is None:
            state = {f"backbone.{key}": value for key, value in state.items()}
        files.write_state(state, target)
    else:
        scores = files.read_json(metrics) if ours and metrics.is_file() else None
        models.save(model, target, metrics=scores)
    what = "no classifier" if count is None else f"{count} classes"
    params = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"wrote {target}: {name}, {params:.2f} M parameters, {what}")
    if bare:
        print(f"use it: vitrail train --model {name} --weights {target} --data FOLDER")
    else:
        print(f"use it: vitrail predict {target} PICTURE")


def is_model_folder(folder: Path) -> bool:
    """Whether `vitrail.save` wrote it, in any schema."""
    from vitrail.weights import files

    path = folder / "config.json"
    return path.is_file() and "schema_version" in dict(files.read_json(path))


def converted(flags: ConvertFlags, bare: bool) -> tuple[str, Any, int | None]:
    """(name, model, number of classes; None: it is a backbone alone) of a foreign checkpoint."""
    from vitrail import models
    from vitrail.weights import files, layouts
    from vitrail.weights.described import described

    checkpoint = files.read_checkpoint(flags.source)
    said = described(checkpoint.config, checkpoint.preprocessor, models.Preprocessing())
    name = flags.model or recognise(checkpoint, said.architecture)
    head, entry = models.parse_name(name)
    said = described(checkpoint.config, checkpoint.preprocessor, entry.preprocessing)
    options: dict[str, Any]
    if head is None:
        options = size_options(entry, said.preprocessing, flags.image_size)
        count = classes_in(checkpoint.state, name, options, flags.layout)
    else:
        options = {} if flags.image_size is None else {"image_size": flags.image_size}
        count = dense_classes(checkpoint, name, options)
    if count is None and not bare:
        raise InputError(
            f"{checkpoint.source} has no classifier, so it makes no model folder; name a target that ends "
            f"in .safetensors, and start from it: vitrail train --model {name} --weights FILE --data DIR "
            "(with --train-only head the backbone stays as it is, and the run is a base for vitrail adapt)"
        )
    names = class_names(flags.classes, said.classes, count)
    # The checkpoint's own names are settled by now.
    source = replace(checkpoint, config={})
    if count is None:
        model: Any = models.create_backbone(name, **options)
    else:
        model = models.create_model(name, classes=names, num_classes=count, **options)
    if head is not None:
        report = models.load_dense(model, source, name, layout=flags.layout)
        preprocessing = replace(
            model.preprocessing, mean=said.preprocessing.mean, std=said.preprocessing.std
        )
    else:
        config = model.config if count is None else model.backbone.config
        report = layouts.load_weights(model, source, entry, config=config, layout=flags.layout)
        side = options.get("image_size")
        size = {} if side is None else {"size": side if isinstance(side, tuple) else (side, side)}
        preprocessing = replace(said.preprocessing, **size)
    print(report)
    if count is not None:
        models.describe(model, replace(model.info, preprocessing=preprocessing))
    return name, model, count


def recognise(checkpoint: Any, architecture: str) -> str:
    """The one registered model whose backbone these weights cover. Raises InputError for none or several."""
    from vitrail.weights.layouts import look_alikes

    names = [name for name, _ in look_alikes(checkpoint.state)]
    if len(names) > 1:
        # Twins in shape (DeiT and ViT) differ in preprocessing: believe the name that the source bears.
        called = (
            architecture,
            Path(checkpoint.source.rpartition("@")[0] or checkpoint.source).name,
        )
        named = [
            n for n in names if any(c == n or c.startswith((n + "_", n + ".")) for c in called)
        ]
        names = named if len(named) == 1 else names
    if len(names) == 1:
        return names[0]
    if not names:
        raise InputError(
            f"{checkpoint.source} looks like no registered model; its keys are "
            f"{listed(sorted(checkpoint.state))}. Name the model with --model to see what differs; "
            "vitrail models lists them"
        )
    raise InputError(
        f"{checkpoint.source} fits {len(names)} models: {', '.join(names)}; say which with --model"
    )


def size_options(entry: Any, preprocessing: Any, image_size: int | None) -> dict[str, Any]:
    """{"image_size": ...} for `create_model`, from the flag or from what the source says."""
    if all(f.name != "image_size" for f in fields(entry.config)):
        if image_size is not None:
            raise InputError(f"{entry.name} has no tables of one image size; drop --image-size")
        return {}
    height, width = preprocessing.size
    return {"image_size": image_size or (height if height == width else (height, width))}


def classes_in(
    state: dict[str, Any], name: str, options: dict[str, Any], layout: str | None
) -> int | None:
    """How many classes the head in a state has; None where it has none, by shapes alone."""
    import torch

    from vitrail import models
    from vitrail.registry import backbone_entry
    from vitrail.weights.layouts import best_fit

    with torch.device("meta"):
        model = models.create_model(name, num_classes=1, **options)
    shapes = {key: value.to("meta") for key, value in state.items()}
    config = model.backbone.config
    fit = best_fit(shapes, model.state_dict(), backbone_entry(name), config, layout)
    if fit is not None and any(key.startswith("head.") for key in fit.new):
        return None
    return fit.classes[0] if fit is not None and fit.classes else 1


def dense_classes(checkpoint: Any, name: str, options: dict[str, Any]) -> int:
    """How many classes the head of a dense model has in a file, by shapes alone."""
    import torch

    from vitrail import models, weights

    head, _ = models.parse_name(name)
    assert head is not None
    with torch.device("meta"):
        model = models.create_model(name, num_classes=1, **options)
    parts = [part for part in models.part_names(model) if part != "backbone"]
    heads = {k: v for k, v in checkpoint.state.items() if not k.startswith("backbone.")}
    found = replace(checkpoint, state=head.from_foreign(heads), config={})
    report = weights.check_part(model, parts, found).report
    return report.classes[0] if report.classes else 1


def class_names(
    path: Path | None, said: tuple[str, ...] | None, count: int | None
) -> tuple[str, ...] | None:
    """The classes' names: from the file, else from the source, else None (numbers)."""
    if path is None:
        return said if said is not None and len(said) == count else None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--classes {path} cannot be read: {error}") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) != count:
        raise InputError(
            f"{path} names {len(names)} classes, but the weights have {count or 'none'}"
        )
    return names
