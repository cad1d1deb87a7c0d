"""Full-model names -> backbone + neck + head + weights. The only place that assembles."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import vitrail.backbones  # noqa: F401  (registers every backbone)
from vitrail import learnable_memory, towers
from vitrail import weights as weights_room
from vitrail.backbones.vit import ViT
from vitrail.classifiers import Classifier, PooledHead
from vitrail.configuration import check_choices, from_dict, to_dict
from vitrail.detectors import cascade, deformable_detr, detr, detr_panoptic, efficientdet, rcnn
from vitrail.detectors.detr_keys import from_deformable_detr, from_detr, from_detr_panoptic
from vitrail.detectors.efficientdet_scales import SCALES, Scale
from vitrail.detectors.keys import from_foreign
from vitrail.registry import (
    BackboneEntry,
    Tensors,
    backbone_entry,
    list_backbones,
    tiny_entries,
    unknown,
    with_fields,
)
from vitrail.segmenters import linear, semantic_fpn, upernet
from vitrail.segmenters.segmenter import check_classes
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Interpolation, Mode, Preprocessing

Weights = str | Path | Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Head:
    """What stands before the slash of a full model's name.

    build: (backbone, config, num_classes) -> the model. from_foreign: keys of other libraries' files to ours;
    those of the backbone, under "backbone.", may keep its own layout. mode, size, interpolation: how an image
    is prepared by default; None: as for the backbone.
    whole: it reads an image as a whole, as a classifier does: images are prepared as for the backbone.
    embeds: what it says of an image is a point: build gets (backbone, its paper's tail with config.dim
    outputs, config), and no class need be named.
    on: the class of the backbones that it stands on.
    """

    task: str
    config: Any
    build: Callable[[Any, Any, Any], Any]
    from_foreign: Callable[[Tensors], Tensors] = dict
    mode: Mode = "fit"
    size: tuple[int, int] = (512, 512)
    interpolation: Interpolation | None = None
    whole: bool = False
    embeds: bool = False
    on: type = object
    counted: str = "forward"  # the method whose multiply-adds are the model's


def _detector(
    config: Any, build: Callable[..., Any] = rcnn.RCNN, keys: Callable[..., Any] = from_foreign
) -> Head:
    return Head(
        task="detect",
        config=config,
        build=build,
        from_foreign=keys,
        mode="edges",
        size=(800, 1333),
    )


def _efficientdet(scale: Scale) -> Head:
    return Head(
        task="detect",
        config=efficientdet.EfficientDetConfig(**scale.fields()),
        build=efficientdet.EfficientDet,
        from_foreign=efficientdet.from_effdet,
        mode="edges",
        size=(scale.size, scale.size),
        interpolation="bilinear",
        counted="raw",
    )


def _towers(config: towers.TowersConfig) -> Head:
    return Head(task="contrast", config=config, build=towers.TwoTowers, whole=True, embeds=True)


HEADS = {
    "linear": Head(task="segment", config=linear.LinearConfig(), build=linear.build),
    "semantic_fpn": Head(
        task="segment", config=semantic_fpn.SemanticFPNConfig(), build=semantic_fpn.build
    ),
    "upernet": Head(
        task="segment",
        config=upernet.UPerNetConfig(),
        build=upernet.build,
        from_foreign=upernet.from_foreign,
    ),
    "faster_rcnn": _detector(rcnn.RCNNConfig()),
    "mask_rcnn": _detector(rcnn.MaskRCNNConfig()),
    "cascade_rcnn": _detector(cascade.CascadeRCNNConfig()),
    "cascade_mask_rcnn": _detector(cascade.CascadeMaskRCNNConfig()),
    "efficientdet": _efficientdet(SCALES["efficientdet_d0"]),
    "detr": _detector(detr.DETRConfig(), detr.DETR, from_detr),
    "deformable_detr": _detector(
        deformable_detr.DeformableDETRConfig(),
        deformable_detr.DeformableDETR,
        from_deformable_detr,
    ),
    "detr_panoptic": replace(
        _detector(
            detr_panoptic.DETRPanopticConfig(), detr_panoptic.DETRPanoptic, from_detr_panoptic
        ),
        task="panoptic",
    ),
    "clip": _towers(towers.TowersConfig()),
    # Scale and bias of section 3.2.
    "siglip": _towers(towers.TowersConfig(loss="sigmoid", scale=10.0, bias=-10.0)),
    "memory": Head(
        task="classify",
        config=learnable_memory.MemoryConfig(),
        build=learnable_memory.build,
        whole=True,
        on=ViT,
    ),
}
# Full models that a paper names as one: name -> (head, backbone).
NAMED = {
    # Released weights have seen squares.
    name: (replace(_efficientdet(scale), mode="letterbox"), scale.backbone)
    for name, scale in SCALES.items()
}
TASKS = tuple(dict.fromkeys(("classify", *(head.task for head in HEADS.values()))))


@dataclass(frozen=True)
class ModelInfo:
    """What a saved model says of itself: enough to build it again and to feed it.

    parts: "backbone", and "head" where the name has one -> the config that it is built from.
    pretrained: {"source", "sha256"} of the released weights that it started from, where it did.
    category_ids: of each class, as COCO's files of the training data call them, where it had such.
    """

    name: str
    parts: Mapping[str, Any]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    pretrained: Mapping[str, str] | None = None
    category_ids: tuple[int, ...] | None = None

    @property
    def config(self) -> Any:
        """The backbone's."""
        return self.parts["backbone"]


