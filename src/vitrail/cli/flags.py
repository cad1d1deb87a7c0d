"""A verb's flags from a dataclass, by tyro; a wrong one is an InputError like any other mistake."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

import tyro

from vitrail.registry import unknown
from vitrail_runtime.errors import InputError

T = TypeVar("T")

# Of tyro's unstable part, and the only way not to have its framed messages: where a later tyro has no such
# hook, or reports something that is unknown here, the frame is what a person sees, also with exit code 2.
_errors: Any = getattr(tyro, "_errors", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceFlags:
    """How an image is put to a model, for verbs that ask one."""

    window: int | None = None
    """Of a segmenter: the side of square windows that slide over the image, in pixels of its input."""
    stride: int | None = None
    """With --window: pixels from one to the next; none: two thirds of it."""
    scales: tuple[float, ...] = (1.0,)
    """Of a segmenter: sizes, relative to its input, at which it sees an image; answers are averaged."""
    flip: bool = False
    """Of a segmenter: also ask of the mirrored image, and average."""

    tokens_per_image: int | None = None
    """Of a plain ViT: images at their own shape, made smaller to at most so many patches; fewer cost less."""
    patch_size: int | None = None
    """Of a classifier on a plain ViT: patches of so many pixels a side, instead of the model's own; larger
    ones cost less. For models trained with --patch-sizes, such as flexivit_small."""

    def asked(self) -> bool:
        """Whether in any way but the plain one."""
        from vitrail.segmenters.inference import Inference

        asked = (self.tokens_per_image, self.patch_size)
        return self._inference() != Inference() or any(value is not None for value in asked)

    def applied(self, model: Any) -> Any:
        """The model, asked in this way. Raises InputError where it cannot be."""
        from vitrail.models import at_own_shape, at_patch_size, describe
        from vitrail.segmenters.inference import inferred

        if self.patch_size is not None:
            at_patch_size(model, self.patch_size)
        if self.tokens_per_image is not None:
            seen = at_own_shape(model, self.tokens_per_image)
            describe(model, dataclasses.replace(model.info, preprocessing=seen))
        return inferred(model, self._inference())

    def _inference(self) -> Any:
        from vitrail.segmenters.inference import Inference

        how = {"window": self.window, "stride": self.stride, "scales": self.scales}
        return Inference(**how, flip=self.flip)


def parse_flags(
    kind: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    description: str | None = None,
    default: T | None = None,
) -> T:
    """An instance of the dataclass `kind` (or `tyro.conf` marker of one) from the command line.

    Raises InputError for what does not fit, naming the closest flags; SystemExit(0) after --help.
    """
    more: dict[str, Any] = {} if default is None else {"default": default}
    with _as_input_errors(kind):
        return tyro.cli(kind, args=argv, prog=prog, description=description, **more)


def act(
    verb: str, actions: Mapping[str, Callable[[list[str]], int | None]], text: str, argv: list[str]
) -> int | None:
    """`vitrail VERB ACTION ...`; text: the help."""
    if not argv or argv[0] in ("-h", "--help"):
        print(text)
        return 0
    if argv[0] not in actions:
        raise InputError(f"unknown action {argv[0]!r}; vitrail {verb} takes {', '.join(actions)}")
    return actions[argv[0]](argv[1:])


def flags_of(kind: Any, prefix: str = "--") -> list[str]:
    """All flags of a dataclass: ["--data", "--augmentation.flip", ...]."""
    kind, markers = _unmarked(kind)
    names = []
    for field in dataclasses.fields(kind):
        inner, markers = _unmarked(field.type)
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(inner):
            nameless = any(getattr(m, "name", None) == "" for m in markers)
            names += flags_of(inner, prefix if nameless else f"{name}.")
        elif tyro.conf.Positional not in markers:
            names.append(name)
    return names


def _unmarked(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """X and the markers of Annotated[X, ...]."""
    if hasattr(kind, "__metadata__"):
        return get_args(kind)[0], kind.__metadata__
    return kind, ()


@contextlib.contextmanager
def _as_input_errors(kind: Any) -> Iterator[None]:
    if not hasattr(_errors, "on_parse_error"):
        yield
        return

    def tell(event: Any) -> None:
        text = _told(event, kind)
        if text is not None:
            raise InputError(text) from None

    with _errors.on_parse_error(tell):
        yield


def _told(event: Any, kind: Any) -> str | None:
    """What is wrong, in one message; None for an event that is not known here."""
    help_hint = f"{event.prog} --help tells what there is"
    match type(event).__name__:
        case "UnrecognizedArgs":
            wrong = [t.partition("=")[0] for t in event.tokens if _is_flag(t)]
            if wrong:
                return "\n".join(str(unknown("flag", flag, flags_of(kind))) for flag in wrong)
            return f"unexpected {' '.join(map(repr, event.tokens))}; {help_hint}"
        case "MissingArgs":
            names = [_name(given.arg) for given in event.missing_arguments]
            return f"{event.prog} needs {' and '.join(names)}; {help_hint}"
        case "BadValue" if event.reason == "too_few_values":
            return f"{_name(event.argument)}: a value is missing; {help_hint}"
        case "InvalidChoice":
            # tyro keeps the choices of a flag that may be None in a set, which has no order.
            choices = sorted(event.choices) if "None" in event.choices else event.choices
            name = event.argument.display_name()
            return f"{name} must be one of {', '.join(choices)}, but is {event.value!r}"
        case "InstantiationFailure" if event.argument is None:
            return str(event.message)  # of the dataclass itself, which names the field
        case "InstantiationFailure":
            # Of a union, a line for each part: the last is that of the part beside None.
            *_, line = str(event.message).splitlines()
            reason = re.sub(r"^- <class '.*?'>: ", "", line)
            return f"{_name(event.argument)}: {reason}"
    return None


def _is_flag(token: str) -> bool:
    """Whether a token means a flag: -1 and -.5 are values of an unknown one."""
    return token.startswith("-") and not token[1:2].isdigit() and token[1:2] != "."


def _name(argument: Any) -> str:
    """ "--data STR", or "RUN" of what has no flag."""
    metavar = str(argument.lowered.metavar)
    return metavar if argument.is_positional() else f"{argument.display_name()} {metavar}"
