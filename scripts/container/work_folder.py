"""The folder a machine works in: the job folder itself on a disk, or a copy of one in a bucket that is kept in step.

folder = open_work_folder(store, "job-1", Path("/tmp/job-1"), contact_seconds=5.0)
folder.fetch(); folder.start(); folder.stop(); folder.deliver()
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from recipes.job import Stop
from scripts.adapter import MANIFEST
from scripts.errors import LorryError
from scripts.job_folder import Stamp, download_folder, upload_folder
from scripts.push import push
from scripts.store import FileStore, Store
from scripts.store.base import READ_BYTES

RECORDS = ("status.json", "metrics.jsonl", "result.json", "proof.json", "scores.json", "probe.safetensors")
"What the trainer knows of the job so far; others watch it while the job runs."
CHECKPOINTS = "checkpoints"
_CHECKPOINT = re.compile(r"^step-(\d{1,12})$")


class WorkFolder(Protocol):
    """What the container needs of the place where the job's files live."""

    path: Path

    def fetch(self, records: bool) -> None:
        """Brings what the job has so far to `path`, with `records` also what another machine wrote last.

        Raises ProviderError, NotFound, VerificationFailed.
        """

    def start(self) -> None:
        """From here on, `path` is carried home every few seconds."""

    def stop(self, fresh: bool = False) -> Stop | None:
        """stop.json as last seen; `fresh` asks the store now."""

    def deliver(self) -> None:
        """Carries everything home and returns when it is there. Raises ProviderError, VerificationFailed."""


def open_work_folder(store: Store, job_id: str, path: Path, contact_seconds: float) -> WorkFolder:
    """The job folder itself where the store is a disk and `path` is that folder; else a copy kept in step."""
    if isinstance(store, FileStore) and path == store.root / job_id:
        return HomeFolder(store, job_id)
    return RemoteFolder(store, job_id, path, contact_seconds)


def newest_checkpoint(path: Path) -> str | None:
    """The name of the newest complete checkpoint of a job folder, `step-000040`; None when there is none."""
    found = [c.parent for c in (path / CHECKPOINTS).glob("step-*/COMPLETE")]
    return max((c.name for c in found if _CHECKPOINT.match(c.name)), key=step_of_checkpoint, default=None)


def step_of_checkpoint(name: str) -> int:
    """The number in `step-000040`."""
    match = _CHECKPOINT.match(name)
    return int(match.group(1)) if match else 0


class HomeFolder:
    """The job folder on this disk: nothing to carry."""

    def __init__(self, store: FileStore, job_id: str) -> None:
        self.path = store.root / job_id
        self._store, self._job_id = store, job_id

    def fetch(self, records: bool) -> None:
        return

    def start(self) -> None:
        return

    def stop(self, fresh: bool = False) -> Stop | None:
        return _read_stop(self._store, self._job_id) if fresh or (self.path / "stop.json").exists() else None

    def deliver(self) -> None:
        return


class RemoteFolder:
    """A copy of a job folder in a bucket. Two threads keep it in step, so that a large checkpoint on its way delays
    neither the heartbeat nor a stop. A checkpoint travels once it is complete; older ones are not fetched back."""

    def __init__(self, store: Store, job_id: str, path: Path, contact_seconds: float) -> None:
        self.path = path
        self._store, self._job_id, self._seconds = store, job_id, contact_seconds
        self._stop: Stop | None = None
        self._sent: dict[str, bytes] = {}
        self._stamps: dict[str, dict[str, Stamp]] = {}
        self._sending = threading.Lock()

    def fetch(self, records: bool) -> None:
        keys = [key.removeprefix(f"{self._job_id}/") for key in self._store.keys(self._job_id)]
        for name in ("launch.json", *(RECORDS if records else ())):
            if name in keys:
                self._store.get_file(f"{self._job_id}/{name}", self.path / name)
        if records:
            self._fetch_logs([key for key in keys if key.startswith("logs/")])
        complete = [key.split("/")[1] for key in keys if re.fullmatch(rf"{CHECKPOINTS}/step-\d+/COMPLETE", key)]
        newest = max(complete, key=step_of_checkpoint, default=None)
        for part in ("data", "adapter", *([f"{CHECKPOINTS}/{newest}"] if newest else [])):
            download_folder(self._store, f"{self._job_id}/{part}", self.path / part)

    def start(self) -> None:
        for action in (self._contact, self._carry_checkpoints):
            threading.Thread(target=_repeat, args=(action, self._seconds), daemon=True).start()

    def stop(self, fresh: bool = False) -> Stop | None:
        if fresh and self._stop is None:
            self._stop = _read_stop(self._store, self._job_id)
        return self._stop

    def deliver(self) -> None:
        self._carry_checkpoints()
        adapter = self.path / "adapter"
        if (adapter / MANIFEST).is_file():
            push(adapter, self._store, self._job_id)  # never over another adapter of this job
        for part in ("logs", "data", *(() if (adapter / MANIFEST).is_file() else ("adapter",))):
            if (self.path / part).is_dir():
                stamps = self._stamps.setdefault(part, {})
                upload_folder(self._store, self.path / part, f"{self._job_id}/{part}", stamps)
        self._send_live()

    def _contact(self) -> None:
        self._stop = self._stop or _read_stop(self._store, self._job_id)
        self._send_live()

    def _send_live(self) -> None:
        with self._sending:
            logs = sorted(p.relative_to(self.path).as_posix() for p in (self.path / "logs").glob("*.log"))
            for name in (*RECORDS, *logs, "container.json"):
                path = self.path / name
                data = path.read_bytes() if path.is_file() and path.stat().st_size <= READ_BYTES else None
                if data is not None and self._sent.get(name) != data:
                    self._store.write(f"{self._job_id}/{name}", data)
                    self._sent[name] = data

    def _carry_checkpoints(self) -> None:
        newest = newest_checkpoint(self.path)
        if newest:
            part = f"{CHECKPOINTS}/{newest}"
            upload_folder(self._store, self.path / part, f"{self._job_id}/{part}", self._stamps.setdefault(newest, {}))

    def _fetch_logs(self, names: list[str]) -> None:
        """What earlier machines logged; the lines that this one has written already go below theirs."""
        for name in names:
            path = self.path / name
            own = path.read_bytes() if path.is_file() else b""
            earlier = self._store.read(f"{self._job_id}/{name}") or b""
            if not own.startswith(earlier):
                path.write_bytes(earlier + own)


def _read_stop(store: Store, job_id: str) -> Stop | None:
    data = store.read(f"{job_id}/stop.json")
    if data is None:
        return None
    try:
        return Stop.model_validate_json(data)
    except ValueError:  # somebody meant to stop it
        return Stop(by="operator", reason="stop.json is there but damaged", at=0.0)


def _repeat(action: Callable[[], None], seconds: float) -> None:
    """Runs `action` for ever. What fails now is tried again at the next turn; until then the files stay here."""
    pause = threading.Event()
    while not pause.wait(seconds):
        try:
            action()
        except (LorryError, OSError):
            continue
