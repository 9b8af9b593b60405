"""Merges the adapter of a job into its base model: finds the job's files, and lets trainer.merge do the arithmetic.

merged = merge("bicycle-care-1", open_store("file:///srv/jobs"), Path("models/Qwen--Qwen3-8B"), Path("merged"), "bf16")
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from recipes.job import JOB_ID, read_record
from recipes.merged import MERGED, MergedModel, Precision
from scripts.adapter import verify_adapter
from scripts.errors import NotFound, Problem
from scripts.pull import pull
from scripts.store import FileStore, Store
from scripts.store.base import Progress
from scripts.torch_verb import torch_verb

_RECORDS = ("launch.json", "result.json", "probe.safetensors")


def merge(
    which: str, store: Store, base: Path, to: Path, precision: Precision, progress: Progress | None = None
) -> MergedModel:
    """Writes the merged model to the new folder `to`. `which`: a job folder, an adapter's folder (merged without the
    job's probe), or a job id.

    Raises NotFound, InputError for what does not belong together, Refused when space is short, VerificationFailed when
    the merged model does not say what the trained one said.
    """
    with tempfile.TemporaryDirectory(prefix="lorry-merge-") as folder:
        source = _source(which, store, Path(folder))
        words = ["trainer.merge", *source, "--base", str(base), "--to", str(to), "--precision", precision]
        torch_verb(words, progress)
    record = read_record(MergedModel, to / MERGED)
    if record is None:
        raise NotFound(Problem(str(to / MERGED), "no such file", "run the merge again"))
    return record


def _source(which: str, store: Store, scratch: Path) -> list[str]:
    """What trainer.merge is told: a job folder on this machine, or an adapter's."""
    given = Path(which)
    if given.is_dir():
        if (given / "adapter").is_dir():
            return ["--job", str(given)]
        verify_adapter(given)
        return ["--adapter", str(given)]
    if not JOB_ID.fullmatch(which):
        raise NotFound(Problem(which[:200], "no such folder", "a job folder, an adapter's folder or a job id"))
    if store.read(f"{which}/launch.json") is None:
        raise NotFound(Problem(f"job {which}", f"no such job in {store.url}", "see what there is with `lorry jobs`"))
    if isinstance(store, FileStore):
        return ["--job", str(store.root / which)]
    pull(store, which, scratch / "adapter")
    for name in _RECORDS:
        store.get_file(f"{which}/{name}", scratch / name)
    return ["--job", str(scratch)]
