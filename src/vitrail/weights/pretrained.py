"""Released weights by a model's name alone: the catalogue's first source, kept on this machine."""

import hashlib
import re
from pathlib import Path

import torch

from vitrail.weights import hub
from vitrail.weights.catalogue import RELEASED
from vitrail.weights.files import FOLDER_FILES, SUFFIXES, Checkpoint, read_checkpoint, shard_names
from vitrail_runtime.errors import InputError

OR_RANDOM = "auto"  # the released weights where they can be had; else none, and the report says why
RELEASED_WEIGHTS = ("pretrained", OR_RANDOM)  # what `weights=` takes instead of a source


def read_pretrained(name: str) -> Checkpoint:
    """The released weights of a backbone, downloaded the first time; `sha256` is that of their file.

    Raises Unavailable where none are known, or no address gives them, or the network does not answer (it then
    names the file to fetch and where to put it); InputError for a damaged file.
    """
    source = next(iter(RELEASED.get(name, ())), None)
    if source is None:
        raise hub.Unavailable(
            f"no released weights of {name} are known; give a file, a folder or hf:owner/name@revision, or "
            "take a model for which `vitrail models` names some"
        )
    place, address = _place(source), _address(source)
    if not address.endswith(SUFFIXES):
        raise hub.Unavailable(
            f"the weights of {name} are linked from {address}: download them there and give the file's path"
        )
    try:
        if place.is_file():
            path, called, notes = place, str(place), []
        elif source.startswith("hf:"):
            found = hub.fetch(source, cached_first=True)
            path, called, notes = found.path, found.name, found.notes
        else:
            _download(address, place)
            path, called, notes = place, source, []
    except hub.Unavailable as error:
        raise hub.Unavailable(
            f"{error}\nor fetch {address} where there is a network, and put it at {place}"
        ) from error
    sha256 = _sha256(path)
    promised = re.search(r"-([0-9a-f]{8})\.pth$", place.name)  # as torchvision calls its files
    if promised is not None and not sha256.startswith(promised[1]):
        raise InputError(
            f"{path} is damaged: its sha256 begins with {sha256[:8]}, not {promised[1]}; remove it, to have "
            "it fetched again"
        )
    checkpoint = read_checkpoint(path)
    checkpoint.source, checkpoint.sha256 = called, sha256
    checkpoint.notes[:0] = [*notes, f"sha256 {sha256}"]
    return checkpoint


def _place(source: str) -> Path:
    """Where torch keeps a file from an address, and where one of the hub's can be put by hand."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if source.startswith("hf:"):
        return folder / f"{hub.parse(source)[0].replace('/', '--')}.safetensors"
    return folder / source.rpartition("/")[2]


def _address(source: str) -> str:
    if not source.startswith("hf:"):
        return source
    return f"https://huggingface.co/{hub.parse(source)[0]}/resolve/main/{FOLDER_FILES[0]}"


def _download(address: str, place: Path) -> None:
    """With a bar, into a temporary file that takes its place when it is whole."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(place))
    except OSError as error:  # the network's errors are of this kind too
        raise hub.Unavailable(f"{address} cannot be fetched ({error})") from error


def _sha256(path: Path) -> str:
    """Of a weights file; of a folder's, all shards one after the other."""
    files = [path]
    if path.is_dir():
        file = next(path / name for name in FOLDER_FILES if (path / name).is_file())
        sharded = file.name.endswith(".index.json")
        files = [path / shard for shard in shard_names(file)] if sharded else [file]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                digest.update(block)
    return digest.hexdigest()
