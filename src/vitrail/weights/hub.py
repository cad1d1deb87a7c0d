"""Weights from Hugging Face hub repositories: pinned to a commit, weight files only, never code."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitrail.weights.files import FOLDER_FILES, SUFFIXES, shard_names
from vitrail_runtime.errors import InputError

_SPEC = re.compile(
    r"hf:(?://)?(?P<repo>[\w.-]+/[\w.-]+?)(?:/(?P<file>[^@]+))?(?:@(?P<revision>[\w./-]+))?"
)
DESCRIPTIONS = ("config.json", "preprocessor_config.json")  # read beside the weights
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Unavailable(InputError):
    """Weights that cannot be had from here: they are not in the cache, and no network gives them."""


@dataclass(frozen=True)
class Found:
    """Weights on this machine. name: as the report calls them, with the commit."""

    path: Path
    name: str
    notes: list[str] = field(default_factory=list)


def fetch(spec: str, *, cached_first: bool = False) -> Found:
    """Download (or find in the cache) the weights of "hf:owner/name[/FILE]@revision".

    A revision is a branch, a tag or a commit; what it stands for today is resolved to a commit, which
    the report names so that it can be pinned. A full commit in the cache needs no network; neither does
    anything in the cache with HF_HUB_OFFLINE=1, or with `cached_first`. Raises InputError when it cannot be
    had; Unavailable where that is for want of a network.
    """
    repo, file, revision = parse(spec)
    cached = _in_cache(repo, file, revision)
    if cached is not None and (cached_first or _COMMIT.fullmatch(revision or "")):
        return cached
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return _download(repo, file, revision, cached)
    if cached is None:
        raise Unavailable(
            f"{spec} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; unset it to "
            "download, or copy the cache from a machine that has it"
        )
    return cached


def parse(spec: str) -> tuple[str, str | None, str | None]:
    """ "hf:owner/name/FILE@revision" -> (owner/name, FILE or None, revision or None)."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise InputError(
            f"{spec!r} is no hub address; write hf:owner/name@revision, with a branch, tag or commit"
        )
    file = match["file"]
    if file is not None and (not file.endswith(SUFFIXES) or ".." in file.split("/")):
        raise InputError(
            f"{spec!r} names the file {file!r}, but only weights are fetched: {', '.join(SUFFIXES)}"
        )
    return match["repo"], file, match["revision"]


def _in_cache(repo: str, file: str | None, revision: str | None) -> Found | None:
    """What the cache holds of this revision, when that is all that is needed."""
    for name in (file,) if file else FOLDER_FILES:
        path = _cached_file(repo, name, revision)
        if path is None:
            continue
        if name.endswith(".index.json"):
            shards = [_cached_file(repo, shard, revision) for shard in shard_names(path)]
            if not all(shards):
                continue
        root = path.parents[name.count("/")]  # snapshots/COMMIT
        return _found(repo, file, revision, root, root.name, " in the cache")
    return None


def _cached_file(repo: str, name: str, revision: str | None) -> Path | None:
    import huggingface_hub

    found: Any = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision or "main")
    return Path(found) if isinstance(found, str) else None


def _download(repo: str, file: str | None, revision: str | None, cached: Found | None) -> Found:
    """Resolve the revision to a commit and fetch the weight files of that commit."""
    import huggingface_hub
    from huggingface_hub import errors

    address = f"hf:{repo}" + (f"@{revision}" if revision else "")
    try:
        info = huggingface_hub.model_info(repo, revision=revision)
        commit = str(info.sha)
        there = {str(s.rfilename) for s in info.siblings or ()}
        name = file or next((n for n in FOLDER_FILES if n in there), None)
        if name is None or name not in there:
            raise InputError(_no_such_file(address, file, there))
        path = Path(huggingface_hub.hf_hub_download(repo, name, revision=commit))
        shards = shard_names(path) if name.endswith(".index.json") else []
        extra = [n for n in DESCRIPTIONS if n in there and file is None]
        for other in [*shards, *extra]:
            huggingface_hub.hf_hub_download(repo, other, revision=commit)
    except InputError:
        raise
    except errors.GatedRepoError as error:
        raise InputError(
            f"{address} asks for its terms to be accepted: do so at https://huggingface.co/{repo}, "
            "then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"there is no repository {repo} on the hub (or it is private: `hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{repo} has no revision {revision!r}") from error
    except Exception as error:  # whatever the network and the client's transport raise
        hint = (
            f"; it is in the cache: pin its commit ({cached.name}) or set HF_HUB_OFFLINE=1"
            if cached
            else ""
        )
        reason = " ".join(str(error).split())[:200]
        raise Unavailable(
            f"{address} cannot be fetched ({type(error).__name__}: {reason}){hint}"
        ) from error
    return _found(repo, file, revision, path.parents[name.count("/")], commit, "")


def _found(
    repo: str, file: str | None, revision: str | None, root: Path, commit: str, where: str
) -> Found:
    pinned = f"hf:{repo}{'/' + file if file else ''}@{commit}"
    notes = []
    if revision != commit:
        notes.append(f"{revision or 'main'}{where} is commit {commit}; pin it: {pinned}")
    return Found(root / file if file else root, pinned, notes)


def _no_such_file(address: str, file: str | None, there: set[str]) -> str:
    weights = sorted(n for n in there if n.endswith(SUFFIXES))
    has = f"it has {', '.join(weights[:10])}" if weights else "it has no weight files"
    repo, _, revision = address.partition("@")
    name = f"; name one: {repo}/{weights[0]}{'@' + revision if revision else ''}" if weights else ""
    return f"{address} has no {file or ' or '.join(FOLDER_FILES)}; {has}{name}"