def list_models(pattern: str = "*", *, task: str | None = None) -> list[str]:
    """Names that `create_model` takes, by shell pattern and task ("classify", "segment", "detect").

    Classifiers are called by their backbone alone. Every head goes with every backbone, but "memory" with
    plain ViTs alone: those names, "HEAD/BACKBONE", are listed where the pattern has a slash or a task other
    than "classify" asks for them. What a paper calls by a name of its own ("efficientdet_d0") is listed where
    the task asks for it or no backbone fits the pattern.
    """
    if task is not None and task not in TASKS:
        raise unknown("task", task, TASKS)
    names = list_backbones(pattern) if task in (None, "classify") and "/" not in pattern else []
    for head, known in HEADS.items():
        asked = task == known.task != "classify"
        if asked or (task in (None, known.task) and "/" in pattern):
            on = [n for n in list_backbones() if issubclass(backbone_entry(n).cls, known.on)]
            full = [f"{head}/{name}" for name in on]
            names += [n for n in full if fnmatch.fnmatchcase(n, pattern)]
    if task is not None or not names:
        named = (n for n, (head, _) in NAMED.items() if task in (None, head.task))
        names += [n for n in named if fnmatch.fnmatchcase(n, pattern)]
    return names


def parse_name(name: str) -> tuple[Head | None, BackboneEntry]:
    """The head (None: a classifier's) and the backbone of a full model's name. Raises InputError."""
    if name in NAMED:
        head, backbone = NAMED[name]
        return head, backbone_entry(backbone)
    before, slash, backbone = name.rpartition("/")
    if slash and before not in HEADS:
        raise unknown("head", before, HEADS)
    return (HEADS[before] if slash else None), backbone_entry(backbone)


def create_backbone(name: str, *, weights: Weights = None, **config_fields: Any) -> Any:
    """A backbone by name: images (B, 3, H, W) -> Features.

    weights: "pretrained", a file, a folder, "hf:owner/name@revision", a state dict, or {"backbone": one of
        these}; a classifier's head in it is left. What became of every key stands in `weights_report` of the
        result.
    config_fields: fields of the paper's config, such as image_size or drop_path_rate.
    Raises InputError for an unknown name or field (with the closest), or weights that do not fit.
    """
    entry = backbone_entry(name)
    backbone = build_backbone(entry, config_fields)
    part = _backbone_part(name, weights)
    source, released = _with_released(weights if part is None else part, entry)
    if source is not None:
        weights_room.load_weights(backbone, source, entry, config=backbone.config)
    elif released is not None:
        backbone.weights_report = released
    return backbone


