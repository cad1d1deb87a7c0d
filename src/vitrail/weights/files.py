"""Reading checkpoints without running them, and writing files that are there whole or not at all.

What may be read: safetensors, and PyTorch pickles by the restricted unpickler (`weights_only=True`) that
builds tensors and plain containers and nothing else. What is written: safetensors and text, each into a
temporary file beside the target, flushed to the disk and renamed over it.
"""

import argparse
import contextlib
import difflib
import hashlib
import json
import os
import pickle
import re
import secrets
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from vitrail_runtime.errors import InputError, listed

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".th", ".tar")
SUFFIXES = (".safetensors", *PICKLES)
WRITTEN = (".capsule", ".safetensors")  # what files that hold safetensors of ours end in
# In this order: what a folder is taken to hold, one name per format that is in use.
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
DIGEST = "vitrail_digest"  # of a file's tensors and texts, among the texts of its header
# A header of 70,000 tensors fits; parsed JSON of this size stays within a few hundred megabytes.
MAX_HEADER = 16 * 2**20

# Keys under which training scripts keep the weights, those that were evaluated first.
WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "teacher",
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "student",
)
PREFIXES = ("module.", "model.", "model_ema.", "ema_model.", "teacher.", "student.", "net.")
# torch.compile, activation checkpointing and FSDP put these into the middle of names.
INFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@dataclass
class Checkpoint:
    """A state dict and where it came from.

    notes: what was unwrapped, chosen or passed over on the way, for the report.
    sha256: of the file, where it holds released weights.
    config, preprocessor: config.json and preprocessor_config.json beside the weights, {} where absent.
    """

    state: dict[str, Tensor]
    source: str
    notes: list[str] = field(default_factory=list)
    sha256: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)


def read_state(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """Key -> tensor on the CPU, from a file, a folder, "hf:owner/name@revision" or a state dict.

    Wrappers that training scripts leave ("state_dict", "module.", ...) are taken off. Raises
    InputError when there is no such source or it holds no weights; code in a pickle is never run.
    """
    return read_checkpoint(source).state


def read_checkpoint(source: str | Path | Mapping[str, Any] | Checkpoint) -> Checkpoint:
    """As `read_state`, with what the report says of the source. A Checkpoint is returned as it is."""
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Mapping):
        return unwrap(source, "the given state dict")
    text = str(source)
    if text.startswith("hf:"):
        from vitrail.weights import hub

        found = hub.fetch(text)
        checkpoint = read_checkpoint(found.path)
        checkpoint.source = found.name
        checkpoint.notes[:0] = found.notes
        return checkpoint
    if re.match(r"[a-z][a-z0-9+.-]+://", text):
        raise InputError(
            f"weights are not read from the address {text}; download the file and give its path, "
            "or name a hub repository as hf:owner/name@revision"
        )
    path = Path(source).expanduser()
    if path.is_dir():
        return read_folder(path)
    return unwrap(_read_tensors(path), str(path))


def read_folder(folder: Path) -> Checkpoint:
    """A model folder of vitrail, or a Hugging Face one: safetensors before pickles, whole or sharded."""
    found = [name for name in FOLDER_FILES if (folder / name).is_file()]
    if not found:
        best = folder / "best"
        if any((best / name).is_file() for name in FOLDER_FILES):
            raise InputError(f"{folder} holds no weights itself; did you mean {best}?")
        others = sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES)
        hint = f"; it holds {listed(others)}: name one of them" if others else ""
        raise InputError(f"{folder} has none of {', '.join(FOLDER_FILES)}{hint}")
    name = found[0]
    sharded = name.endswith(".index.json")
    checkpoint = read_shards(folder / name) if sharded else read_checkpoint(folder / name)
    checkpoint.source = str(folder)
    checkpoint.notes.insert(0, f"read {name} in the folder")
    checkpoint.config = _beside(folder / "config.json")
    checkpoint.preprocessor = _beside(folder / "preprocessor_config.json")
    return checkpoint


def _beside(path: Path) -> dict[str, Any]:
    data = read_json(path) if path.is_file() else {}
    return data if isinstance(data, dict) else {}


def shard_places(index: Path) -> dict[str, str]:
    """Key -> the file beside a Hugging Face index that holds it. Raises InputError for other names."""
    data = read_json(index)
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise InputError(f"{index} has no weight_map from keys to file names; download it again")
    for name in sorted(set(places.values())):
        # Anything but a weights file beside the index would be a file that nobody named.
        if name != Path(name).name or "\\" in name or Path(name).suffix not in SUFFIXES:
            raise InputError(
                f"{index} names the shard {name!r}, which is not a plain file name that ends in "
                f"{', '.join(SUFFIXES)}"
            )
    return places


def shard_names(index: Path) -> list[str]:
    """The files that an index names, sorted."""
    return sorted(set(shard_places(index).values()))


