"""The client's own job row in Supabase, written through its REST interface (PostgREST), and the adapter in its storage.

rows = SupabaseRows("https://x.supabase.co", key, "pipeline_training_jobs", httpx.Client())
rows.update("job-1", progress_values(files), unless=ENDED)        # False when the row has ended, or there is none

A row that says cancelled, failed or completed is never woken by late progress: the condition is part of the UPDATE, so
it holds against every other writer. For the same reason `status=completed` with `adapter_file_path` is written once,
however many processes try, and nothing is written after it.
"""

from __future__ import annotations

import gzip
import math
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import quote

import httpx

from recipes.job import Stage
from scripts.errors import Problem, ProviderError
from scripts.job_folder import JobFiles

RowEnd = Literal["completed", "failed", "cancelled"]

ENDED: tuple[RowEnd, ...] = ("completed", "failed", "cancelled")
BUCKET = "lora-models"

_TIMEOUT = httpx.Timeout(10.0, connect=5.0)
_UPLOAD_TIMEOUT = httpx.Timeout(120.0, connect=10.0)
_STAGE_PERCENT: dict[Stage, int] = {
    "fetching": 5, "loading": 15, "evaluating": 20, "training": 25,
    "saving": 95, "proving": 96, "storing": 97, "done": 97,
}  # fmt: skip
"Where a stage starts; training goes from 25 to 95, and 100 comes with `completed` alone."


@dataclass(frozen=True)
class SupabaseRows:
    """One table and one storage of a Supabase project. Every call raises ProviderError when it did not succeed."""

    url: str
    key: str = field(repr=False)
    table: str
    http: httpx.Client = field(repr=False)

    def read(self, row_id: str) -> dict[str, Any] | None:
        """What the row says of its state; None when there is no such row."""
        columns = "id,status,progress,current_epoch,current_step"
        rows = self._ask("GET", {"id": f"eq.{row_id}", "select": columns}, None)
        return rows[0] if rows else None

    def update(self, row_id: str, values: Mapping[str, Any], unless: Sequence[RowEnd]) -> bool:
        """One UPDATE of the row unless its status is one of those; whether it was carried out."""
        which = {"id": f"eq.{row_id}", "status": f"not.in.({','.join(unless)})", "select": "id,status"}
        return bool(self._ask("PATCH", which, _plain(values)))

    def upload(self, path: Path, name: str) -> None:
        """Puts a file into the bucket BUCKET under `name`; one of that name is replaced."""
        url = f"{self.url.rstrip('/')}/storage/v1/object/{BUCKET}/{quote(name)}"
        headers = {**self._headers(), "x-upsert": "true", "content-type": "application/gzip"}
        headers["content-length"] = str(path.stat().st_size)
        try:
            with path.open("rb") as file:
                answer = self.http.post(url, content=file, headers=headers, timeout=_UPLOAD_TIMEOUT)
        except httpx.HTTPError as error:
            raise _silent("Supabase storage", error) from None
        if not answer.is_success:
            raise _refused(f"Supabase storage, bucket {BUCKET}", answer)

    def _ask(self, method: str, query: dict[str, str], values: dict[str, Any] | None) -> list[dict[str, Any]]:
        url = f"{self.url.rstrip('/')}/rest/v1/{quote(self.table, safe='')}"
        headers = {**self._headers(), "prefer": "return=representation"}
        where = f"Supabase table {self.table}"
        try:
            answer = self.http.request(method, url, params=query, json=values, headers=headers, timeout=_TIMEOUT)
        except httpx.HTTPError as error:
            raise _silent(where, error) from None
        if not answer.is_success:
            raise _refused(where, answer)
        try:
            return cast(list[dict[str, Any]], answer.json())
        except ValueError:
            raise ProviderError(Problem(where, "an answer that is not JSON", "the URL of the project itself")) from None

    def _headers(self) -> dict[str, str]:
        return {"apikey": self.key, "authorization": f"Bearer {self.key}"}


def adapter_path(row_id: str) -> str:
    """What adapter_file_path says: bucket and name of the adapter's archive."""
    return f"{BUCKET}/adapters/{row_id}.tar.gz"


def progress_values(files: JobFiles) -> dict[str, Any]:
    """The columns of a job that runs; empty while no machine has said a word. Pure."""
    container, status = files.container, files.status
    if container is None or container.ended is not None:
        return {}
    percent = _STAGE_PERCENT[container.stage]
    if container.stage == "training" and status is not None:
        percent = 25 + status.progress * 70 // 100
    values: dict[str, Any] = {
        "status": "initializing" if container.stage in ("fetching", "loading") else "running",
        "progress": percent,
        "started_at": _stamp(container.started_at),
        "updated_at": _stamp(container.updated_at),
    }
    if status is not None:
        values |= {"current_epoch": status.epoch, "current_step": status.step, "total_steps": status.total_steps}
        values |= {"current_loss": status.training_loss, "current_learning_rate": status.learning_rate}
        values["tokens_per_second"] = status.tokens_per_second
    return values


def is_news(row: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether the row says less than these values do."""
    seen = ("status", "progress", "current_epoch", "current_step")
    return any(name in values and row.get(name) != values[name] for name in seen)


def final_values(
    files: JobFiles, outcome: RowEnd, row_id: str, sentence: str, usd: float | None, now: float
) -> dict[str, Any]:
    """The columns of a job that has ended, all for one UPDATE. Pure."""
    values: dict[str, Any] = {"status": outcome, "completed_at": _stamp(now), "updated_at": _stamp(now)}
    if usd is not None:
        values["actual_cost"] = round(usd, 4)
    if outcome != "completed":
        return values if outcome == "cancelled" else values | {"error_message": sentence[:2000]}
    values |= {"progress": 100, "adapter_file_path": adapter_path(row_id)}
    if files.result is not None:
        values |= {"current_step": files.result.step, "total_steps": files.result.total_steps}
        values |= {"final_loss": files.result.final_training_loss}
        values["training_time_seconds"] = int(files.result.wall_seconds)
    return values


def pack(folder: Path, archive: Path) -> None:
    """A .tar.gz of the adapter's files below adapter/: the same bytes for the same adapter."""
    with (
        archive.open("wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = tarfile.TarInfo(f"adapter/{path.relative_to(folder).as_posix()}")
            entry.size, entry.mode = path.stat().st_size, 0o644
            with path.open("rb") as file:
                tar.addfile(entry, file)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is unknown or no number: a column keeps what it has then."""
    known = {name: value for name, value in values.items() if value is not None}
    return {name: value for name, value in known.items() if not isinstance(value, float) or math.isfinite(value)}


def _stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _silent(where: str, error: Exception) -> ProviderError:
    return ProviderError(Problem(where, f"no answer ({type(error).__name__})", "it is asked again later"))


def _refused(where: str, answer: httpx.Response) -> ProviderError:
    try:
        said = str(answer.json().get("message", ""))[:200]
    except (ValueError, AttributeError):
        said = ""
    want = "the service key of this project" if answer.status_code in (401, 403) else "see its message"
    return ProviderError(Problem(where, f"status {answer.status_code} {said!a}", want))