def create_model(
    name: str,
    *,
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
    weights: Weights = None,
    head: Mapping[str, Any] | None = None,
    **config_fields: Any,
) -> Any:
    """A full model by name: "HEAD/BACKBONE"; a bare backbone name is a classifier.

    classes: the class names, in the order of the labels; or num_classes, for names "0", "1", ...
    weights: as for `create_backbone`, of the whole model; or by part, {"backbone": ..., "head": ...}, where
        the parts that are not named stay as they were initialised. A head in a file is dropped only where
        its number of classes differs, and that is said. "pretrained" are the released weights of the
        backbone (and, where the classes are as many, of a classifier's head), which are downloaded once;
        "auto" are these where they can be had, else none, and `weights_report` says why.
    head: fields of the head's config, such as {"dim": 256}. config_fields: of the backbone's.
    """
    known, entry = parse_name(name)
    whole = known is not None and known.whole
    embeds = known is not None and known.embeds
    names = () if embeds and not classes and not num_classes else class_names(classes, num_classes)
    dense = {} if known is None or whole else entry.dense
    parts = {"backbone": _configured(entry, {**dense, **config_fields})}
    if known is not None:
        parts["head"] = _head_config(f"the head of {name}", known.config, head or {})
    elif head:
        raise InputError(
            f"{name} is a classifier, whose head has no fields, but got head={dict(head)}"
        )
    model = assemble(name, parts, len(names))
    preprocessing = entry.preprocessing
    if known is not None and not whole:
        preprocessing = replace(preprocessing, mode=known.mode, size=known.size)
        if known.interpolation is not None:
            preprocessing = replace(preprocessing, interpolation=known.interpolation)
    if "image_size" in config_fields:
        size = config_fields["image_size"]
        size = (size, size) if isinstance(size, int) else tuple(size)
        preprocessing = replace(preprocessing, size=size)
    if known is not None and isinstance(weights, str) and weights in weights_room.RELEASED_WEIGHTS:
        weights = {"backbone": weights}
    weights, released = _with_released(weights, entry)
    origin = None
    if isinstance(released, weights_room.Checkpoint):
        origin = {"source": released.source, "sha256": released.sha256}
    describe(model, ModelInfo(name, parts, names, preprocessing, origin))
    by_part = _by_part(model, name, weights)
    if by_part is not None:
        model.weights_report = _load_parts(model, by_part, entry, parts["backbone"])
    elif weights is not None and known is None:
        weights_room.load_weights(model, weights, entry, config=parts["backbone"])
    elif weights is not None:
        model.weights_report = load_dense(model, weights, name)
    elif released is not None:
        model.weights_report = released
    return model


def assemble(name: str, parts: Mapping[str, Any], num_classes: int) -> Any:
    """The model of a name from the configs of its parts, freshly initialised."""
    known, entry = parse_name(name)
    if known is None:
        return build_classifier(entry, parts["backbone"], num_classes)
    if known.task == "segment":
        check_classes(num_classes)
    backbone = entry.cls(parts["backbone"])
    if known.embeds:
        tail = entry.tail or PooledHead
        outputs = parts["head"].dim
        return known.build(
            backbone, tail(parts["backbone"], backbone.feature_specs, outputs), parts["head"]
        )
    return known.build(backbone, parts["head"], num_classes)


def build_backbone(entry: BackboneEntry, config_fields: Mapping[str, Any]) -> Any:
    """The entry's backbone with some config fields replaced, freshly initialised."""
    return entry.cls(_configured(entry, config_fields))


def build_classifier(entry: BackboneEntry, config: Any, num_classes: int) -> Classifier:
    """The entry's backbone of this config and its paper's tail, or the pooled head; freshly initialised."""
    backbone = entry.cls(config)
    tail = entry.tail or PooledHead
    return Classifier(backbone, tail(config, backbone.feature_specs, num_classes))


def _head_config(where: str, default: Any, given: Mapping[str, Any]) -> Any:
    """A head's config with some fields replaced, whose values are of the types that the fields have."""
    if not given.keys() <= (fields := to_dict(default)).keys():
        with_fields(where, default, given)  # which says what is meant
    return from_dict(type(default), fields | dict(given), where=where)


def _configured(entry: BackboneEntry, config_fields: Mapping[str, Any]) -> Any:
    config = with_fields(entry.name, entry.config, config_fields)
    check_choices(config, where=entry.name)
    return config


