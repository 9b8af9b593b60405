"""Follows a job until it ends: a line per stage, a bar for the steps, a stop when it is past its limits, and another
machine when its own was taken back.

state = watch(store, "job-1", backend, sys.stderr)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

from scripts.backends.base import Backend, Handle, KeepsLogs, Observation
from scripts.errors import NotFound, Problem, ProviderError
from scripts.job_folder import JobFiles, read_job
from scripts.launch import launch_again
from scripts.state import DOING, JobState, job_state, overdue, was_taken
from scripts.stop import stop_job
from scripts.store import Store

STEP_PERCENT = 10
"Without a terminal, a line for every so many percent of the steps."
AGAIN_SECONDS = 60.0
"Between two requests for another machine."
LOG_SECONDS = 20.0
"Between two looks at what the machine prints, which a provider such as CloudWatch counts."


def watch(
    store: Store,
    job_id: str,
    backend: Backend,
    out: TextIO,
    *,
    poll_seconds: float = 1.0,
    logs: bool = False,
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> JobState:
    """Returns the final state. Stops the job when it is past its deadline or its cap.

    A machine that the provider took back is followed by another, as the tick would do. A store or provider that does
    not answer is asked again. logs: says what the machine prints too. Raises NotFound for an unknown job, Refused when
    no other machine may be asked for.
    """
    files, teller = read_job(store, job_id), _Teller(out)
    printed = _Printed(backend, teller, now) if logs and isinstance(backend, KeepsLogs) else None
    if files.launch is None:
        raise NotFound(Problem(f"job {job_id}", "no such job", "see what there is with `lorry jobs`"))
    try:
        while True:
            pause = poll_seconds
            try:
                looked_at = _handle(files)
                observation = backend.observe(looked_at) if looked_at else None
                files = read_job(store, job_id)
                if _handle(files) != looked_at:  # the job has another machine: what was seen is of the one before
                    continue
                state = job_state(files, observation, now())
                if printed:
                    printed.tell(files, at_once=state.is_final)
                if _may_go_on_elsewhere(files, state, observation, now()):
                    pause = max(poll_seconds, AGAIN_SECONDS)
                    teller.line("its machine was taken back; asking for another, to go on from the newest checkpoint")
                    launch_again(store, files, backend, "lorry (watch)", now())
                else:
                    teller.tell(files, state)
                    if state.is_final:
                        return state
                    _stop_when_overdue(store, backend, files, observation, now())
            except ProviderError as error:
                teller.line(f"no answer, asking again: {error}")
            sleep(pause)
    finally:
        teller.close()


def _handle(files: JobFiles) -> Handle | None:
    return files.submission.handle if files.submission else None


def _may_go_on_elsewhere(files: JobFiles, state: JobState, observation: Observation | None, now: float) -> bool:
    return was_taken(files, state, observation) and overdue(files, observation, now) is None


def _stop_when_overdue(
    store: Store, backend: Backend, files: JobFiles, observation: Observation | None, now: float
) -> None:
    due = overdue(files, observation, now)
    if due:
        by, reason = due
        stop_job(store, files.job_id, backend, by, reason, now)


class _Printed:
    """What the machines of the job print, each line once: lines carry time and host where a provider says them."""

    def __init__(self, backend: KeepsLogs, teller: _Teller, now: Callable[[], float]) -> None:
        self._backend, self._teller, self._now = backend, teller, now
        self._looked_at = float("-inf")
        self._said: set[str] = set()

    def tell(self, files: JobFiles, *, at_once: bool) -> None:
        """What is new, every LOG_SECONDS. A log that cannot be read now is read at the next look."""
        handle = _handle(files)
        if not handle or (not at_once and self._now() - self._looked_at < LOG_SECONDS):
            return
        self._looked_at = self._now()
        try:
            for line in self._backend.logs(handle):
                if line not in self._said:
                    self._said.add(line)
                    self._teller.log(line)
        except ProviderError as error:
            self._teller.line(f"no log now: {error}")


class _Teller:
    """Says what is new: each sentence of a stage once, the steps as a bar or as a line every STEP_PERCENT."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._is_terminal = out, out.isatty()
        self._said = ""
        self._percent = 0
        self._bar: tqdm | None = None

    def tell(self, files: JobFiles, state: JobState) -> None:
        stage = files.container.stage if files.container else None
        if state.state != "running" or stage is None:
            self.line(f"{state.state}: {state.sentence}")
        elif stage != "training" or files.status is None:
            self.line(DOING[stage])
        elif self._is_terminal:
            self._show_bar(files)
        elif files.status.progress >= self._percent + STEP_PERCENT or self._said != DOING[stage]:
            self._percent = files.status.progress // STEP_PERCENT * STEP_PERCENT
            self._said = DOING[stage]
            self._out.write(state.sentence + _left(state) + "\n")
            self._out.flush()

    def line(self, text: str) -> None:
        if text == self._said:
            return
        self.close()
        self._said = text
        self._out.write(text + "\n")
        self._out.flush()

    def log(self, text: str) -> None:
        """A line of the machine, which changes nothing of what was said of the job."""
        self.close()
        self._out.write(f"  | {text}\n")
        self._out.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show_bar(self, files: JobFiles) -> None:
        status = files.status
        assert status is not None
        if self._bar is None:
            self._bar = tqdm(
                total=status.total_steps, desc="training", unit="step", file=self._out, initial=status.step
            )
        self._bar.n = status.step
        if status.training_loss is not None:
            self._bar.set_postfix(loss=f"{status.training_loss:.3f}", refresh=False)
        self._bar.refresh()
        self._said = "training"


def _left(state: JobState) -> str:
    if state.eta_seconds is None:
        return ""
    minutes = state.eta_seconds / 60
    return f", about {minutes:.0f} min left" if minutes >= 1 else ", less than a minute left"
