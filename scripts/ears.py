"""How one client hears of its jobs: a signed webhook, its own row in a Supabase table, both, or neither.

ears = Ears(webhook=Webhook(...), rows=SupabaseRows(...)); ears.hear_end(store, End(files, ...), now=time.time())
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scripts.callbacks import MOST_TRIES, Answer, DueTry, Kind, Outcome, are_over, deliver, due_tries, read_deliveries
from scripts.errors import Problem, ProviderError
from scripts.job_folder import JobFiles
from scripts.pull import pull
from scripts.store import Store
from scripts.supabase import ENDED, RowEnd, SupabaseRows, final_values, is_news, pack, progress_values
from scripts.webhook import Webhook


@dataclass(frozen=True)
class End:
    """How one job ended. client_id: the job as its client calls it, which is the id of its row."""

    files: JobFiles
    client_id: str
    outcome: Outcome
    sentence: str
    usd: float | None


@dataclass(frozen=True)
class Ears:
    """What a client has asked for. Every method raises ProviderError when a store or a database does not answer."""

    webhook: Webhook | None = None
    rows: SupabaseRows | None = None

    def has_cancelled(self, row_id: str) -> bool:
        """Whether the client's own row says cancelled: its application may tell nobody else."""
        row = self.rows.read(row_id) if self.rows else None
        return row is not None and row.get("status") == "cancelled"

    def hear_progress(self, row_id: str, files: JobFiles) -> list[str]:
        """Writes what is new into the row."""
        values = progress_values(files)
        row = self.rows.read(row_id) if self.rows and values else None
        if self.rows is None or row is None or row.get("status") in ENDED or not is_news(row, values):
            return []
        return ["told the row its progress"] if self.rows.update(row_id, values, ENDED) else []

    def hear_end(self, store: Store, end: End, now: float) -> list[str]:
        """Makes the tries that are due; a sentence for each."""
        job_id, said = end.files.job_id, []
        for due in due_tries(end.outcome, self._kinds(), read_deliveries(store, job_id), now):
            answer = deliver(store, job_id, due, partial(self._send, due.kind, store, end, now), now)
            if answer is not None:
                said.append(_sentence(due, answer))
        return said

    def have_heard(self, store: Store, job_id: str, outcome: Outcome) -> bool:
        """Whether every delivery of this end got through or was given up."""
        return are_over(outcome, self._kinds(), read_deliveries(store, job_id) if self._kinds() else {})

    def _send(self, kind: Kind, store: Store, end: End, now: float) -> None:
        if kind == "webhook" and self.webhook is not None:
            self.webhook.post(f"{end.files.job_id}.{end.outcome}", message_of(end), now)
        elif self.rows is not None:
            end_row(self.rows, store, end, now)

    def _kinds(self) -> tuple[Kind, ...]:
        wanted: tuple[tuple[Kind, object], ...] = (("webhook", self.webhook), ("supabase", self.rows))
        return tuple(kind for kind, sink in wanted if sink is not None)


def message_of(end: End) -> dict[str, Any]:
    """The body of a webhook, in the words of the status answer. It holds no secret and no URL. Pure."""
    return {
        "id": end.client_id,
        "status": end.outcome.upper(),
        "error": None if end.outcome == "completed" else end.sentence,
        "cost_usd": None if end.usd is None else round(end.usd, 4),
        "model_files": sorted(end.files.manifest.files) if end.files.manifest else [],
    }


def end_row(rows: SupabaseRows, store: Store, end: End, now: float) -> None:
    """Ends the client's row, once: the adapter is in the client's storage before the row says completed.

    A row that has ended, was cancelled or does not exist is left alone. A row that failed is completed when the job,
    launched again, brought an adapter after all.
    """
    closed: tuple[RowEnd, ...] = ("completed", "cancelled") if end.outcome == "completed" else ENDED
    row = rows.read(end.client_id)
    if row is None or row.get("status") in closed:
        return
    if end.outcome == "completed":
        with tempfile.TemporaryDirectory(prefix="lorry-") as folder:
            adapter, archive = Path(folder) / "adapter", Path(folder) / "adapter.tar.gz"
            pull(store, end.files.job_id, adapter)
            pack(adapter, archive)
            rows.upload(archive, f"adapters/{end.client_id}.tar.gz")
    values = final_values(end.files, end.outcome, end.client_id, end.sentence, end.usd, now)
    if rows.update(end.client_id, values, closed):
        return
    row = rows.read(end.client_id)
    if row is not None and row.get("status") not in closed:
        raise ProviderError(Problem(f"Supabase table {rows.table}", "the row did not change", "it is tried again"))


def _sentence(due: DueTry, answer: Answer) -> str:
    if answer.done:
        return f"{due.name}: told at try {due.number}"
    if due.number >= MOST_TRIES:
        return f"{due.name}: given up after {due.number} tries: {answer.detail}"
    return f"{due.name}: try {due.number} failed: {answer.detail}"
