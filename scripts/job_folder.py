"""Reads and carries job folders: the records of one job or of all, and whole folders between a disk and a store.

files = read_job(store, "bicycle-care-1"); files.status
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recipes.job import (
    JOB_ID,
    ContainerState,
    LaunchSpec,
    Manifest,
    Metric,
    Proof,
    Record,
    Result,
    Status,
    Stop,
    Submission,
)
from scripts.errors import InputError, LorryError, Problem
from scripts.store import FileStore, Store
from scripts.store.base import shown

Stamp = tuple[int, int]
"Size and modification time (ns) of a file when it was sent."

SETTLED = "_settled"
"Folder of marks, one per job for which nothing will ever be due: one listing in the place of a thousand reads."

_RECORDS: dict[str, tuple[str, type[Record]]] = {
    "launch": ("launch.json", LaunchSpec),
    "submission": ("submission.json", Submission),
    "stop": ("stop.json", Stop),
    "container": ("container.json", ContainerState),
    "status": ("status.json", Status),
    "result": ("result.json", Result),
    "proof": ("proof.json", Proof),
    "manifest": ("adapter/manifest.json", Manifest),
}
_MARKERS = ("COMPLETE", "manifest.json")
_READERS = 32


@dataclass(frozen=True)
class JobFiles:
    """The records of one job; None where the file is missing or unusable, and then `broken` says which and why."""

    job_id: str
    launch: LaunchSpec | None = None
    submission: Submission | None = None
    stop: Stop | None = None
    container: ContainerState | None = None
    status: Status | None = None
    result: Result | None = None
    proof: Proof | None = None
    manifest: Manifest | None = None
    broken: tuple[str, ...] = ()


def job_ids(store: Store) -> list[str]:
    """The ids of all jobs in the store, sorted."""
    return [name for name in store.folders() if JOB_ID.fullmatch(name)]


def open_jobs(store: Store) -> list[str]:
    """The jobs for which something may be due."""
    marks = {key.rpartition("/")[2] for key in store.keys(SETTLED)}
    return [job_id for job_id in job_ids(store) if job_id not in marks]


def read_job(store: Store, job_id: str) -> JobFiles:
    """The records of one job. A damaged file is noted in `broken`; all fields are None for an unknown job.

    Raises InputError when that cannot be a job id, ProviderError when the store cannot be read.
    """
    return read_jobs(store, [job_id])[0]


def read_jobs(store: Store, ids: Iterable[str]) -> list[JobFiles]:
    """The records of many jobs, read side by side: in a bucket 1,000 jobs are 8,000 requests."""
    ids = [required_job_id(job_id) for job_id in ids]
    wanted = [(job_id, field) for job_id in ids for field in _RECORDS]
    with ThreadPoolExecutor(_READERS) as pool:
        read = pool.map(lambda at: _record(store, *at), wanted)
        values = dict(zip(wanted, read, strict=True))
    return [_job_files(job_id, {field: values[job_id, field] for field in _RECORDS}) for job_id in ids]


def whole_metrics(data: bytes) -> list[Metric]:
    """The lines of metrics.jsonl that are whole; a machine that died may have left half a line."""
    metrics = []
    for line in data.splitlines():
        try:
            metrics.append(Metric.model_validate_json(line))
        except ValidationError:
            continue
    return metrics


def required_job_id(job_id: str) -> str:
    """The job id itself; InputError when it cannot be one."""
    if not JOB_ID.fullmatch(job_id):
        want = "3 to 63 characters: a-z, 0-9 and single hyphens inside"
        raise InputError(Problem("job", ascii(job_id[:80]), want))
    return job_id


def upload_folder(store: Store, folder: Path, prefix: str, sent: dict[str, Stamp]) -> list[str]:
    """Sends the files below `folder` that changed since `sent` was filled; returns their keys and updates `sent`.

    Files that mark others as whole (COMPLETE, manifest.json) go last, so that an interruption never leaves a mark
    without what it marks. A file that vanishes meanwhile is passed over.
    """
    done = []
    for name in _files_below(folder):
        path, key = folder / name, f"{prefix}/{name}"
        try:
            stamp = _stamp(path)
            if sent.get(name) == stamp:
                continue
            store.put_file(path, key)
        except (OSError, LorryError):
            if path.is_file():
                raise
            continue
        sent[name] = stamp
        done.append(key)
    return done


def download_folder(store: Store, prefix: str, folder: Path) -> list[Path]:
    """Fetches all files below `prefix` that `folder` does not hold already; marks last. Returns what was fetched."""
    done = []
    names = [key.removeprefix(f"{prefix}/") for key in store.keys(prefix)]
    for name in sorted(names, key=_marks_last):
        path, key = folder / name, f"{prefix}/{name}"
        if not (path.is_file() and store.holds(key, path)):
            store.get_file(key, path)
            done.append(path)
    return done


@contextmanager
def file_below(store: Store, key: str) -> Iterator[Path]:
    """One file as a path on this disk, for as long as the block lasts. Raises NotFound when it is missing."""
    if isinstance(store, FileStore) and (store.root / key).is_file():
        yield store.root / key
        return
    with tempfile.TemporaryDirectory(prefix="lorry-") as folder:
        path = Path(folder) / key.rpartition("/")[2]
        store.get_file(key, path)
        yield path


def _record(store: Store, job_id: str, field: str) -> Record | str | None:
    """The record, a sentence about its damage, or None when there is no such file."""
    name, model = _RECORDS[field]
    try:
        data = store.read(f"{job_id}/{name}")
        return None if data is None else model.model_validate_json(data)
    except (ValidationError, InputError) as error:
        return f"{job_id}/{name}: not a {model.__name__} file ({str(error).splitlines()[0]})"


def _job_files(job_id: str, values: dict[str, Record | str | None]) -> JobFiles:
    records: dict[str, Any] = {field: value for field, value in values.items() if isinstance(value, Record)}
    return JobFiles(job_id, **records, broken=tuple(v for v in values.values() if isinstance(v, str)))


def _files_below(folder: Path) -> list[str]:
    paths = [Path(where, name) for where, _, names in os.walk(folder) for name in names]
    return sorted(filter(shown, (path.relative_to(folder).as_posix() for path in paths)), key=_marks_last)


def _marks_last(name: str) -> tuple[bool, str]:
    return name.rpartition("/")[2] in _MARKERS, name


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
