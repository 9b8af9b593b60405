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
SHOWN = {
    "epoch",
    "step",
    "training_loss",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "validation_loss",
    "step_seconds",
}
"Fields of a metric that the status repeats; loss and learning rate stand together in every line that has one."


class Journal:
    """What is known of the running attempt, and the files that say it."""

    def __init__(
        self, job: Path, spec: LaunchSpec, attempt: int, keeper: bool, now: Callable[[], float] = time.time
    ) -> None:
        self.job, self.attempt, self.now = job, attempt, now
        self._keeper = keeper
        self.started_at = now()
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
            out.write(_line(metric))
        self._show([metric])

    def rewind(self, step: int) -> None:
        """Drops the lines of metrics.jsonl after `step`, and a line torn by a crash: they will be written again.

        The status then shows what the last kept lines say.
        """
        path = self.job / "metrics.jsonl"
        if not self._keeper or not path.is_file():
            return
        metrics = [_metric(line) for line in path.read_text(encoding="utf-8").splitlines()]
        kept = [metric for metric in metrics if metric and metric.step <= step]
        temporary = path.with_name(".metrics.jsonl.tmp")
        temporary.write_text("".join(_line(metric) for metric in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._show(kept)

    def seconds(self) -> float:
        """Wall time of the training so far, earlier attempts up to their checkpoint included."""
        return float(self._facts.get("earlier_seconds", 0.0)) + self.now() - self.started_at

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
            step=self._facts.get("step", self._status.step),
            total_steps=self._status.total_steps,
            wall_seconds=self.seconds(),
            ended_at=self.now(),
            **{fact: value for fact, value in self._facts.items() if fact not in ("step", "earlier_seconds")},
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

    def _show(self, metrics: list[Metric]) -> None:
        values: dict[str, Any] = {}
        for metric in metrics:
            values |= metric.model_dump(include=SHOWN, exclude_none=True)
        if metrics:
            values["progress"] = min(100, 100 * metrics[-1].step // max(1, self._status.total_steps))
        self._update(**values)

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


def _line(metric: Metric) -> str:
    return metric.model_dump_json(exclude_none=True) + "\n"


def _metric(line: str) -> Metric | None:
    try:
        return Metric.model_validate_json(line)
    except ValueError:
        return None