def read_shards(index: Path) -> Checkpoint:
    """The shards that a Hugging Face index names, as one state."""
    places = shard_places(index)
    files = sorted(set(places.values()))
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise InputError(
            f"{index} names {len(files)} shards, but {len(missing)} are not there: "
            f"{listed(missing)}; download the whole folder"
        )
    state: dict[str, Tensor] = {}
    for name in files:
        part = _read_tensors(index.parent / name)
        twice = state.keys() & part.keys()
        if twice:
            raise InputError(f"{index.parent / name} repeats {sorted(twice)[:3]} of another shard")
        state.update(part)
    absent = sorted(places.keys() - state.keys())
    if absent:
        raise InputError(f"the shards of {index} lack {len(absent)} of its keys: {listed(absent)}")
    checkpoint = unwrap(state, str(index))
    checkpoint.notes.insert(0, f"{len(files)} shards")
    return checkpoint


def _read_tensors(path: Path) -> Any:
    """What stands in a file: key -> tensor from safetensors, any plain data from a pickle."""
    if not path.exists():
        raise InputError(f"there is no weights file {path}{_nearby(path)}")
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"{path} ends in {suffix or 'nothing'}, but weights are read from {', '.join(SUFFIXES)}, "
            "a folder, or hf:owner/name@revision"
        )
    try:
        _look_at_start(path)
        return read_safetensors(path) if suffix == ".safetensors" else read_pickle(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _look_at_start(path: Path) -> None:
    """Say what a file is when it is none of the formats that its name promises."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
    if size == 0:
        raise InputError(f"{path} is empty (0 bytes); download or copy it again")
    if start.startswith(b"version https://git-lfs.github.com/spec"):
        raise InputError(
            f"{path} is a git-lfs pointer of {size} bytes, not the weights; "
            "run `git lfs pull` in its repository, or download the file itself"
        )
    if start.lstrip()[:15].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(
            f"{path} is a web page, not weights: the download went to a page instead of the file"
        )
    is_safetensors = start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] <= size
    is_zip = start.startswith(b"PK\x03\x04")
    if path.suffix.lower() == ".safetensors" and is_zip:
        raise InputError(f"{path} is a PyTorch zip file; rename it to end in .pth")
    if path.suffix.lower() != ".safetensors" and is_safetensors:
        raise InputError(f"{path} is a safetensors file; rename it to end in .safetensors")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Key -> tensor. Nothing larger than the file itself is allocated, whatever its header claims.

    A file that carries a digest, as `write_state` gives it, is checked against it.
    """
    _check_header(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            texts = dict(file.metadata() or {})
            # Cloned: the reader maps the file, and whoever overwrites it would change the weights.
            # An open file is no mapping: `in file` would fail.
            state = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise InputError(
            f"{path} is not a whole safetensors file ({error}); download or copy it again"
        ) from error
    written = texts.pop(DIGEST, None)
    if written is not None and written != digest_of(state, texts):
        raise InputError(
            f"{path} is damaged: its digest is not that of what was written; copy it again"
        )
    return state


def digest_of(tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None) -> str:
    """32 hex characters over texts by name, and over name, dtype, shape and bytes of every tensor.

    The order of the names does not matter. As many threads hash as torch computes with.
    """

    def one(item: tuple[str, Tensor]) -> bytes:
        key, value = item
        about = json.dumps([key, str(value.dtype), list(value.shape)])
        digest = hashlib.blake2b(about.encode(), digest_size=16)
        # BLAKE2b is as fast on every processor; SHA-256 is half as fast on those without instructions for it.
        if (
            value.numel()
        ):  # NumPy's empty arrays come with strides of which torch makes no view as bytes
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(data)
        return digest.digest()

    digest = hashlib.blake2b(json.dumps(dict(texts or {}), sort_keys=True).encode(), digest_size=16)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for part in threads.map(one, sorted(tensors.items(), key=lambda item: item[0])):
            digest.update(part)
    return digest.hexdigest()


def read_metadata(path: Path) -> dict[str, str]:
    """The text that travels in a safetensors file's header, unchecked; {} where there is none."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _check_header(path: Path) -> None:
    """What the safetensors reader lets pass: keys that stand twice, headers of any size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        raw = file.read(8)
        length = struct.unpack("<Q", raw)[0] if len(raw) == 8 else 0
        if not 2 <= length <= size - 8:
            raise InputError(
                f"{path} is not a whole safetensors file (its header would take {length} bytes, "
                f"the file has {size}); download or copy it again"
            )
        if length > MAX_HEADER:
            raise InputError(
                f"{path} has a header of {length} bytes, more than the {MAX_HEADER} that are read"
            )
        header = file.read(length)
    try:
        json.loads(header, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a safetensors file (header: {error})") from error


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        keys = [k for k, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return seen


def read_pickle(path: Path) -> Any:
    """A torch.save file's data by the restricted unpickler. Raises InputError for anything with code."""
    _check_zip(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            # A Namespace is a bag of attributes; half of the released checkpoints hold their flags in one.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = (
            f"holds more than tensors ({name[1]}): unpickling it could run code, so it was refused"
            if name
            else "is no torch.save file, or a pickle of another kind that could run code: refused"
        )
        raise InputError(
            f"{path} {what}, and nothing was executed. Look for a .safetensors release of these "
            "weights, or download it again; if you trust the file, load it where it was made and save "
            "only its state_dict with torch.save"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # the unpickler raises whatever a broken file leads it to
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{path} is broken or not a PyTorch checkpoint ({type(error).__name__}: {reason}); "
            "download or copy it again"
        ) from error


def _check_zip(path: Path) -> None:
    """torch.save stores without compressing; a compressed member could unfold to any size."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or (
        sum(m.file_size for m in members) > path.stat().st_size
    ):
        raise InputError(
            f"{path} is a compressed zip file, not a PyTorch checkpoint; unpack it first"
        )


def read_json(path: Path) -> Any:
    """A JSON file. Raises InputError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def unwrap(data: Any, source: str) -> Checkpoint:
    """The state dict inside what a training script saved. Raises InputError where there is none."""
    notes: list[str] = []
    while isinstance(data, Mapping) and not _mostly_tensors(data):
        inner = [k for k in WRAPPERS if isinstance(data.get(k), Mapping) and _has_tensors(data[k])]
        if not inner:
            break
        others = f" (there is also {', '.join(map(repr, inner[1:]))})" if inner[1:] else ""
        notes.append(f"took the entry {inner[0]!r}{others}")
        data = data[inner[0]]
    if not isinstance(data, Mapping):
        raise InputError(f"{source} holds a {type(data).__name__}, not a state dict of tensors")
    state = {str(k): v for k, v in data.items() if isinstance(v, Tensor)}
    if not state:
        shown = ", ".join(repr(str(k)) for k in list(data)[:8])
        raise InputError(
            f"{source} holds no tensors under {', '.join(map(repr, WRAPPERS))}; its keys are {shown}"
        )
    passed = [str(k) for k in data if not isinstance(data[k], Tensor)]
    if passed:
        notes.append(f"passed over entries that are no tensors: {listed(passed, limit=8)}")
    if state.pop("n_averaged", None) is not None:
        notes.append("passed over the counter 'n_averaged' of weight averaging")
    for infix in INFIXES:
        if any(infix in key for key in state):
            state = {key.replace(infix, ""): v for key, v in state.items()}
            notes.append(f"took {infix!r} out of the keys")
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {key.removeprefix(prefix): v for key, v in state.items()}
        notes.append(f"took the prefix {prefix!r} off every key")
    return Checkpoint(state, source, notes)


def _mostly_tensors(data: Mapping[str, Any]) -> bool:
    tensors = sum(isinstance(v, Tensor) for v in data.values())
    return tensors > 0 and not any(
        isinstance(data.get(k), Mapping) and _has_tensors(data[k]) for k in WRAPPERS
    )


def _has_tensors(data: Mapping[str, Any]) -> bool:
    return any(
        isinstance(v, Tensor) or (isinstance(v, Mapping) and _has_tensors(v)) for v in data.values()
    )


def _nearby(path: Path) -> str:
    """The closest file names in the folder where one was looked for."""
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    close = difflib.get_close_matches(path.name, os.listdir(path.parent), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(str(path.parent / c) for c in close)}?" if close else ""


def write_state(
    state: Mapping[str, Tensor], path: str | Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors. The path holds the old file or the whole new one, at any moment.

    metadata: text that travels in the file's header; `read_metadata` gives it back. A digest of tensors and
        text travels with it, against which `read_state` checks them.
    Raises InputError when it cannot be written (a full disk, no permission); the old file stays.
    """
    path = Path(path)
    if path.suffix not in WRITTEN:
        raise InputError(
            f"only safetensors is written; let {path.name} end in {' or '.join(WRITTEN)}"
        )
    tensors: dict[str, Tensor] = {}
    places = set()
    for key, value in state.items():
        value = value.detach().cpu().contiguous()
        # The format holds no aliases: a tied or a sliced tensor is written on its own.
        if value.untyped_storage().data_ptr() in places:
            value = value.clone()
        places.add(value.untyped_storage().data_ptr())
        tensors[key] = value
    # The format's readers in other libraries expect to be told the framework.
    texts = {"format": "pt", **(metadata or {})}
    texts[DIGEST] = digest_of(tensors, texts)
    with _replacing(path) as temporary:
        save_file(tensors, temporary, metadata=texts)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file, atomically as `write_state`.

    Bytes of file names that are no text become escapes such as \\udcff, as JSON writes them too.
    """
    with _replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place, flushed to disk, when the body succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Made first with the permissions that a new file has here: safetensors would leave 0600.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = temporary.stat().st_mode & 0o777
        yield temporary
        os.chmod(temporary, mode)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except (OSError, safetensors.SafetensorError) as error:
        kept = "; the file that stood there is unchanged" if path.exists() else ""
        raise InputError(f"{path} cannot be written: {error}{kept}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders; its rename is durable enough
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
