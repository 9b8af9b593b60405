"""Removes a finished job's copy of its training set, where the recipe says so: every version of it, for good.

said = forget_training_set(store, read_job(store, "job-1"), now=time.time())        # None when nothing was due
"""

from __future__ import annotations

from typing import Literal

from recipes.job import Record
from scripts.errors import Problem, VerificationFailed
from scripts.job_folder import JobFiles
from scripts.store import Store
from scripts.store.erase import erase, still_there

SETS = ("train.jsonl", "valid.jsonl")
RECORD = "data_erased.json"


class DataErased(Record):
    """data_erased.json: what is gone, and by its hashes what it was. objects: versions and unfinished uploads too."""

    format: Literal[1] = 1
    at: float
    objects: int
    bytes: int
    source_sha256: str
    train_sha256: str
    valid_sha256: str


def owes_forgetting(store: Store, files: JobFiles) -> bool:
    """Whether the job has ended well, shall not keep its training set, and still does."""
    spec = files.launch
    is_asked = spec is not None and spec.recipe.data.after_training == "delete" and files.manifest is not None
    return is_asked and store.read(f"{files.job_id}/{RECORD}") is None


def forget_training_set(store: Store, files: JobFiles, now: float) -> str | None:
    """Erases train.jsonl and valid.jsonl of the job, and writes data_erased.json; a sentence, or None.

    Raises VerificationFailed when the adapter is not whole in the store (nothing is erased then), or when something is
    still there afterwards; ProviderError when the store fails. Called again, it goes on with what is left.
    """
    spec, manifest, job = files.launch, files.manifest, files.job_id
    if spec is None or manifest is None or not owes_forgetting(store, files):
        return None
    missing = sorted({f"{job}/adapter/{name}" for name in manifest.files} - {*store.keys(f"{job}/adapter")})
    if missing:
        raise VerificationFailed(Problem(missing[0], "it is not in the store", "the training set is kept until it is"))
    url = f"{store.url}/{job}/data"
    removed = erase(url, SETS)
    if left := still_there(url, SETS):
        want = "allow s3:DeleteObjectVersion and s3:AbortMultipartUpload here"
        raise VerificationFailed(Problem(url, f"{len(left)} versions of the training set are still there", want))
    record = DataErased(
        at=now,
        objects=len(removed),
        bytes=sum(item.bytes for item in removed),
        source_sha256=spec.source_sha256,
        train_sha256=spec.train_sha256,
        valid_sha256=spec.valid_sha256,
    )
    store.write(f"{job}/{RECORD}", record.model_dump_json(indent=2).encode() + b"\n")
    return f"erased its training set, {len(removed)} objects"
