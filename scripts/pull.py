"""Brings an adapter home from a store, verified against its manifest.

manifest = pull(open_store("s3://my-bucket/jobs"), "bicycle-care-1", Path("bicycle-care-1/adapter"))
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from recipes.job import Manifest
from scripts.adapter import MANIFEST, file_names, read_manifest, same_adapter, verify_adapter
from scripts.errors import Conflict, NotFound, Problem, VerificationFailed
from scripts.job_folder import required_job_id
from scripts.store import Store
from scripts.store.base import Progress, sha256_of, shown
from scripts.store.disk import disk_errors


def pull(store: Store, job_id: str, folder: Path, *, progress: Progress | None = None) -> Manifest:
    """Fetches the job's adapter into `folder`, manifest.json last, and verifies the whole. Called again, it goes on.

    Raises NotFound when the job has no finished adapter, Conflict when `folder` holds anything else, VerificationFailed
    when the bytes are not those of the manifest.
    """
    key = f"{required_job_id(job_id)}/adapter"
    data = store.read(f"{key}/{MANIFEST}")
    manifest = read_manifest(data, f"{store.url}/{key}/{MANIFEST}")
    if data is None or manifest is None:
        want = "wait for the run to end; `lorry show` says how it stands"
        raise NotFound(Problem(f"{store.url}/{job_id}", "no finished adapter", want))
    _require_own(manifest, job_id, f"{store.url}/{key}/{MANIFEST}")
    _require_room(folder, manifest)
    for name, sha256 in {**manifest.files, MANIFEST: hashlib.sha256(data).hexdigest()}.items():
        if not (folder / name).exists():
            store.get_file(f"{key}/{name}", folder / name, sha256=sha256, progress=progress)
    return verify_adapter(folder)


def _require_own(manifest: Manifest, job_id: str, where: str) -> None:
    """A manifest from elsewhere must not name another job, or files outside the folder."""
    strange = [name for name in manifest.files if not shown(name)]
    if strange or manifest.job_id != job_id:
        got = f"names the file {strange[0][:80]!a}" if strange else f"the manifest of job {manifest.job_id}"
        raise VerificationFailed(Problem(where, got, "do not use this adapter"))


def _require_room(folder: Path, manifest: Manifest) -> None:
    """The folder may hold parts of this very adapter and nothing else: nothing is ever replaced."""
    with disk_errors(folder):
        other = [name for name in file_names(folder) if not _is(folder / name, manifest.files.get(name))]
        here = folder / MANIFEST
        if here.exists() and not same_adapter(read_manifest(here.read_bytes(), str(here)) or manifest, manifest):
            other.append(MANIFEST)
    if other:
        got = f"already holds something else ({', '.join(other[:5])})"
        raise Conflict(Problem(str(folder), got, "pull into a new folder"))


def _is(path: Path, sha256: str | None) -> bool:
    return path.is_file() and sha256_of(path) == sha256
