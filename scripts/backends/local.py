"""Jobs on this machine: the container as a process of its own that outlives the command which started it.

backend = LocalBackend(os.environ); handle = backend.submit(spec, backend.request(spec)); backend.observe(handle).phase
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes.job import LaunchSpec
from recipes.recipe import BackendName
from scripts.backends.base import Handle, Observation, Owned
from scripts.errors import Problem, ProviderError
from scripts.job_lock import Process, is_alive, lock_owner, process_of, take_lock
from scripts.machine import ROOT
from scripts.store import FileStore, open_store

START_SECONDS = 30.0
_PASSED_ON = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "TZ",
    "LD_LIBRARY_PATH",
    "VIRTUAL_ENV",
    "HF_HOME",
    "SSL_CERT_FILE",
)
_PASSED_ON_PREFIXES = ("CUDA_", "NVIDIA_", "NCCL_", "LORRY_")
_LAUNCHING = ".launch.lock"
_MODULE = "scripts.container"


class LocalBackend:
    """One process per job, found again by its number and start time; the kernel's file lock keeps it the only one.

    environment: of the caller; the container gets a few names of it, and AWS_* where the store is a bucket.
    module: what to run as the container.
    """

    name: BackendName = "local"

    def __init__(self, environment: Mapping[str, str], module: str = _MODULE) -> None:
        self._environment, self._module = environment, module

    def request(self, spec: LaunchSpec) -> dict[str, Any]:
        """The command of the container; `python` stands for the interpreter of the caller."""
        command = ["python", "-m", self._module, "--store", spec.store, "--job", spec.job_id]
        if not spec.store.startswith("file:///"):
            command += ["--work", f"~/.cache/lorry/jobs/{spec.job_id}"]
        return {"command": command}

    def submit(self, spec: LaunchSpec, request: Mapping[str, Any]) -> dict[str, Any]:
        """Starts the container, or finds the one that runs; returns its process number and start time."""
        folder = self._work(spec)
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        with take_lock(folder, _LAUNCHING, wait=True):
            owner = lock_owner(folder) or self._start(spec, request, folder)
        return {**vars(owner), "folder": str(folder)}

    def observe(self, handle: Handle) -> Observation:
        """Whether that very process still runs."""
        process = _process(handle)
        alive = process is not None and is_alive(process)
        return Observation("running" if alive else "gone", f"process {handle.get('pid')}", 0.0)

    def logs(self, handle: Handle) -> Iterator[str]:
        """What the container printed."""
        try:
            with (Path(str(handle.get("folder"))) / "logs" / "container.out").open(errors="replace") as file:
                yield from (line.rstrip("\n") for line in file)
        except OSError:
            return

    def stop(self, handle: Handle) -> None:
        """SIGTERM: the container lets the trainer save, writes how it ended, and ends."""
        process = _process(handle)
        if process is not None and is_alive(process):
            try:
                os.kill(process.pid, signal.SIGTERM)
            except ProcessLookupError:
                return
            except PermissionError:
                raise ProviderError(
                    Problem("local", f"process {process.pid} belongs to another user", "stop the job as that user")
                ) from None

    def owned(self) -> list[Owned]:
        """The containers that run on this machine, by their command lines."""
        found = []
        for entry in Path("/proc").iterdir():
            job_id = self._job_of(entry) if entry.name.isdigit() else None
            process = process_of(int(entry.name)) if job_id else None
            if job_id and process:
                found.append(Owned(job_id, vars(process), "running", usd_per_hour=0.0))
        return found

    def _start(self, spec: LaunchSpec, request: Mapping[str, Any], folder: Path) -> Process:
        command = [str(word) for word in request["command"]]
        command = [sys.executable, *(str(folder) if word.startswith("~/") else word for word in command[1:])]
        with (folder / "logs" / "container.out").open("ab") as output:
            child = subprocess.Popen(
                command,
                env=self._container_environment(spec),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        give_up = time.monotonic() + START_SECONDS
        while time.monotonic() < give_up:
            owner = lock_owner(folder)
            if owner is not None:
                return owner
            if child.poll() is not None:  # it ended as soon as it had begun: the job folder says how
                return Process(child.pid, 0)
            time.sleep(0.02)
        raise ProviderError(
            Problem(
                "local", f"the container did not start within {START_SECONDS:g} s", f"see {folder}/logs/container.out"
            )
        )

    def _container_environment(self, spec: LaunchSpec) -> dict[str, str]:
        aws = ("AWS_",) if spec.store.startswith("s3://") else ()
        prefixes = (*_PASSED_ON_PREFIXES, *aws)
        seen = {k: v for k, v in self._environment.items() if k in _PASSED_ON or k.startswith(prefixes)}
        path = [str(ROOT), *filter(None, self._environment.get("PYTHONPATH", "").split(":"))]
        return {**seen, "PYTHONPATH": ":".join(path), "PYTHONUNBUFFERED": "1"}

    def _work(self, spec: LaunchSpec) -> Path:
        store = open_store(spec.store)
        if isinstance(store, FileStore):
            return store.root / spec.job_id
        return Path(self._environment.get("HOME", "/nonexistent")) / ".cache" / "lorry" / "work" / spec.job_id

    def _job_of(self, process: Path) -> str | None:
        try:
            words = (process / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        except OSError:
            return None
        if self._module not in words or "--job" not in words[:-1]:
            return None
        return words[words.index("--job") + 1]


def _process(handle: Handle) -> Process | None:
    """The process a handle names; None for a handle that was never completed."""
    pid, started = handle.get("pid"), handle.get("started")
    return Process(pid, started) if isinstance(pid, int) and isinstance(started, int) else None
