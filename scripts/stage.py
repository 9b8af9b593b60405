"""Fills a folder, a volume or a bucket with a base model, once: every file, then the manifest that vouches for them.

stage(Staging("Qwen/Qwen3-8B", open_store("s3://volume-id/models"), models=Path("/models")), now=time.time())

Run again it goes on where it was, keeps what is sound and replaces what is not.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from recipes.catalog import load_catalog
from recipes.recipe import Quantize
from recipes.staged import STAGED
from scripts.errors import Conflict, InputError, Problem, Refused, VerificationFailed
from scripts.job_lock import take_lock
from scripts.model_manifest import (
    MANIFEST,
    ModelManifest,
    StagedFile,
    folder_name,
    read_manifest,
    staged_bytes,
    staged_model,
)
from scripts.model_source import download, files_to_stage, find_copy, require_right_model
from scripts.models import quantising_words
from scripts.store import FileStore, Store
from scripts.store.base import Progress, report, sha256_of
from scripts.store.disk import disk_errors
from scripts.torch_verb import torch_verb

if TYPE_CHECKING:
    from scripts.backends.runpod_api import RunpodApi

SPARE_BYTES = 10**9
"Left free beyond the model, for whatever else writes there."
_GB = 10**9
_LOCK = ".stage.lock"
_ELSEWHERE = "stage to another place, or remove that folder first"
_RUNPOD_S3 = re.compile(r"s3api-[a-z0-9-]+\.runpod\.io")


@dataclass(frozen=True)
class Staging:
    """What shall be staged where.

    store: the models folder to fill. models: the models folder of this machine, where a download lands.
    copy: a folder that has the model; None takes the one in `models`, or else downloads. runpod: asked for the size of
    the volume when the store is one. quantize: its weights are converted on this machine first.
    """

    model: str
    store: Store
    models: Path
    copy: Path | None = None
    revision: str | None = None
    runpod: RunpodApi | None = None
    quantize: Quantize | None = None

    @property
    def folder(self) -> str:
        """The name of the folder that is filled."""
        return folder_name(self.model, self.quantize)


@dataclass(frozen=True)
class _Copy:
    """A model's files on this machine. `files` is what their own manifest says, where they have one."""

    folder: Path
    revision: str | None
    source: Literal["hub", "folder"]
    files: Mapping[str, StagedFile] | None = None


def stage(staging: Staging, *, now: float, progress: Progress | None = None) -> ModelManifest:
    """Stages the model and returns its manifest. `now` is seconds since 1970.

    Raises InputError for a model or copy that cannot be used, Refused when space is short, Conflict when another
    revision or another `lorry stage` is there, VerificationFailed when the store ends up with other bytes.
    """
    facts = staged_model(staging.model)
    if staging.quantize and facts.shape.experts and not load_catalog().families[facts.family].our_experts:
        got = f"the experts of {staging.model} cannot be quantised here"
        raise InputError(Problem(f"--quantize {staging.quantize}", got, "leave it out, and train it with engine zero3"))
    with _alone(staging):
        standing = read_manifest(staging.store, staging.model, staging.quantize)
        _require_same_revision(staging, staging.store, standing)
        if standing is not None and staging.copy is None:
            return _still_whole(staging, standing)
        find = _converted if staging.quantize else _find_or_fetch
        copy = find(staging, now, progress)
        require_right_model(copy.folder, staging.model)
        files = {name: _described(copy.folder / name, progress) for name in files_to_stage(copy.folder)}
        _require_known_files(staging, standing, copy, files)
        require_room(staging, {name: file.bytes for name, file in files.items()})
        for name in files:
            staging.store.put_file(copy.folder / name, f"{staging.folder}/{name}", progress=progress)
        revision = copy.revision or (standing.revision if standing else None)
        manifest = ModelManifest(
            model=staging.model,
            quantize=staging.quantize,
            revision=revision,
            source=copy.source,
            staged_at=now,
            files=files,
        )
        staging.store.write(f"{staging.folder}/{MANIFEST}", manifest.model_dump_json(indent=2).encode())
        return manifest


def require_room(staging: Staging, sizes: Mapping[str, int]) -> None:
    """Raises Refused when the files (name -> bytes), less those that are there, would not leave SPARE_BYTES free."""
    free = free_bytes(staging.store, staging.folder, staging.runpod)
    if free is None:
        return
    needed = sum(sizes.values())
    if isinstance(staging.store, FileStore):
        home = staging.store.root / staging.folder
        needed -= sum(size for name, size in sizes.items() if _size(home / name) == size)
    if needed and needed + SPARE_BYTES > free:
        said = (
            f"{free / _GB:.1f} GB are free, {needed / _GB:.1f} GB are needed and {SPARE_BYTES / _GB:.0f} GB kept free"
        )
        raise Refused(Problem(staging.store.url, said, "make the disk or volume larger, or remove what is not needed"))