def class_names(classes: Sequence[str] | None, num_classes: int | None) -> tuple[str, ...]:
    """The class names of a model: given, counted, or ImageNet's thousand numbers."""
    if classes is None:
        count = 1000 if num_classes is None else num_classes
        if count < 1:
            raise InputError(f"num_classes is {count}, but a model needs at least one class")
        return tuple(str(i) for i in range(count))
    names = tuple(classes)
    if isinstance(classes, str) or not names or not all(isinstance(c, str) for c in names):
        raise InputError(f"classes must be a list of names, but got {classes!r}")
    if len(set(names)) != len(names):
        twice = sorted({c for c in names if names.count(c) > 1})
        raise InputError(f"class names must differ, but {twice} stand more than once")
    if num_classes not in (None, len(names)):
        raise InputError(
            f"num_classes={num_classes}, but {len(names)} classes are named; drop num_classes"
        )
    return names


def check_takes_packs(model: Any, *, drops: bool = False) -> None:
    """Raise InputError unless a model takes packed images, naming those that do. drops: of some tokens."""
    if not hasattr(model, "backbone"):
        raise InputError(
            f"windows, scales and flips ask {model.info.name} of images of one size: leave them away, or ask "
            "without --tokens-per-image and --max-tokens"
        )
    takes = getattr(model.backbone, "takes_packs", False)
    if takes and hasattr(model, "forward_packed") and getattr(model, "takes_packs", True):
        if drops and getattr(model, "reads_maps", False):
            raise InputError(
                f"{model.info.name} reads maps, in which token dropping leaves holes; give --packing.drop 0"
            )
        return
    if takes:
        reads = getattr(model, "reads", "maps of one size")
        raise InputError(
            f"{model.info.name} cannot take packed images: its head reads {reads} "
            f"({type(model).__name__}); take images of one size, or another head: linear, or an R-CNN's"
        )
    known = {backbone_entry(name).family for name in list_backbones()}
    with torch.device("meta"):
        families = [
            family
            for family, entry in tiny_entries().items()
            if family in known
            and hasattr(entry.cls, "takes_packs")
            and entry.cls(entry.config).takes_packs
        ]
    raise InputError(
        f"{model.info.name} cannot take packed images: its tokens are no plain patches; models that can are "
        f"those of the families {', '.join(families)}, such as vit_tiny_patch16"
    )


def use_patch_sizes(model: Any, *sizes: int) -> None:
    """Let a classifier on a plain ViT cut images into patches of these sizes, the first where a call names
    none: the projection of its own patches, and its positions, are resized (Beyer et al., "FlexiViT", CVPR
    2023, arXiv 2212.08013). Its config and weights stay as they are.

    Raises InputError for other models.
    """
    if not sizes or min(sizes) < 1:
        raise InputError(f"patch sizes must be at least 1 pixel, but are {sizes}")
    if not getattr(getattr(model, "backbone", None), "takes_patch_sizes", False):
        raise InputError(
            f"{model.info.name} cannot change its patch size: its tokens are no plain patches; models that "
            "can are plain ViTs, such as flexivit_small and vit_tiny_patch16"
        )
    if not getattr(model, "takes_patch_sizes", False):
        raise InputError(
            f"{model.info.name} cannot change its patch size, for which its head was made; give it to a new "
            f"model, which weights are fitted to: --model-fields patch_size={sizes[0]}"
        )
    model.backbone.patch_sizes = tuple(sizes)


