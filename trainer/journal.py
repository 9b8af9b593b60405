"""The trainer's diary in the job folder: status.json (heartbeat), metrics.jsonl (one line per step), result.json.

Only rank 0 keeps the first two. Any rank may write result.json; the first one stays, so a failure is reported by the
rank that saw it. No torch in here: the heartbeat starts before the heavy imports.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.causes import EXIT_CODES, Cause
from recipes.job import LaunchSpec, Metric, Result, Stage, Status, write_record

HEARTBEAT_SECONDS = 2.0


class Journal:
    """What is known of the running attempt, and the files that say it."""

    def __init__(
        self, job: Path, spec: LaunchSpec, attempt: int, keeper: bool, now: Callable[[], float] = time.time
    ) -> None:
        self.job, self.attempt, self.now = job, attempt, now
        self._keeper = keeper
        self._started = now()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._trouble: OSError | None = None
        self._status = Status(
            job_id=spec.job_id, stage="loading", attempt=attempt, updated_at=now(), total_steps=spec.total_steps
        )
        self._facts: dict[str, Any] = {"base_revision": spec.recipe.base.revision}

    def open(self) -> None:
        """Removes what an earlier attempt concluded and starts the heartbeat. Nothing elsewhere than on rank 0."""
        if not self._keeper:
            return
        for name in ("result.json", "proof.json"):
            (self.job / name).unlink(missing_ok=True)
        self._write_status()
        threading.Thread(target=self._beat, daemon=True).start()

    def say(self, text: str) -> None:
        """One line for the log, from rank 0."""
        if self._keeper:
            print(text, flush=True)

    def stage(self, stage: Stage) -> None:
        """Enters a stage, visible at once."""
        self._update(stage=stage)

    def learn(self, **facts: Any) -> None:
        """Fields of the Result as they become known; a failure reports what was known by then."""
        self._facts |= facts

    def known(self, fact: str) -> Any:
        """A fact learned earlier, or None."""
        return self._facts.get(fact)

    def record(self, metric: Metric) -> None:
        """Appends one line to metrics.jsonl and brings the status up to date. Raises OSError (the disk is full)."""
        if not self._keeper:
            return
        with (self.job / "metrics.jsonl").open("a", encoding="utf-8") as out:
            out.write(metric.model_dump_json(exclude_none=True) + "\n")
        values = metric.model_dump(include={"epoch", "step", "gradient_norm", "tokens_per_second", "validation_loss"})
        values = {key: value for key, value in values.items() if value is not None}
        if metric.training_loss is not None and metric.learning_rate is not None:
            values |= {"training_loss": metric.training_loss, "learning_rate": metric.learning_rate}
        total = max(1, self._status.total_steps)
        self._update(**values, progress=min(100, 100 * metric.step // total))

    def rewind(self, step: int) -> None:
        """Drops the lines of metrics.jsonl after `step`, and a line torn by a crash: they will be written again."""
        path = self.job / "metrics.jsonl"
        if not self._keeper or not path.is_file():
            return
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        temporary = path.with_name(".metrics.jsonl.tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)

    def close(self, cause: Cause | None, sentence: str) -> int:
        """Stops the heartbeat and writes result.json. Returns the exit code of the process.

        A failure is written by the first rank that saw it; what all ranks agree on is written by rank 0.
        """
        code = EXIT_CODES[cause] if cause else 0
        self._stopped.set()
        outcome = "completed" if cause is None else "cancelled" if cause == "cancelled" else "failed"
        if cause in (None, "cancelled") and not self._keeper:
            return code
        if cause is None:
            self._update(stage="done", progress=100)
        result = Result(
            job_id=self._status.job_id,
            outcome=outcome,
            cause=cause,
            sentence=sentence,
            exit_code=code,
            attempt=self.attempt,
            step=self._facts.pop("step", self._status.step),
            total_steps=self._status.total_steps,
            wall_seconds=self._facts.pop("earlier_seconds", 0.0) + self.now() - self._started,
            ended_at=self.now(),
            **self._facts,
        )
        self._write_once(result)
        return code

    def _write_once(self, result: Result) -> None:
        path = self.job / "result.json"
        mine = path.with_name(f".result.{os.getpid()}.json")
        write_record(mine, result)
        try:
            os.link(mine, path)  # fails when another rank was first
        except FileExistsError:
            pass
        finally:
            mine.unlink()

    def _update(self, **values: Any) -> None:
        if self._trouble:
            raise self._trouble
        with self._lock:
            self._status = self._status.model_copy(update=values)
        if self._keeper:
            self._write_status()

    def _write_status(self) -> None:
        with self._lock:
            write_record(self.job / "status.json", self._status.model_copy(update={"updated_at": self.now()}))

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            try:
                self._write_status()
            except OSError as error:
                self._trouble = error


def _step_of(line: str) -> float:
    try:
        return Metric.model_validate_json(line).step
    except ValueError:
        return float("inf")