def free_bytes(store: Store, folder: str, runpod: RunpodApi | None) -> int | None:
    """Bytes that the model in `folder` may take; None where nothing limits them.

    On a disk: what is free. On a Runpod volume, which is a bucket named by its id: its size less the manifests of the
    other models, since its S3 API does not tell what is free. Raises InputError for a volume whose size is not known.
    """
    if isinstance(store, FileStore):
        return shutil.disk_usage(next(p for p in (store.root, *store.root.parents) if p.exists())).free
    volume = runpod.read("network-volumes", urlsplit(store.url).netloc) if runpod else None
    if volume is not None:
        others = sum(size for name, size in staged_bytes(store).items() if name != folder)
        return int(volume["size"]) * _GB - others
    return None


def require_known_volume(store: Store, runpod: RunpodApi | None, environment: Mapping[str, str]) -> None:
    """Raises InputError when the store is a Runpod volume and there is no key to ask for its size."""
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or ""
    if store.url.startswith("s3://") and _RUNPOD_S3.fullmatch(urlsplit(endpoint).hostname or "") and runpod is None:
        want = "set it: the volume's size is asked for before it is filled"
        raise InputError(Problem("RUNPOD_API_KEY", "not set", want))


def _converted(staging: Staging, now: float, progress: Progress | None) -> _Copy:
    """The quantised copy: made where it shall lie, or on this machine first and then taken to the bucket."""
    quantize, given = staging.quantize, staging.copy
    assert quantize
    if not isinstance(staging.store, FileStore):
        here = FileStore(staging.models.resolve())
        made = stage(replace(staging, store=here, runpod=None), now=now, progress=progress)
        return _Copy(here.root / staging.folder, made.revision, made.source, made.files)
    if given is not None and (given / STAGED).is_file():
        return _Copy(given, staging.revision, "folder")
    base = _find_or_fetch(replace(staging, quantize=None), now, progress)
    require_right_model(base.folder, staging.model)
    words = quantising_words(base.folder, staging.store.root / staging.folder, staging.model, quantize)
    torch_verb(words + (["--revision", base.revision] if base.revision else []), progress)
    return _Copy(staging.store.root / staging.folder, base.revision, base.source)


def _find_or_fetch(staging: Staging, now: float, progress: Progress | None) -> _Copy:
    """The copy that is staged: the one given, the one staged on this machine, or a download into its place."""
    if staging.copy is not None:
        return _Copy(*find_copy(staging.copy, staging.model, staging.revision), "folder")
    here = FileStore(staging.models.resolve())
    folder = here.root / folder_name(staging.model)
    kept = read_manifest(here, staging.model)
    if kept is not None:
        _require_same_revision(staging, here, kept)
        return _Copy(folder, kept.revision, kept.source, kept.files)
    there = sum(_size(path) for path in folder.rglob("*") if path.is_file())
    expected_bytes = round(staged_model(staging.model).checkpoint_gb * _GB)
    require_room(Staging(staging.model, here, staging.models), {"the model": max(0, expected_bytes - there)})
    return _Copy(*download(staging.model, staging.revision, here.root), "hub")


def _described(path: Path, progress: Progress | None) -> StagedFile:
    size = path.stat().st_size
    found = StagedFile(bytes=size, sha256=sha256_of(path))
    report(progress, size)
    return found


def _still_whole(staging: Staging, standing: ModelManifest) -> ModelManifest:
    """The manifest that stands, when a quick look at the files finds nothing wrong."""
    if isinstance(staging.store, FileStore):
        home = staging.store.root / staging.folder
        if odd := [name for name, file in standing.files.items() if _size(home / name) != file.bytes]:
            want = "give a sound copy with --from: what is sound is kept"
            raise VerificationFailed(Problem(str(home / odd[0]), "not the file that its manifest names", want))
    return standing


def _require_same_revision(staging: Staging, store: Store, standing: ModelManifest | None) -> None:
    """A copy with the same hashes may tell the revision of a staged model that did not know it; nothing else may."""
    if standing is None or staging.revision in (None, standing.revision):
        return
    if standing.revision is not None or staging.copy is None:
        where = f"{store.url}/{staging.folder}"
        said = f"revision {standing.revision or 'unknown'} is staged, not {staging.revision}"
        raise Conflict(Problem(where, said, _ELSEWHERE))


def _require_known_files(
    staging: Staging, standing: ModelManifest | None, copy: _Copy, files: Mapping[str, StagedFile]
) -> None:
    """A staged model may be repaired, never turned into another one under the jobs that read it; nor may a copy that
    went bad since it was staged be passed on."""
    if copy.files is not None and copy.files != files:
        want = "run `lorry stage --verify` there"
        raise VerificationFailed(Problem(str(copy.folder), "not the files that its manifest names", want))
    if standing is not None and standing.files != files:
        where = f"{staging.store.url}/{staging.folder}"
        raise Conflict(Problem(where, f"it holds other files than {copy.folder}, by its manifest", _ELSEWHERE))


@contextmanager
def _alone(staging: Staging) -> Iterator[None]:
    """On a disk: no second `lorry stage` in the same folder, and nothing left of one that was killed."""
    if not isinstance(staging.store, FileStore):
        with disk_errors(staging.copy or staging.models):
            yield
        return
    home = staging.store.root / staging.folder
    with disk_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        with take_lock(home, _LOCK) as mine:
            if not mine:
                raise Conflict(Problem(str(home), "another `lorry stage` is filling it", "wait for that one to end"))
            for leftover in home.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            yield


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
