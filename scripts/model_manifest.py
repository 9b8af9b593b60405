"""The manifest of a staged base model: which files, how long, with which hashes, of which revision.

manifest = read_manifest(open_store("s3://volume-id/models"), "Qwen/Qwen3-8B")      # None when it is not staged
verify_model(open_store("file:///workspace/models"), "Qwen/Qwen3-8B")               # every byte, or every fault

A store here is a models folder: what LORRY_MODELS names on the machines that mount it.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationError

from recipes.catalog import BaseModelFacts, load_catalog
from recipes.job import Record
from recipes.recipe import Quantize
from scripts.errors import InputError, NotFound, Problem, VerificationFailed
from scripts.models import model_folder
from scripts.store import FileStore, Store
from scripts.store.base import Progress, report, sha256_of

MANIFEST = "manifest.json"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class StagedFile(Record):
    """One file of a base model."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class ModelManifest(Record):
    """manifest.json in the folder of a staged base model, written when every file is there and never before."""

    format: Literal[1] = 1
    model: str
    quantize: Quantize | None = None
    "None: the model's own files."
    revision: str | None
    "Commit of the model's repository; None where the copy that was given does not say."
    source: Literal["hub", "folder"]
    staged_at: float
    "Seconds since 1970."
    files: dict[str, StagedFile]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files.values())


def staged_model(model: str) -> BaseModelFacts:
    """The catalog's facts of a base model that can be staged. Raises InputError for any other name."""
    models = load_catalog().models
    facts = models.get(model)
    if facts is None:
        near = difflib.get_close_matches(model, models, n=1, cutoff=0.4)
        want = f"did you mean '{near[0]}'?" if near else f"one of {', '.join(m for m in models if models[m].staged)}"
        raise InputError(Problem("MODEL", f"'{model[:120]}' is not in recipes/models.yaml", want))
    if not facts.staged:
        raise InputError(Problem("MODEL", f"'{model}' is made where it is used", "nothing needs to be staged"))
    return facts


def folder_name(model: str, quantize: Quantize | None = None) -> str:
    """The name of a base model's folder in a models folder."""
    return model_folder(Path(), model, quantize).name


def read_manifest(store: Store, model: str, quantize: Quantize | None = None) -> ModelManifest | None:
    """The manifest of a staged model; None when it is not staged. Raises InputError when the file is no manifest."""
    key = f"{folder_name(model, quantize)}/{MANIFEST}"
    data = store.read(key)
    if data is None:
        return None
    try:
        manifest = ModelManifest.model_validate_json(data)
    except ValidationError as error:
        first = str(error).splitlines()[0]
        raise InputError(Problem(f"{store.url}/{key}", f"not a manifest ({first})", "stage the model again")) from None
    if (manifest.model, manifest.quantize) != (model, quantize):
        said = f"it is of {folder_name(manifest.model, manifest.quantize)}"
        raise InputError(Problem(f"{store.url}/{key}", said, f"stage {model} again"))
    return manifest


def staged_bytes(store: Store) -> dict[str, int]:
    """Bytes of every base model of the catalog that is staged here, by its folder. It lists nothing."""
    models = [model for model, facts in load_catalog().models.items() if facts.staged]
    kinds: tuple[Quantize | None, ...] = (None, *get_args(Quantize))
    found = ((folder_name(m, kind), read_manifest(store, m, kind)) for m in models for kind in kinds)
    return {folder: manifest.total_bytes for folder, manifest in found if manifest is not None}


def verify_model(
    store: Store, model: str, progress: Progress | None = None, quantize: Quantize | None = None
) -> ModelManifest:
    """Reads every byte of a staged model. Raises NotFound without a manifest, VerificationFailed with every fault."""
    manifest = read_manifest(store, model, quantize)
    if manifest is None:
        how = f"run `lorry stage {model}" + (f" --quantize {quantize}`" if quantize else "`")
        raise NotFound(Problem(f"{store.url}/{folder_name(model, quantize)}", "no manifest", how))
    if faults := list(_faults(store, manifest, progress)):
        raise VerificationFailed(*faults)
    return manifest


def _faults(store: Store, manifest: ModelManifest, progress: Progress | None) -> Iterator[Problem]:
    for name, file in sorted(manifest.files.items()):
        key = f"{folder_name(manifest.model, manifest.quantize)}/{name}"
        want = f"stage {manifest.model} again: sound files are kept"
        try:
            found = _sha256(store, key, file.bytes)
        except NotFound:
            yield Problem(f"{store.url}/{key}", "missing", want)
            continue
        if found != file.sha256:
            yield Problem(f"{store.url}/{key}", f"not the {file.bytes} bytes of the manifest", want)
        report(progress, file.bytes)


def _sha256(store: Store, key: str, size: int) -> str:
    """SHA-256 of a stored file; empty when its length already tells it is another one. Raises NotFound."""
    if isinstance(store, FileStore):
        path = store.root / key
        if not path.is_file():
            raise NotFound(Problem(str(path), "no such file"))
        return sha256_of(path) if path.stat().st_size == size else ""
    with tempfile.TemporaryDirectory(prefix="lorry-verify-") as folder:
        copy = Path(folder) / "file"
        store.get_file(key, copy)
        return sha256_of(copy)
