"""Plays torchrun and its worker: honours the file contract of `trainer.train` without torch, and fails as told.

replay.json in the job folder: {"steps": 12, "step_seconds": 0.02, "checkpoint_steps": 3, "faults": {"1": ["crash", 5]}}
The worker has a session of its own and, as the harshest case, does not die with its parent.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

CODES = {"out_of_memory": 20, "disk_full": 23, "lost_rank": 24, "cancelled": 27}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--worker", action="store_true")
    given = parser.parse_args()
    return Worker(given.job, given.attempt).run() if given.worker else torchrun()


def torchrun() -> int:
    """Starts the worker in its own session, hands SIGTERM on, reports its exit code as torchrun does, exits with 1."""
    worker = subprocess.Popen([sys.executable, *sys.argv, "--worker"], start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: worker.send_signal(signal.SIGTERM))
    code = worker.wait()
    if code:
        print(f"Root Cause (first observed failure):\n  exitcode  : {code} (pid: {worker.pid})", flush=True)
    return 1 if code else 0


class Worker:
    def __init__(self, job: Path, attempt: int) -> None:
        self.job, self.attempt = job, attempt
        self.script = json.loads((job / "replay.json").read_text())
        self.fault, self.fault_step = self.script.get("faults", {}).get(str(attempt), ["none", 0])
        self.job_id = json.loads((job / "launch.json").read_text())["job_id"]
        self.step, self.stage = 0, "loading"
        self.stopped = False

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self.on_term)
        self.be_alone()
        (self.job / "environment.txt").write_text("\n".join(sorted(os.environ)))
        for name in ("result.json", "proof.json"):
            if not self.script.get("keep_old_result"):
                (self.job / name).unlink(missing_ok=True)
        threading.Thread(target=self.beat, daemon=True).start()
        self.status()
        self.step = max((int(p.parent.name[5:]) for p in self.job.glob("checkpoints/*/COMPLETE")), default=0)
        self.fail_here()
        self.stage = "training"
        while self.step < self.script["steps"]:
            if self.stopped:
                self.checkpoint()
                return self.result("cancelled", "cancelled", "stopped on request")
            time.sleep(self.script["step_seconds"])
            self.step += 1
            self.status()
            if self.step % self.script["checkpoint_steps"] == 0:
                self.checkpoint()
            if (code := self.fail_here()) is not None:
                return code
        self.stage = "saving"
        self.status()
        files = self.adapter()
        return self.result("completed", None, "", files)

    def be_alone(self) -> None:
        """Two trainers of one job at once are what must never happen: the second one leaves a note."""
        self.lock = (self.job / ".trainer.lock").open("a")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with (self.job / "violations").open("a") as file:
                file.write(f"attempt {self.attempt} met another trainer\n")
            os._exit(99)

    def on_term(self, *_: object) -> None:
        self.stopped = self.fault != "deaf"

    def fail_here(self) -> int | None:
        if self.step != self.fault_step and not (self.fault_step == 0 and self.stage == "loading"):
            return None
        match self.fault:
            case "crash":
                print("a line of the log before the end", flush=True)
                os._exit(1)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang" | "deaf":
                while self.fault == "deaf" or not self.stopped:
                    time.sleep(0.02)
            case "out_of_memory" | "lost_rank":
                return self.result("failed", self.fault, f"{self.fault} at step {self.step}")
            case "disk_full":
                os._exit(CODES["disk_full"])
            case "torn_result":
                (self.job / "result.json").write_text('{"job_id": "')
                os._exit(1)
            case "no_room":  # as on a full disk: the container can no longer replace its own file
                keeper = json.loads((self.job / ".container.lock").read_text())["pid"]
                (self.job / f".container.json.{keeper}.tmp").mkdir(exist_ok=True)
                os._exit(CODES["disk_full"])
        return None

    def beat(self) -> None:
        while True:
            time.sleep(0.1)
            self.status()

    def status(self) -> None:
        steps = self.script["steps"]
        values = {
            "job_id": self.job_id, "stage": self.stage, "attempt": self.attempt, "updated_at": time.time(),
            "step": self.step, "total_steps": steps, "progress": 100 * self.step // steps,
        }  # fmt: skip
        if self.step:
            values |= {"training_loss": 6.0 - self.step / steps, "learning_rate": 0.001}
        write(self.job / "status.json", values)

    def checkpoint(self) -> None:
        folder = self.job / "checkpoints" / f"step-{self.step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lora.safetensors").write_bytes(tensors(self.step))
        write(folder / "state.json", {"step": self.step})
        (folder / "COMPLETE").touch()

    def adapter(self) -> dict[str, str]:
        folder = self.job / "adapter"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        (folder / "adapter_model.safetensors").write_bytes(tensors(self.step))
        (self.job / "probe.safetensors").write_bytes(tensors(1))
        return {
            p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != "manifest.json"
        }

    def result(self, outcome: str, cause: str | None, sentence: str, files: dict[str, str] | None = None) -> int:
        code = CODES[cause] if cause else 0
        values = {
            "job_id": self.job_id, "outcome": outcome, "cause": cause, "sentence": sentence, "exit_code": code,
            "attempt": self.attempt, "step": self.step, "total_steps": self.script["steps"],
            "adapter_sha256": files or {}, "base_sha256": "0" * 64, "trainable_parameters": 4,
        }  # fmt: skip
        write(self.job / "result.json", values)
        return code


def write(path: Path, value: object) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def tensors(value: int) -> bytes:
    """A safetensors file with one tensor of four floats."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack("<4f", *[float(value)] * 4)


if __name__ == "__main__":
    sys.exit(main())
