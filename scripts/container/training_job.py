"""How a container is a SageMaker training job: channels in, checkpoints mirrored, metrics printed, failures explained.

job = training_job(os.environ); code = run_in_training_job(job, work, run) if job else run()

The platform says everything through files below /opt/ml: channels in input/data, hosts in input/config, checkpoints to
and from S3 in checkpoints, and the reason of a failure in output/failure, of which it keeps 1,024 characters. It ends a
container with SIGTERM and kills it two minutes later; what the container does then is what it does on any machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from recipes.job import ContainerState, read_record
from scripts.container.work_folder import CHECKPOINTS
from scripts.errors import InputError, LorryError, Problem

BASE = "/opt/ml"
BASE_VARIABLE = "SAGEMAKER_BASE_DIR"
"Where the platform's files are, if not in BASE; AWS's own training toolkit reads the same variable."
FAILURE_CHARACTERS = 1024
ECHO_SECONDS = 1.0


@dataclass(frozen=True)
class TrainingJob:
    """The files of the platform. base: /opt/ml on SageMaker."""

    name: str
    base: Path

    def prepare(self, work: Path) -> None:
        """Brings recipe and training set from their channels, and lets checkpoints be written where they are mirrored.

        Raises OSError.
        """
        data = self.base / "input" / "data"
        work.mkdir(parents=True, exist_ok=True)
        if (data / "recipe" / "launch.json").is_file():
            shutil.copyfile(data / "recipe" / "launch.json", work / "launch.json")
        if (data / "training").is_dir():
            shutil.copytree(data / "training", work / "data", dirs_exist_ok=True)
        mirrored = self.base / "checkpoints"
        mirrored.mkdir(parents=True, exist_ok=True)
        for folder in mirrored.glob("step-*"):
            if not _is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
        if not (work / CHECKPOINTS).exists():
            (work / CHECKPOINTS).symlink_to(mirrored)

    def fail(self, reason: str) -> None:
        """Says why it failed, where the platform looks for it. A disk that is full must not keep it from ending."""
        try:
            (self.base / "output").mkdir(parents=True, exist_ok=True)
            (self.base / "output" / "failure").write_text(reason[:FAILURE_CHARACTERS], encoding="utf-8")
        except OSError as error:
            print(f"the reason could not be written: {error}", file=sys.stderr)

    def node_variables(self) -> dict[str, str]:
        """What nodes.py reads, from the platform's file: which of the hosts this is. Empty for one alone."""
        path = self.base / "input" / "config" / "resourceconfig.json"
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            hosts, mine = sorted(told["hosts"], key=_host_number), told["current_host"]
            rank, interface = hosts.index(mine), str(told["network_interface_name"])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                Problem(str(path), repr(error), "hosts, current_host and network_interface_name")
            ) from None
        if len(hosts) == 1:
            return {}
        names = {"NODES": str(len(hosts)), "NODE_RANK": str(rank), "MASTER_ADDR": hosts[0]}
        return names | dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), interface)


def training_job(environment: Mapping[str, str]) -> TrainingJob | None:
    """The training job of this container; None where it is in none."""
    name = environment.get("TRAINING_JOB_NAME")
    return TrainingJob(name, Path(environment.get(BASE_VARIABLE) or BASE)) if name else None


def run_in_training_job(job: TrainingJob, work: Path, run: Callable[[], int]) -> int:
    """Runs the container; its exit code is the outcome: 0 is Completed, anything else Failed with the reason."""
    echo = _Echo(work / "metrics.jsonl", sys.stdout)
    try:
        os.environ.update(job.node_variables())  # said in a file here, and in the environment everywhere else
        job.prepare(work)
        echo.start()
        code, reason = run(), ""
    except LorryError as error:
        print(error, file=sys.stderr)
        code, reason = error.exit_code, str(error)
    except Exception as error:  # whatever it is, the service shows the reason to who looks
        traceback.print_exc()
        code, reason = 1, f"{type(error).__name__}: {error}"
    finally:
        echo.finish()
    if code:
        job.fail(reason or _reason(work, code))
    return code


def _host_number(host: str) -> int:
    """The number in `algo-12`, since as text algo-10 would come before algo-2."""
    return int(host.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint that was mirrored has all that its mark names: the platform copies files in any order."""
    try:
        sums = json.loads((checkpoint / "COMPLETE").read_text(encoding="utf-8"))
        for name, sha256 in sums.items():
            with (checkpoint / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return False
    except (OSError, ValueError, AttributeError):
        return False
    return True


def _reason(work: Path, code: int) -> str:
    """How the container says it ended."""
    try:
        state = read_record(ContainerState, work / "container.json")
    except LorryError:
        state = None
    if state is None or state.ended is None:
        return f"the machine was told to end before the job was over (exit code {code})"
    return f"{state.cause}: {state.sentence}"


class _Echo:
    """Prints each new line of metrics.jsonl, from which CloudWatch takes the metrics that the request defines."""

    def __init__(self, path: Path, out: TextIO) -> None:
        self._path, self._out, self._bytes = path, out, 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._bytes = self._path.stat().st_size if self._path.is_file() else 0
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _follow(self) -> None:
        while not self._over.wait(ECHO_SECONDS):
            self._print_new()
        self._print_new()

    def _print_new(self) -> None:
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, 2)
                self._bytes = min(self._bytes, size)  # after a crash the lines past the checkpoint are written again
                file.seek(self._bytes)
                text, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return
        if newline:
            self._bytes += len(text) + 1
            self._out.write(text.decode("utf-8", "replace") + "\n")
            self._out.flush()
