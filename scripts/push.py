"""Puts a whole adapter into a store, so that no reader ever takes half of it for an adapter.

manifest = push(Path("bicycle-care-1/adapter"), open_store("s3://my-bucket/jobs"), "bicycle-care-1")
"""

from __future__ import annotations

from pathlib import Path

from recipes.job import Manifest
from scripts.adapter import MANIFEST, read_manifest, same_adapter, verify_adapter
from scripts.errors import Conflict, Problem
from scripts.job_folder import required_job_id
from scripts.store import Store
from scripts.store.base import Progress


def push(folder: Path, store: Store, job_id: str, *, progress: Progress | None = None) -> Manifest:
    """Sends the adapter in `folder`: its files first, manifest.json last and only if there is none.

    Returns the manifest that then stands in the store. Interrupted anywhere, it goes on when called again.

    Raises NotFound and VerificationFailed for what is wrong with the folder, before anything is sent; Conflict when
    the job has another adapter already; ProviderError and VerificationFailed when the store fails.
    """
    key = f"{required_job_id(job_id)}/adapter"
    manifest = verify_adapter(folder)
    if manifest.job_id != job_id:
        want = f"push it as {manifest.job_id}"
        raise Conflict(Problem(str(folder / MANIFEST), f"the adapter of job {manifest.job_id}, not {job_id}", want))
    _require_same(store, key, manifest)
    for name in manifest.files:
        store.put_file(folder / name, f"{key}/{name}", progress=progress)
    store.create(f"{key}/{MANIFEST}", (folder / MANIFEST).read_bytes())
    return _require_same(store, key, manifest) or manifest


def _require_same(store: Store, key: str, manifest: Manifest) -> Manifest | None:
    """The manifest that stands in the store, if any; Conflict when it vouches for something else."""
    there = read_manifest(store.read(f"{key}/{MANIFEST}"), f"{store.url}/{key}/{MANIFEST}")
    if there is None or same_adapter(there, manifest):
        return there
    names = {name for name, _ in there.files.items() ^ manifest.files.items()}
    changed = ", ".join(sorted(names)) or "what the manifest says of it"
    got = f"the store has another adapter of this job already; different: {changed}"
    raise Conflict(Problem(f"{store.url}/{key}", got, "train under a new job id"))