def at_patch_size(model: Any, size: int) -> None:
    """Ask a model with patches of this size from now on (`use_patch_sizes`). Images at their own shape have
    at most the pixels that they had."""
    before = model.preprocessing.patches
    use_patch_sizes(model, size)
    if before is not None:
        most = max(1, before[0] * before[1] ** 2 // size**2)
        seen = replace(model.preprocessing, patches=(most, size))
        describe(model, replace(model.info, preprocessing=seen))


def at_own_shape(model: Any, most: int) -> Preprocessing:
    """How a model that takes packs sees images at their own shape, of at most so many patches."""
    check_takes_packs(model)
    if most < 1:
        raise InputError(f"an image needs at least one patch, but at most {most} are allowed")
    patches = (most, model.backbone.patch_sizes[0])
    return replace(model.preprocessing, mode="native", patches=patches)


def describe(model: Any, info: ModelInfo) -> None:
    """Attach what a saved model says of itself."""
    model.info = info
    model.classes = info.classes
    model.preprocessing = info.preprocessing
    model.category_ids = info.category_ids


def part_names(model: torch.nn.Module) -> list[str]:
    """The top-level modules that hold weights: "backbone", "head", ..."""
    return [part for part, module in model.named_children() if module.state_dict()]


def _backbone_part(name: str, weights: Weights) -> Any:
    """What `weights` gives under "backbone" where it goes by part, else None: a checkpoint."""
    if isinstance(weights, Mapping) and (
        set(weights) == {"backbone"} or any(isinstance(v, (str, Path)) for v in weights.values())
    ):
        if "backbone" not in weights:
            raise InputError(
                f"weights of the backbone {name!r} stand under 'backbone', but got "
                f"{sorted(map(str, weights))}"
            )
        return weights["backbone"]
    return None


def _with_released(weights: Any, entry: BackboneEntry) -> tuple[Any, Any]:
    """`weights` with the backbone's released ones where they are asked for, and these: a Checkpoint, or a
    Report that says why "auto" got none."""
    by_part = isinstance(weights, Mapping)
    wanted = weights.get("backbone") if by_part else weights
    if not isinstance(wanted, str) or wanted not in weights_room.RELEASED_WEIGHTS:
        return weights, None
    rest = {k: v for k, v in weights.items() if k != "backbone"} if by_part else {}
    try:
        released = weights_room.read_pretrained(entry.name)
    except weights_room.Unavailable as error:
        if rest or wanted != weights_room.OR_RANDOM:
            raise
        return None, weights_room.Report(f"starting from random weights: {error}", "", ())
    return ({**rest, "backbone": released} if by_part else released), released


def _by_part(model: torch.nn.Module, name: str, weights: Weights) -> Mapping[str, Any] | None:
    """`weights` where it goes by part, else None: a checkpoint of the whole model.

    Parts are named by files and folders, or by the parts' names alone; other mappings hold tensors.
    """
    if not isinstance(weights, Mapping):
        return None
    known = part_names(model)
    files = any(isinstance(v, (str, Path)) for v in weights.values())
    if not files and not (weights and set(weights) <= set(known)):
        return None
    strange = [str(part) for part in weights if part not in known]
    if strange:
        raise InputError(
            f"weights by part for {name!r} take the keys {', '.join(map(repr, known))}, but got "
            f"{sorted(map(str, weights))}"
        )
    return weights


def _load_parts(
    model: Any, weights: Mapping[str, Any], entry: BackboneEntry, config: Any
) -> weights_room.Report:
    """Fill the named parts, each from its own file."""
    reports = []
    for part, source in weights.items():
        module = getattr(model, part)
        if part == "backbone":
            reports.append(weights_room.load_weights(module, source, entry, config=config))
        else:
            checkpoint = weights_room.read_checkpoint(source)
            reports.append(weights_room.check_part(model, (part,), checkpoint).fill())
    return reports[0] if len(reports) == 1 else weights_room.joined(reports)


def load_dense(
    model: Any, weights: Any, name: str, *, layout: str | None = None
) -> weights_room.Report:
    """Fill a whole dense model from a file of ours or of another library. layout: of the backbone's keys."""
    head, entry = parse_name(name)
    assert head is not None
    checkpoint = weights_room.read_checkpoint(weights)
    prefix = "backbone."
    state = head.from_foreign(checkpoint.state)
    below = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    above = {k: v for k, v in state.items() if not k.startswith(prefix)}
    if not below or not above:
        raise InputError(
            f"{checkpoint.source} holds no whole {name}: it has {len(below)} keys under 'backbone.' and "
            f"{len(above)} beside them; for the backbone's weights alone give "
            "weights={'backbone': ...}"
        )
    parts = tuple(part for part in part_names(model) if part != "backbone")
    heads = replace(checkpoint, state=above)
    ready = weights_room.check_part(model, parts, heads)  # before anything is filled
    own = replace(checkpoint, state=below)
    config = model.info.parts["backbone"]
    first = weights_room.load_weights(model.backbone, own, entry, config=config, layout=layout)
    return weights_room.joined([first, ready.fill()])
