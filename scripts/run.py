"""The whole way in one go: launch a prepared job, watch it, verify its adapter, draw its report.

done = run(job, settings, os.environ, say, sys.stderr, now=time.time); print(done.summary)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from recipes.job import Manifest
from scripts.adapter import verify_adapter
from scripts.backends import open_backend
from scripts.errors import Problem, TrainingFailed
from scripts.job_folder import JobFiles, read_job
from scripts.job_report import write_report
from scripts.launch import launch_by_hand
from scripts.prepare_job import PreparedJob, Say
from scripts.pull import pull
from scripts.settings import Settings
from scripts.store import FileStore, Store, open_store
from scripts.watch import watch


@dataclass(frozen=True)
class Done:
    """A job that ended well: its manifest and a short summary for a person."""

    manifest: Manifest
    summary: str


def run(
    job: PreparedJob,
    settings: Settings,
    environment: Mapping[str, str],
    say: Say,
    out: TextIO,
    *,
    now: Callable[[], float],
) -> Done:
    """Launches the job and follows it to its end; progress goes to `out`.

    The report is written in every case. Raises TrainingFailed with the cause when it ends without an adapter,
    VerificationFailed when the adapter is not what its manifest says.
    """
    store, job_id = open_store(settings.store), job.spec.job_id
    backend = open_backend(job.spec.backend, environment)
    launch_by_hand(store, job.spec, job.plan, job.data, backend, now())
    say("launch", f"{job_id} on {job.spec.offer}")
    state = watch(store, job_id, backend, out)
    report = write_report(store, job_id, state)
    if state.state != "completed":
        raise TrainingFailed(
            Problem(
                f"job {job_id}", f"{state.state}: {state.sentence}", f"the report is {report}; the log: logs/ beside it"
            )
        )
    manifest = _verified(store, job_id)
    say("verify", f"{len(manifest.files)} files are what the manifest says")
    return Done(manifest, _summary(read_job(store, job_id), manifest, f"{store.url}/{job_id}/adapter", report))


def _verified(store: Store, job_id: str) -> Manifest:
    """The adapter in the store, checked bit by bit; from a bucket it is fetched for that."""
    if isinstance(store, FileStore):
        return verify_adapter(store.root / job_id / "adapter")
    with tempfile.TemporaryDirectory(prefix="lorry-") as folder:
        return pull(store, job_id, Path(folder) / "adapter")


def _summary(files: JobFiles, manifest: Manifest, adapter: str, report: str) -> str:
    result, proof = files.result, files.proof
    assert result is not None
    assert proof is not None
    lines = []
    if result.initial_validation_loss is not None and result.final_validation_loss is not None:
        before, after = result.initial_validation_loss, result.final_validation_loss
        lines.append(("held-out loss", f"{before:.4f} before, {after:.4f} after"))
    lines += [
        ("proof", f"passed: effect {proof.effect:.3g}, reloaded to within {proof.reproduction_error:.2g}"),
        ("manifest", f"verified, {len(manifest.files)} files, base {manifest.base_model}"),
        ("cost", "unknown" if manifest.cost_usd is None else f"${manifest.cost_usd:.2f}"),
        ("adapter", adapter.removeprefix("file://")),
        ("report", report.removeprefix("file://")),
    ]
    return "\n".join(f"{name:<14} {value}" for name, value in lines)
